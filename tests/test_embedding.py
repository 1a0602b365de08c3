"""Embeddings off the event loop: the same decisions in time, the twin's past the deadline, a loop that stays free."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from live_service import Running, process, running, wait_for

from benchmarks.service import load as ask_all
from benchmarks.service import new_texts
from features.golden import CONVERSATIONS
from features.load import TWIN, Learned, load_estimator, load_neighbours, load_router, load_twin, save_router
from features.staged import Staged
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.errors import BundleError, InputError
from router_ml.quality import LearnedEstimator
from router_ml.router import Router
from router_ml.store import Store
from router_ml.stored_features import unpack_features
from router_ml.types import ModelCard
from serving.embedding import ROOM, Embedder, Late, Tokens
from serving.live import LiveRouter
from serving.settings import Settings
from training.onboard import onboard_bundle
from training.train import Training, train

HARD, EASY = "Prove rigorously that the tensor comet operator is bounded.", "What is the plural of river?"
NO_TIME = 1e-3
"""A deadline in milliseconds that no embedding meets."""


@pytest.fixture(scope="module")
def static_bundle(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` makes of the log of the transformer's bundle with the static encoder."""
    out = tmp_path_factory.mktemp("static") / "bundle"
    train(tiny_log.head(4 * 120), catalog, out=out, holdout=0.0)
    return out


@pytest.fixture(scope="module")
def router(transformer_bundle: Path) -> Router:
    return load_router(transformer_bundle)


@pytest.fixture(scope="module")
def patient(transformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("patient") / "store.db"
    with running(transformer_bundle, store, embed_deadline_ms=30_000.0) as service:
        yield service


@pytest.fixture
def hasty(transformer_bundle: Path, tmp_path: Path) -> Iterator[Running]:
    with running(transformer_bundle, tmp_path / "store.db", embed_deadline_ms=NO_TIME) as service:
        yield service


def says(answer: dict[str, Any], router: Router, prompt: str) -> bool:
    """Whether an answer over HTTP is what the router decides, to the last bit."""
    decision = router.decide(request_of(prompt=prompt))
    theirs = [(c["model"], c["p_ok"], c["expected_cost_usd"], c["p_claim"]) for c in answer["candidates"]]
    ours = [(c.model, c.p_ok, c.expected_cost_usd, c.p_claim) for c in decision.candidates]
    return theirs == ours and answer["reason"] == decision.reason and answer["propensity"] == decision.propensity


def test_in_time_the_answer_is_the_sync_paths_bit_for_bit(patient: Running, router: Router) -> None:
    assert isinstance(router.estimator, LearnedEstimator)
    for prompt in (HARD, EASY, HARD, ""):  # the third is remembered, the last has no words
        said = patient.http.post("/route", json={"prompt": prompt})
        answer = said.json()
        assert answer["degraded"] is False and "x-router-degraded" not in said.headers
        assert says(answer, router, prompt)
        (row,) = [row for row in patient.decisions() if row["decision_id"] == answer["decision_id"]]
        live, own = unpack_features(row["features"]), router.estimator.featurizer.transform(request_of(prompt=prompt))
        assert own.embedding is not None and live.embedding is not None
        assert live.rows.tobytes() == own.rows.tobytes() and live.embedding.tobytes() == own.embedding.tobytes()
        assert row["degraded"] is False
    assert patient.http.get("/readyz").json()["degraded"] == []
    assert patient.metric("router_embedding_queue") == 0


def test_a_tiers_threshold_reaches_the_embedded_request(router: Router) -> None:
    staged = Staged.of(router.estimator)
    assert staged is not None
    request = request_of(prompt=HARD)
    seen = staged.read(request)
    rest = staged.rest(seen, staged.encoder.embed(seen.tokens))
    assert np.array_equal(rest.estimate(request).p_ok, router.estimator.estimate(request).p_ok)
    with pytest.raises(ValueError, match="not in list"):
        rest.estimate(dataclasses.replace(request, quality_threshold=0.123))


def test_past_the_deadline_the_twin_answers_as_the_static_router_would(hasty: Running, static_bundle: Path) -> None:
    static = load_router(static_bundle)
    for prompt in (HARD, EASY):
        said = hasty.http.post("/route", json={"prompt": prompt, "explain": True})
        answer = said.json()
        assert answer["degraded"] is True and said.headers["x-router-degraded"] == "true"
        assert says(answer, static, prompt)
        assert answer["model_version"] == hasty.service.live.live.router.model_version != static.model_version
        explained = answer["explanation"]
        assert explained["nearest"] and explained["nearest"][0]["similarity"] > 0.3
        assert [c["p_ok"] for c in explained["candidates"]] == pytest.approx([c["p_ok"] for c in answer["candidates"]])
    rows = hasty.decisions()
    assert [row["degraded"] for row in rows] == [True, True]
    assert len(list(hasty.service.store.iter_log_rows())) == 2
    assert hasty.metric('router_degraded_total{why="deadline"}') + hasty.metric(
        'router_degraded_total{why="busy"}'
    ) == len(rows)


def test_every_endpoint_that_decides_has_the_deadline(hasty: Running) -> None:
    preview = hasty.http.post("/route/preview", json={"prompt": "one"}).json()
    assert preview["degraded"] is True
    batch = hasty.http.post("/route/batch", json={"requests": [{"prompt": "two"}, {"prompt": "three"}]}).json()
    assert [item["decision"]["degraded"] for item in batch["results"]] == [True, True]
    body = {"messages": [{"role": "user", "content": "four"}]}
    plano = hasty.http.post("/routing/v1/chat/completions", json=body)
    assert plano.status_code == 200 and plano.headers["x-router-degraded"] == "true" and plano.json()["models"]
    assert len(hasty.decisions()) == 3  # a preview is none
    spoken = hasty.http.get("/openapi.json").json()["components"]["schemas"]["RouteAnswer"]
    assert spoken["properties"]["degraded"]["type"] == "boolean" and "degraded" in spoken["required"]


def test_what_was_late_once_is_there_when_it_is_asked_again(hasty: Running, router: Router) -> None:
    assert hasty.http.post("/route", json={"prompt": HARD}).json()["degraded"] is True

    def in_time() -> bool:
        answer = hasty.http.post("/route", json={"prompt": HARD}).json()
        return not answer["degraded"] and says(answer, router, HARD)

    wait_for(in_time)


def test_an_encoder_that_fails_degrades_and_says_nothing_of_the_prompt(
    transformer_bundle: Path, static_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(transformer_bundle, tmp_path / "store.db", embed_deadline_ms=30_000.0) as service:
        embedding = service.service.live.live.embedding
        assert embedding is not None
        bert = embedding.staged.encoder.bert
        model, bert._model = bert._model, None  # calling it raises
        answer = service.http.post("/route", json={"prompt": "secret " + HARD}).json()
        assert answer["degraded"] is True and says(answer, load_router(static_bundle), "secret " + HARD)
        assert service.metric('router_degraded_total{why="failed"}') == 1
        assert "TypeError" in caplog.text and "secret" not in caplog.text
        bert._model = model
        assert service.http.post("/route", json={"prompt": "secret " + HARD}).json()["degraded"] is False


def test_without_its_thread_the_service_degrades_and_readiness_says_so(hasty: Running) -> None:
    embedding = hasty.service.live.live.embedding
    assert embedding is not None
    embedding.embedder.close()
    wait_for(lambda: not embedding.embedder.alive)
    assert hasty.http.get("/readyz").json()["degraded"] == ["encoder"]
    assert hasty.http.post("/route", json={"prompt": EASY}).json()["degraded"] is True
    assert hasty.metric('router_degraded_total{why="busy"}') == 1


def test_a_flood_is_answered_within_the_deadline_and_the_loop_stays_free(
    transformer_bundle: Path, tmp_path: Path
) -> None:
    """16 connections ask without a pause for texts that take some 100 ms each: on the loop each would wait 1.6 s."""
    deadline_s, slack_s = 0.1, 0.8
    texts = new_texts(["river stone cloud engine ledger market protein theorem " * 40], 30_000)
    store = tmp_path / "store.db"
    with process(bundle=transformer_bundle, store=str(store), embed_deadline_ms=deadline_s * 1000) as (server, http):
        port = http.base_url.port
        assert port is not None
        run = asyncio.run(ask_all(port, texts, 16, 3.0))
        text = http.get("/metrics").text
        server.terminate()
        server.wait(30)  # its store is committed then
    assert run["answers"] > 100 and run["degraded"] > 0.5
    assert run["route_ms"]["p99"] < (deadline_s + slack_s) * 1000
    assert run["healthz_ms"]["p50"] < 250 and run["healthz_ms"]["p99"] < slack_s * 1000
    counted = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("router_degraded_total{"))
    assert counted == round(run["degraded"] * run["answers"])
    rows = list(Store(str(store)).decisions())
    assert len(rows) == run["answers"] and sum(row["degraded"] for row in rows) == counted
    assert all(0.0 < row["propensity"] <= 1.0 for row in rows)


class Held:
    """An embed function that waits to be let on, and knows what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.go = threading.Semaphore(0)

    def __call__(self, tokens: Tokens) -> Any:
        self.asked.append(int(tokens[0]))
        assert self.go.acquire(timeout=20)
        return tokens.astype(np.float32)


def tokens(i: int) -> Tokens:
    return np.full(3, i, dtype=np.int64)


def in_loop(scenario: Callable[[Held, Embedder], Any]) -> Held:
    held = Held()
    embedder = Embedder(held)
    try:
        asyncio.run(scenario(held, embedder))
    finally:
        embedder.close()
        held.go.release(1000)
    wait_for(lambda: not embedder.alive)
    return held


async def asked_for(held: Held, count: int) -> None:
    for _ in range(2000):
        if len(held.asked) == count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(held.asked)


def test_the_same_text_is_embedded_once_for_all_who_wait() -> None:
    async def scenario(held: Held, embedder: Embedder) -> None:
        waiting = [asyncio.create_task(embedder.embed(tokens(i), 60.0)) for i in (1, 2, 1, 2, 2)]
        await asked_for(held, 1)
        waiting.append(asyncio.create_task(embedder.embed(tokens(1), 60.0)))  # which the thread is at
        await asyncio.sleep(0)
        held.go.release(2)
        assert [found[0] for found in await asyncio.gather(*waiting)] == [1, 2, 1, 2, 2, 1]

    assert in_loop(scenario).asked == [1, 2]


def test_what_nobody_waits_for_any_more_is_not_embedded() -> None:
    async def scenario(held: Held, embedder: Embedder) -> None:
        first = asyncio.create_task(embedder.embed(tokens(1), 60.0))
        await asked_for(held, 1)
        late = asyncio.create_task(embedder.embed(tokens(2), 0.01))
        gone, alone, beside = (asyncio.create_task(embedder.embed(tokens(i), 60.0)) for i in (3, 4, 3))
        assert await late == "deadline"
        alone.cancel()
        gone.cancel()  # its text is another's, too
        await asyncio.gather(alone, gone, return_exceptions=True)
        held.go.release(3)
        assert [(await first)[0], (await beside)[0]] == [1, 3]

    assert in_loop(scenario).asked == [1, 3]


def test_a_full_queue_refuses_at_once_and_has_room_again_when_waiters_have_left() -> None:
    async def scenario(held: Held, embedder: Embedder) -> None:
        first = asyncio.create_task(embedder.embed(tokens(0), 60.0))
        await asked_for(held, 1)
        waiting = [asyncio.create_task(embedder.embed(tokens(i + 1), 60.0)) for i in range(ROOM)]
        await asyncio.sleep(0)
        assert embedder.waiting == ROOM
        assert await embedder.embed(tokens(-1), 60.0) == "busy"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await embedder.embed(tokens(-2), 0.01) == "deadline"  # it was queued
        held.go.release(1)
        await first

    assert in_loop(scenario).asked == [0]


def test_what_cannot_be_ready_in_time_is_refused_at_once() -> None:
    async def scenario(held: Held, embedder: Embedder) -> None:
        asyncio.get_running_loop().call_later(0.2, held.go.release, 1)
        assert not isinstance(await embedder.embed(tokens(1), 60.0), str)  # so that a text is known to take 0.2 s
        first = asyncio.create_task(embedder.embed(tokens(2), 60.0))
        await asked_for(held, 2)
        started = time.monotonic()
        assert await embedder.embed(tokens(3), 0.15) == "busy"
        assert time.monotonic() - started < 0.1
        second = asyncio.create_task(embedder.embed(tokens(4), 60.0))
        held.go.release(2)
        assert [(await first)[0], (await second)[0]] == [2, 4]

    assert in_loop(scenario).asked == [1, 2, 4]


def test_an_embedder_that_is_closed_leaves_nobody_waiting() -> None:
    async def scenario(held: Held, embedder: Embedder) -> None:
        waiting = [asyncio.create_task(embedder.embed(tokens(i), 60.0)) for i in range(3)]
        await asked_for(held, 1)
        embedder.close()
        held.go.release(1)
        found: list[Any] = await asyncio.gather(*waiting)
        late: Late = "busy"
        assert found[0][0] == 0 and found[1:] == [late, late] == [late, await embedder.embed(tokens(9), 60.0)]

    in_loop(scenario)


def embedders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "embedder"}


def test_the_thread_of_a_router_ends_when_no_request_uses_it(transformer_bundle: Path) -> None:
    before = embedders()
    holder = LiveRouter(transformer_bundle)
    used = holder.live  # as a request does
    models = []
    for _ in range(3):
        embedding = holder.reload().embedding
        assert embedding is not None
        models.append(weakref.ref(embedding.staged.encoder.bert))
    del embedding
    gc.collect()
    wait_for(lambda: len(embedders() - before) == 2)
    assert used.embedding is not None and used.embedding.embedder.alive
    assert [model() is None for model in models] == [True, True, False]
    del used, holder
    gc.collect()
    wait_for(lambda: embedders() <= before)


def test_a_bundle_is_warm_before_it_is_served(transformer_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(transformer_bundle, tmp_path / "copy"))
    embedding = LiveRouter(copy).live.embedding
    assert embedding is not None and len(embedding.staged.encoder.bert._said) == 1 + len(CONVERSATIONS)


def test_a_static_bundle_has_no_thread_and_no_deadline(static_bundle: Path, tmp_path: Path) -> None:
    before = embedders()
    with running(static_bundle, tmp_path / "store.db", embed_deadline_ms=NO_TIME) as service:
        answer = service.http.post("/route", json={"prompt": HARD}).json()
        assert service.service.live.live.embedding is None and embedders() <= before
        assert answer["degraded"] is False and says(answer, load_router(static_bundle), HARD)
        assert service.decisions()[0]["degraded"] is False


def test_a_bundle_without_a_twin_waits_and_says_so(
    transformer_bundle: Path, router: Router, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = load_estimator(read_bundle(transformer_bundle))
    save_router(tmp_path / "alone", alone, {"quality_threshold": 0.5})
    with (
        caplog.at_level(logging.WARNING),
        running(tmp_path / "alone", tmp_path / "s.db", embed_deadline_ms=NO_TIME) as s,
    ):
        assert "no twin that stands in" in caplog.text
        answer = s.http.post("/route", json={"prompt": HARD}).json()
        assert answer["degraded"] is False and says(answer, router, HARD)
        embedding = s.service.live.live.embedding
        assert embedding is not None
        embedding.staged.encoder.bert._model = None
        refused = s.http.post("/route", json={"prompt": EASY})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "train it again" in refused.json()["detail"]


def test_training_judges_the_twin_and_the_bundle_says_how_it_did(
    transformer_training: tuple[Training, Path], static_bundle: Path
) -> None:
    made, bundle = transformer_training
    twin, alone = (json.loads((path / "manifest.json").read_text()) for path in (bundle, static_bundle))
    assert twin["metrics"]["twin"] == {name: alone["metrics"][name] for name in ("rounds", "out_of_fold")}
    assert made.metrics["twin"]["out_of_fold"] != made.metrics["out_of_fold"]
    assert twin["twin"] == {name: alone[name] for name in twin["twin"]} and twin["twin"]["encoder"]["kind"] == "table"
    own = {name: digest for name, digest in twin["files"].items() if name.startswith(TWIN)}
    assert own == {TWIN + name: digest for name, digest in alone["files"].items()}


def test_an_altered_twin_is_refused_by_its_files_name(transformer_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(transformer_bundle, tmp_path / "copy"))
    for name in (
        "twin-booster.txt",
        "twin-encoder.npz",
        "twin-outcomes.npz",
        "twin-neighbours.npz",
        "twin-tokens.json",
    ):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleError, match=name):
            load_router(copy)
        (copy / name).write_bytes(data)


def test_a_twin_of_other_thresholds_is_refused(transformer_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(transformer_bundle)
    twin = load_twin(bundle)
    assert twin is not None
    other = dataclasses.replace(twin, calibration=dataclasses.replace(twin.calibration, thresholds=np.array([0.7])))
    save_router(tmp_path / "b", load_estimator(bundle), {"quality_threshold": 0.5}, None, Learned(other))
    with pytest.raises(BundleError, match="other quality thresholds"):
        load_router(tmp_path / "b")


def test_a_model_that_joins_later_joins_the_twin(transformer_bundle: Path, tmp_path: Path, catalog: Catalog) -> None:
    card: ModelCard = dataclasses.replace(catalog["mid"], id="mid-2", sibling="mid")
    onboard_bundle(transformer_bundle, card, out=tmp_path / "wider")
    router = load_router(tmp_path / "wider")
    assert router.twin is not None and len(router.twin.estimate(request_of(prompt=HARD)).p_ok) == 5
    past = load_neighbours(tmp_path / "wider", router.model_version, twin=True)
    assert past is not None and past.outcomes.shape[1] == 5 and past.embeddings.shape[1] == 128


def test_who_serves_keeps_the_weights_once_and_cannot_save(router: Router, tmp_path: Path) -> None:
    assert isinstance(router.estimator, LearnedEstimator)
    staged = Staged.of(router.estimator)
    assert staged is not None and staged.encoder.bert.weights is None
    with pytest.raises(TypeError, match="let go of its encoder's weights"):
        save_router(tmp_path / "b", router.estimator, {})


@pytest.mark.parametrize("value", [0.0, -1.0, 60_001.0, float("nan")])
def test_a_deadline_is_a_time(value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embed_deadline_ms"):
        Settings(bundle=tmp_path, embed_deadline_ms=value)


@pytest.mark.parametrize("first", ["transformer", "static"])
def test_a_challenger_embeds_for_itself(
    transformer_bundle: Path, tiny_bundle: Path, tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Champion and challenger may be of either kind; what a challenger has no time for, its twin decides."""
    monkeypatch.setattr("serving.shadow.LATE_SECONDS", 30.0)
    bundles = [transformer_bundle, tiny_bundle][:: 1 if first == "transformer" else -1]
    alone = [load_router(bundle).decide(request_of(prompt=HARD)) for bundle in bundles]
    settings = {"challenger": bundles[1], "embed_deadline_ms": 30_000.0}
    with running(bundles[0], tmp_path / "store.db", **settings) as live:

        def answer(share: float) -> tuple[str, float, list[dict[str, Any]]]:
            body = {"canary": {"share": share, "by": "request"}}
            assert live.http.put("/policy", json=body).status_code == 200
            told = live.http.post("/route", json={"prompt": HARD}).json()

            def kept() -> list[dict[str, Any]]:
                assert live.service.store.flush()
                return [row for row in live.service.store.shadows() if row["decision_id"] == told["decision_id"]]

            wait_for(lambda: len(kept()) == 1, 60)
            return told["model_version"], told["p_ok"], kept()

        for share, served, other in ((0.0, *alone), (1.0, *alone[::-1])):
            version, p_ok, (shadow,) = answer(share)
            assert (version, shadow["model_version"]) == (served.model_version, other.model_version)
            assert (p_ok, shadow["p_ok"]) == (pytest.approx(served.chosen.p_ok), pytest.approx(other.chosen.p_ok))
            assert not shadow["degraded"] and live.http.get("/readyz").json()["degraded"] == []
        object.__setattr__(live.service.settings, "embed_deadline_ms", NO_TIME)
        told = live.http.post("/route", json={"prompt": "Another text."}).json()
        assert told["degraded"] is (first == "static") and told["model_version"] == alone[1].model_version
