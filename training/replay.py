"""A shadow on trial without any traffic: a log's newest requests, sent once more through the real service."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from router_ml.bundle import read_bundle
from router_ml.errors import InputError, RouterError
from router_ml.policy import Policy
from training.candidates import allowed_models, first_named
from training.challenge import Contender
from training.held_out import held_out
from training.local_service import local_service, send
from training.simulate import true_quality

Outcomes = dict[tuple[str, str], dict[str, Any]]
PAUSE_S = 0.003
"""Between two requests: a shadow is scored once its answer is out, and left out where the next one is waiting."""


def replay(
    log: pl.DataFrame,
    champion: Path,
    challenger: Path,
    folder: Path,
    *,
    truth: Path | None = None,
    policy: Policy | None = None,
    exploration_rate: float = 0.5,
    requests: int = 500,
    seed: int = 0,
) -> str:
    """Sends the log's newest requests to `router-ml serve` with both bundles, and gives the store that it leaves.

    Of each session one request, of those that neither bundle has learnt from. The service runs on this machine, in a
    process of its own, under `policy` with its exploration at `exploration_rate`, which is far above what live traffic
    would bear; no model is called. An outcome is
    reported where one is known: for a simulated log (`truth`, its directory) drawn from the truth, else the one that
    the log has of the very model that was chosen. `folder` is emptied first. Raises InputError where no request is new
    to both bundles, RouterError where the service decides none.
    """
    rows = _newest(log, champion, challenger, requests)
    known = _outcomes(log, rows) if truth is None else _drawn(truth, rows, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    under = (policy or Policy()).with_changes(exploration_rate=exploration_rate, explore=())
    store = folder / "store.db"
    options = ["--bundle", champion, "--challenger", challenger, "--store", store]
    refused: list[str] = []
    with local_service([str(option) for option in options], folder / "service.log") as url:
        send(f"{url}/policy", under.to_json(), method="PUT")
        for request, body in _bodies(rows, Contender.load(champion).router.catalog.ids, first_named(log)):
            try:
                decision = send(f"{url}/route", body)
            except RouterError as error:
                refused.append(str(error))
                continue
            outcome = known.get((request, decision["model"]))
            if outcome is not None:
                send(f"{url}/outcomes", {"decision_id": decision["decision_id"], **outcome})
            time.sleep(PAUSE_S)
    if len(refused) == len(rows):
        raise RouterError(f"the service decided none of {len(rows)} requests: {refused[0]}")
    return str(store)


def _newest(log: pl.DataFrame, champion: Path, challenger: Path, most: int) -> pl.DataFrame:
    """The newest requests that are new to both bundles, one row a request and one request a session, oldest first."""
    rows = log
    for bundle in (champion, challenger):
        new = held_out(log, read_bundle(bundle).manifest)[0]["request_id"]
        rows = rows.filter(pl.col("request_id").is_in(new.implode()))
    texts = rows.filter(pl.col("prompt").is_not_null() | pl.col("messages").is_not_null())
    alone = pl.coalesce("session", "request_id")
    texts = texts.unique("request_id", keep="first", maintain_order=True)
    texts = texts.filter(alone.is_first_distinct()).sort("time").tail(most)
    if texts.is_empty():
        raise InputError("no request of the log that has a text is new to both bundles: nothing can be replayed")
    return texts


def _bodies(
    rows: pl.DataFrame, models: tuple[str, ...], first: Mapping[str, datetime]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each request's id and the body of its POST /route."""
    names = ("request_id", "prompt", "messages", "tools", "tenant", "task")
    for allowed, row in zip(allowed_models(rows, models, first), rows.select(names).iter_rows(named=True), strict=True):
        body = {name: row[name] for name in ("request_id", "tenant", "task") if row[name] is not None}
        body |= {name: json.loads(row[name]) for name in ("messages", "tools") if row[name] is not None}
        if "messages" not in body:
            body["prompt"] = row["prompt"]
        if allowed is not None:
            body["candidates"] = list(allowed)
        yield row["request_id"], body


def _outcomes(log: pl.DataFrame, rows: pl.DataFrame) -> Outcomes:
    """What the log knows of these requests, by request and model."""
    told = log.filter(
        pl.col("request_id").is_in(rows["request_id"].implode()), pl.col("quality").is_not_null(),
        pl.col("fallback_from").is_null(),
    )  # fmt: skip
    columns = ("input_tokens", "output_tokens", "cost_usd", "latency_ms", "quality", "quality_source")
    return {
        (row["request_id"], row["model"]): {name: row[name] for name in columns if row[name] is not None}
        for row in told.select("request_id", "model", *columns).iter_rows(named=True)
    }


def _drawn(truth: Path, rows: pl.DataFrame, seed: int) -> Outcomes:
    """An answer of every model to these requests, drawn from what is true of the simulated log."""
    rng = np.random.default_rng(seed)
    found: Outcomes = {}
    for row in true_quality(truth, rows["request_id"]).iter_rows(named=True):
        for name in row:
            kind, _, model = name.partition("/")
            if kind == "p":
                outcome = {"cost_usd": float(row[f"cost_usd/{model}"]), "quality_source": "simulated"}
                found[row["request_id"], model] = outcome | {"quality": float(rng.random() < row[name])}
    return found
