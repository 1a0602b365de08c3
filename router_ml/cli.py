"""The `router-ml` command: the front door, which opens each room only when it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from router_ml import __version__
from router_ml.advise_cli import advise
from router_ml.audit_cli import audit
from router_ml.catalog_cli import catalog
from router_ml.cost_cli import selfhost, usage
from router_ml.doctor_cli import doctor
from router_ml.evaluate_cli import evaluate, promote
from router_ml.import_cli import LOGGINGS, import_
from router_ml.rollout_cli import history, register_as, rollback, say_registered, watch
from router_ml.serve_cli import serve
from router_ml.terminal import (
    ALIAS,
    REGISTER,
    TRACKING,
    Commands,
    ExistingFile,
    LogPath,
    PathArg,
    bar,
    say_log,
    stages,
)
from router_ml.tradeoff_cli import tradeoff
from router_ml.tune_cli import compare, explore, tune

ENCODER = click.option(
    "--encoder",
    default="static",
    show_default=True,
    help="static (distilled from MiniLM), transformer (MiniLM itself) or lexical.",
)
SEED = click.option("--seed", default=0, show_default=True, help="The same seed gives the same result.")


def _logging(default: str) -> Callable[[Any], Any]:
    """The logging policy: what the log knows of every request."""
    return click.option(
        "--logging",
        type=click.Choice(LOGGINGS),
        default=default,
        show_default=True,
        help="Every model's outcome, one drawn evenly, or mostly the best model's.",
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="router-ml")
def main() -> None:
    """Learn from outcomes the cheapest model that is likely good enough."""


@main.command()
@click.option("--rows", default=20_000, show_default=True, help="Requests to simulate.")
@click.option("--out", required=True, type=PathArg, help="The log directory to write; its truth goes to OUT/truth.")
@_logging("uniform")
@click.option("--feedback-rate", default=0.6, show_default=True, help="Share of good answers that get feedback.")
@SEED
@click.option("--overwrite", is_flag=True, help="Replace an existing log.")
def simulate(rows: int, out: Path, logging: Any, feedback_rate: float, seed: int, overwrite: bool) -> None:
    """Write a log of simulated traffic whose true qualities are known, and its catalogue beside it.

    Example: router-ml simulate --rows 20000 --out logs
    """
    from training.simulate import simulate as run

    with bar("requests", rows) as done:
        summary = run(
            rows, out, seed=seed, logging=logging, feedback_rate=feedback_rate, overwrite=overwrite, progress=done
        )
    say_log(summary, out)


@main.command()
@click.option("--logs", required=True, type=LogPath(), help="A log directory or file, or the URL of one.")
@click.option("--catalog", type=ExistingFile, help="Model cards, JSON; a log directory has its own.")
@click.option(
    "--quality-threshold",
    default=(0.5,),
    show_default=True,
    multiple=True,
    help="From this quality on an answer is acceptable; may be repeated, the lowest is the default.",
)
@ENCODER
@click.option("--encoder-model", help="A folder with all-MiniLM-L6-v2, where it is not found by itself.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This machine's cores, or the Ray cluster that RAY_ADDRESS names.",
)
@click.option("--keep-prompts", is_flag=True, help="Keep the texts' beginnings in the bundle, for explanations.")
@click.option("--holdout", default=0.2, show_default=True, help="Newest share of requests to judge on.")
@SEED
@click.option("--out", required=True, type=PathArg, help="The bundle directory to write.")
@REGISTER
@ALIAS
@TRACKING
def train(
    logs: Path | str, catalog: Path | None, quality_threshold: tuple[float, ...], encoder: str,
    encoder_model: str | None, engine: str, keep_prompts: bool, holdout: float, seed: int, out: Path, name: str | None,
    alias: str | None, tracking_uri: str,
) -> None:  # fmt: skip
    """Learn a router from a log and write it as a bundle.

    Example: router-ml train --logs logs --out bundle --register router
    """
    from router_ml.catalog import Catalog
    from router_ml.logs import read_log_info
    from training.engines import engine_of
    from training.train import train as run

    if catalog is None and Path(logs).is_file():
        raise click.UsageError(f"{logs} is a single file, which has no catalogue in it: give --catalog FILE")
    cards = Catalog.load(catalog) if catalog else Catalog.from_json(read_log_info(logs)["catalog"], f"{logs}/log.json")
    if name and alias:
        from training.report import check_alias

        check_alias(tracking_uri, name, alias)
    with stages() as report:
        made = run(
            logs, cards, out=out, threshold=quality_threshold, encoder=encoder, encoder_model=encoder_model,
            holdout=holdout, seed=seed, keep_prompts=keep_prompts, report=report, engine=engine_of(engine),
        )  # fmt: skip
    click.echo(f"bundle {made.version} in {out}")
    click.echo(json.dumps(made.metrics, indent=1))
    if name:
        from training.report import publish

        say_registered(publish(made, out, tracking_uri=tracking_uri, name=name, alias=alias), tracking_uri)


@main.command()
@click.option("--bundle", required=True, type=PathArg, help="The bundle directory to start from.")
@click.option("--card", required=True, type=ExistingFile, help="The new model's card, JSON as in a catalogue.")
@click.option("--logs", type=click.Path(exists=True, path_type=Path), help="A log with outcomes of the new model.")
@click.option("--sibling", help="The bundle's model that it most resembles; otherwise the one that the card names.")
@click.option("--out", required=True, type=PathArg, help="The bundle directory to write.")
@REGISTER
@ALIAS
@TRACKING
def onboard(
    bundle: Path, card: Path, logs: Path | None, sibling: str | None, out: Path, name: str | None, alias: str | None,
    tracking_uri: str,
) -> None:  # fmt: skip
    """Add a new model to a bundle without training again, from its card and what outcomes there are.

    Example: router-ml onboard --bundle bundle --card card.json --sibling mid --out wider
    """
    from router_ml.catalog import load_card
    from training.onboard import onboard_bundle

    new = load_card(card)
    if logs is None and (sibling or new.sibling) is None:
        click.echo(
            f"router-ml: no outcomes and no sibling: {new.id!r} is taken to be like the bundle's models of its tier; "
            "give --sibling MODEL or --logs LOG for better",
            err=True,
        )
    made = onboard_bundle(bundle, new, out=out, logs=logs, sibling=sibling)
    most = sorted(made.mix.items(), key=lambda item: -item[1])[:3]
    likes = ", ".join(f"{weight:.2f} {model}" for model, weight in most)
    click.echo(f"bundle {made.version} in {out}: {new.id} from {made.outcomes} outcomes, most like {likes}")
    if name:
        register_as(out, name, alias, tracking_uri)


@main.command()
@click.argument("prompt")
@click.option("--bundle", required=True, type=PathArg, help="A bundle directory.")
@click.option("--policy", type=ExistingFile, help="A policy file, TOML.")
@click.option("--min-probability", type=float, help="The dial: least probability of an acceptable answer.")
@click.option("--tier", help="The dial by name.")
@click.option("--willingness-to-pay-usd", type=float, help="The dial: what an acceptable answer is worth.")
@click.option("--max-cost-usd", type=float, help="Exclude models that are expected to cost more.")
@click.option("--quality-threshold", type=float, help="From this quality on an answer is acceptable.")
@click.option(
    "--objective",
    type=click.Choice(["cost", "quality"]),
    help="The cheapest that meets the dial, or the most probable within --max-cost-usd.",
)
def route(
    prompt: str, bundle: Path, policy: Path | None, min_probability: float | None, tier: str | None,
    willingness_to_pay_usd: float | None, max_cost_usd: float | None, quality_threshold: float | None,
    objective: str | None,
) -> None:  # fmt: skip
    """Route one PROMPT and print the decision as JSON.

    Example: router-ml route "What is 2 + 2?" --bundle bundle --tier economy
    """
    import dataclasses

    from features.load import load_router
    from router_ml.conversation import request_of
    from router_ml.policy import Policy

    router = load_router(bundle, Policy.load(policy) if policy else None)
    request = request_of(
        prompt=prompt, min_probability=min_probability, tier=tier,
        willingness_to_pay_usd=willingness_to_pay_usd, max_cost_usd=max_cost_usd,
        quality_threshold=quality_threshold, objective=objective,
    )  # fmt: skip
    decision = router.decide(request)
    candidates = [candidate._asdict() for candidate in decision.candidates]
    click.echo(json.dumps({**dataclasses.asdict(decision), "candidates": candidates}, indent=1))


@main.command()
@click.argument("decision_id")
@click.option("--bundle", required=True, type=PathArg, help="The directory of the bundle that made the decision.")
@click.option("--store", default="router-ml.db", show_default=True, help="SQLite file or SQLAlchemy URL.")
@click.option("--neighbours", default=10, show_default=True, type=click.IntRange(0), help="Past requests to show.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def explain(decision_id: str, bundle: Path, store: str, neighbours: int, as_json: bool) -> None:
    """Explain a stored decision: each candidate's estimate taken apart, what excluded it, and past requests like it.

    Example: router-ml explain 01a2027725327f66ee2a3f92a30962cd --bundle bundle --store router-ml.db
    """
    from features.explain import as_text, explain_stored
    from features.load import load_neighbours, load_router
    from router_ml.errors import InputError
    from router_ml.store import Store
    from router_ml.tables import existing

    row = Store(existing(store)).decision(decision_id)
    if row is None:
        raise InputError(
            f"the store knows no decision {decision_id!r}: check --store, and the id, the answer's 'decision_id'"
        )
    router = load_router(bundle)
    past = load_neighbours(bundle, router.model_version, twin=bool(row["degraded"]))
    explanation = explain_stored(router, row, past, nearest=neighbours)
    click.echo(json.dumps(explanation.to_json(prompts=True), indent=1) if as_json else as_text(explanation))


@main.command()
@click.option("--data", type=ExistingFile, help="An outcome matrix of your own; otherwise traffic is simulated.")
@click.option("--catalog", type=ExistingFile, help="Its model cards; catalog.json beside the data by default.")
@click.option("--out", type=PathArg, default=Path("demo"), show_default=True, help="Where everything is written.")
@click.option("--rows", default=20_000, show_default=True, help="Requests to simulate without --data.")
@ENCODER
def demo(data: Path | None, catalog: Path | None, out: Path, rows: int, encoder: str) -> None:
    """Show the whole path: log, training, MLflow, service, and requests routed over HTTP.

    Example: router-ml demo --data outcomes.parquet
    """
    from training.demo import run

    run(data=data, catalog=catalog, out=out, rows=rows, encoder=encoder)


main.add_command(advise)
main.add_command(audit)
main.add_command(import_)
main.add_command(catalog)
main.add_command(serve)
for command in (doctor, tune, tradeoff, compare, explore, evaluate, promote, rollback, watch, history, selfhost, usage):
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
