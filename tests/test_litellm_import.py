"""LiteLLM's spend log, from exports and from Postgres, as LiteLLM's own proxy wrote it (tests/litellm_spend.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
from litellm_spend import libpq, litellm_proxy, make_table, rows_of, talk
from live_service import running, wait_for
from openai_upstream import openai_upstream

from router_ml.catalog import Catalog
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.logs import read_log, read_log_info
from training.dataset import build_dataset, reliability
from training.feedback import parse_rule
from training.importers import postgres
from training.importers.importing import ImportSummary, import_log
from training.importers.signals import read_signals

FIXTURE = Path(__file__).parent / "fixtures" / "litellm"
EXPORT = FIXTURE / "spend_logs.jsonl"
MISSING = ["refused before a model was called"]


def rows(log: Path) -> list[dict[str, Any]]:
    return read_log(log).to_dicts()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImportSummary, Path]:
    out = tmp_path_factory.mktemp("litellm") / "log"
    return import_log("litellm", str(EXPORT), out=out), out


@pytest.fixture
def table(postgres_url: str) -> str:
    """The table, as LiteLLM's migrations make it, with the rows of the fixture."""
    with psycopg.connect(libpq(postgres_url), autocommit=True) as db:
        db.execute((FIXTURE / "spend_logs.sql").read_text())  # type: ignore[arg-type]
    insert(postgres_url, [json.loads(line) for line in EXPORT.read_text().splitlines()])
    return postgres_url


def insert(url: str, new: list[dict[str, Any]]) -> None:
    populate = 'insert into "LiteLLM_SpendLogs" select (jsonb_populate_record(null::"LiteLLM_SpendLogs", %s)).*'
    with psycopg.connect(libpq(url), autocommit=True) as db, db.cursor() as cursor:
        cursor.executemany(populate, [(json.dumps(row),) for row in new])


def by(log: list[dict[str, Any]], **like: Any) -> list[dict[str, Any]]:
    return [row for row in log if all(row[name] == value for name, value in like.items())]


def check_rows(log: list[dict[str, Any]], *, prompts: bool) -> None:
    """What `litellm_spend.talk` asked for, once."""
    first, proved = by(log, task="sums")[0], by(log, propensity=0.25)[0]
    assert (first["model"], first["provider"], first["session"], first["tenant"]) == (
        "small",
        "openai",
        "s-1",
        "team-blue",
    )
    assert (first["input_tokens"], first["output_tokens"], first["status"], first["retries"]) == (11, 7, "ok", 0)
    assert first["cost_usd"] == pytest.approx(25e-6) and 0 < first["latency_ms"] < 60_000
    assert len(first["key"]) == 64 and first["fallback_from"] is None and first["quality"] is None
    assert (proved["model"], proved["policy_version"], proved["candidates"]) == ("large", "p-1", ["small", "large"])
    # A model without a price costs nothing that is known.
    assert [row["cost_usd"] for row in by(log, model="silent")] == [None]
    # After a fallback the served model is not the action.
    (fell,) = by(log, fallback_from="flaky")
    assert (fell["model"], fell["status"]) == ("spare", "ok") and not by(log, model="flaky")
    assert sorted(row["status"] for row in by(log, model="large")) == [
        "error",
        "error",
        "ok",
        "rate_limited",
        "timeout",
    ]
    assert {row["retries"] for row in by(log, model="large", status="timeout")} == {1}
    assert all(row["cost_usd"] is None for row in log if row["status"] not in ("ok", "cached"))
    cached = [row for row in log if "_cache_hit" in row["request_id"]]
    assert len(cached) == 2
    for row in cached:
        nothing = [row[name] for name in ("latency_ms", "retries", "provider")]
        assert nothing == [None] * 3 and row["output_tokens"] == 7
        assert (row["status"], row["cost_usd"]) == ("cached", 0.0)
    text = [row["messages"] or row["prompt"] for row in log]
    assert all(text) if prompts else not any(text)
    if prompts:
        said = request_of_log_row(proved["prompt"], proved["messages"], proved["tools"])
        assert (said.messages[0].text == "Prove it." and "tools" in json.dumps(sorted(said.needs))) or said.tools
        assert {row["prompt"] for row in log if row["prompt"]} == {"Once upon", "Say so."}


def test_an_export_in_json_lines(imported: tuple[ImportSummary, Path]) -> None:
    done, out = imported
    assert (done.added, done.skipped, done.log.rejected) == (28, {MISSING[0]: 4}, 0)
    log = rows(out)
    with_prompts, without = log[:14], log[14:]
    check_rows(with_prompts, prompts=True)
    check_rows(without, prompts=False)
    assert read_log_info(out)["meta"]["sources"] == [f"litellm:{EXPORT}"]


def test_rows_without_a_prompt_count_for_reliability_and_feedback_makes_labels(
    tmp_path: Path, catalog: Catalog
) -> None:
    names = dict(zip(("frontier", "mid", "hosted", "local"), ("large", "small", "spare", "flaky"), strict=True))
    cards = Catalog(tuple(replace(card, id=names[card.id]) for card in catalog))
    first = json.loads(EXPORT.read_text().splitlines()[0])
    (tmp_path / "votes.csv").write_text(
        f"response_id,trace_id,value\nanswer-2,,1\n,{first['litellm_call_id']},-1\nanswer-9,,1\n"
    )
    votes = read_signals(tmp_path / "votes.csv", source="thumbs")
    rules = [parse_rule("thumbs=thumbs")]
    done = import_log("litellm", str(EXPORT), out=tmp_path / "log", catalog=cards, feedback=rules, signals=votes)
    assert (done.signals, done.unjoined, done.requality) == (3, 0, 3) and done.without_card == {"silent": 2}
    log = read_log(tmp_path / "log")
    data = build_dataset(log, cards)  # answer-9 has no prompt: its vote cannot be learnt from
    assert int(data.observed.sum()) == 2
    large, small, flaky = (cards.index[name] for name in ("large", "small", "flaky"))
    failure = reliability(log, cards).failure
    assert failure[large] > failure[small] and failure[flaky] > failure[small]
    # Rows without a prompt are half of it: with them there is twice the evidence, which is shrunk less.
    text = log.filter(pl.col("messages").is_not_null() | pl.col("prompt").is_not_null())
    assert len(text) == len(log) / 2 and failure[large] > reliability(text, cards).failure[large]


@pytest.mark.parametrize("kind", ["csv", "parquet", "text.jsonl"])
def test_other_exports_say_the_same(
    imported: tuple[ImportSummary, Path], table: str, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / f"spend.{kind}"
    if kind == "csv":  # as Postgres exports it
        query = 'copy (select * from "LiteLLM_SpendLogs") to stdout (format csv, header true)'
        with psycopg.connect(libpq(table)) as db, db.cursor() as cursor, cursor.copy(query) as copied:
            file.write_bytes(b"".join(bytes(block) for block in copied))
    else:  # JSON within JSON, as the proxy's own API gives it
        lines = [json.loads(line) for line in EXPORT.read_text().splitlines()]
        text = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in lines]
        if kind == "parquet":
            frame = pl.DataFrame(text, infer_schema_length=None)
            frame.with_columns(pl.col("startTime", "endTime").str.to_datetime(time_unit="ms")).write_parquet(file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in text))
    done = import_log("litellm", str(file), out=tmp_path / "log")
    assert done.added == 28
    same, other = (read_log(path).sort("request_id") for path in (imported[1], tmp_path / "log"))
    assert other.equals(same)


def test_a_live_postgres(imported: tuple[ImportSummary, Path], table: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(postgres, "PAGE_ROWS", 5)
    out = tmp_path / "log"
    prisma = f"{libpq(table)}?schema=public&connection_limit=5&pool_timeout=10"
    done = import_log("litellm", prisma, out=out)
    assert (done.added, done.skipped) == (28, {MISSING[0]: 4})
    assert read_log(out).equals(read_log(imported[1]))
    (name,) = read_log_info(out)["meta"]["sources"]
    assert "@" not in name and "?" not in name
    last = json.loads(EXPORT.read_text().splitlines()[-1])
    # One row is newer; one began before the newest that was read, and was written later.
    at = datetime.fromisoformat(last["startTime"])
    newer = last | {"request_id": "n", "status": "success", "startTime": (at + timedelta(seconds=1)).isoformat()}
    late = last | {"request_id": "l", "status": "success", "startTime": (at - timedelta(minutes=30)).isoformat()}
    older = last | {"request_id": "o", "status": "success", "startTime": (at - timedelta(minutes=90)).isoformat()}
    insert(table, [newer, late, older])
    again = import_log("litellm", prisma, out=out)
    assert (again.added, again.known, again.log.rows) == (2, 28, 30)
    assert read_log(out)["request_id"][0] == "l" and read_log(out)["time"].is_sorted()
    wider = import_log("litellm", prisma, out=out, settings={"overlap_s": 7200})
    assert (wider.added, wider.log.rows) == (1, 31)


def test_what_of_a_postgres_is_read(table: str, tmp_path: Path) -> None:
    times = sorted(row["startTime"] for row in rows_of(table))
    settings = {"since": times[3], "until": times[7], "tenant": "api_key"}
    done = import_log("litellm", libpq(table), out=tmp_path / "log", settings=settings)
    assert done.added == 4
    assert {len(row["tenant"]) for row in rows(tmp_path / "log")} == {64}
    assert rows(tmp_path / "log")[0]["time"] == datetime.fromisoformat(times[3]).replace(tzinfo=UTC)
    # An older LiteLLM has fewer columns, and its JSON may be no object.
    with psycopg.connect(libpq(table), autocommit=True) as db:
        for column in ("litellm_call_id", "request_duration_ms", "organization_id"):
            db.execute(f'alter table "LiteLLM_SpendLogs" drop column {column}')  # type: ignore[arg-type]
        db.execute("""update "LiteLLM_SpendLogs" set metadata = '[]', proxy_server_request = 'null'""")
        db.execute("""update "LiteLLM_SpendLogs" set prompt_tokens = 0, completion_tokens = 0""")
    done = import_log("litellm", libpq(table), out=tmp_path / "old")
    log = rows(tmp_path / "old")
    assert done.log.rejected == 0 and all(row["input_tokens"] is None for row in log)
    assert any(row["latency_ms"] for row in log) and all(row["fallback_from"] is None for row in log)


def test_nothing_can_be_written_by_the_importer(table: str, tmp_path: Path) -> None:
    with psycopg.connect(libpq(table), autocommit=True) as db:
        db.execute(
            "create function meddle() returns text language sql as $$ delete from \"LiteLLM_SpendLogs\"; select 'x' $$"
        )
        db.execute('alter table "LiteLLM_SpendLogs" rename to kept')
        db.execute('create view "LiteLLM_SpendLogs" as select *, meddle() as meddled from kept')
        db.execute('alter view "LiteLLM_SpendLogs" rename column status to state')
        db.execute('alter view "LiteLLM_SpendLogs" rename column meddled to status')
    with pytest.raises(InputError, match=r"cannot read 'LiteLLM_SpendLogs' of the Postgres: .*read-only"):
        import_log("litellm", libpq(table), out=tmp_path / "log")


def test_what_is_refused(postgres_url: str, tmp_path: Path) -> None:
    for source, settings, said in (
        (libpq(postgres_url), {}, "no table 'LiteLLM_SpendLogs'"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", {}, "cannot read"),
        (str(EXPORT), {"model": "model_id"}, "choose one of model_group, model"),
        (str(EXPORT), {"tenant": "user"}, "choose one of team_id"),
        (str(tmp_path / "none.csv"), {}, "there is no file"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            import_log("litellm", source, out=tmp_path / "log", settings=settings)
        assert "secret" not in str(refused.value)


def test_the_names_of_deployments(tmp_path: Path) -> None:
    import_log("litellm", str(EXPORT), out=tmp_path / "log", settings={"model": "model"})
    assert {row["model"] for row in rows(tmp_path / "log")} >= {"openai/small-2026", "openai/large-2026"}


def test_the_proxy_of_today_writes_what_the_fixture_has(
    litellm_bin: Path, postgres_url: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    make_table(postgres_url, litellm_bin)
    with (
        running(tiny_bundle, tmp_path / "router.db") as live,
        openai_upstream() as upstream,
        litellm_proxy(
            litellm_bin, tmp_path / "proxy", upstream, postgres_url, prompts=True, router=str(live.http.base_url)
        ) as http,
    ):
        wanted = talk(http, upstream)
        wait_for(lambda: len(rows_of(postgres_url)) == wanted, 30)
        kept = [json.loads(line) for line in EXPORT.read_text().splitlines()]
        assert {frozenset(row) for row in rows_of(postgres_url)} == {frozenset(row) for row in kept}
        done = import_log("litellm", libpq(postgres_url), out=tmp_path / "log")
        assert (done.added, done.skipped) == (14, {MISSING[0]: 2})
        check_rows(rows(tmp_path / "log"), prompts=True)

        # What our plugin decides stands in the spend log, whatever the caller says of it.
        forged = {"spend_logs_metadata": {"router_ml": {"propensity": 0.001}, "mine": 1}}
        body = {"model": "router-ml", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "metadata": forged}
        assert http.post("/v1/chat/completions", json=body).is_success
        wait_for(lambda: len(rows_of(postgres_url)) == wanted + 1, 30)
        import_log("litellm", libpq(postgres_url), out=tmp_path / "log")
        assert live.service.store.flush()
        (decision,) = live.service.store.iter_log_rows()
    row = rows(tmp_path / "log")[-1]
    same = ("model", "propensity", "policy_version", "fallback_from")
    assert [row[name] for name in same] == [decision[name] for name in same]
    assert sorted(row["candidates"]) == sorted(decision["candidates"])
    assert rows_of(postgres_url)[-1]["metadata"]["spend_logs_metadata"]["mine"] == 1
