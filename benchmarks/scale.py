"""Time and memory of importing and of training by the number of rows, each in a process of its own.

    python -m benchmarks.scale --rows 1000000 --json benchmarks/results/scale.json

What they read is made first and is not timed. Imported is an export of LiteLLM's spend log as Parquet: rows that its
proxy wrote (tests/fixtures/litellm), some 8 kB of JSON each, with ids, times and prompts of their own. Trained on are
requests of 200 to 600 characters, nearly all different, with one outcome each of one of eight models, drawn evenly;
`train` goes from Parquet to a bundle with its defaults. Both on a tenth of the rows, then on all. Memory is the largest
sum of what all its processes had resident, looked at fifty times a second: pages that they share count more than once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import psutil
from rich.table import Table

from benchmarks.results import open_console, write_results
from router_ml.catalog import Catalog
from router_ml.log_schema import LOG_SCHEMA
from router_ml.log_writer import LogWriter
from training import world
from training.simulate import START
from training.traffic import FAMILIES, LEVELS, draw_prompts

_CHUNK = 100_000
_SPAN_S = 28 * 86_400
SHORTEST, LONGEST = 200, 600
_CARDS = world.SIMULATED_CATALOG.cards
CATALOG = Catalog(
    (
        *_CARDS,
        replace(_CARDS[2], id="summit-mini", provider="cairn", input_usd_per_mtok=0.3, output_usd_per_mtok=1.2),
        replace(_CARDS[3], id="delta-8b", input_usd_per_mtok=0.1, output_usd_per_mtok=0.1),
    )
)
"""Eight models: the simulated world's six, and two more that are a little weaker than one of them each."""
_OF = np.array([*range(len(_CARDS)), 2, 3])
_STRENGTH = world.STRENGTH[:, _OF] - np.where(np.arange(len(_OF)) < len(_CARDS), 0.0, 0.5)
_SLOPE, _VERBOSITY = world.SLOPE[_OF], world.VERBOSITY[_OF]


@dataclass(frozen=True)
class Used:
    """What a command took: wall clock and processor time in seconds, and its processes' memory in GB at the most."""

    seconds: float
    cpu_s: float
    peak_gb: float


def write_log(rows: int, out: Path, seed: int = 0) -> None:
    """A log of `rows` requests with one outcome each, in time's order; the same under a seed."""
    with LogWriter(out, catalog=CATALOG, logging="uniform", meta={"simulated": True, "seed": seed}) as writer:
        for chunk, first in enumerate(range(0, rows, _CHUNK)):
            n = min(_CHUNK, rows - first)
            writer.write(_rows(first, n, rows, np.random.default_rng([seed, chunk])))


def _rows(first: int, n: int, total: int, rng: np.random.Generator) -> pl.DataFrame:
    family = rng.choice(len(FAMILIES), n, p=world.TENANT_SHARE @ world.MIX)
    level = rng.choice(LEVELS, n, p=world.LEVEL_SHARE)
    prompts, fullness = draw_prompts(family, level, rng)
    while (short := np.flatnonzero((prompts.str.len_chars() < SHORTEST).to_numpy())).size:
        more, _ = draw_prompts(family[short], level[short], rng)
        prompts = prompts.scatter(short, prompts.gather(short) + "\n" + more)
    difficulty = level - world.LEVEL_SHARE @ np.arange(LEVELS) + fullness - 0.5
    model = rng.integers(0, len(CATALOG), n)
    odds = _STRENGTH[family, model] - _SLOPE[model] * difficulty + rng.normal(0.0, world.HIDDEN_SD, n)
    tokens = world.OUTPUT_TOKENS[family] * (1.0 + world.TOKENS_PER_LEVEL * level) * _VERBOSITY[model]
    number = np.arange(first, first + n)
    second = _SPAN_S * (number + rng.random(n)) / total
    prompt = prompts.str.slice(0, LONGEST)
    return pl.DataFrame(
        {
            "request_id": pl.Series(number).cast(pl.String).str.zfill(12),
            "time": pl.Series((second * 1e6).astype(np.int64)).cast(pl.Duration("us")),
            # Half of the requests come two to a session.
            "session": pl.Series(np.where(number // 2 % 2 == 0, number // 2, -1)).cast(pl.String),
            "prompt": prompt,
            "model": pl.Series(CATALOG.ids).gather(model),
            "propensity": np.full(n, 1.0 / len(CATALOG)),
            "input_tokens": (prompt.str.len_chars().cast(pl.Int64) + 3) // 4,
            "output_tokens": np.maximum(tokens * rng.lognormal(-0.08, world.TOKENS_SD, n), 1.0).astype(np.int64),
            "quality": (rng.random(n) < 1.0 / (1.0 + np.exp(-odds))).astype(np.float64),
        }
    ).with_columns(
        time=pl.lit(START, LOG_SCHEMA["time"]) + pl.col("time"),
        session=pl.when(pl.col("session") != "-1").then("session"),
        status=pl.lit("ok"),
    )


_SPEND = Path(__file__).parents[1] / "tests" / "fixtures" / "litellm" / "spend_logs.jsonl"
_HERE = "@prompt@"


def write_spend_log(rows: int, out: Path, seed: int = 0) -> None:
    """An export of `rows` rows of LiteLLM's spend log, all different; the same under a seed."""
    import pyarrow.parquet as pq

    written = [json.loads(line) for line in _SPEND.read_text().splitlines()]
    written = [row for row in written if row["proxy_server_request"].get("messages") and row["model_group"]]
    for row in written:
        row["proxy_server_request"]["messages"][-1]["content"] = _HERE
    text = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in written]
    templates = pl.DataFrame(text, infer_schema_length=None)
    writer = None
    aside = out.with_suffix(".tmp")
    for chunk, first in enumerate(range(0, rows, _CHUNK)):
        rng = np.random.default_rng([seed, chunk])
        n = min(_CHUNK, rows - first)
        own = _rows(first, n, rows, rng)
        frame = templates[rng.integers(0, len(templates), n)].with_columns(
            request_id=pl.concat_str(pl.lit("chatcmpl-"), own["request_id"]),
            litellm_call_id=pl.concat_str(pl.lit("call-"), own["request_id"]),
            session_id=pl.concat_str(pl.lit("trace-"), own["request_id"]),
            startTime=own["time"].dt.replace_time_zone(None).dt.cast_time_unit("ms"),
            endTime=own["time"].dt.replace_time_zone(None).dt.cast_time_unit("ms") + pl.duration(seconds=2),
            proxy_server_request=pl.col("proxy_server_request").str.replace(
                _HERE, own["prompt"].str.replace_all("\n", "\\n", literal=True), literal=True
            ),
        )
        table = frame.to_arrow()
        writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=20_000)
    if writer is not None:
        writer.close()
    aside.replace(out)


def measured(command: list[str], log: Path) -> Used:
    """Runs a command to its end, its output in the file `log`. Raises ClickException when it fails."""
    before, started, peak = os.times(), time.perf_counter(), 0
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(root))
            time.sleep(0.02)  # a small import lasts half a second
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Used(seconds, cpu, peak / 1e9)


def _resident(root: psutil.Process) -> int:
    total = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total


def run(rows: int, folder: Path) -> dict[str, Any]:
    """Imports and trains on `rows` rows; figures by their names in the results."""
    spend, log, bundle = folder / f"spend-{rows}.parquet", folder / f"log-{rows}", folder / f"bundle-{rows}"
    if not spend.is_file():
        write_spend_log(rows, spend)
    if not log.is_dir():
        write_log(rows, log)
    commands = {
        "import": ["import", "litellm", str(spend), "--out", str(folder / f"imported-{rows}")],
        "train": ["train", "--logs", str(log), "--out", str(bundle)],
    }
    found: dict[str, Any] = {"rows": rows}
    for name, command in commands.items():
        used = measured([sys.executable, "-m", "router_ml.cli", *command], folder / f"{name}-{rows}.log")
        found |= {f"{name}_s": used.seconds, f"{name}_cpu_s": used.cpu_s, f"{name}_peak_gb": used.peak_gb}
    return found


@click.command(help=__doc__)
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(1000))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where logs and bundles are kept; by default nowhere.")
@click.option("--growth/--no-growth", default=True, show_default=True, help="Also a tenth of the rows, to compare.")
def main(rows: int, json_path: Path | None, folder: Path | None, growth: bool) -> None:
    console = open_console()
    with tempfile.TemporaryDirectory() as aside:
        place = folder or Path(aside)
        place.mkdir(parents=True, exist_ok=True)
        found = []
        for size in [rows // 10, rows] if growth else [rows]:
            with console.status(f"{size:,} rows"):
                found.append(run(size, place))
    result: dict[str, Any] = {**found[-1], "cores": os.cpu_count(), "load": os.getloadavg()[1]}
    if growth:
        keys = [key for key in found[0] if key != "rows"]
        result["growth"] = {"rows": found[0]["rows"], **{key: found[1][key] / found[0][key] for key in keys}}
    table = Table("rows", *(key for key in found[0] if key != "rows"), title="by the number of rows")
    for one in found:
        table.add_row(f"{one['rows']:,}", *(f"{one[key]:.2f}" for key in one if key != "rows"))
    console.print(table)
    if json_path:
        write_results(console, json_path, result)


if __name__ == "__main__":
    main()
