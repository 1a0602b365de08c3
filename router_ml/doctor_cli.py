"""The command `router-ml doctor`: what a log can and cannot support."""

from __future__ import annotations

from pathlib import Path

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, LogPath, working
from router_ml.tune_cli import JSON, PLOT, STORE, log_rows, write_json, write_plot


@click.command()
@click.argument("log", required=False, type=LogPath())
@STORE
@click.option("--catalog", type=ExistingFile, help="Model cards, JSON; otherwise those that the log carries.")
@JSON
@PLOT
@click.pass_context
def doctor(
    context: click.Context, log: Path | str | None, store: str | None, catalog: Path | None, json_path: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Say what LOG (a directory, file or URL) or a --store can and cannot support, and what to log from now on.

    Trains nothing. Exits with 1 where no choice between models can be learnt from it.

    Example: router-ml doctor logs --json examination.json
    """
    from router_ml.catalog import Catalog
    from router_ml.logs import read_log_info
    from training.doctor import examine
    from training.importers.settle import judgements_of

    if (log is None) == (store is None):
        raise InputError("say what to look at: either LOG or --store FILE")
    cards = Catalog.load(catalog) if catalog else None
    if cards is None and log is not None and (isinstance(log, str) or (log / "log.json").is_file()):
        given = read_log_info(log).get("catalog")
        cards = Catalog.from_json(given, f"{log}/log.json") if given else None
    folder = Path(log) if log is not None and (isinstance(log, Path) or "://" not in log) else None
    rows = log_rows(log, store)
    with working("examining"):
        judgements = judgements_of(folder) if folder is not None and (folder / "log.json").is_file() else None
        found = examine(rows, cards, judgements=judgements)
    click.echo("\n".join(found.in_words))
    write_json(json_path, found.to_json())
    write_plot(plot, found.plot)
    context.exit(0 if found.routable else 1)
