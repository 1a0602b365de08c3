"""The commands `router-ml import …`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from router_ml.errors import InputError
from router_ml.terminal import ExistingFile, PathArg, bar, say_log

LOGGINGS = ["full", "uniform", "mostly-best"]
_OUT = click.option("--out", required=True, type=PathArg, help="The log directory to make or to add to.")
_RULES = (
    click.option("--feedback", "rules_file", type=ExistingFile, help="What feedback means: [[source]] tables, TOML."),
    click.option("--rule", "rules", multiple=True, help="The same in short: NAME=KIND[,weight=W][,reliability=R]…"),
)
_FILES = (
    click.option("--feedback-column", "feedback_columns", multiple=True, help="NAME=COLUMN of the feedback files."),
    click.option("--feedback-source", help="The source's name, where the files have no column for it."),
    click.option(
        "--feedback-time-unit",
        type=click.Choice(["s", "ms", "us", "ns"]),
        help="Times of the feedback files are numbers since 1970.",
    ),
)
_COMMON = (
    _OUT,
    click.option("--catalog", type=ExistingFile, help="Model cards, JSON, that the log is to carry."),
    *_RULES,
    click.option(
        "--feedback-data",
        type=ExistingFile,
        multiple=True,
        help="Feedback of these requests: CSV, JSON lines, Parquet.",
    ),
    *_FILES,
    click.option(
        "--max-reject-share", default=0.05, show_default=True, help="Past this share of bad rows nothing is added."
    ),
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group("import")
def import_() -> None:
    """Bring what a gateway logged, or outcomes from elsewhere, into a request log.

    Importing again adds what is new; an import that was interrupted goes on where it was.
    """


@import_.command("litellm")
@click.argument("source")
@click.option(
    "--model-column",
    type=click.Choice(["model_group", "model"]),
    default="model_group",
    show_default=True,
    help="The column with the router's model ids: the names that callers use, or the deployments'.",
)
@click.option("--tenant-column", type=click.Choice(["team_id", "organization_id", "end_user", "api_key"]),
              help="The column with the tenant; otherwise the first of the first three.")  # fmt: skip
@click.option("--task-tag", default="task:", show_default=True, help="How a request's tag with its task begins.")
@click.option("--since", help="Only rows from this time on, ISO; of a Postgres only.")
@click.option("--until", help="Only rows before this time, ISO; of a Postgres only.")
@click.option("--overlap", default=3600.0, show_default=True, help="Seconds to read again: rows are written late.")
@_with(*_COMMON)
def import_litellm(
    source: str, model_column: str, tenant_column: str | None, task_tag: str, since: str | None, until: str | None,
    overlap: float, **common: Any,
) -> None:  # fmt: skip
    """Read LiteLLM's spend log: SOURCE is the proxy's Postgres URL, or an export (CSV, JSON lines, Parquet).

    Example: router-ml import litellm postgresql://reader@db/litellm --catalog catalog.json --out logs
    """
    settings = {
        "model": model_column, "tenant": tenant_column, "task_tag": task_tag,
        "since": since, "until": until, "overlap_s": overlap,
    }  # fmt: skip
    _import("litellm", source, settings, **common)


@import_.command("langfuse")
@click.argument("source")
@click.option("--model-key", help="The key of metadata with the router's model id; otherwise the provided model name.")
@click.option("--tenant-key", help="The key of metadata with the tenant; otherwise the user.")
@click.option(
    "--task-column", type=click.Choice(["name", "trace_name", "prompt_name"]), help="Otherwise the task's tag."
)
@click.option("--task-tag", default="task:", show_default=True, help="How a trace's tag with its task begins.")
@click.option("--latency-unit", type=click.Choice(["s", "ms"]), default="s", show_default=True,
              help="Of the column latency, which is used where a call has no end: ms before 2026-04-01.")  # fmt: skip
@_with(*_COMMON)
def import_langfuse(source: str, **options: Any) -> None:
    """Read Langfuse's export: SOURCE is a file of observations_v2 or scores, or the project's folder with both.

    Example: router-ml import langfuse export --rule "*:helpfulness=score" --out logs
    """
    names = ("model_key", "tenant_key", "task_column", "task_tag", "latency_unit")
    _import("langfuse", source, {name: options.pop(name) for name in names}, **options)


@import_.command("otel")
@click.argument("source")
@click.option("--model", type=click.Choice(["request", "response"]), default="request", show_default=True,
              help="The model's name that was asked for, or the one that answered.")  # fmt: skip
@click.option("--tenant-attribute", default="enduser.id", show_default=True, help="Of the span, or of its resource.")
@click.option("--task-attribute", help="Of the span, or of its resource.")
@_with(*_COMMON)
def import_otel(source: str, **options: Any) -> None:
    """Read OpenTelemetry's GenAI spans and evaluations: SOURCE is OTLP as JSON lines, or a folder of such files.

    Example: router-ml import otel traces.jsonl --rule "Relevance=score,min=1,max=5" --out logs
    """
    names = ("model", "tenant_attribute", "task_attribute")
    _import("otel", source, {name: options.pop(name) for name in names}, **options)


@import_.command("portkey")
@click.argument("source")
@click.option("--session-key", default="session_id", show_default=True, help="The key of metadata with the session.")
@click.option("--tenant-key", default="_user", show_default=True, help="The key of metadata with the tenant.")
@click.option("--task-key", default="task", show_default=True, help="The key of metadata with the task.")
@_with(*_COMMON)
def import_portkey(source: str, **options: Any) -> None:
    """Read Portkey's logs export and feedback: SOURCE is a file of JSON lines, or a folder of them.

    Example: router-ml import portkey logs.jsonl --rule "feedback=score,min=-10,max=10" --out logs
    """
    names = ("session_key", "tenant_key", "task_key")
    _import("portkey", source, {name: options.pop(name) for name in names}, **options)


@import_.command("helicone")
@click.argument("source")
@click.option("--model", type=click.Choice(["request_model", "model", "response_model"]), default="request_model",
              show_default=True, help="The column with the router's model ids.")  # fmt: skip
@click.option("--session-key", default="Helicone-Session-Id", show_default=True, help="The property with the session.")
@click.option("--tenant-key", help="The property with the tenant; otherwise the user.")
@click.option("--task-key", default="task", show_default=True, help="The property with the task.")
@_with(*_COMMON)
def import_helicone(source: str, **options: Any) -> None:
    """Read Helicone's requests: SOURCE is a file (JSON lines, CSV, Parquet), or a folder of them.

    Example: router-ml import helicone requests.jsonl --rule "accuracy=score,max=100" --out logs
    """
    names = ("model", "session_key", "tenant_key", "task_key")
    _import("helicone", source, {name: options.pop(name) for name in names}, **options)


@import_.command("table")
@click.argument("source")
@click.option("--column", "columns", multiple=True, help="LOG_COLUMN=COLUMN of the file, where they differ.")
@click.option("--unit", "units", multiple=True, help="time=s|ms|us|ns, cost_usd=cents|…, latency_ms=s|…")
@click.option("--constant", "constants", multiple=True, help="LOG_COLUMN=VALUE of every row.")
@click.option("--signal", "signals", multiple=True, help="NAME=COLUMN with feedback, NAME being that of a rule.")
@_with(*_COMMON)
def import_table(source: str, **options: Any) -> None:
    """Read a CSV, JSON lines or Parquet file SOURCE whose columns you name.

    Example: router-ml import table calls.csv --column request_id=id --column time=ts --unit time=s --out logs
    """
    names = ("columns", "units", "constants", "signals")
    settings = {name: _pairs(options.pop(name), f"--{name.removesuffix('s')}") for name in names}
    _import("table", source, settings, **options)


@import_.command("store")
@click.argument("source")
@_with(*_COMMON)
def import_store(source: str, **common: Any) -> None:
    """Read the service's own store: SOURCE is its SQLite file or SQLAlchemy URL; outcomes that came later are taken in.

    Example: router-ml import store router-ml.db --catalog catalog.json --out logs
    """
    _import("store", source, {}, **common)


@import_.command("feedback")
@click.argument("files", nargs=-1, type=ExistingFile)
@_OUT
@_with(*_RULES, *_FILES)
def import_feedback(
    files: tuple[Path, ...], out: Path, rules_file: Path | None, rules: tuple[str, ...],
    feedback_columns: tuple[str, ...], feedback_source: str | None, feedback_time_unit: str | None,
) -> None:  # fmt: skip
    """Bring late feedback in FILES, or other rules for what is there already, to the rows of an imported log.

    Example: router-ml import feedback thumbs.csv --out logs --rule thumbs=thumbs,reliability=0.9
    """
    from training.importers.importing import import_feedback as run

    signals = _signals(files, feedback_columns, feedback_source, feedback_time_unit)
    _say(run(signals, out=out, feedback=_rules(rules_file, rules)), out)


@import_.command("outcomes")
@click.argument("file", type=ExistingFile)
@click.option("--catalog", required=True, type=ExistingFile, help="Model cards, JSON.")
@click.option("--logging", type=click.Choice(LOGGINGS), default="full", show_default=True,
              help="Every model's outcome, one drawn evenly, or mostly the best model's.")  # fmt: skip
@click.option("--out", required=True, type=PathArg, help="The log directory to write.")
@click.option("--split", help="Only rows whose column 'split' has this value.")
@click.option(
    "--preamble-tokens", default=0, show_default=True, help="Input tokens that each prompt has beside its text."
)
@click.option(
    "--max-reject-share", default=0.05, show_default=True, help="Past this share of bad rows nothing is written."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same result.")
@click.option("--overwrite", is_flag=True, help="Replace an existing log.")
def import_outcomes(
    file: Path, catalog: Path, logging: Any, out: Path, split: str | None, preamble_tokens: int,
    max_reject_share: float, seed: int, overwrite: bool,
) -> None:  # fmt: skip
    """Turn an outcome matrix FILE (a row a prompt, columns correct/MODEL or quality/MODEL) into a log.

    Example: router-ml import outcomes mmlu_pro.parquet --catalog catalog.json --logging uniform --out logs
    """
    from router_ml.catalog import Catalog
    from training import outcomes

    with bar("rows") as rows:
        summary = outcomes.import_outcomes(
            file, Catalog.load(catalog), logging=logging, out=out, split=split, preamble_tokens=preamble_tokens,
            max_reject_share=max_reject_share, seed=seed, overwrite=overwrite, progress=rows,
        )  # fmt: skip
    say_log(summary, out)


def _import(
    kind: str, source: str, settings: Mapping[str, Any], *, out: Path, catalog: Path | None, rules_file: Path | None,
    rules: tuple[str, ...], feedback_data: tuple[Path, ...], feedback_columns: tuple[str, ...],
    feedback_source: str | None, feedback_time_unit: str | None, max_reject_share: float,
) -> None:  # fmt: skip
    from router_ml.catalog import Catalog
    from training.importers.importing import import_log

    with bar("rows") as rows:
        summary = import_log(
            kind,
            source,
            out=out,
            catalog=Catalog.load(catalog) if catalog else None,
            feedback=_rules(rules_file, rules),
            signals=_signals(feedback_data, feedback_columns, feedback_source, feedback_time_unit),
            settings=settings,
            max_reject_share=max_reject_share,
            progress=rows,
        )
    _say(summary, out)


def _rules(file: Path | None, rules: tuple[str, ...]) -> list[Any] | None:
    from training.feedback import load_rules, parse_rule

    if file is None and not rules:
        return None
    # What is said on the command line comes first, so that it holds.
    return [*map(parse_rule, rules), *(load_rules(file) if file else [])]


def _signals(files: Iterable[Path], columns: tuple[str, ...], source: str | None, time_unit: str | None) -> Any:
    from training.importers.signals import read_signals

    names = _pairs(columns, "--feedback-column")
    for file in files:
        yield from read_signals(file, columns=names, source=source, time_unit=time_unit)


def _pairs(given: Iterable[str], option: str) -> dict[str, str]:
    found = {}
    for text in given:
        name, is_pair, value = text.partition("=")
        if not (name and is_pair and value):
            raise InputError(f"{option} {text}: write it as NAME=VALUE")
        found[name] = value
    return found


def _say(summary: Any, out: Path) -> None:
    say_log(summary.log, out)
    click.echo(f"  {summary.added} added, {summary.known} were there already, {summary.updated} say something new")
    for why, count in summary.skipped.items():
        click.echo(f"  {count} left out: {why}")
    if summary.signals:
        click.echo(f"  {summary.signals} signals of feedback; the quality of {summary.requality} rows is another now")
        if summary.unjoined:
            click.echo(f"  {summary.unjoined} signals have no row yet")
        if summary.ambiguous:
            click.echo(
                f"  {summary.ambiguous} signals name a request that went to several models, and not whose answer"
            )
        if summary.unread:
            click.echo(f"  {summary.unread} signals say nothing that their rule can read")
        for source, count in summary.without_rule.items():
            click.echo(f"  {count} signals of {source!r} have no rule: give --rule {source}=KIND")
    if summary.without_card is None:
        click.echo("  no model has a card: give --catalog, here or when the log is used")
    for model, count in list((summary.without_card or {}).items())[:10]:
        click.echo(f"  {count} rows of {model!r}, which has no card in the catalogue")
