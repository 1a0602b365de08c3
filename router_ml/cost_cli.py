"""The commands `router-ml selfhost` and `router-ml usage`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, PathArg

LOGS = click.option("--logs", type=click.Path(exists=True, path_type=Path), help="A log directory or file.")


@click.command()
@click.argument("file", type=ExistingFile)
@click.option("--catalog", required=True, type=ExistingFile, help="Model cards, JSON.")
@click.option("--against", "others", multiple=True, required=True, help="A model of the catalogue to compare with.")
@LOGS
@click.option("--scale", default=1.0, show_default=True, help="The log's traffic times this: a sample stands for more.")
@click.option("--model", help="The catalogue's model that is hosted; its card gets the effective prices in --out.")
@click.option("--out", type=PathArg, help="Where to write the catalogue with them.")
@click.option("--plot", type=PathArg, help="Write the hours as a picture.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def selfhost(
    file: Path, catalog: Path, others: tuple[str, ...], logs: Path | None, scale: float, model: str | None,
    out: Path | None, plot: Path | None, as_json: bool,
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
    table = _toml(file, {"deployment", "traffic"})
    if (logs is None) == ("traffic" not in table):
        raise InputError(f"the traffic comes from a table [traffic] in {file} or from --logs: give one of the two")
    cards = Catalog.load(catalog)
    for name in (*others, *([model] if model else [])):
        if name not in cards:
            raise InputError(f"{catalog} has no model {name!r}: it has {', '.join(cards.ids)}")
    traffic = Traffic.of_log(read_log(logs), scale=scale) if logs else Traffic.from_table(table["traffic"])
    hosting: Hosting = host(Deployment.from_table(table.get("deployment")), traffic)
    compared = [against(hosting, cards[name]) for name in others]
    if as_json:
        names = ("usd_per_month", "gpu_usd", "input_usd_per_mtok", "output_usd_per_mtok", "utilisation", "overflow")
        said: dict[str, Any] = {name: getattr(hosting, name) for name in names}
        said |= {"mtok_per_month": traffic.mtok_per_month, "replicas": float(hosting.replicas.max())}
        click.echo(json.dumps(said | {"against": [asdict(one) | {"pays": one.pays} for one in compared]}, indent=1))
    else:
        click.echo(f"traffic: {traffic.mtok_per_month:,.0f} million tokens a month {traffic.note}".rstrip())
        click.echo(
            f"hosting: {hosting.usd_per_month:,.0f} USD a month ({hosting.gpu_usd:,.0f} for GPUs), up to "
            f"{hosting.replicas.max():.0f} replicas, {hosting.utilisation:.0%} of what is paid for is used"
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
    if plot is not None:
        hosting.plot().savefig(plot)
    if model is not None and out is not None:
        written(Catalog(tuple(hosting.card(card) if card.id == model else card for card in cards)), out)


def _toml(file: Path, known: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file} is not readable TOML: {error}") from None
    if unknown := sorted(set(table) - known):
        raise InputError(f"{file}: unknown table {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return table
