"""The command `router-ml serve`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from router_ml import log_lines
from router_ml.errors import RouterError
from router_ml.terminal import TRACKING, ExistingFile, PathArg

log = logging.getLogger(__name__)


@click.command()
@click.option("--bundle", type=PathArg, help="A bundle directory.")
@click.option("--model", help="A registered router instead, as NAME@ALIAS; the alias is followed.")
@click.option(
    "--cache", type=PathArg, default=Path("serving-bundle"), show_default=True,
    help="Where versions of --model are kept: the last good one serves while the registry is away.",
)  # fmt: skip
@click.option("--poll-seconds", default=10.0, show_default=True, help="How often the registry is asked for --model.")
@click.option(
    "--challenger", type=PathArg,
    help="A second bundle directory: scored beside the first, and served as the policy's canary says.",
)  # fmt: skip
@click.option("--challenger-alias", help="With --model: an alias of the same model whose version is the challenger.")
@click.option("--policy", type=ExistingFile, help="A policy file, TOML.")
@click.option(
    "--store", default="router-ml.db", show_default=True, envvar="ROUTER_ML_STORE",
    help="SQLite file or SQLAlchemy URL; one with a password is better in ROUTER_ML_STORE.",
)  # fmt: skip
@click.option("--spool", type=PathArg, help="Where decisions wait for the store; by default beside an SQLite file.")
@click.option(
    "--store-prompts", default="features", show_default=True, type=click.Choice(["none", "features", "text"]),
    help="What is kept of a request: nothing, what the learner saw of it, or its text, too.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback, API keys are needed.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-keys", type=ExistingFile, help="TOML file of keys: hashes, scopes, bounds.")
@click.option("--tradeoff", type=PathArg, help="A file of router-ml tradeoff, for the console; followed.")
@click.option(
    "--release-logs", type=click.Path(exists=True, path_type=Path),
    help="The log that the console's promotions are judged on; by default the store.",
)  # fmt: skip
@click.option("--max-body-bytes", default=2 * 1024 * 1024, show_default=True, help="Of a request's body.")
@click.option("--max-messages", default=2_000, show_default=True, help="Of a request's conversation.")
@click.option("--max-candidates", default=1_000, show_default=True, help="That a request may name.")
@click.option("--request-seconds", default=30.0, show_default=True, help="A request's head and its body may each take.")
@click.option("--session-seconds", default=3600.0, show_default=True, help="How long a session is remembered.")
@click.option(
    "--embed-deadline-ms", default=150.0, show_default=True,
    help="How long a transformer may take; past it the bundle's static twin answers.",
)  # fmt: skip
@click.option(
    "--drain-seconds", default=0.0, show_default=True,
    help="How long the port stays open after SIGTERM, while readiness says no.",
)  # fmt: skip
@click.option(
    "--replicas", default=1, show_default=True,
    help="How many processes share the traffic: each takes its part of a model's max_concurrency and tokens a second.",
)  # fmt: skip
@click.option(
    "--baseline-model",
    help="The model that metrics compare costs with; by default the one that was best in the training log.",
)
@click.option(
    "--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]),
    help="Each line of the log as text, or as one JSON object.",
)  # fmt: skip
@click.option(
    "--otlp-endpoint",
    help="Trace to this collector, OTLP over HTTP; by default to OTEL_EXPORTER_OTLP_ENDPOINT, if that is set.",
)
@TRACKING
def serve(
    bundle: Path | None, model: str | None, cache: Path, poll_seconds: float, challenger: Path | None,
    challenger_alias: str | None, policy: Path | None, store: str, spool: Path | None, store_prompts: str,
    host: str, port: int, api_keys: Path | None, tradeoff: Path | None, release_logs: Path | None,
    max_body_bytes: int, max_messages: int, max_candidates: int,
    request_seconds: float, session_seconds: float, embed_deadline_ms: float, drain_seconds: float,
    replicas: int, baseline_model: str | None, log_format: str, otlp_endpoint: str | None, tracking_uri: str,
) -> None:  # fmt: skip
    """Serve routing decisions at POST /route.

    Example: router-ml serve --bundle bundle --port 8000
    """
    from serving.keys import KEYS_VARIABLE, read_api_keys
    from serving.settings import Settings

    if (bundle is None) == (model is None):
        raise click.UsageError("give either --bundle DIRECTORY or --model NAME@ALIAS")
    log_lines.configure(log_format)  # type: ignore[arg-type]
    try:
        settings = Settings(
            bundle=bundle, model=model, tracking_uri=tracking_uri, cache=cache, poll_seconds=poll_seconds,
            challenger=challenger, challenger_alias=challenger_alias, policy=policy, store=store, spool=spool,
            store_prompts=store_prompts,  # type: ignore[arg-type]
            host=host, port=port, session_seconds=session_seconds, embed_deadline_ms=embed_deadline_ms,
            api_keys=read_api_keys(api_keys, os.environ.get(KEYS_VARIABLE)),
            tradeoff=tradeoff, release_logs=release_logs, max_body_bytes=max_body_bytes, max_messages=max_messages,
            max_candidates=max_candidates,
            request_seconds=request_seconds, drain_seconds=drain_seconds, replicas=replicas,
            baseline_model=baseline_model,
            log_format=log_format, otlp_endpoint=otlp_endpoint,  # type: ignore[arg-type]
        )  # fmt: skip
        from serving.app import serve as run

        run(settings)
    except RouterError as error:
        if log_format != "json":
            raise
        log.critical("%s", error)
        sys.exit(2)
