"""API keys over HTTP: scopes, and bounds that no request body widens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_service import Running, running, sha256

from router_ml.conversation import request_of
from router_ml.policy import Policy
from serving.keys import ApiKey
from serving.problems import ProblemError

KEYS: dict[str, Any] = {
    "free": {"sha256": sha256("free")},
    "reader": {"sha256": sha256("reader"), "scopes": ["outcomes"]},
    "operator": {"sha256": sha256("operator"), "scopes": ["admin"]},
    "nurse": {"sha256": sha256("nurse"), "scopes": ["health"]},
    "narrow": {
        "sha256": sha256("narrow"),
        "models": ["mid", "hosted"],
        "tiers": ["economy", "standard"],
        "data_classes": ["public"],
        "tenant": "acme",
    },
    "secret": {"sha256": sha256("secret"), "data_classes": ["confidential", "public"], "tiers": ["premium"]},
}


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_bundle, tmp_path_factory.mktemp("keys") / "store.db", api_keys=KEYS) as live:
        yield live


def ask(live: Running, key: str, **body: Any) -> tuple[int, dict[str, Any]]:
    said = live.http.post("/route", json={"prompt": "What is the plural of river?", **body}, headers={"x-api-key": key})
    return said.status_code, said.json()


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        ("free", "/route", 200),
        ("reader", "/route", 403),
        ("operator", "/route", 403),
        ("reader", "/outcomes", 200),
        ("operator", "/outcomes", 403),
        ("free", "/models/mid/health", 403),
        ("nurse", "/models/mid/health", 200),
        ("free", "/route/preview", 200),
        ("reader", "/route/preview", 403),
        ("reader", "/route/batch", 403),
        ("reader", "/routing/v1/chat/completions", 403),
        ("nobody", "/route", 401),
    ],
)
def test_a_key_does_what_its_scopes_say(live: Running, key: str, path: str, status: int) -> None:
    bodies = {"/outcomes": {"decision_id": "x", "quality": 1.0}, "/route/batch": {"requests": [{"prompt": "x"}]}}
    method, usual = ("PUT", {"state": "auto"}) if path.endswith("health") else ("POST", {"prompt": "x"})
    said = live.http.request(method, path, json=bodies.get(path, usual), headers={"x-api-key": key})
    assert said.status_code == status
    if status == 403:
        assert said.json()["type"] == "urn:router-ml:problem:forbidden" and "of the scope" in said.json()["detail"]


def test_every_key_may_read_what_is_in_force(live: Running) -> None:
    for path in ("/models", "/policy", "/metrics"):
        assert live.http.get(path, headers={"x-api-key": "operator"}).status_code == 200
        assert live.http.get(path).status_code == 401


def test_a_keys_models_are_the_only_ones(live: Running) -> None:
    status, answer = ask(live, "narrow")
    assert status == 200 and {c["model"] for c in answer["candidates"]} <= {"mid", "hosted"}
    assert answer["excluded"]["frontier"] == "not on the key's allow-list"
    status, answer = ask(live, "narrow", candidates=["frontier", "mid"])
    assert {c["model"] for c in answer["candidates"]} == {"mid"}
    status, answer = ask(live, "narrow", candidates=["frontier"])
    assert status == 422 and answer["excluded"]["frontier"] in (
        "not on the key's allow-list",
        "not among the request's candidates",
    )


@pytest.mark.parametrize(
    ("key", "body", "says"),
    [
        ("narrow", {"tier": "premium"}, "does not cover tier 'premium': it has economy, standard"),
        ("narrow", {"min_probability": 0.1}, "may not set 'min_probability'"),
        ("narrow", {"willingness_to_pay_usd": 1.0}, "may not set 'willingness_to_pay_usd'"),
        ("narrow", {"objective": "quality", "max_cost_usd": 1.0}, "may not set 'objective'"),
        ("narrow", {"data_class": "internal"}, "does not cover data_class 'internal': it has public"),
        ("narrow", {"tenant": "other"}, "does not cover tenant 'other'"),
    ],
)
def test_what_a_key_does_not_cover_is_refused(live: Running, key: str, body: dict[str, Any], says: str) -> None:
    status, answer = ask(live, key, **body)
    assert status == 403 and says in answer["detail"]


def test_what_a_request_leaves_out_is_the_keys(live: Running) -> None:
    ask(live, "narrow", request_id="one")
    ask(live, "secret", request_id="two")
    ask(live, "secret", request_id="three", data_class="public")
    rows = {row["request_id"]: row for row in live.decisions() if row["request_id"]}
    assert (rows["one"]["tenant"], rows["one"]["data_class"], rows["one"]["tier"]) == ("acme", "public", "standard")
    assert (rows["two"]["data_class"], rows["two"]["tier"]) == ("confidential", "premium")
    assert rows["two"]["model"] == "local"  # the only one that is cleared
    assert rows["three"]["data_class"] == "public"


names = st.sampled_from(["a", "b", "c", None])


@given(names, names, st.sampled_from(["economy", "standard", "premium", None]), st.data())
def test_no_body_widens_a_bound(tenant: Any, data_class: Any, tier: Any, data: st.DataObject) -> None:
    lists = st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "economy", "standard"]), min_size=1).map(tuple))
    key = ApiKey("k", "0" * 64, ("route",), data.draw(lists), data.draw(lists), data.draw(lists), data.draw(names))
    dial = data.draw(
        st.sampled_from([{}, {"min_probability": 0.1}, {"willingness_to_pay_usd": 1.0}, {"objective": "cost"}])
    )
    asked = request_of(prompt="x", tenant=tenant, data_class=data_class, tier=tier, **dial)
    try:
        bound = key.bind(asked, Policy())
    except ProblemError as error:
        assert error.status == 403
        return
    assert key.tenant is None or bound.tenant == key.tenant
    assert key.data_classes is None or bound.data_class in key.data_classes
    assert key.tiers is None or (bound.tier in key.tiers and not dial)
    assert key.models is None or bound.allowed == frozenset(key.models)
    assert tenant in (None, bound.tenant) and data_class in (None, bound.data_class) and tier in (None, bound.tier)
