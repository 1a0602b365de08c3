"""The commands `router-ml catalog …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from router_ml.rollout_cli import register_as
from router_ml.terminal import ALIAS, REGISTER, TRACKING, ExistingFile, PathArg


@click.group()
def catalog() -> None:
    """Bring prices into a catalogue, and see what they change."""


@catalog.command("import")
@click.option(
    "--from", "source", default="litellm", show_default=True, help="The installed LiteLLM's price file, or such a FILE."
)
@click.option(
    "--model", "models", multiple=True, help="A model of the file, or ID=NAME; otherwise all that --out has already."
)
@click.option("--free", is_flag=True, help="Take a price of 0 at its word; otherwise it counts as unknown.")
@click.option("--out", required=True, type=PathArg, help="The catalogue to write; cards that it has already are kept.")
def import_(source: str, models: tuple[str, ...], free: bool, out: Path) -> None:
    """Write or renew a catalogue's prices from LiteLLM's price file.

    A card that is there keeps its tier, sibling, capabilities and clearances. A new one is cleared for public data and
    no region, and its tier is a guess: its 'guessed' says so. A model without a price is an error, or skipped where it
    was not named.

    Example: router-ml catalog import --model gpt-4o-mini --out catalog.json
    """
    from router_ml.catalog import Catalog, written
    from router_ml.price_file import changes, import_prices, litellm_prices, read_prices

    entries, name = litellm_prices() if source == "litellm" else (read_prices(Path(source)), f"price file {source}")
    before = Catalog.load(out) if out.exists() else None
    made = import_prices(entries, name, models, before, free=free)
    for change in changes(before or made.catalog, made.catalog):
        click.echo(_shown(change.model, change.field, change.old, change.new))
    for model, why in made.skipped.items():
        click.echo(f"{model} skipped: {why}", err=True)
    for model in made.priced:
        if guessed := made.catalog[model].guessed:
            card = made.catalog[model]
            what = ", ".join(f"{field} {getattr(card, field)!r}" for field in sorted(guessed))
            click.echo(f"{model}: guessed {what}; correct it in {out} and take it out of 'guessed'")
    written(made.catalog, out)
    click.echo(f"{len(made.priced)} models priced from {name}, {len(made.catalog)} in {out}")


@catalog.command()
@click.argument("old", type=ExistingFile)
@click.argument("new", type=ExistingFile)
@click.option("--bundle", type=PathArg, help="Whose decisions to compare under the two.")
@click.option("--logs", type=click.Path(exists=True, path_type=Path), help="The log whose requests are decided again.")
@click.option("--policy", type=ExistingFile, help="A policy file, TOML; otherwise the default policy.")
@click.option("--sample", default=2_000, show_default=True, type=click.IntRange(1), help="Requests to decide.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same requests.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def diff(
    old: Path, new: Path, bundle: Path | None, logs: Path | None, policy: Path | None, sample: int, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """List which prices change from OLD to NEW; with a bundle and a log, which decisions would flip, and the cost.

    Example: router-ml catalog diff catalog.json new.json --bundle bundle --logs logs
    """
    from dataclasses import asdict

    from router_ml.catalog import Catalog
    from router_ml.price_file import changes

    if (bundle is None) != (logs is None):
        raise click.UsageError("decisions are compared with --bundle and --logs, both")
    before, after = Catalog.load(old), Catalog.load(new)
    found = changes(before, after)
    report: dict[str, Any] = {"changes": [asdict(change) for change in found]}
    if not as_json:
        for change in found:
            click.echo(_shown(change.model, change.field, change.old, change.new))
        click.echo(f"{len(found)} changes of {len(set(before.ids) | set(after.ids))} models")
    if bundle is not None and logs is not None:
        from features.load import load_router
        from router_ml.logs import read_log
        from router_ml.policy import Policy
        from training.flips import flips

        router = load_router(bundle, Policy.load(policy) if policy else None)
        flipped = flips(router, before, after, read_log(logs), sample=sample, seed=seed)
        if not as_json:
            click.echo(flipped.as_text())
        report["flips"] = flipped.to_json()
    if as_json:
        click.echo(json.dumps(report, indent=1))


@catalog.command("apply")
@click.argument("new", type=ExistingFile)
@click.option("--bundle", required=True, type=PathArg, help="The bundle whose decisions are to go by the new prices.")
@click.option("--out", required=True, type=PathArg, help="The bundle to write; the same folder replaces it.")
@REGISTER
@ALIAS
@TRACKING
def apply_(new: Path, bundle: Path, out: Path, name: str | None, alias: str | None, tracking_uri: str) -> None:
    """Bring the prices of the catalogue NEW into a bundle, without training again.

    What the router says of each model's answers stays as it is; what they cost, and so its choices, change. A service
    that follows the folder takes it up; with --register it is a challenger for one that follows MLflow.

    Example: router-ml catalog apply new.json --bundle bundle --out bundle
    """
    from router_ml.bundle import check_replaceable, read_bundle
    from router_ml.catalog import Catalog
    from router_ml.price_file import aligned, changes, repriced

    check_replaceable(out)
    made, cards = read_bundle(bundle), Catalog.load(new)
    for change in changes(made.catalog, aligned(cards, made.catalog, "new")):
        click.echo(_shown(change.model, change.field, change.old, change.new))
    click.echo(f"bundle {repriced(made, cards, out)} in {out}")
    if name:
        register_as(out, name, alias, tracking_uri)


def _shown(model: str, field: str, old: Any, new: Any) -> str:
    if field == "model":
        return f"{model}: {'gone' if new is None else 'new'}"
    change = ""
    if isinstance(old, int | float) and isinstance(new, int | float) and old:
        change = f" ({new / old - 1:+.1%})"
    return f"{model}: {field} {json.dumps(old)} to {json.dumps(new)}{change}"
