"""The commands `router-ml tune`, `compare` and `explore`: what a log can tell of a change before it is made."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, PathArg, working
from router_ml.writing import finite, made_aside, write_aside

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from router_ml.catalog import Catalog

LOGS = click.option("--logs", type=click.Path(exists=True, path_type=Path), help="A log directory or file.")
STORE = click.option("--store", help="A service's store instead: SQLite file or SQLAlchemy URL.")
POLICY = click.option("--policy", type=ExistingFile, help="A policy file, TOML.")
JSON = click.option("--json", "json_path", type=PathArg, help="Write everything as JSON.")
PLOT = click.option("--plot", type=PathArg, help="Write a plot, PNG or SVG by its name.")
CONFIDENCE = click.option("--confidence", default=0.95, show_default=True, help="How sure, e.g. 0.95.")
_CHUNK = 10_000
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
    frame = log_rows(logs, store)
    with working("testing settings"):
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
    write_json(
        json_path,
        {
            **{name: getattr(found, name) for name in ("min_quality", "confidence", "method", "why", "more_rows")},
            "chosen": None if found.chosen is None else found.chosen._asdict(),
            "rows": found.rows, "considered": found.considered, "informative": found.informative,
            "max_weight": found.max_weight, "assumptions": list(found.assumptions),
            "settings": [finite(row) for row in found.to_frame().iter_rows(named=True)],
        },
    )  # fmt: skip
    write_plot(plot, found.plot)
    sys.exit(0 if at is not None else 1)


CATALOG = click.option("--catalog", type=ExistingFile, help="Model cards, JSON; a log directory has its own.")
TASK = click.option("--task", help="Only requests of this task.")
EFFECT = click.option("--effect", default=0.05, show_default=True, help="The least difference in mean quality to see.")
POWER = click.option("--power", default=0.8, show_default=True, help="How probably it is to be seen.")


@click.command()
@click.argument("model_a")
@click.argument("model_b")
@LOGS
@STORE
@CATALOG
@TASK
@EFFECT
@POWER
@CONFIDENCE
@JSON
@PLOT
def compare(
    model_a: str, model_b: str, logs: Path | None, store: str | None, catalog: Path | None, task: str | None,
    effect: float, power: float, confidence: float, json_path: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Compare MODEL_A with MODEL_B from logs: quality and cost, or what it takes to tell.

    Example: router-ml compare aurora-4 summit-pro --logs logs --task code
    """
    from training.compare import compare as run

    frame, cards = log_rows(logs, store), _cards(logs, catalog)
    with working("comparing"):
        found = run(frame, cards, model_a, model_b, task=task, effect=effect, power=power, confidence=confidence)
    on = f"{found.n:,} of {found.considered:,} requests" + (f" of task {task}" if task else "")
    if found.quality is None:
        click.echo(f"{model_a} - {model_b}: not identified on {found.considered:,} requests: {found.why}")
    else:
        ways = {"paired": "sent to both", "randomised": "whose model was drawn, doubly robust"}
        click.echo(f"{model_a} - {model_b}, on {on}, {ways[found.how]}; {confidence:.0%} intervals")
        for name, unit, of in (("quality", "", found.quality), ("cost", " USD a request", found.cost_usd)):
            said = "not known" if of is None else f"{of.value:+.4g}{unit}, from {of.low:+.4g} to {of.high:+.4g}"
            click.echo(f"  {name:8} {said}")
        if found.experiment is None:
            better = model_a if found.quality.low > 0.0 else model_b if found.quality.high < 0.0 else None
            click.echo(f"  {better} is better" if better else f"  they differ by less than {effect:g}")
    for line in found.warnings:
        click.echo(f"  note: {line}")
    if found.experiment is not None:
        click.echo("\n".join(f"  {line}" for line in found.experiment.in_words))
        click.echo("  router-ml explore --plan spreads them over days within a budget")
    write_json(
        json_path,
        {
            **{n: getattr(found, n) for n in ("model_a", "model_b", "task", "how", "n", "considered", "confidence")},
            "why": found.why, "warnings": list(found.warnings),
            **{n: e._asdict() for n, e in (("quality", found.quality), ("cost_usd", found.cost_usd)) if e is not None},
            "experiment": None if found.experiment is None else finite(found.experiment.to_frame().to_dicts()[0]),
        },
    )  # fmt: skip
    write_plot(plot, found.plot)


@click.command()
@click.argument("model_a")
@click.argument("model_b")
@LOGS
@STORE
@CATALOG
@TASK
@EFFECT
@POWER
@CONFIDENCE
@click.option("--plan", is_flag=True, help="Spread the requests over days; without it: how far the log is.")
@click.option("--budget-usd-per-day", type=float, help="What a day may cost more than without the experiment.")
@click.option("--max-rate", default=0.2, show_default=True, help="The largest share of such requests to draw.")
@click.option("--requests-per-day", type=float, help="How many such requests come; by default as in the log.")
@POLICY
@click.option("--out", type=PathArg, help="With --plan: write the policy with the experiment in it, TOML.")
@JSON
@PLOT
def explore(
    model_a: str, model_b: str, logs: Path | None, store: str | None, catalog: Path | None, task: str | None,
    effect: float, power: float, confidence: float, plan: bool, budget_usd_per_day: float | None, max_rate: float,
    requests_per_day: float | None, policy: Path | None, out: Path | None, json_path: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Plan the exploration that tells MODEL_A from MODEL_B; the policy that --out writes carries it out.

    Example: router-ml explore aurora-4 summit-pro --logs logs --plan --out policy.toml
    """
    from training.experiment import plan_experiment, schedule, write_policy

    if not plan and (out or budget_usd_per_day is not None or policy):
        raise InputError("--out, --policy and --budget-usd-per-day belong to --plan: add it")
    frame, cards = log_rows(logs, store), _cards(logs, catalog)
    found = plan_experiment(
        frame, cards, model_a, model_b, task=task, effect=effect, power=power, confidence=confidence,
        requests_per_day=requests_per_day,
    )  # fmt: skip
    click.echo("\n".join(found.in_words))
    written: dict[str, Any] = {"experiment": finite(found.to_frame().to_dicts()[0])}
    drawing: Any = found.plot
    if plan:
        made = schedule(found, budget_usd_per_day=budget_usd_per_day, max_rate=max_rate)
        drawing, days = made.plot, made.days
        click.echo(
            f"  {found.per_day:,.0f} such requests a day, of which {made.rate:.4g} are drawn, for {len(days)} days"
        )
        click.echo("day     drawn   extra USD   power")
        for row in days.iter_rows(named=True):
            if row["day"] <= 10 or row["day"] == len(days):
                click.echo(f"{row['day']:3d}  {row['drawn']:8.1f}  {row['extra_usd']:10.4f}   {row['power']:.3f}")
            elif row["day"] == 11:
                click.echo("  …")
        written |= {"rate": made.rate, "days": [finite(row) for row in days.iter_rows(named=True)]}
        if out is not None:
            changed = write_policy(made.rule, out, base=policy, catalog=cards)
            click.echo(f"written to {out}, policy version {changed.version}; take the entry out again when it is done")
    write_json(json_path, written)
    write_plot(plot, drawing)


def _cards(logs: Path | None, catalog: Path | None) -> Catalog:
    from router_ml.catalog import Catalog
    from router_ml.logs import read_log_info

    if catalog is not None:
        return Catalog.load(catalog)
    if logs is None or logs.is_file():
        raise InputError("a store or a single file has no catalogue in it: give --catalog FILE")
    return Catalog.from_json(read_log_info(logs)["catalog"], f"{logs}/log.json")


def log_rows(logs: Path | str | None, store: str | None) -> pl.DataFrame:
    """All rows of a log, or of a store. Raises InputError unless exactly one of them is given.

    Those before a `--since`, too: by them `held_out` knows what is old, and it takes the later ones.
    """
    from itertools import islice

    import polars as pl

    from router_ml.logs import LOG_SCHEMA, read_log
    from router_ml.store import Store
    from router_ml.tables import existing

    if (logs is None) == (store is None):
        raise InputError("give the rows to judge by: either --logs LOG or --store FILE")
    if logs is not None:
        return read_log(logs)
    assert store is not None
    rows, frames = Store(existing(store)).iter_log_rows(), [pl.DataFrame(schema=LOG_SCHEMA)]
    while chunk := list(islice(rows, _CHUNK)):  # as dicts they are a multiple of their columns' size
        frames.append(pl.DataFrame(chunk, schema=LOG_SCHEMA))
    return pl.concat(frames)


def _microseconds(since: datetime | None) -> int:
    from datetime import UTC

    return 0 if since is None else int(since.replace(tzinfo=UTC).timestamp() * 1e6)


def write_json(path: Path | None, found: dict[str, Any]) -> None:
    """JSON, aside and renamed."""
    if path is None:
        return
    write_aside(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def write_plot(path: Path | None, plot: Any) -> None:
    """The figure that `plot` makes, if there is a path. Raises InputError for another format than PNG, SVG or PDF."""
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path} has to end in .png, .svg or .pdf")
    figure: Figure = plot()
    made_aside(path, lambda aside: figure.savefig(aside, dpi=120))
