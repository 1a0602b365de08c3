"""The command `router-ml advise`: which of a log's traffic could go elsewhere, and what keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.cost_cli import toml_tables
from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, LogPath, PathArg, working
from router_ml.tune_cli import CONFIDENCE, JSON, PLOT, write_json, write_plot
from router_ml.writing import write_aside

if TYPE_CHECKING:
    from router_ml.catalog import Catalog


@click.command()
@click.argument("log", type=LogPath())
@click.option("--catalog", type=ExistingFile, help="Model cards, JSON; a log directory has its own.")
@click.option("--min-quality", type=float, help="Needed mean quality; by default today's of each segment, less:")
@click.option("--margin", default=0.02, show_default=True, help="How much less quality than today is good enough.")
@click.option("--deployment", type=ExistingFile, help="TOML with a table [deployment]: GPUs to host a model on.")
@click.option("--host", metavar="MODEL", help="The catalogue's model that the deployment serves.")
@click.option(
    "--data-class",
    "data_classes",
    multiple=True,
    metavar="OF:CLASS",
    help="Data class of requests, e.g. tenant=bank:confidential or task=hr:internal; *:CLASS is of all. Repeatable.",
)
@click.option(
    "--region", "regions", multiple=True, metavar="OF:REGION", help="Likewise the region they have to stay in."
)
@click.option("--scale", default=1.0, show_default=True, help="The log's traffic times this: a sample stands for more.")
@click.option("--peak-to-mean", type=float, help="How much an hour's busiest minutes are above its mean; see selfhost.")
@click.option("--feedback-ratio", default=1.0, show_default=True, help="How often bad answers get feedback, by good.")
@click.option("--rows", default=200_000, show_default=True, help="How many of the newest rows are looked at.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same result.")
@CONFIDENCE
@JSON
@click.option("--csv", "csv_path", type=PathArg, help="Write a row a segment as CSV.")
@PLOT
def advise(
    log: Any, catalog: Path | None, min_quality: float | None, margin: float, deployment: Path | None,
    host: str | None, data_classes: tuple[str, ...], regions: tuple[str, ...], scale: float,
    peak_to_mean: float | None, feedback_ratio: float, rows: int, seed: int, confidence: float,
    json_path: Path | None, csv_path: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Find segments of traffic that could go to something cheaper, and say what keeps the others.

    A segment is a case for a rule, a cheaper route, fine-tuning, self-hosting, or an experiment with its price. All
    intervals hold together. What a log's policy could not have chosen gets no number.

    Example: router-ml advise logs --data-class tenant=northbank:internal --json advice.json
    """
    from router_ml.logs import read_log
    from router_ml.selfhost import Deployment
    from training.advise import advise as run

    if not 0.0 < feedback_ratio < float("inf"):
        raise InputError("--feedback-ratio has to be above 0: 2 says that bad answers get feedback twice as often")
    if rows < 1:
        raise InputError("--rows has to be 1 or more")
    hosting = None
    if deployment is not None:
        hosting = Deployment.from_table(toml_tables(deployment, {"deployment", "traffic"}).get("deployment"))
    cards = _cards(log, catalog)
    declared = [_declared("--data-class", data_classes), _declared("--region", regions)]
    frame = read_log(log).sort("time", maintain_order=True)
    if len(frame) > rows:
        click.echo(f"the newest {rows:,} of {len(frame):,} rows", err=True)
    with working("judging segments"):
        found = run(
            frame.tail(rows), cards, min_quality=min_quality, margin=margin, deployment=hosting, hosted=host,
            data_classes=declared[0], regions=declared[1], confidence=confidence, scale=scale,
            peak_to_mean=peak_to_mean, feedback_ratio=feedback_ratio, seed=seed,
        )  # fmt: skip
    for line in found.in_words:
        click.echo(line)
    click.echo(
        f"all {found.intervals} intervals hold together with {confidence:.0%}, those of what was picked as well: its "
        "lower end holds, its middle may be high"
    )
    write_json(json_path, found.to_json())
    if csv_path is not None:
        write_aside(csv_path, found.to_frame().write_csv())
    write_plot(plot, found.plot)


def _cards(log: Any, catalog: Path | None) -> Catalog:
    from router_ml.catalog import Catalog
    from router_ml.logs import read_log_info

    if catalog is not None:
        return Catalog.load(catalog)
    if isinstance(log, Path) and log.is_file():
        raise InputError("a single file has no catalogue in it: give --catalog FILE")
    return Catalog.from_json(read_log_info(log).get("catalog"), f"{log}/log.json")


def _declared(option: str, said: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in said:
        of, colon, value = text.rpartition(":")
        if not (colon and of and value):
            raise InputError(f"{option} {text}: write task=NAME:VALUE, tenant=NAME:VALUE or *:VALUE")
        found[of] = value
    return found
