"""The command `router-ml serve`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from router_ml.terminal import TRACKING, ExistingFile, PathArg


@click.command()
@click.option("--bundle", type=PathArg, help="A bundle directory.")
@click.option("--model", help="A registered router instead, as NAME@ALIAS.")
@click.option(
    "--cache", type=PathArg, default=Path("serving-bundle"), show_default=True, help="Where --model is copied to."
)
@click.option("--policy", type=ExistingFile, help="A policy file, TOML.")
@click.option("--store", default="router-ml.db", show_default=True, help="SQLite file or SQLAlchemy URL.")
@click.option("--spool", type=PathArg, help="Where decisions wait for the store; by default beside an SQLite file.")
@click.option(
    "--store-prompts", default="features", show_default=True, type=click.Choice(["none", "features", "text"]),
    help="What is kept of a request: nothing, what the learner saw of it, or its text, too.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback, API keys are needed.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-keys", type=ExistingFile, help="TOML file of keys: hashes, scopes, bounds.")
@click.option(
    "--embed-deadline-ms",
    default=50.0,
    show_default=True,
    help="How long a transformer may take; past it the bundle's static twin answers.",
)
@TRACKING
def serve(
    bundle: Path | None, model: str | None, cache: Path, policy: Path | None, store: str, spool: Path | None,
    store_prompts: str, host: str, port: int, api_keys: Path | None, embed_deadline_ms: float,
    tracking_uri: str,
) -> None:  # fmt: skip
    """Serve routing decisions at POST /route.

    Example: router-ml serve --bundle bundle --port 8000
    """
    from serving.keys import KEYS_VARIABLE, read_api_keys
    from serving.settings import Settings

    if (bundle is None) == (model is None):
        raise click.UsageError("give either --bundle DIRECTORY or --model NAME@ALIAS")
    if model is not None:
        from router_ml import registry

        name, _, alias = model.partition("@")
        version = registry.resolve(tracking_uri, name, alias or registry.CHAMPION)
        bundle = registry.download(tracking_uri, name, version.version, cache)
    assert bundle is not None
    settings = Settings(
        bundle=bundle, policy=policy, store=store, spool=spool, store_prompts=store_prompts,  # type: ignore[arg-type]
        host=host, port=port, embed_deadline_ms=embed_deadline_ms,
        api_keys=read_api_keys(api_keys, os.environ.get(KEYS_VARIABLE)),
    )  # fmt: skip
    from serving.app import serve as run

    run(settings)
