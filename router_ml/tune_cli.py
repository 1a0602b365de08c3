"""The commands `router-ml tune`, `compare` and `explore`: what a log can tell of a change before it is made."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, PathArg

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

LOGS = click.option("--logs", type=click.Path(exists=True, path_type=Path), help="A log directory or file.")
STORE = click.option("--store", help="A service's store instead: SQLite file or SQLAlchemy URL.")
POLICY = click.option("--policy", type=ExistingFile, help="A policy file, TOML.")
JSON = click.option("--json", "json_path", type=PathArg, help="Write everything as JSON.")
PLOT = click.option("--plot", type=PathArg, help="Write a plot, PNG or SVG by its name.")
CONFIDENCE = click.option("--confidence", default=0.95, show_default=True, help="How sure, e.g. 0.95.")
_KINDS = {"min-probability": "min_probability", "willingness-to-pay": "willingness_to_pay_usd"}


@click.command()
@click.option("--bundle", required=True, type=PathArg, help="The bundle directory whose dial is tuned.")
@LOGS
@STORE
@POLICY
@click.option("--min-quality", required=True, type=float, help="The mean quality to promise, e.g. 0.8.")
@CONFIDENCE
@click.option("--dial", multiple=True, type=click.Choice(list(_KINDS)), help="Tune this dial only; may be repeated.")
@click.option("--since", type=click.DateTime(), help="Only rows after this time, UTC.")
@click.option(
    "--method", default="auto", show_default=True,
    type=click.Choice(["auto", "betting", "binomial", "hoeffding-bentkus"]),
    help="The test; auto is the exact binomial one where rows weigh the same, else betting.",
)  # fmt: skip
@JSON
@PLOT
def tune(
    bundle: Path, logs: Path | None, store: str | None, policy: Path | None, min_quality: float, confidence: float,
    dial: tuple[str, ...], since: datetime | None, method: Any, json_path: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Find the cheapest dial whose mean quality is at least --min-quality, with --confidence.

    Judged on rows that the bundle has not learnt from, as far as the log drew their models at random (or sent requests
    to all). Exits with 1 where no setting is shown to be good enough.

    Example: router-ml tune --bundle bundle --logs logs --min-quality 0.8
    """
    from features.load import load_router
    from router_ml.bundle import read_bundle
    from router_ml.policy import Policy
    from training.judged import judged_of_decisions
    from training.tune import tune as run
    from training.tune import tune_judged

    router = load_router(bundle, Policy.load(policy) if policy else None)
    options: dict[str, Any] = {
        "min_quality": min_quality,
        "confidence": confidence,
        "dials": [_KINDS[name] for name in dial or _KINDS],
        "method": method,
    }
    frame = _log(logs, store, since)
    if store is None:
        found = run(router, frame, read_bundle(bundle).manifest, since=since, **options)
    else:
        from router_ml.store import Store

        decisions = list(Store(store).decisions(_microseconds(since)))
        found = tune_judged(judged_of_decisions(router, decisions, frame), **options)
    at = found.at
    if at is None:
        click.echo(f"no setting is shown to reach {min_quality:g} with {confidence:.0%} confidence: {found.why}")
    else:
        click.echo(
            f"{found.settings[at].kind} = {found.settings[at].value:g}: mean quality of at least {min_quality:g} with "
            f"{confidence:.0%} confidence\n"
            f"  estimated {found.quality[at]:.3f}, shown to reach {found.lower[at]:.3f} by {found.informative:,} rows\n"
            f"  expected cost of a call {found.cost_usd[at]:.3g} USD; of the safest setting {found.cost_usd[0]:.3g} USD"
        )
    click.echo("\n".join(["this assumes", *(f"  {line}" for line in found.assumptions)]))
    _write(
        json_path,
        {
            **{name: getattr(found, name) for name in ("min_quality", "confidence", "method", "why", "more_rows")},
            "chosen": None if found.chosen is None else found.chosen._asdict(),
            "rows": found.rows, "considered": found.considered, "informative": found.informative,
            "max_weight": found.max_weight, "assumptions": list(found.assumptions),
            "settings": found.to_frame().to_dicts(),
        },
    )  # fmt: skip
    _draw(plot, found.plot)
    sys.exit(0 if at is not None else 1)


def _log(logs: Path | None, store: str | None, since: datetime | None = None) -> pl.DataFrame:
    """The rows of a log, or of a store. Raises InputError unless exactly one of them is given."""
    import polars as pl

    from router_ml.logs import LOG_SCHEMA, read_log
    from router_ml.store import Store

    if (logs is None) == (store is None):
        raise InputError("give the rows to judge by: either --logs LOG or --store FILE")
    if logs is not None:
        return read_log(logs)
    assert store is not None
    if "://" not in store and not Path(store).is_file():
        raise InputError(f"there is no store at {store}: give the one of the service, --store FILE or URL")
    return pl.DataFrame(list(Store(store).iter_log_rows(_microseconds(since))), schema=LOG_SCHEMA)


def _microseconds(since: datetime | None) -> int:
    from datetime import UTC

    return 0 if since is None else int(since.replace(tzinfo=UTC).timestamp() * 1e6)


def _write(path: Path | None, found: dict[str, Any]) -> None:
    """JSON, aside and renamed."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def _draw(path: Path | None, plot: Any) -> None:
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path} has to end in .png, .svg or .pdf")
    figure: Figure = plot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
