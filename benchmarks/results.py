"""What benchmarks share in saying what they found: the terminal, means over seeds, the JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console


def summarise(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds with `…_sd` beside each, nested as one run is."""

    def merge(values: list[Any]) -> Any:
        if not isinstance(values[0], dict):
            return values
        return {key: merge([v[key] for v in values]) for key in values[0]}

    def reduce(node: Any) -> Any:
        out: dict[str, Any] = {}
        for key, value in node.items():
            if isinstance(value, dict):
                out[key] = reduce(value)
            else:
                out[key], out[f"{key}_sd"] = float(np.mean(value)), float(np.std(value))
        return out

    return reduce(merge(runs))


def open_console(width: int = 170) -> Console:
    """The terminal; where there is none, a file of `width` columns, which has room for the table."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=width)


def check_source(data: Path, matrix: Path | None, catalog: Path | None) -> None:
    """Raises ClickException unless there is either published data or a matrix with its catalogue."""
    if (matrix is None) != (catalog is None):
        raise click.ClickException("--matrix and --catalog go together")
    if matrix is None and not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR, or --matrix FILE --catalog FILE")


def write_results(console: Console, path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, aside and renamed, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(path)
    console.print(f"written to {path}")
