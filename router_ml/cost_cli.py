"""The commands `router-ml selfhost` and `router-ml usage`."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, PathArg
from router_ml.tune_cli import write_plot

if TYPE_CHECKING:
    import polars as pl

    from router_ml.catalog import Catalog

LOGS = click.option("--logs", type=click.Path(exists=True, path_type=Path), help="A log directory or file.")


@click.command()
@click.argument("file", type=ExistingFile)
@click.option("--catalog", required=True, type=ExistingFile, help="Model cards, JSON.")
@click.option("--against", "others", multiple=True, required=True, help="A model of the catalogue to compare with.")
@LOGS
@click.option("--scale", default=1.0, show_default=True, help="The log's traffic times this: a sample stands for more.")
@click.option("--peak-to-mean", type=float, help="How much an hour's busiest minutes are above its mean (--logs).")
@click.option("--model", help="The catalogue's model that is hosted; its card gets the effective prices in --out.")
@click.option("--out", type=PathArg, help="Where to write the catalogue with them.")
@click.option("--plot", type=PathArg, help="Write the hours as a picture.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def selfhost(
    file: Path, catalog: Path, others: tuple[str, ...], logs: Path | None, scale: float,
    peak_to_mean: float | None, model: str | None, out: Path | None, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what hosting a model costs a month and a token, and from which volume on it pays.

    FILE is TOML: a table [deployment] and, unless a log shows the traffic, a table [traffic].

    Example: router-ml selfhost hosting.toml --catalog catalog.json --against aurora-4 --against delta-70b
    """
    from dataclasses import asdict

    from router_ml.catalog import Catalog, written
    from router_ml.logs import read_log
    from router_ml.selfhost import Deployment, Hosting, against, host
    from router_ml.traffic_shape import Traffic

    if (model is None) != (out is None):
        raise click.UsageError("--model says whose card is written, --out where: give both or none")
    if not 0.0 < scale < float("inf"):
        raise InputError("--scale has to be a number above 0")
    table = toml_tables(file, {"deployment", "traffic"})
    if (logs is None) == ("traffic" not in table):
        raise InputError(f"the traffic comes from a table [traffic] in {file} or from --logs: give one of the two")
    if peak_to_mean is not None and logs is None:
        raise InputError(f"--peak-to-mean is for --logs: write peak_to_mean into the table [traffic] of {file}")
    cards = Catalog.load(catalog)
    for name in (*others, *([model] if model else [])):
        if name not in cards:
            raise InputError(f"{catalog} has no model {name!r}: it has {', '.join(cards.ids)}")
    if logs is None:
        traffic = Traffic.from_table(table["traffic"])
    else:
        traffic = Traffic.of_log(read_log(logs), scale=scale, peak_to_mean=peak_to_mean)
    hosting: Hosting = host(Deployment.from_table(table.get("deployment")), traffic)
    compared = [against(hosting, cards[name]) for name in others]
    if as_json:
        names = ("usd_per_month", "gpu_usd", "input_usd_per_mtok", "output_usd_per_mtok", "utilisation", "overflow")
        said: dict[str, Any] = {name: getattr(hosting, name) for name in names}
        said |= {"peak_to_mean": traffic.peak_to_mean, "note": traffic.note}
        said |= {"mtok_per_month": traffic.mtok_per_month, "replicas": float(hosting.replicas.max())}
        click.echo(json.dumps(said | {"against": [asdict(one) | {"pays": one.pays} for one in compared]}, indent=1))
    else:
        click.echo(f"traffic: {traffic.mtok_per_month:,.0f} million tokens a month; {traffic.note}".rstrip("; "))
        click.echo(
            f"hosting: {hosting.usd_per_month:,.0f} USD a month ({hosting.gpu_usd:,.0f} for GPUs), up to "
            f"{hosting.replicas.max():.0f} replicas, {hosting.utilisation:.0%} of what is paid for is used; the "
            f"busiest minutes may take {hosting.deployment.max_utilisation:.0%} of a replica"
        )
        click.echo(
            f"effective prices: {hosting.input_usd_per_mtok:.4g} USD a million tokens of input, "
            f"{hosting.output_usd_per_mtok:.4g} of output"
        )
        if hosting.overflow > 0.0:
            click.echo(f"{hosting.overflow:.1%} of the work is past max_replicas: the other model serves it")
        for one in compared:
            even = (
                "at no volume" if one.break_even_mtok is None else f"from {one.break_even_mtok:,.0f} million tokens on"
            )
            until = "" if one.until_mtok is None else f" and up to {one.until_mtok:,.0f}"
            click.echo(
                f"{one.model}: {one.usd_per_month:,.0f} USD a month against {one.self_usd_per_month:,.0f}: hosting "
                f"{'pays' if one.pays else 'does not pay'}; it does {even}{until}"
            )
    write_plot(plot, hosting.plot)
    if model is not None and out is not None:
        written(Catalog(tuple(hosting.card(card) if card.id == model else card for card in cards)), out)


@click.command()
@click.option("--store", help="SQLite file or SQLAlchemy URL of a service.")
@LOGS
@click.option("--by", default="", help="Of tenant, key, task, model, day; several with commas between.")
@click.option("--baseline", help="The model that savings are against.")
@click.option("--catalog", type=ExistingFile, help="Model cards, JSON; a log directory and a store have their own.")
@click.option("--since", type=click.DateTime(), help="Only calls from this time on, UTC.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with all columns instead of text.")
def usage(
    store: str | None, logs: Path | None, by: str, baseline: str | None, catalog: Path | None, since: datetime | None,
    as_csv: bool,
) -> None:  # fmt: skip
    """Add up what calls used and cost, and what they saved against a baseline; sums are exact.

    Example: router-ml usage --store router-ml.db --by tenant,model --baseline aurora-4
    """
    from router_ml.accounting import accounts, cents
    from router_ml.catalog import Catalog

    if (store is None) == (logs is None):
        raise click.UsageError("calls come from a service's --store or from --logs: give one of the two")
    cards = Catalog.load(catalog) if catalog else None
    rows, known = _calls(store, logs, baseline, since)
    cards = cards or known
    if cards is None:
        raise InputError("nothing says what the models cost: give --catalog FILE")
    found = accounts(rows, cards, by=[name.strip() for name in by.split(",") if name.strip()], baseline=baseline)
    if as_csv:
        click.echo(found.to_frame().write_csv(), nl=False)
        return
    for row in found.frame.iter_rows(named=True):
        whose = " ".join("none" if row[name] is None else str(row[name]) for name in found.by) or "all"
        saved = ""
        if baseline is not None:
            share = f" ({row['savings_nano'] / row['baseline_nano']:.1%})" if row["baseline_nano"] else ""
            saved = f"; {baseline} {cents(row['baseline_nano'])}, saved {cents(row['savings_nano'])}{share}"
            saved += f" over {row['compared']} calls" if row["compared"] != row["calls"] else ""
        still = f", {row['open']} of them open" if row["open"] else ""
        click.echo(f"{whose}: {row['calls']} calls{still}, {cents(row['cost_nano'])} USD{saved}")
    reported, priced, still_open = (found.total(name) for name in ("reported", "priced", "open"))
    click.echo(
        f"together: {found.total('calls')} calls, {cents(found.total('cost_nano'))} USD: "
        f"{reported} reported, {priced} priced by their tokens, {still_open} open"
    )
    if baseline is not None:
        click.echo(f"the baseline is {baseline} at its card's prices, for the tokens that the calls had")
    if found.total("open_expected_nano"):
        click.echo(
            f"open calls are expected to cost {cents(found.total('open_expected_nano'))} USD, "
            f"and {cents(found.total('open_reserve_nano'))} at most"
        )


def _calls(
    store: str | None, logs: Path | None, baseline: str | None, since: datetime | None
) -> tuple[pl.DataFrame, Catalog | None]:
    """The calls, and the catalogue that stands beside them."""
    import polars as pl

    from router_ml.accounting import spend_frame
    from router_ml.audit import catalogs
    from router_ml.audit import changes as noted
    from router_ml.catalog import Catalog
    from router_ml.logs import read_log, read_log_info
    from router_ml.stored import spend_rows
    from router_ml.tables import existing, open_database

    if logs is not None:
        log = read_log(logs)
        if since is not None:
            log = log.filter(pl.col("time") >= since.replace(tzinfo=UTC))
        raw = read_log_info(logs).get("catalog") if logs.is_dir() else None
        return log, None if raw is None else Catalog.from_json(raw, f"{logs}/log.json")
    assert store is not None
    engine = open_database(existing(store))
    cards = {card.id: card for of in catalogs(noted(engine)).values() for each in of for card in each}
    since_us = int(since.replace(tzinfo=UTC).timestamp() * 1e6) if since else 0
    known = Catalog(tuple(replace(card, sibling=None) for card in cards.values())) if cards else None
    return spend_frame(spend_rows(engine, baseline, since_us)), known


def toml_tables(file: Path, known: set[str]) -> dict[str, Any]:
    """A TOML file's tables, of these names. Raises InputError for others, and where it is not TOML."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file} is not readable TOML: {error}") from None
    if unknown := sorted(set(table) - known):
        raise InputError(f"{file}: unknown table {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return table
