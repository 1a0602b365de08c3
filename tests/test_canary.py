"""Canaries: which arm a request is in, and propensities that are what they say, by simulation and over HTTP."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_service import Running, running

from features.load import load_router
from router_ml.canary import CanaryPolicy, assign, mixture, probability
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.policy import Exploration, Policy
from router_ml.router import Router
from router_ml.types import RouteRequest

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the tensor operator is bounded."
DIAL = 0.6  # at which the two bundles prefer other models for a hard request, and the same one for an easy one
MODELS, ARMS = ("frontier", "mid", "hosted", "local"), ("champion", "challenger")
REWARD = dict(
    zip([(p, m) for p in (HARD, EASY) for m in MODELS], (0.9, 0.8, 0.3, 0.1, 0.5, 0.9, 0.7, 0.9), strict=True)
)


def asked(**fields: Any) -> RouteRequest:
    return request_of(prompt=HARD, min_probability=DIAL, **fields)


def policy_file(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def test_a_units_arm_is_sticky_and_independent_of_salt_and_challenger() -> None:
    policy = CanaryPolicy(share=0.2, by="tenant")
    tenants = [f"tenant {i}" for i in range(4000)]

    def arms(policy: CanaryPolicy, version: str = "v1", draw: float = 0.5) -> np.ndarray:
        return np.array([assign(policy, version, asked(tenant=t, session=t), draw).challenger for t in tenants])

    first = arms(policy)
    assert (arms(policy, draw=0.0) == first).all() and abs(first.mean() - 0.2) < 4 * math.sqrt(0.16 / 4000)
    assert (arms(replace(policy, share=0.4)) >= first).all() and not arms(replace(policy, share=0.0)).any()
    assert arms(replace(policy, share=1.0)).all()
    for other in (arms(replace(policy, salt="2")), arms(policy, "v2"), arms(replace(policy, by="session"))):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / math.sqrt(4000)


def test_what_a_request_does_not_name_makes_it_a_unit_of_its_own() -> None:
    by_session = CanaryPolicy(share=0.5)
    alone = assign(by_session, "v", asked(tenant="acme"), 0.4)
    assert (alone.challenger, alone.unit, alone.cluster) == (True, "request", None)
    assert not assign(by_session, "v", asked(tenant="acme"), 0.5).challenger
    clusters = [
        assign(by_session, "v", asked(session=s, tenant=t, key=k), 0.0).cluster
        for s, t, k in (("s", "t", "k"), ("s", "tk", None), ("s", None, "tk"), ("t", "s", "k"), ("s", "t", None))
    ]
    assert len(set(clusters)) == 5 and None not in clusters


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"share": 1.5}, "canary.share"),
        ({"share": True}, "canary.share"),
        ({"by": "user"}, "canary.by has to be one of request, session, tenant"),
        ({"salt": 1}, "canary.salt"),
        ({"shares": 0.1}, "unknown setting 'canary.shares'; known are share, by, salt"),
        (0.1, "'canary' has to be a table"),
    ],
)
def test_a_policys_mistake_is_named(table: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Policy.from_json({"canary": table})


def test_a_policy_without_a_canary_keeps_its_version() -> None:
    assert "canary" not in Policy().to_json()  # of which the version is the hash
    with_one = Policy.from_json({"canary": {"share": 0.05, "by": "tenant"}})
    assert Policy.from_json(with_one.to_json()) == with_one and with_one.version != Policy().version


@pytest.fixture(scope="module")
def routers(tiny_bundle: Path, sparse_bundle: Path) -> tuple[Router, Router]:
    policy = Policy(exploration_rate=0.2, canary=CanaryPolicy(share=0.3, by="request"))
    return load_router(tiny_bundle, policy), load_router(sparse_bundle, policy)


def test_probabilities_of_a_routers_choice_are_those_it_draws_with(routers: tuple[Router, Router]) -> None:
    rng = np.random.default_rng(1)
    experiments = [
        (),
        (Exploration(models=("mid", "hosted"), rate=0.4),),
        (Exploration(models=("local", "mid"), rate=0.4),),
    ]
    for router, explore in itertools.product(routers, experiments):
        router = replace(router, draw=rng.random).with_policy(router.policy.with_changes(explore=explore))
        preferred = replace(router, draw=lambda: 1.0).decide(asked(candidates=("frontier", "mid", "hosted")))
        told = {model: probability(preferred, model) for model in router.catalog.ids}
        assert sum(told.values()) == pytest.approx(1.0) and told["local"] == 0.0 and not preferred.explored
        for _ in range(200):
            made = router.decide(asked(candidates=("frontier", "mid", "hosted")))
            assert made.propensity == pytest.approx(told[made.model])


def test_over_salts_a_tenants_propensity_is_the_frequency(routers: tuple[Router, Router]) -> None:
    """By tenant, for one request: the mixture is how often each model is chosen over draws of the salt."""
    quiet = [replace(r, draw=lambda: 1.0).decide(asked()) for r in routers]
    rng = np.random.default_rng(2)
    rows: list[tuple[str, float]] = []
    for salt in range(4000):
        drawn = assign(CanaryPolicy(share=0.3, by="tenant", salt=str(salt)), "v", asked(tenant="acme"), 0.0)
        preferred, other = (quiet[1], quiet[0]) if drawn.challenger else (quiet[0], quiet[1])
        models = [c.model for c in preferred.candidates]
        model = str(rng.choice(models, p=[probability(preferred, m) for m in models]))
        served = replace(preferred, model=model, propensity=probability(preferred, model))
        rows.append((model, mixture(drawn, served, other)))
    counts = Counter(model for model, _ in rows)
    for model, propensity in {(m, round(p, 12)) for m, p in rows}:
        assert abs(counts[model] / 4000 - propensity) < 4 * math.sqrt(propensity * (1 - propensity) / 4000)
    assert len(counts) == 4 == len({(m, round(p, 12)) for m, p in rows})


@pytest.fixture(scope="module")
def logged(tiny_bundle: Path, sparse_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a service logs of 3,000 requests, each drawn by itself, under exploration."""
    folder = tmp_path_factory.mktemp("canary")
    policy = policy_file(folder, 'exploration_rate = 0.2\n[canary]\nshare = 0.3\nby = "request"\n')
    with running(tiny_bundle, folder / "store.db", policy=policy, challenger=sparse_bundle) as live:
        for _ in range(30):
            batch = [{"prompt": p, "min_probability": DIAL, "request_id": p} for p in [HARD, HARD, EASY, HARD] * 25]
            answers = live.http.post("/route/batch", json={"requests": batch}).json()["results"]
        return {
            "rows": live.decisions(),
            "answers": [answer["decision"] for answer in answers],
            "shadows": {row["decision_id"]: row for row in live.service.store.shadows()},
            "counted": {arm: live.metric(f'router_canary_decisions_total{{arm="{arm}"}}') for arm in ARMS},
            "log": list(live.service.store.iter_log_rows()),
        }


def test_logged_propensities_are_the_frequencies(logged: dict[str, Any], routers: tuple[Router, Router]) -> None:
    rows = logged["rows"]
    assert len(rows) == 3000 and logged["counted"] == Counter(row["arm"] for row in rows)
    versions = dict(zip(ARMS, (r.model_version for r in routers), strict=True))
    assert all(row["model_version"] == versions[row["arm"]] for row in rows)
    assert {(row["arm_unit"], row["arm_share"], row["arm_cluster"]) for row in rows} == {("request", 0.3, None)}
    assert_rate(sum(row["arm"] == "challenger" for row in rows), 3000, 0.3)
    for prompt, size in ((HARD, 2250), (EASY, 750)):
        of = [row for row in rows if row["request_id"] == prompt]
        told: dict[str, set[float]] = {}
        for row in of:  # the same in whichever arm it was chosen
            told.setdefault(row["model"], set()).add(round(row["propensity"], 9))
        assert len(of) == size and len(told) == 4 and all(len(values) == 1 for values in told.values())
        assert sum(value for (value,) in told.values()) == pytest.approx(1.0)
        for model, (propensity,) in told.items():
            assert_rate(sum(row["model"] == model for row in of), size, propensity)
        for arm in ARMS:  # within an arm it is the arm's own
            own = [row for row in of if row["arm"] == arm]
            for model, propensity in {(row["model"], row["arm_propensity"]) for row in own}:
                assert_rate(sum(row["model"] == model for row in own), len(own), propensity)
    assert [row["propensity"] for row in logged["log"]] == [row["propensity"] for row in rows]
    by_id = {row["decision_id"]: row for row in rows}
    for answer in logged["answers"]:
        row = by_id[answer["decision_id"]]
        assert (answer["propensity"], answer["model_version"]) == (row["propensity"], row["model_version"])
        assert "arm" not in answer and "shadow" not in answer


def assert_rate(count: int, of: int, rate: float) -> None:
    assert abs(count / of - rate) < 5 * math.sqrt(rate * (1 - rate) / of), f"{count} of {of}, not {rate:.3f}"


@pytest.mark.parametrize("target", [*ARMS, "uniform"])
def test_the_log_of_both_arms_values_any_policy(
    logged: dict[str, Any], routers: tuple[Router, Router], target: str
) -> None:
    """Importance weights from the log alone give the true value of either bundle, and of a policy that neither is."""
    preferred = {
        name: {p: replace(r, draw=lambda: 1.0).decide(request_of(prompt=p, min_probability=DIAL)) for p in (HARD, EASY)}
        for name, r in zip(ARMS, routers, strict=True)
    }
    values, truth, plain = [], [], []
    for row in logged["rows"]:
        shadow, prompt = logged["shadows"][row["decision_id"]], row["request_id"]
        assert {row["arm"], shadow["bundle"]} == set(ARMS) and row["model_version"] != shadow["model_version"]
        in_log = {row["arm"]: row["arm_propensity"], shadow["bundle"]: shadow["served_probability"], "uniform": 0.25}
        values.append(in_log[target] / row["propensity"] * REWARD[prompt, row["model"]])
        plain.append(REWARD[prompt, row["model"]])
        truth.append(
            np.mean([REWARD[prompt, m] for m in MODELS])
            if target == "uniform"
            else sum(probability(preferred[target][prompt], m) * REWARD[prompt, m] for m in MODELS)
        )
    for estimates, unbiased in ((values, True), (plain, False)):  # what is served is not what is asked about
        errors = np.array(estimates) - np.array(truth)
        assert bool(abs(errors.mean()) < 5 * errors.std() / math.sqrt(len(errors))) is unbiased


def test_a_session_stays_in_its_arm(tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path) -> None:
    policy = policy_file(tmp_path, "[canary]\nshare = 0.5\n")
    with running(tiny_bundle, tmp_path / "store.db", policy=policy, challenger=sparse_bundle) as live:
        for i in range(60):
            talk = [{"role": "user", "content": HARD}]
            for _ in range(3):
                body = {"messages": talk, "session": f"s{i}", "min_probability": DIAL}
                told = [live.http.post(path, json=body).json() for path in ("/route/preview", "/route")]
                assert told[0]["model_version"] == told[1]["model_version"]
                assert told[0]["propensity"] == told[1]["propensity"]
                talk += [
                    {"role": "assistant", "content": "It is."},
                    {"role": "user", "content": "And the adjoint one?"},
                ]
        rows = live.decisions()
    by_session: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_session.setdefault(row["session"], []).append(row)
    arms = Counter()
    for turns in by_session.values():
        assert len({(t["arm"], t["arm_cluster"], t["model_version"], t["arm_unit"]) for t in turns}) == 1
        assert [t["incumbent"] for t in turns[1:]] == [t["model"] for t in turns[:-1]]
        first, *later = turns
        arms[first["arm"]] += 1
        # Nothing but the arm decides: over its draw the first model has the arm's share, given the arm a model has 1.
        assert first["model"] == {"champion": "mid", "challenger": "hosted"}[first["arm"]]
        assert (first["propensity"], first["arm_propensity"]) == (0.5, 1.0)
        assert all((t["propensity"], t["arm_propensity"]) == (1.0, 1.0) for t in later)
    assert_rate(arms["challenger"], 60, 0.5)
    assert len({row["arm_cluster"] for row in rows}) == 60


def test_a_tenant_is_in_one_arm_until_the_share_is_turned(
    tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path
) -> None:
    def arms(live: Running) -> dict[str, str | None]:
        for i in range(40):
            live.http.post("/route", json={"prompt": HARD, "min_probability": DIAL, "tenant": f"t{i % 20}"})
        rows = live.decisions()[-40:]
        found = {(row["tenant"], row["arm"]) for row in rows}
        assert len(found) == 20
        return dict(found)

    with running(tiny_bundle, tmp_path / "store.db", challenger=sparse_bundle) as live:

        def put(share: float) -> None:
            body = {"canary": {"share": share, "by": "tenant", "salt": "a"}}
            assert live.http.put("/policy", json=body).status_code == 200

        assert set(arms(live).values()) == {None}
        put(0.3)
        some = arms(live)
        put(0.7)
        more = arms(live)
        assert set(some.values()) == set(more.values()) == set(ARMS)
        assert all(more[t] == "challenger" for t, arm in some.items() if arm == "challenger") and more != some
        put(0.0)
        assert set(arms(live).values()) == {None}
        noted = [change for change in live.service.store.changes() if change["kind"] == "policy"]
        assert [n["after"]["policy"].get("canary", {}).get("share") for n in noted] == [None, 0.3, 0.7, 0.0]
