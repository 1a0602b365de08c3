"""The audit log: who changed what, append-only; and residency, proven from the store alone."""

from __future__ import annotations

import json
import shutil
import sqlite3
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
def live(tiny_bundle: Path, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 0.5\n")
    with running(
        tiny_bundle, tmp_path / "store.db", policy=tmp_path / "policy.toml", api_keys=KEYS, watch_seconds=0
    ) as live:
        yield live


def test_every_change_is_noted_with_who_when_before_and_after(live: Running, tmp_path: Path) -> None:
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
    said = CliRunner().invoke(main, ["audit", "changes", "--store", str(tmp_path / "store.db")])
    assert said.exit_code == 0 and "policy  by operator: " + last["after"]["version"] in said.output


def test_a_reload_that_fails_is_said_and_nothing_is_noted(live: Running, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[tiers]\nstandard = 6\n")
    refused = live.http.post("/admin/reload", headers=ADMIN)
    assert refused.status_code in (422, 503) and "standard" in refused.json()["detail"]
    assert live.service.store.flush() and len(live.service.store.changes()) == 3
    for method, path in (("POST", "/admin/reload"), ("GET", "/admin/changes")):
        assert live.http.request(method, path, headers={"x-api-key": "gateway"}).status_code == 403


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_the_database_itself_keeps_what_was_noted(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path}/store.db" if backend == "sqlite" else request.getfixturevalue("postgres_url")
    store = Store(url).start()
    store.note_change("policy", "me", {"version": "1"})
    store.note_change("policy", "me", {"version": "1"})
    store.note_change("policy", "you", {"version": "2"})
    assert store.flush()
    assert [c["who"] for c in store.changes()] == ["me", "you"]
    for statement in ("update changes set who = 'nobody'", "delete from changes"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
            connection.exec_driver_sql(statement)
    if backend == "sqlite":
        columns = "change_id, time_us, kind, who, before, after"
        values = columns.replace("who", "'nobody'")
        for statement in (
            f"insert or replace into changes select {values} from changes",
            f"insert or replace into changes (rowid, {columns}) select rowid, {values} from changes",
        ):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
                connection.exec_driver_sql(statement)
    assert [c["who"] for c in store.changes()] == ["me", "you"]
    store.close()


def test_a_store_that_is_not_there_proves_nothing(tmp_path: Path) -> None:
    for command in ("residency", "changes"):
        said = CliRunner().invoke(main, ["audit", command, "--store", str(tmp_path / "typo.db")])
        assert said.exit_code not in (0, 1) and "there is no store" in said.output
    assert list(tmp_path.iterdir()) == []


def residency(store: Path, *options: str) -> tuple[int, str]:
    said = CliRunner().invoke(main, ["audit", "residency", "--store", str(store), *options])
    return said.exit_code, said.output


def test_residency_is_proven_and_a_breach_is_found(live: Running, tmp_path: Path) -> None:
    key = {"x-api-key": "gateway"}
    for body in ({"data_class": "confidential"}, {"region": "eu"}, {}):
        assert live.http.post("/route", json={"prompt": "x", **body}, headers=key).status_code == 200
    ids = [row["decision_id"] for row in live.decisions()]
    assert [row["data_class"] for row in live.decisions()] == ["confidential", "public", "public"]
    store = tmp_path / "store.db"
    assert residency(store) == (0, "3 decisions, 0 violations\n")

    breached = tmp_path / "breached.db"
    with sqlite3.connect(store) as whole, sqlite3.connect(breached) as copy:
        whole.backup(copy)
        fallback = json.dumps([{"model": "local"}, {"model": "frontier"}])
        copy.execute("update decisions set candidates = ? where decision_id = ?", (fallback, ids[0]))
    code, said = residency(breached)
    assert code == 1 and "1 violations" in said
    assert f"{ids[0]}  fallback frontier: not cleared for data class 'confidential'" in said

    with sqlite3.connect(breached) as copy:
        copy.execute("update decisions set data_class = null, model_version = 'other' where decision_id = ?", (ids[2],))
    code, said = residency(breached)
    assert code == 1 and "cannot be proven: the catalogue of bundle other is not known" in said


def test_a_catalogue_may_be_given_for_a_version_that_was_not_noted(
    live: Running, tmp_path: Path, catalog: Catalog
) -> None:
    live.http.post("/route", json={"prompt": "x"}, headers={"x-api-key": "gateway"})
    version = live.decisions()[0]["model_version"]
    bare, file = tmp_path / "bare.db", tmp_path / "catalog.json"
    shutil.copy(tmp_path / "store.db", bare)
    with sqlite3.connect(tmp_path / "store.db") as whole, sqlite3.connect(bare) as copy:
        whole.backup(copy)
        copy.execute("drop trigger changes_no_delete")
        copy.execute("delete from changes")
    assert residency(bare)[0] == 1
    file.write_text(json.dumps(catalog.to_json()))
    assert residency(bare, "--catalog", version, str(file)) == (0, "1 decisions, 0 violations\n")
    assert residency(bare, "--since", "2999-01-01") == (0, "0 decisions, 0 violations\n")
