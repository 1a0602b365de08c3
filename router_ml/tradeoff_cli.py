"""The command `router-ml tradeoff`: what each setting of the dial would cost and be worth, for the console."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from router_ml.evaluate_cli import CLUSTER, SINCE, policy_under
from router_ml.terminal import PathArg, stages
from router_ml.tune_cli import CONFIDENCE, LOGS, PLOT, POLICY, log_rows, write_plot

if TYPE_CHECKING:
    import polars as pl

    from router_ml.policy import Policy


@click.command()
@click.option("--bundle", required=True, type=PathArg, help="The bundle directory whose dial is moved.")
@LOGS
@click.option("--store", help="A service's store instead: its rows, their tiers, and the policy in force there.")
@POLICY
@SINCE
@CLUSTER
@CONFIDENCE
@click.option("--out", required=True, type=PathArg, help="Where to write it, JSON: for router-ml serve --tradeoff.")
@click.option("--keep-prompts", is_flag=True, help="Take the beginnings of some requests' texts along as examples.")
@click.option(
    "--setting", "settings", multiple=True, type=click.FloatRange(0, 1),
    help="Judge this least probability, beside those of the tiers, instead of some thirty; may be repeated.",
)  # fmt: skip
@click.option("--most-rows", default=20_000, show_default=True, type=click.IntRange(1), help="The newest of the rows.")
@PLOT
def tradeoff(
    bundle: Path, logs: Path | None, store: str | None, policy: Path | None, since: datetime | None, cluster: str,
    confidence: float, out: Path, keep_prompts: bool, settings: tuple[float, ...], most_rows: int, plot: Path | None,
) -> None:  # fmt: skip
    """Judge some thirty settings of the dial on a log: quality, cost, latency, who would be sent elsewhere.

    Judged on rows that the bundle has not learnt from, under the policy in force. Anyone whom the console is open to
    reads what --keep-prompts takes along.

    Example: router-ml tradeoff --bundle bundle --logs logs --out tradeoff.json
    """
    from features.load import load_router
    from router_ml.bundle import read_bundle
    from training.tradeoff import SETTINGS
    from training.tradeoff import tradeoff as judge

    under = policy_under(policy, store)
    router = load_router(bundle, under)
    rows = log_rows(logs, store)
    if store is not None:
        rows = _with_tiers(rows, store, router.policy)
    with stages(transient=True) as report:
        found = judge(
            router, rows, read_bundle(bundle).manifest, since=since, cluster=cluster, confidence=confidence,
            keep_prompts=keep_prompts, most_rows=most_rows, settings=settings or SETTINGS, report=report,
        )  # fmt: skip
    found.write(out)
    write_plot(plot, found.plot)
    source = found.source
    click.echo(
        f"{len(found.settings)} settings for bundle {found.model_version} under policy {found.policy_version}, judged "
        f"on {source['judged']:,} requests ({source['outcomes']:,} outcomes) to {source['newest'][:10]}: {out}"
    )
    for note in source["notes"]:
        click.echo(f"  note: {note}")


def _with_tiers(rows: pl.DataFrame, store: str, policy: Policy) -> pl.DataFrame:
    """The store's rows with the tier that each decision was asked for; null where it brought a dial of its own."""
    import polars as pl
    import sqlalchemy as sa

    from router_ml.tables import DECISIONS, open_database

    default = policy.dials[policy.default_tier].min_probability
    columns = [DECISIONS.c[name] for name in ("decision_id", "tier", "min_probability")]
    with open_database(store).connect() as connection:
        asked = {
            of: tier if tier in policy.dials else policy.default_tier if tier is None and p == default else None
            for of, tier, p in connection.execute(sa.select(*columns))
        }
    tiers = [asked.get(of) for of in rows["request_id"]]
    return rows.with_columns(pl.Series("tier", tiers, dtype=pl.String))
