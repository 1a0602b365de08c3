"""The console's files and its API, without a browser."""

from __future__ import annotations

import json
from pathlib import Path

from live_service import running

from router_ml.policy import Policy
from serving.console.pages import FILES


def test_the_files_are_short_and_name_no_other_host() -> None:
    for name, (body, _) in FILES.items():
        text = body.decode()
        assert text.count("\n") <= 350, name
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, name
        hosts = text.replace("http://www.w3.org/2000/svg", "")  # a namespace, which nothing asks for
        assert "http://" not in hosts and "https://" not in hosts, name


def test_numbers_that_javascript_writes_are_the_same_version(tiny_bundle: Path, tmp_path: Path) -> None:
    text = (
        json.dumps(Policy(exploration_rate=1.0, max_attempts=3).to_json()).replace("1.0", "1").replace("300.0", "300")
    )
    with running(tiny_bundle, tmp_path / "store.db") as live:
        put = live.http.put("/policy", content=text, headers={"content-type": "application/json"}).json()
    assert put["version"] == Policy(exploration_rate=1.0, max_attempts=3).version
    assert put["policy"]["session"]["cache_min_tokens"] == 1024 and put["policy"]["max_attempts"] == 3


def test_the_api_reads_either_kind_of_store(tiny_bundle: Path, store_url: str) -> None:
    with running(tiny_bundle, store_url, store_prompts="text") as live:
        for i in range(3):
            body = {"prompt": f"What is 100% of {i}_?", "tenant": "acme", "session": "s", "request_id": f"a_{i}"}
            assert live.http.post("/route", json=body).status_code == 200
        rows = live.decisions()
        told = {"decision_id": rows[0]["decision_id"], "quality": 1.0, "cost_usd": 0.25}
        assert live.http.post("/outcomes", json=told).status_code == 200
        assert live.http.post("/outcomes", json={"request_id": "a_1", "latency_ms": 5.0}).status_code == 200

        def found(**query: str) -> list[str]:
            said = live.http.get("/console/api/decisions", params=query)
            assert said.status_code == 200, said.text
            return [row["request_id"] for row in said.json()["decisions"]]

        assert found() == ["a_2", "a_1", "a_0"] and found(id="a_1") == ["a_1"] and found(id="a%") == []
        assert found(text="100% of 2") == ["a_2"] and found(text="0_") == ["a_0"] and found(tenant="nobody") == []
        last = f"{rows[1]['time_us']}-{rows[1]['decision_id']}"
        assert found(after=last) == ["a_0"] and found(explored="1") == []
        for wrong in ({"after": "x"}, {"colour": "red"}):
            assert live.http.get("/console/api/decisions", params=wrong).status_code == 422
        one = live.http.get(f"/console/api/decisions/{rows[1]['decision_id']}").json()
        assert [o["latency_ms"] for o in one["outcomes"]] == [5.0] and one["explanation"]["candidates"]
        assert live.http.get("/console/api/decisions/unknown").status_code == 404
        said = live.http.get("/console/api/sums", params={"days": 1, "baseline": "frontier"})
        assert said.status_code == 200, said.text
        sums = said.json()
        of = {name: i for i, name in enumerate(sums["columns"])}
        assert sum(row[of["calls"]] for row in sums["rows"]) == 3
        assert sum(row[of["cost_nano"]] for row in sums["rows"]) == 250_000_000
        assert live.http.get("/console/api/sums", params={"days": "0"}).status_code == 422
        assert live.http.get("/console/api/sums", params={"baseline": "nobody"}).status_code == 422
        me = live.http.get("/console/api/me").json()
        assert me["key"] is None and me["may_apply"] is True
        assert live.http.get("/console/api/tradeoff").json()["tradeoff"] is None
