"""Several processes on one database: what one learns of models, and the policy put at one, hold in all soon."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import new_postgres
from live_service import Running, process, running, sha256, wait_for
from relay import relay_to

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.router import new_id
from router_ml.shared import Circuit, publish, put_policy, read
from router_ml.store import Store
from router_ml.tables import open_database
from serving.health import Health, HealthSettings
from serving.live import WARM_UP

PROMPT = {"prompt": "What is the plural of river?"}
HEALTH = {"min_calls": 3, "open_seconds": 3.0}
KEYS = {
    "gateway": {"sha256": sha256("gateway"), "scopes": ["route", "outcomes", "health"]},
    "other": {"sha256": sha256("other"), "scopes": ["route", "outcomes"]},
    "operator": {"sha256": sha256("operator"), "scopes": ["admin"]},
}
GATEWAY, OTHER, OPERATOR = ({"x-api-key": name} for name in KEYS)
WITHIN = 2.0


@dataclasses.dataclass(frozen=True)
class Pair:
    a: httpx.Client
    b: httpx.Client
    url: str


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes on one store, of either kind."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("shared")
        url = f"sqlite:///{folder}/store.db"
        if request.param == "postgresql":
            url = stack.enter_context(new_postgres())
        settings = {"bundle": tiny_bundle, "store": url, "spool": folder / "spool", "api_keys": KEYS, "health": HEALTH}
        a, b = (stack.enter_context(process(**settings))[1] for _ in "ab")
        yield Pair(a, b, url)


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    said = http.post("/route", json=PROMPT | body, headers=GATEWAY)
    assert said.status_code == 200, said.text
    return dict(said.json())


def tell(http: httpx.Client, decision: dict[str, Any], **body: Any) -> httpx.Response:
    return http.post("/outcomes", json={"decision_id": decision["decision_id"], **body}, headers=GATEWAY)


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics", headers=GATEWAY).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


def matched(live: Running) -> None:
    """Waits until every outcome has found its decision, or none."""
    shared = live.service.shared

    def none_left() -> bool:
        with shared._turn:  # while none is looked up
            return not shared._unclear

    wait_for(none_left)


def soon(condition: Callable[[], bool]) -> None:
    wait_for(condition, WITHIN)


def test_a_circuit_opens_and_closes_for_all_wherever_its_outcomes_arrive(pair: Pair) -> None:
    both = {"candidates": ["mid", "local"]}
    first = ask(pair.a, **both)["model"]
    for _ in range(3):
        assert tell(pair.a, ask(pair.a, **both), status="error").status_code == 200
    why = "circuit open: 3 of 3 calls failed in 60 s"
    assert ask(pair.a, **both)["excluded"][first] == why
    soon(lambda: ask(pair.b, **both)["excluded"].get(first) == why)
    opened = time.monotonic()

    probes: list[dict[str, Any]] = []

    def probed() -> bool:
        probes.append(ask(pair.b, **both))
        return bool(probes[-1]["model"] == first)

    wait_for(probed, 10)  # B lets one through, and its outcome comes to A
    assert time.monotonic() - opened > 0.5
    assert tell(pair.a, probes[-1], status="ok").status_code == 200
    for http in (pair.a, pair.b):
        soon(lambda http=http: ask(http, **both)["model"] == first)


def test_an_outcome_counts_at_another_process_once_and_for_its_own_key(pair: Pair) -> None:
    only = {"candidates": ["hosted"], "request_id": new_id()}
    for _ in range(3):
        made_at, told_at = pair.a, pair.b
        decision = ask(made_at, **only)
        body = {"decision_id": decision["decision_id"], "status": "timeout", "latency_ms": 900.0}
        key = GATEWAY | {"idempotency-key": decision["decision_id"]}
        first, again = (http.post("/outcomes", json=body, headers=key) for http in (told_at, made_at))
        assert first.status_code == 200 and first.json() == again.json()
        for http in (pair.a, pair.b):
            assert http.post("/outcomes", json=body | {"status": "ok"}, headers=key).status_code == 409
        more = {**body, "latency_ms": 901.0}  # of the same call, and of one that another key asked for
        assert told_at.post("/outcomes", json=more, headers=GATEWAY).status_code == 200
        assert told_at.post("/outcomes", json=more, headers=OTHER).status_code == 200
    why = "circuit open: 3 of 3 calls failed in 60 s"
    for http in (pair.b, pair.a):
        soon(lambda http=http: ask(http, candidates=["hosted", "mid"])["excluded"].get("hosted") == why)
    rows = [row for row in Store(pair.url).iter_log_rows() if row["status"] == "timeout"]
    assert [row["model"] for row in rows] == ["hosted"] * 3


def test_a_model_taken_out_by_hand_is_out_in_all_until_it_is_put_back(pair: Pair) -> None:
    for state, there in (("open", True), ("auto", False)):
        said = pair.a.put("/models/frontier/health", json={"state": state}, headers=GATEWAY)
        assert said.status_code == 200
        soon(lambda there=there: ("frontier" in ask(pair.b)["excluded"]) == there)
    assert pair.b.put("/models/nobody/health", json={"state": "open"}, headers=GATEWAY).status_code == 404


def test_a_policy_put_at_one_is_in_force_in_all(pair: Pair) -> None:
    default = pair.b.get("/policy", headers=GATEWAY)
    version = default.json()["version"]
    assert default.headers["etag"] == f'"{version}"'
    mine = default.json()["policy"] | {"tiers": {"standard": 0.625}}
    put = pair.a.put("/policy", json=mine, headers=OPERATOR | {"if-match": f'"{version}"'})
    assert put.status_code == 200, put.text
    assert put.json()["policy"] == mine and put.headers["etag"] == f'"{put.json()["version"]}"'
    assert ask(pair.a)["min_probability"] == 0.625
    soon(lambda: ask(pair.b)["min_probability"] == 0.625)
    assert ask(pair.b)["policy_version"] == put.json()["version"]
    late = pair.b.put("/policy", json={}, headers=OPERATOR | {"if-match": f'"{version}"'})
    assert late.status_code == 412 and put.json()["version"] in late.json()["detail"]
    for wrong, says in (({"default_model": "gone"}, "gone"), ({"tiers": {"standard": 2}}, "standard"), ([], "")):
        refused = pair.b.put("/policy", json=wrong, headers=OPERATOR)
        assert refused.status_code == 422 and says in refused.text
    assert pair.b.put("/policy", json={}, headers=GATEWAY).status_code == 403
    back = pair.b.delete("/policy", headers=OPERATOR)
    assert back.status_code == 200 and back.json() == default.json()
    soon(lambda: ask(pair.a)["policy_version"] == version)
    noted = pair.a.get("/admin/changes", headers=OPERATOR).json()["changes"]
    assert [(c["who"], c["after"]["version"]) for c in noted if c["kind"] == "policy"] == [
        ("the start", version),
        ("operator", put.json()["version"]),
        ("operator", version),
    ]


def test_outcomes_of_no_known_decision_are_kept_and_counted(
    store_url: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.shared.GRACE_SECONDS", 0.5)
    with running(tiny_bundle, store_url) as live, running(tiny_bundle, store_url) as other:
        known = other.http.post("/route", json=PROMPT | {"request_id": "known"}).json()
        early, now = new_id(), live.service.store
        for body in (
            {"decision_id": new_id(), "status": "ok"},
            {"request_id": "nobody's"},
            {"request_id": "known", "quality": 1.0},
            {"decision_id": known["decision_id"], "status": "ok"},
            {"decision_id": early},  # its decision's commit is late
        ):
            assert live.http.post("/outcomes", json=body).status_code == 200
        decision = dataclasses.replace(live.service.live.live.router.decide(WARM_UP), decision_id=early)
        assert now.record(WARM_UP, decision, provider="p") and now.flush()
        matched(live)
        assert live.metric("router_store_unmatched_total") == 2
        assert now.counts()["unmatched_outcomes"] == 2
        assert {r["request_id"]: r["quality"] for r in now.iter_log_rows()}[known["decision_id"]] == 1.0


def test_an_outcome_days_later_joins_and_says_nothing_of_now(store_url: str, tiny_bundle: Path) -> None:
    with running(tiny_bundle, store_url, health=HealthSettings(min_calls=1)) as live:
        decision = live.http.post("/route", json=PROMPT).json()
        assert len(live.decisions()) == 1
    with open_database(store_url).begin() as connection:
        connection.execute(sa.text("update decisions set time_us = time_us - 432000000000"))
    with running(tiny_bundle, store_url, health=HealthSettings(min_calls=1)) as live:
        late = {"decision_id": decision["decision_id"], "status": "error", "quality": 0.0}
        assert live.http.post("/outcomes", json=late).status_code == 200
        matched(live)
        (row,) = live.service.store.iter_log_rows()
        assert (row["request_id"], row["status"], row["quality"]) == (decision["decision_id"], "error", 0.0)
        assert live.service.health.states() == {} and live.service.shared.unmatched == 0


def test_with_the_database_away_routing_goes_on_and_catches_up(
    tiny_bundle: Path, postgres_url: str, tmp_path: Path
) -> None:
    url, spool = sa.make_url(postgres_url), tmp_path / "spool"
    with relay_to(url.port or 5432) as relay:
        through = url.set(port=int(relay.url.rpartition(":")[2])).render_as_string(hide_password=False)
        with (
            running(tiny_bundle, through, spool=spool) as live,
            running(tiny_bundle, postgres_url, spool=spool) as other,
        ):
            with relay.cut():
                wait_for(lambda: live.service.shared.failures > 0)
                assert live.http.put("/models/frontier/health", json={"state": "open"}).status_code == 200
                began = time.perf_counter()
                answers = [live.http.post("/route", json=PROMPT) for _ in range(50)]
                assert {a.status_code for a in answers} == {200} and time.perf_counter() - began < 5
                assert "frontier" in answers[0].json()["excluded"]
                assert live.http.put("/policy", json={"tiers": {"standard": 0.6}}).status_code == 503
                assert other.http.put("/policy", json={"tiers": {"standard": 0.55}}).status_code == 200
                wait_for(lambda: "shared" in live.http.get("/readyz").json()["degraded"])
            wait_for(lambda: live.http.post("/route", json=PROMPT).json()["min_probability"] == 0.55, 10)
            wait_for(lambda: "frontier" in other.http.post("/route", json=PROMPT).json()["excluded"], WITHIN)
            wait_for(lambda: live.http.get("/readyz").json()["degraded"] == [])


def test_a_start_without_the_database_keeps_the_policy(tiny_bundle: Path, postgres_url: str, tmp_path: Path) -> None:
    url = sa.make_url(postgres_url)
    with relay_to(url.port or 5432) as relay:
        through = url.set(port=int(relay.url.rpartition(":")[2])).render_as_string(hide_password=False)
        with running(tiny_bundle, through, spool=tmp_path / "spool") as live:
            assert live.http.put("/policy", json={"tiers": {"standard": 0.55}}).status_code == 200
        with relay.cut(), running(tiny_bundle, through, spool=tmp_path / "spool") as live:
            assert live.http.post("/route", json=PROMPT).json()["min_probability"] == 0.55
            assert {"store", "shared"} <= set(live.http.get("/readyz").json()["degraded"])


def test_a_restart_keeps_what_was_set_and_forgets_what_has_expired(store_url: str, tiny_bundle: Path) -> None:
    engine = open_database(store_url)
    publish(
        engine,
        [
            Circuit("model", "frontier", "hand", True, "taken out by hand", 1e6, True),
            Circuit("model", "mid", "opened", True, "circuit open: long ago", 31.0),
            Circuit("model", "hosted", "opened", True, "circuit open: just now", 3.0),
        ],
    )
    put_policy(engine, Policy(tiers={"standard": 0.55}), "me")
    with running(tiny_bundle, store_url) as live:
        answer = live.http.post("/route", json=PROMPT).json()
        assert answer["excluded"] == {"frontier": "taken out by hand", "hosted": "circuit open: just now"}
        assert answer["min_probability"] == 0.55


def test_a_policy_file_rules_and_says_so(store_url: str, tiny_bundle: Path, tmp_path: Path) -> None:
    put_policy(open_database(store_url), Policy(tiers={"standard": 0.55}), "me")
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 0.65\n")
    with running(tiny_bundle, store_url, policy=tmp_path / "policy.toml") as live:
        assert live.http.post("/route", json=PROMPT).json()["min_probability"] == 0.65
        refused = live.http.put("/policy", json={})
        assert refused.status_code == 409 and "policy.toml" in refused.json()["detail"]
        assert live.http.delete("/policy").json()["policy"]["tiers"] == {"standard": 0.65}
        assert live.http.get("/readyz").json()["degraded"] == []
    assert read(open_database(store_url), 0).policy == "null"


@pytest.fixture(scope="module")
def bundle_without_mid(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from features.load import save_router
    from training.dataset import build_dataset
    from training.fit import fit

    fewer = Catalog(tuple(card for card in catalog if card.id != "mid"))
    data = build_dataset(tiny_log.filter(tiny_log["model"] != "mid"), fewer)
    out = tmp_path_factory.mktemp("bundle") / "fewer"
    save_router(out, fit(data, encoder="lexical").estimator, {"quality_threshold": 0.5})
    return out


def test_a_stored_policy_that_a_new_bundle_does_not_fit_keeps_the_last_good(
    tiny_bundle: Path, bundle_without_mid: Path, tmp_path: Path
) -> None:
    link, url = tmp_path / "current", str(tmp_path / "store.db")
    link.symlink_to(tiny_bundle)
    with running(link, url, watch_seconds=0.05) as live:
        version = live.http.get("/models").json()["model_version"]
        assert live.http.put("/policy", json={"rules": [{"model": "mid", "task": "t"}]}).status_code == 200
        (tmp_path / "next").symlink_to(bundle_without_mid)
        (tmp_path / "next").replace(link)
        wait_for(lambda: live.http.get("/readyz").json()["degraded"] == ["bundle"])
        assert "'mid'" in (live.service.live.last_error or "")
        answer = live.http.post("/route", json=PROMPT | {"task": "t"}).json()
        assert (answer["model"], answer["model_version"]) == ("mid", version)
        put_policy(open_database(url), Policy(rules=()).with_changes(default_model="no such"), "another process")
        wait_for(lambda: live.http.get("/readyz").json()["degraded"] == ["bundle", "policy"])
        assert live.http.post("/route", json=PROMPT | {"task": "t"}).json()["model"] == "mid"
        assert live.http.delete("/policy").status_code == 200  # the bundle that waited fits now
        wait_for(lambda: live.http.get("/readyz").json()["degraded"] == [])
        assert live.http.get("/models").json()["model_version"] != version
    put_policy(open_database(url), Policy(default_model="mid"), "me")
    with pytest.raises(InputError, match=r"'mid'.*DELETE /policy"), running(bundle_without_mid, url):
        pass


def two(clock: Callable[[], float]) -> tuple[Health, Health]:
    settings = HealthSettings(min_calls=2, open_seconds=30)
    return Health(settings, clock), Health(settings, clock)


def exchange(engine: sa.Engine, *processes: Health) -> None:
    for one in processes:
        publish(engine, one.take())
    for one in processes:
        for told in read(engine, 0).circuits:
            one.adopt(told)


def test_what_was_done_by_hand_is_undone_by_hand_alone(store_url: str) -> None:
    engine = open_database(store_url)
    a, b = two(time.monotonic)
    a.set("m", "open")
    publish(engine, a.take())
    for _ in range(2):
        b.report("m", "p", failed=True)
    exchange(engine, a, b)  # b has not heard of it when its own circuit opens
    for one in (a, b):
        assert one.down({"m": "p"}) == {"m": "taken out by hand"}
    b.set("m", "closed")
    exchange(engine, b, a)
    assert a.down({"m": "p"}) == b.down({"m": "p"}) == {}


def test_a_change_here_is_not_undone_by_older_news(store_url: str) -> None:
    engine = open_database(store_url)
    a, b = two(time.monotonic)
    a.set("m", "open")
    exchange(engine, a, b)
    b.set("m", "auto")
    for told in read(engine, 0).circuits:  # read before b has told of it
        b.adopt(told)
    assert b.down({"m": "p"}) == {}
    told = b.take()
    b.give_back(told)  # the database was away
    exchange(engine, b, a)
    assert a.down({"m": "p"}) == {}


def test_processes_probe_together(store_url: str) -> None:
    engine, now = open_database(store_url), [1000.0]
    a, b = two(lambda: now[0])
    for _ in range(2):
        a.report("m", "p", failed=True)
    exchange(engine, a, b)
    now[0] += 31
    assert a.down({"m": "p"}) == b.down({"m": "p"}) == {}
    a.chosen("m", "p", "probe")
    publish(engine, a.take())
    for told in read(engine, 0).circuits:  # with the ages of half a minute later
        b.adopt(dataclasses.replace(told, age=told.age + 31))
    assert "m" in b.down({"m": "p"})  # one is enough
    b.report("m", "p", failed=True, decision_id="probe")
    now[0] += 1
    exchange(engine, b, a)
    now[0] += 20
    assert "m" in a.down({"m": "p"}) and "m" in b.down({"m": "p"})  # open again, for both


def test_serials_become_visible_in_their_order(store_url: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    engines = [open_database(store_url) for _ in range(4)]
    seen: dict[str, str] = {}

    def write(process: int) -> None:
        for i in range(25):
            change = Circuit("model", f"{process}", "hand", True, str(i), 0.0, True)
            while True:  # on a busy machine SQLite gives a writer up that has waited for five seconds
                with contextlib.suppress(sa.exc.OperationalError):
                    publish(engines[process], [change])
                    break

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, i) for i in range(4)]
        serial, written = 0, False
        while not written:
            written = all(writer.done() for writer in writers)
            news = read(engines[0], serial)
            seen |= {circuit.name: circuit.why for circuit in news.circuits}
            assert news.serial >= serial
            serial = news.serial
            time.sleep(0.002)
        for writer in writers:
            writer.result()
    assert serial == 100 and seen == dict.fromkeys("0123", "24")


def test_a_database_that_was_restored_is_caught_up_with(
    tiny_bundle: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.shared.READ_ALL", 2)
    with running(tiny_bundle, store_url) as live:
        for state in ("open", "closed", "open"):
            assert live.http.put("/models/frontier/health", json={"state": state}).status_code == 200
        wait_for(lambda: live.service.shared._seen > 0)
        engine = open_database(store_url)
        with engine.begin() as connection:
            connection.execute(sa.text("delete from shared"))
        put_policy(engine, Policy(tiers={"standard": 0.55}), "me")
        publish(engine, [Circuit("model", "mid", "hand", True, "taken out by hand", 0.0, True)])
        wait_for(lambda: live.http.post("/route", json=PROMPT).json()["min_probability"] == 0.55)
        wait_for(lambda: "mid" in live.http.post("/route", json=PROMPT).json()["excluded"])


def test_an_idle_process_reads_once_a_second(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db") as live:
        asked: list[str] = []
        engine = live.service.shared._engine
        assert engine is not None
        sa.event.listen(engine, "before_cursor_execute", lambda c, cursor, sql, *rest: asked.append(sql))
        time.sleep(3.0)
        assert 1 <= len(asked) <= 4 and {sql.split()[0] for sql in asked} == {"SELECT"}
