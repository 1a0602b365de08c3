"""The audit log: who changed what, append-only; and residency, proven from the store alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from live_service import Running, running, sha256

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.store import Store

KEYS: dict[str, Any] = {
    "gateway": {"sha256": sha256("gateway")},
    "operator": {"sha256": sha256("operator"), "scopes": ["admin"]},
}
ADMIN = {"x-api-key": "operator"}


@pytest.fixture
def live(tiny_bundle: Path, tmp_path: Path, store_url: str) -> Iterator[Running]:
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 0.5\n")
    with running(tiny_bundle, store_url, policy=tmp_path / "policy.toml", api_keys=KEYS, watch_seconds=0) as live:
        yield live


def test_every_change_is_noted_with_who_when_before_and_after(live: Running, tmp_path: Path, store_url: str) -> None:
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 0.6\n")
    reloaded = live.http.post("/admin/reload", headers=ADMIN)
    assert reloaded.status_code == 200
    assert live.http.post("/admin/reload", headers=ADMIN).status_code == 200  # nothing has changed: nothing to note
    assert live.service.store.flush()
    found = live.http.get("/admin/changes", headers=ADMIN).json()["changes"]
    assert [(c["kind"], c["who"]) for c in found] == [
        ("model", "the start"),
        ("policy", "the start"),
        ("keys", "the start"),
        ("policy", "operator"),
    ]
    last = found[-1]
    assert last["before"]["policy"]["tiers"]["standard"] == 0.5 and last["after"]["policy"]["tiers"]["standard"] == 0.6
    assert last["after"]["version"] == reloaded.json()["policy_version"]
    assert sha256("operator") not in json.dumps(found)
    assert found[0]["before"] is None and found[0]["after"]["models"][0]["id"] == "frontier"
    said = CliRunner().invoke(main, ["audit", "changes", "--store", store_url])
    assert said.exit_code == 0 and "policy  by operator: " + last["after"]["version"] in said.output


def test_a_reload_that_fails_is_said_and_nothing_is_noted(live: Running, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 6\n")
    refused = live.http.post("/admin/reload", headers=ADMIN)
    assert refused.status_code in (422, 503) and "standard" in refused.json()["detail"]
    assert live.service.store.flush() and len(live.service.store.changes()) == 3
    for method, path in (("POST", "/admin/reload"), ("GET", "/admin/changes")):
        assert live.http.request(method, path, headers={"x-api-key": "gateway"}).status_code == 403


def test_the_database_itself_keeps_what_was_noted(store_url: str) -> None:
    store = Store(store_url).start()
    store.note_change("policy", "me", {"version": "1"})
    store.note_change("policy", "me", {"version": "1"})
    store.note_change("policy", "you", {"version": "2"})
    assert store.flush()
    assert [c["who"] for c in store.changes()] == ["me", "you"]
    for statement in ("update changes set who = 'nobody'", "delete from changes"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.engine.begin() as connection:
            connection.exec_driver_sql(statement)
    if store_url.startswith("sqlite"):
        columns = "change_id, time_us, kind, who, before, after, reason"
        values = columns.replace("who", "'nobody'")
        for statement in (
            f"insert or replace into changes select {values} from changes",
            f"insert or replace into changes (rowid, {columns}) select rowid, {values} from changes",
        ):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.engine.begin() as connection:
                connection.exec_driver_sql(statement)
    assert [c["who"] for c in store.changes()] == ["me", "you"]
    store.close()


def test_a_store_that_is_not_there_proves_nothing(tmp_path: Path) -> None:
    for command in ("residency", "changes"):
        said = CliRunner().invoke(main, ["audit", command, "--store", str(tmp_path / "typo.db")])
        assert said.exit_code not in (0, 1) and "there is no store" in said.output
    assert list(tmp_path.iterdir()) == []


def residency(store: str, *options: str) -> tuple[int, str]:
    said = CliRunner().invoke(main, ["audit", "residency", "--store", store, *options])
    return said.exit_code, said.output


def alter(live: Running, sql: str, **values: str) -> None:
    with live.service.store.engine.begin() as connection:
        connection.execute(sa.text(sql), values)


def test_residency_is_proven_and_a_breach_is_found(live: Running, store_url: str) -> None:
    key = {"x-api-key": "gateway"}
    for body in ({"data_class": "confidential"}, {"region": "eu"}, {}):
        assert live.http.post("/route", json={"prompt": "x", **body}, headers=key).status_code == 200
    ids = [row["decision_id"] for row in live.decisions()]
    assert [row["data_class"] for row in live.decisions()] == ["confidential", "public", "public"]
    assert residency(store_url) == (0, "3 decisions, 0 violations\n")

    fallback = json.dumps([{"model": "local"}, {"model": "frontier"}])
    alter(live, "update decisions set candidates = :fallback where decision_id = :i", fallback=fallback, i=ids[0])
    code, said = residency(store_url)
    assert code == 1 and "1 violations" in said
    assert f"{ids[0]}  fallback frontier: not cleared for data class 'confidential'" in said

    alter(live, "update decisions set data_class = null, model_version = 'other' where decision_id = :i", i=ids[2])
    code, said = residency(store_url)
    assert code == 1 and "cannot be proven: the catalogue of bundle other is not known" in said


def test_a_catalogue_may_be_given_for_a_version_that_was_not_noted(
    live: Running, tmp_path: Path, store_url: str, catalog: Catalog
) -> None:
    live.http.post("/route", json={"prompt": "x"}, headers={"x-api-key": "gateway"})
    assert len(live.decisions()) == 1
    alter(live, "update decisions set model_version = 'other'")
    (tmp_path / "catalog.json").write_text(json.dumps(catalog.to_json()))
    assert residency(store_url)[0] == 1
    given = ("--catalog", "other", str(tmp_path / "catalog.json"))
    assert residency(store_url, *given) == (0, "1 decisions, 0 violations\n")
    assert residency(store_url, *given, "--since", "2999-01-01") == (0, "0 decisions, 0 violations\n")
