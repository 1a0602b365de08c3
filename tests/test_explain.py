"""Explanations: exact, the same at once and later, over HTTP and on the command line, and no prompt in them unasked."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lightgbm
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from live_service import Running, free_port, running, wait_for

from features.explain import LARGEST, NEAREST, Explanation, as_text, explain, explain_stored
from features.load import NEIGHBOURS, load_neighbours, load_router, save_router
from features.neighbours import Neighbours
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.quality import Calibration, LearnedEstimator
from router_ml.router import Router
from router_ml.store import Store
from router_ml.types import CandidateFeatures, RouteDecision
from training.train import train

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the comet operator is bounded."
UNKNOWN_WORDS = "Zzyzx qwfp"


@pytest.fixture(scope="module")
def router(tiny_bundle: Path) -> Router:
    return load_router(tiny_bundle, Policy(exploration_rate=0.0))


@pytest.fixture(scope="module")
def past(tiny_bundle: Path, router: Router) -> Neighbours:
    found = load_neighbours(tiny_bundle, router.model_version)
    assert found is not None
    return found


def learner(router: Router) -> LearnedEstimator:
    assert isinstance(router.estimator, LearnedEstimator)
    return router.estimator


def decided(router: Router, **body: Any) -> tuple[RouteDecision, CandidateFeatures]:
    decision, estimate = router.decide_with_estimate(request_of(**body))
    assert estimate.features is not None
    return decision, estimate.features


@pytest.fixture(scope="module")
def explained(router: Router, past: Neighbours) -> Explanation:
    decision, features = decided(router, prompt=HARD, region="us", candidates=("mid", "local", "frontier", "nobody"))
    return explain(router, decision, features, past)


def test_contributions_sum_to_the_boosters_raw_score(router: Router, past: Neighbours) -> None:
    names = learner(router).featurizer.names
    for prompt in (EASY, HARD, "", UNKNOWN_WORDS):
        decision, features = decided(router, prompt=prompt)
        raw = np.asarray(lightgbm.Booster(model_str=learner(router).trees.text).predict(features.rows, raw_score=True))
        for candidate in explain(router, decision, features, past).candidates:
            i = router.catalog.index[candidate.model]
            parts = [x.log_odds for x in candidate.contributions]
            assert candidate.log_odds == pytest.approx(raw[i], abs=1e-9)
            assert candidate.base_log_odds + sum(parts) + candidate.other_log_odds == pytest.approx(raw[i], abs=1e-9)
            assert len(parts) == LARGEST and sorted(map(abs, parts), reverse=True) == list(map(abs, parts))
            for x in candidate.contributions:
                assert x.value == features.rows[i, names.index(x.feature)]


def test_a_contribution_is_what_the_feature_changes(router: Router) -> None:
    # On average over the order in which features become known: a feature that no tree asks for adds nothing.
    booster = lightgbm.Booster(model_str=learner(router).trees.text)
    used = dict(zip(booster.feature_name(), booster.feature_importance("split"), strict=True))
    decision, features = decided(router, prompt=HARD)
    for candidate in explain(router, decision, features, None).candidates:
        assert all(used[x.feature] > 0 for x in candidate.contributions if x.log_odds != 0.0)
        assert any(x.log_odds != 0.0 for x in candidate.contributions)


def test_the_estimates_are_those_that_were_averaged_and_calibrated(router: Router, explained: Explanation) -> None:
    estimator = learner(router)
    decision, features = decided(router, prompt=HARD)
    names = estimator.featurizer.names
    booster = np.asarray(lightgbm.Booster(model_str=estimator.trees.text).predict(features.rows))
    decided_p = {c.model: c.p_ok for c in decision.candidates}
    for candidate in explained.candidates:
        i = router.catalog.index[candidate.model]
        parts = dict(candidate.estimates)
        assert parts.pop("booster") == pytest.approx(booster[i], abs=1e-6)
        assert len(parts) == len(features.parts)
        for name, p in parts.items():
            assert p == features.rows[i, names.index(name)]
        # The excluded ones', too: what was not allowed may have been likely.
        assert candidate.p_ok == pytest.approx(decided_p[candidate.model], abs=1e-6)


def test_probabilities_are_those_of_the_quality_threshold_that_was_asked_for(router: Router, past: Neighbours) -> None:
    known = learner(router).calibration
    stricter = replace(known, intercept=known.intercept - 1.0, thresholds=known.thresholds + 0.25)
    both = replace(learner(router), calibration=Calibration.stack([known, stricter]))
    graded = replace(router, estimator=both)
    decision, _ = graded.decide_with_estimate(request_of(prompt=HARD, region="us"))
    decision = replace(decision, quality_threshold=0.75)
    estimate = both.estimate(request_of(prompt=HARD, quality_threshold=0.75))
    assert estimate.features is not None
    explained = explain(graded, decision, estimate.features, past)
    assert {c.role for c in explained.candidates} == {"chosen", "fallback", "excluded"}
    for candidate in explained.candidates:
        i = router.catalog.index[candidate.model]
        for name in ("p_ok", "p_low", "p_high", "p_claim"):
            assert getattr(candidate, name) == pytest.approx(getattr(estimate, name)[i], rel=1e-7), name
    at_half = explain(graded, replace(decision, quality_threshold=0.5), estimate.features, past)
    for strict, lenient in zip(explained.candidates, at_half.candidates, strict=True):
        assert strict.p_ok is not None and lenient.p_ok is not None and strict.p_ok < lenient.p_ok - 0.05


def test_every_candidate_is_there_with_what_excluded_it(explained: Explanation) -> None:
    roles = {c.model: (c.role, c.excluded) for c in explained.candidates}
    assert roles["hosted"] == ("excluded", explained.excluded["hosted"])
    assert roles["local"] == ("excluded", "not in region 'us'")
    assert {roles["mid"], roles["frontier"]} == {("chosen", None), ("fallback", None)}
    assert explained.candidates[0].model == explained.model and explained.candidates[0].role == "chosen"
    assert set(explained.excluded) == {"hosted", "local", "nobody"}
    assert all((c.expected_cost_usd is None) == (c.role == "excluded") for c in explained.candidates)
    text = as_text(explained)
    for said in (explained.reason, explained.decision_id, "excluded local", "not in region 'us'", "excluded nobody"):
        assert said in text


def test_the_nearest_are_real_requests_with_their_outcomes(
    explained: Explanation, tiny_log: pl.DataFrame, catalog: Catalog
) -> None:
    logged = {(r, m): q for r, m, q in tiny_log.select("request_id", "model", "quality").iter_rows()}
    prompts = dict(tiny_log.select("request_id", "prompt").iter_rows())
    assert len(explained.nearest) == NEAREST
    for request in explained.nearest:
        assert request.outcomes == {model: logged[request.request_id, model] for model in catalog.ids}
        assert prompts[request.request_id].startswith("Prove rigorously")
        assert request.prompt is None
    similar = [request.similarity for request in explained.nearest]
    assert similar == sorted(similar, reverse=True) and similar[0] <= 1.001
    for candidate in explained.candidates:
        qualities = [request.outcomes[candidate.model] for request in explained.nearest]
        assert candidate.nearest_known == NEAREST
        assert candidate.nearest_quality == pytest.approx(np.mean(qualities), abs=1e-6)


def test_what_is_not_known_is_said(router: Router, past: Neighbours) -> None:
    decision, features = decided(router, prompt=UNKNOWN_WORDS)
    strange = explain(router, decision, features, past)
    assert strange.nearest == () and "no word that the encoder knows" in str(strange.note)
    assert {(c.nearest_known, c.nearest_quality) for c in strange.candidates} == {(0, None)}
    assert "train a new one" in str(explain(router, decision, features, None).note)
    assert explain(router, decision, features, past, nearest=0).nearest == ()
    partly = Neighbours(past.ids, past.embeddings, np.full_like(past.outcomes, np.nan))
    partly.outcomes[:, 1] = 0.25
    decision, features = decided(router, prompt=EASY)
    by_model = {c.model: c for c in explain(router, decision, features, partly).candidates}
    assert [by_model[m].nearest_quality for m in router.catalog.ids] == [None, 0.25, None, None]
    assert [by_model[m].nearest_known for m in router.catalog.ids] == [0, NEAREST, 0, 0]


def test_another_bundles_decision_is_refused(router: Router, past: Neighbours) -> None:
    decision, features = decided(router, prompt=EASY)
    other = Router(router.catalog, router.estimator, router.policy, "another")
    with pytest.raises(InputError, match=f"made by bundle {router.model_version}, and this is another"):
        explain(other, decision, features, past)


# Over HTTP


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain") / "router.db"


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, store: Path) -> Iterator[Running]:
    with running(tiny_bundle, store) as live:
        yield live


def ask(live: Running, **body: Any) -> dict[str, Any]:
    response = live.http.post("/route", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stored(live: Running, decision_id: str) -> dict[str, Any]:
    assert live.service.store.flush()
    row = live.service.store.decision(decision_id)
    assert row is not None
    return row


def as_sent(explanation: Explanation) -> dict[str, Any]:
    return json.loads(json.dumps(explanation.to_json()))


def test_an_explanation_is_there_only_when_asked_for(live: Running) -> None:
    assert "explanation" not in ask(live, prompt=HARD)
    assert "explanation" not in ask(live, prompt=HARD, explain=False)
    answer = ask(live, prompt=HARD, explain=True)
    explanation = answer["explanation"]
    for name in ("decision_id", "model", "reason", "excluded", "model_version", "policy_version", "min_probability"):
        assert explanation[name] == answer[name]
    assert [c["model"] for c in explanation["candidates"]] == [c["model"] for c in answer["candidates"]]
    for told, offered in zip(explanation["candidates"], answer["candidates"], strict=True):
        for name in ("p_ok", "p_low", "p_high", "p_claim", "expected_cost_usd", "expected_total_cost_usd"):
            assert told[name] == pytest.approx(offered[name], rel=1e-7), name
    assert live.http.post("/route", json={"prompt": HARD, "explain": "yes"}).status_code == 422


def test_past_requests_are_read_when_the_first_explanation_is_asked_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with running(copy, tmp_path / "store.db", watch_seconds=0) as live:
        ask(live, prompt=HARD)
        assert "_neighbours" not in vars(live.service.live.live)
        ask(live, prompt=HARD, explain=True)
        assert "_neighbours" in vars(live.service.live.live)
        live.service.live.reload()  # its cache goes with the router it belongs to
        assert "_neighbours" not in vars(live.service.live.live)
        (copy / NEIGHBOURS).write_bytes(b"altered")
        told = ask(live, prompt=HARD, explain=True)["explanation"]
        assert told["nearest"] == [] and "cannot be read" in told["note"] and str(tmp_path) not in json.dumps(told)
        assert told["candidates"][0]["contributions"]


def test_explaining_later_is_explaining_at_once(live: Running, router: Router, past: Neighbours) -> None:
    for body in (
        {"prompt": HARD},
        {"prompt": EASY, "region": "eu", "max_tokens": 20},
        {"messages": [{"role": "user", "content": HARD}], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": UNKNOWN_WORDS},
        {"prompt": "", "candidates": ["mid", "nobody"]},
    ):
        at_once = ask(live, **body, explain=True)["explanation"]
        row = stored(live, at_once["decision_id"])
        assert row["prompt"] is None and row["messages"] is None
        assert as_sent(explain_stored(router, row, past)) == at_once


def test_a_stored_prompt_explains_where_there_are_no_features(
    tiny_bundle: Path, tmp_path: Path, router: Router, past: Neighbours
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HARD}]
    with running(tiny_bundle, tmp_path / "store.db", store_prompts="text") as live:
        for body in ({"prompt": EASY}, {"messages": messages, "tools": tools}):
            at_once = ask(live, **body, explain=True)["explanation"]
            row = stored(live, at_once["decision_id"]) | {"features": None}  # as an earlier program kept it
            assert as_sent(explain_stored(router, row, past)) == at_once


def test_many_may_ask_for_explanations_while_others_are_routed(live: Running) -> None:
    expected = {p: ask(live, prompt=p, explain=True)["explanation"] for p in (EASY, HARD)}
    wrong: list[str] = []

    def client(prompt: str, explain: bool) -> None:
        for _ in range(15):
            answer = ask(live, prompt=prompt, explain=explain)
            same = answer["p_ok"] == pytest.approx(expected[prompt]["candidates"][0]["p_ok"])
            if explain:
                got, want = answer["explanation"], expected[prompt]
                same &= {**got, "decision_id": ""} == {**want, "decision_id": ""}
            if not same:
                wrong.append(prompt)

    threads = [threading.Thread(target=client, args=(p, e)) for p in (EASY, HARD) for e in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# On the command line


def router_ml(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def said(*args: str | Path) -> str:
    done = router_ml("explain", *args)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args: str | Path) -> str:
    done = router_ml("explain", *args)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    return re.sub(r"\s+", " ", done.stderr)


def test_the_command_says_what_the_service_said(live: Running, tiny_bundle: Path, store: Path) -> None:
    at_once = ask(live, prompt=HARD, region="us", explain=True)["explanation"]
    stored(live, at_once["decision_id"])
    where = ("--bundle", tiny_bundle, "--store", store)
    told = json.loads(said(at_once["decision_id"], *where, "--json"))
    assert {request.pop("prompt") for request in told["nearest"]} == {None}
    assert told == at_once
    text = said(at_once["decision_id"], *where, "--neighbours", "3")
    assert at_once["model"] in text and "not in region 'us'" in text
    assert re.findall(r"^  -?[01]\.\d{3} (\w+): ", text, re.MULTILINE) == [
        request["request_id"] for request in at_once["nearest"][:3]
    ]


def test_prompts_are_shown_where_training_kept_them_and_never_over_http(
    tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path
) -> None:
    log = tiny_log.filter(pl.col("request_id").str.slice(1).cast(pl.Int64) < 80)
    train(log, catalog, out=tmp_path / "bundle", encoder="lexical", keep_prompts=True)
    with running(tmp_path / "bundle", tmp_path / "store.db") as live:
        answer = live.http.post("/route", json={"prompt": EASY, "explain": True})
        assert answer.json()["explanation"]["nearest"] and "plural" not in answer.text
        stored(live, answer.json()["decision_id"])
    decision_id = answer.json()["decision_id"]
    where = ("--bundle", tmp_path / "bundle", "--store", tmp_path / "store.db")
    prompts = dict(log.select("request_id", "prompt").iter_rows())
    nearest = json.loads(said(decision_id, *where, "--json"))["nearest"]
    assert nearest and all(request["prompt"] == prompts[request["request_id"]] for request in nearest)
    assert nearest[0]["prompt"] in said(decision_id, *where)


def test_what_cannot_be_explained_says_why(
    live: Running, router: Router, tiny_bundle: Path, store: Path, tmp_path: Path
) -> None:
    decision_id = ask(live, prompt=HARD)["decision_id"]
    stored(live, decision_id)
    assert f"no store at {tmp_path / 'none.db'}" in refused(
        decision_id, "--bundle", tiny_bundle, "--store", tmp_path / "none.db"
    )
    assert not (tmp_path / "none.db").exists()
    assert "knows no decision 'nobody'" in refused("nobody", "--bundle", tiny_bundle, "--store", store)
    assert "no bundle at" in refused(decision_id, "--bundle", tmp_path / "none", "--store", store)
    other = save_router(
        tmp_path / "other", learner(router), {"quality_threshold": 0.5, "log_sha256": "", "metrics": {}}
    )
    told = refused(decision_id, "--bundle", tmp_path / "other", "--store", store)
    assert f"made by bundle {router.model_version}, and this is {other}" in told
    with running(tiny_bundle, tmp_path / "bare.db", store_prompts="none") as bare:
        bare_id = ask(bare, prompt=HARD)["decision_id"]
        stored(bare, bare_id)
    told = refused(bare_id, "--bundle", tiny_bundle, "--store", tmp_path / "bare.db")
    assert "neither its features nor its prompt" in told and "cheapest candidate" in told
    copy = tmp_path / "copy.db"
    with sqlite3.connect(store) as whole, sqlite3.connect(copy) as connection:
        whole.backup(connection)
        connection.execute("update decisions set features = x'00' where decision_id = ?", (decision_id,))
    assert "stored features cannot be read" in refused(decision_id, "--bundle", tiny_bundle, "--store", copy)


@pytest.mark.parametrize("kept", ["features", "none", "text"])
def test_what_the_command_to_serve_keeps(kept: str, tiny_bundle: Path, tmp_path: Path) -> None:
    port, store = free_port(), tmp_path / "store.db"
    serve = [sys.executable, "-m", "router_ml.cli", "serve", "--bundle", tiny_bundle, "--store", store]
    serve += [] if kept == "features" else ["--store-prompts", kept]
    with (
        subprocess.Popen([*map(str, serve), "--port", str(port)], stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
    ):

        def ready() -> bool:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                return http.get("/readyz").status_code == 200
            return False

        try:
            wait_for(ready, 60)
            decision_id = http.post("/route", json={"prompt": HARD}).json()["decision_id"]
        finally:
            process.terminate()
            process.wait(30)
    row = Store(str(store)).decision(decision_id)
    assert row is not None and row["prompt"] == (HARD if kept == "text" else None)
    assert (row["features"] is None) == (kept == "none")


def test_a_bundle_without_past_requests_explains_the_rest(router: Router, tmp_path: Path) -> None:
    manifest = {"quality_threshold": 0.5, "log_sha256": "", "metrics": {}}
    version = save_router(tmp_path / "bundle", learner(router), manifest)
    with running(tmp_path / "bundle", tmp_path / "store.db") as live:
        told = ask(live, prompt=HARD, explain=True)["explanation"]
        stored(live, told["decision_id"])
    assert told["model_version"] == version and told["nearest"] == [] and "train a new one" in told["note"]
    assert told["candidates"][0]["contributions"]
    text = said(told["decision_id"], "--bundle", tmp_path / "bundle", "--store", tmp_path / "store.db")
    assert "no nearest past requests: the bundle was made without" in text


def test_the_stores_exports_go_on_without_features(live: Running) -> None:
    ask(live, prompt=EASY)
    assert live.service.store.flush()
    rows = list(Store(str(live.service.settings.store)).iter_log_rows())
    assert rows and all("features" not in row for row in rows)
