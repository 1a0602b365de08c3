"""Importing again: files that grow, are cut or made anew, clocks and units that are wrong, readers that are slow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psycopg
import pytest

from router_ml.errors import InputError
from router_ml.log_files import log_files
from router_ml.logs import read_log, read_log_info
from training.feedback import parse_rule
from training.importers import files, importing, postgres, resume, state
from training.importers.importing import ImportSummary, import_log
from training.importers.parts import HALF
from training.importers.signals import read_signals
from training.requests import LoggedRequests

HEADER = "request_id,time,model,cost_usd\n"


def row(i: int) -> str:
    return f"c{i},2026-02-01T11:{i // 60:02d}:{i % 60:02d}Z,m,0.{i:03d}25\n"


def line(i: int, **more: Any) -> str:
    said = {
        "request_id": f"r{i}",
        "time": f"2026-02-01T{i // 60:02d}:{i % 60:02d}:00Z",
        "model": "m",
        "prompt": f"p {i}",
    }
    return json.dumps(said | more) + "\n"


def put(file: Path, lines: Sequence[str]) -> Path:
    file.write_text("".join(lines))
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "log"


def again(file: Path, out: Path, **more: Any) -> ImportSummary:
    return import_log(more.pop("kind", "table"), str(file), out=out, **more)


@pytest.mark.parametrize(("digits", "better"), [(3, "ms"), (6, "us or ns"), (9, "us or ns")])
def test_a_unit_that_is_wrong_is_named(tmp_path: Path, out: Path, digits: int, better: str) -> None:
    file = put(
        tmp_path / "t.csv", ["request_id,time,model\n", *(f"r{i},{1767225600 + i}{'0' * digits},m\n" for i in range(9))]
    )
    with pytest.raises(InputError, match=rf"Most times are in the future.*give --unit time={better}$"):
        again(file, out, settings={"units": {"time": "s"}})
    if digits == 3:
        assert again(file, out, settings={"units": {"time": "ms"}}).added == 9


def test_one_time_that_is_out_of_all_range_costs_its_row(tmp_path: Path, out: Path) -> None:
    text = ["request_id,time,model\n", *(f"r{i},{1767225600 + i},m\n" for i in range(30)), "far,99999999999999,m\n"]
    done = again(put(tmp_path / "t.csv", text), out, settings={"units": {"time": "s"}})
    assert (done.added, dict(done.log.reject_reasons)) == (30, {"time in the future": 1})
    kept = json.loads(pl.read_parquet(out / "rejects.parquet")["original"][0])
    assert kept["time"] == "99999999999999"


def test_bytes_that_are_no_text_cost_their_row(tmp_path: Path, out: Path) -> None:
    time = [datetime(2026, 1, 1, tzinfo=UTC)] * 3
    pl.DataFrame(
        {"request_id": [b"a", b"\xff", b"c"], "time": time, "model": ["m"] * 3, "prompt": [b"x", b"y", b"\xfe"]}
    ).write_parquet(tmp_path / "t.parquet")
    done = again(tmp_path / "t.parquet", out, max_reject_share=0.7)
    assert (done.added, dict(done.log.reject_reasons)) == (1, {"broken UTF-8": 2})
    assert read_log(out).select("request_id", "prompt").rows() == [("a", "x")]
    assert pl.read_parquet(out / "rejects.parquet").sort("row")["row"].to_list() == [2, 3]


def test_half_a_line_of_json_is_left_for_the_next_time(tmp_path: Path, out: Path) -> None:
    file, lines = tmp_path / "a.jsonl", [line(i) for i in range(21)]
    assert again(put(file, lines[:20]), out).added == 20
    done = again(put(file, [*lines[:20], lines[20][:30]]), out)
    assert (done.added, done.log.rejected, done.skipped) == (0, 0, {HALF: 1})
    assert again(put(file, [*lines[:20], lines[20].rstrip()]), out).added == 1  # an object that closes is whole
    assert again(put(file, [*lines, line(21)]), out).added == 1
    assert read_log(out)["request_id"].to_list() == [f"r{i}" for i in range(22)]


@pytest.mark.parametrize("cut", [3, 10, 20, 30])
def test_the_last_row_of_a_csv_may_be_half_of_one(tmp_path: Path, out: Path, cut: int) -> None:
    file, rows = tmp_path / "b.csv", [row(i) for i in range(33)]
    first = again(put(file, [HEADER, *rows[:30], rows[30][:-cut]]), out)
    assert first.log.rejected == 0 and first.added == 31 - (HALF in first.skipped)
    done = again(put(file, [HEADER, *rows]), out)
    assert done.log.rows == first.added + done.added == 33
    log = read_log(out)
    assert log["cost_usd"].to_list() == [float(f"0.{i:03d}25") for i in range(33)]
    assert log["request_id"].to_list() == [f"c{i}" for i in range(33)]


def test_a_row_under_half_an_id_goes(tmp_path: Path, out: Path) -> None:
    file, header = tmp_path / "b.csv", "time,model,request_id\n"
    rows = [f"2026-02-01T11:00:{i:02d}Z,m,c{i}\n" for i in range(12)]
    first = again(put(file, [header, *rows[:11], rows[11][:-2]]), out)  # c1, which there is
    assert (first.added, first.log.rejected, first.skipped) == (11, 0, {HALF: 1})
    assert again(put(file, [header, *rows[:11], rows[11].rstrip() + "2"]), out).added == 1
    assert read_log(out)["request_id"][-1] == "c112"
    done = again(put(file, [header, *rows]), out)
    assert read_log(out)["request_id"].to_list() == [f"c{i}" for i in range(12)] and done.log.rows == 12


def test_a_finished_csv_without_a_last_newline_is_whole(tmp_path: Path, out: Path) -> None:
    file, rows = tmp_path / "b.csv", [row(i) for i in range(5)]
    assert again(put(file, [HEADER, *rows[:4], rows[4].rstrip()]), out).added == 5
    parts = read_log_info(out)["parts"]
    done = again(file, out)
    assert (done.added, done.known, done.skipped) == (0, 0, {}) and read_log_info(out)["parts"] == parts
    done = again(put(file, [HEADER, *rows, row(5)]), out)
    assert (done.added, done.log.rows) == (1, 6)
    # Another file of the same name does not take the row with it that the old one ended on.
    assert again(put(file, [HEADER, *rows, row(5), row(6).rstrip()]), out).added == 1
    assert again(put(file, [HEADER, row(7), row(8)]), out).log.rows == 9
    assert "c6" in read_log(out)["request_id"].to_list()


def test_rows_over_lines_and_quotes_that_open_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_BLOCK", 64)
    file, header = tmp_path / "b.csv", "request_id,time,model,prompt\n"
    rows = [f'c{i},2026-02-01T11:00:{i:02d}Z,m,"one\n""two"", {i}\n"\n' for i in range(20)]
    assert again(put(file, [header, *rows[:10], rows[10][:-12]]), out).added == 10
    assert again(put(file, [header, *rows]), out).added == 10
    odd = [f'd{i},2026-02-01T12:00:{i:02d}Z,m,a 5" pipe\n' for i in range(7)]
    assert again(put(file, [header, *rows, *odd]), out).added == 7
    assert again(put(file, [header, *rows, *odd, odd[0].replace("d0", "d7").rstrip()]), out).added == 1
    log = read_log(out)
    assert log.height == 28 and log["prompt"][0] == 'one\n"two", 0\n' and log["prompt"][-1] == 'a 5" pipe'
    # A row that is whole but for its newline has one in a field; the next one is half after a quote that opens nothing.
    whole = log["prompt"].to_list()
    over = 'd8,2026-02-01T12:09:00Z,m,"x\n 5"" "'
    assert again(put(file, [header, *rows, *odd, odd[0].replace("d0", "d7"), over]), out).added == 1
    assert (
        again(put(file, [header, *rows, *odd, odd[0].replace("d0", "d7"), over + "\n", rows[0][:40]]), out).added == 0
    )
    assert read_log(out)["prompt"].to_list() == [*whole, 'x\n 5" ']
    monkeypatch.setattr(resume, "_LONGEST", 1000)
    never = [f"e{i},2026-02-01T13:00:{i:02d}Z,m,x\n" for i in range(60)]
    with pytest.raises(InputError, match=r"a quote that opens behind byte .* is never closed"):
        again(put(tmp_path / "c.csv", [header, 'e,2026-02-01,m,"open\n', *never]), out)


def observation(i: int, *, ended: bool = True, **more: Any) -> str:
    said = {
        "id": f"o{i}", "trace_id": f"t{i}", "type": "GENERATION", "provided_model_name": "m", "input": "hello " * 20,
        "start_time": f"2026-02-01T{i // 60:02d}:{i % 60:02d}:00Z",
    }  # fmt: skip
    if ended:
        said |= {"end_time": f"2026-02-01T{i // 60:02d}:{i % 60:02d}:03Z", "total_cost": 0.01}  # type: ignore[dict-item]
    return json.dumps(said | more) + "\n"


def test_an_export_that_is_made_again_replaces_what_it_says_anew(tmp_path: Path, out: Path) -> None:
    file = put(tmp_path / "obs.jsonl", [observation(i, ended=i not in (500, 700)) for i in range(800)])
    assert file.stat().st_size > 1 << 17 and again(file, out, kind="langfuse").added == 800
    done = again(put(file, [observation(i) for i in range(850)]), out, kind="langfuse")
    assert (done.added, done.updated, done.log.rejected) == (50, 2, 0)
    assert read_log(out)["cost_usd"].to_list() == [0.01] * 850


def test_an_import_goes_on_within_a_file_that_grew_meanwhile(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 500)

    def stop(rows: int) -> None:
        if rows >= 15:
            raise RuntimeError

    for name, made, head in (("a.csv", row, HEADER), ("b.jsonl", line, "")):
        lines = [made(i) for i in range(40)]
        file, log = put(tmp_path / name, [head, *lines[:30]]), out / name
        with pytest.raises(RuntimeError):
            again(file, log, part_rows=10, progress=stop)
        began = json.loads((log / "import.json").read_text())["parts"]
        assert 10 <= sum(part["rows"] for part in began) < 30
        done = again(put(file, [head, *lines]), log, part_rows=10)
        assert (done.added, done.known, done.log.rows) == (40, 0, 40), name


def test_an_older_export_takes_nothing_back(tmp_path: Path, out: Path) -> None:
    def score(value: float, day: int) -> str:
        said = {"id": "s1", "timestamp": f"2026-02-{day:02d}T00:00:00Z", "trace_id": "t1", "observation_id": "o1"}
        return json.dumps(said | {"name": "q", "value": value, "source": "API", "data_type": "NUMERIC"}) + "\n"

    new = put(tmp_path / "new.jsonl", [observation(1), score(1.0, 3)])
    old = put(tmp_path / "old.jsonl", [observation(1, total_cost=None), score(0.0, 2)])
    running = put(tmp_path / "running.jsonl", [observation(1, ended=False, user_id="u")])
    again(new, out, kind="langfuse", feedback=[parse_rule("api:q=score")])
    assert again(old, out, kind="langfuse").updated == 0
    assert again(running, out, kind="langfuse").updated == 1
    (found,) = read_log(out).to_dicts()
    assert [found[n] for n in ("cost_usd", "latency_ms", "status", "quality", "tenant")] == [0.01, 3000, "ok", 1.0, "u"]


def test_a_row_whose_time_moves_keeps_the_log_in_order(tmp_path: Path, out: Path) -> None:
    again(put(tmp_path / "a.jsonl", [observation(i) for i in range(60)]), out, kind="langfuse", part_rows=10)
    moved = observation(5, start_time="2026-02-01T05:00:00Z", end_time="2026-02-01T05:00:09Z")
    assert again(put(tmp_path / "b.jsonl", [moved]), out, kind="langfuse", part_rows=10).updated == 1
    log = read_log(out)
    assert log["time"].is_sorted() and log["request_id"][-1] == "o5"


def test_other_settings_read_the_rows_anew(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line(i, group="g", propensity=1.0 if i > 7 else None) for i in range(10)]
    file = put(tmp_path / "a.jsonl", [*rows, line(9, group="h", model="n", propensity=1.0)])
    again(file, out)
    asked = {"columns": {"model": "group"}}
    with monkeypatch.context() as patch:
        patch.setattr(importing, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again(file, out, settings=asked)
    assert again(file, out, settings=asked).updated == 8  # it was ended, and is still to be done
    assert sorted(read_log(out)["model"].to_list()) == ["g"] * 8 + ["m", "m", "n"]
    done = again(file, out, settings=asked)
    assert (done.updated, done.known) == (0, 0)


def test_a_signal_reaches_the_one_answer_that_it_names(tmp_path: Path, out: Path) -> None:
    several = [line(0, model=m, propensity=1.0, trace_id=f"t-{m}") for m in "abc"]
    put(tmp_path / "f.jsonl", [
        json.dumps(said) + "\n"
        for said in (
            {"request_id": "r0", "value": 1, "source": "any"},
            {"request_id": "r0", "value": 1, "source": "model", "model": "b"},
            {"request_id": "r0", "value": 0, "source": "trace", "trace_id": "t-c"},
        )
    ])  # fmt: skip
    done = again(
        put(tmp_path / "a.jsonl", several), out, feedback=[parse_rule("*=thumbs")],
        signals=read_signals(tmp_path / "f.jsonl"),
    )  # fmt: skip
    assert (done.ambiguous, done.unjoined, done.requality) == (1, 0, 2)
    log = read_log(out).sort("model")
    assert log.select("quality", "quality_source").rows() == [(None, None), (1.0, "model"), (0.0, "trace")]
    # What stands in the rows themselves is about each of them.
    table = [
        "request_id,time,model,propensity,up\n",
        *(f"s,2026-02-01,{m},1.0,{up}\n" for m, up in zip("abc", "101", strict=True)),
    ]
    again(
        put(tmp_path / "t.csv", table),
        tmp_path / "b",
        feedback=[parse_rule("*=thumbs")],
        settings={"signals": {"up": "up"}},
    )
    assert read_log(tmp_path / "b").sort("model")["quality"].to_list() == [1.0, 0.0, 1.0]


def test_a_traces_last_answer_is_one_that_succeeded(tmp_path: Path, out: Path) -> None:
    calls = [line(i, trace_id="t", status=s) for i, s in enumerate(("ok", "error"))]
    failed = [line(i, trace_id="u", status="error") for i in (2, 3)]
    put(tmp_path / "f.csv", ["trace_id,value\nt,1\nu,0\n"])
    again(put(tmp_path / "a.jsonl", [*calls, *failed]), out, feedback=[parse_rule("f=thumbs")],
          signals=read_signals(tmp_path / "f.csv"))  # fmt: skip
    assert read_log(out)["quality"].to_list() == [1.0, None, None, 0.0]


def test_readers_keep_their_files_for_a_day(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    grow = lambda n: again(put(file, [line(i) for i in range(n)]), out)  # noqa: E731
    grow(50)
    reading = LoggedRequests(log_files(out), np.arange(50))  # what a training holds
    for n in range(60, 200, 20):
        grow(n)
    assert len(reading.read()) == 50
    # Not for ever, and not whatever it costs.
    monkeypatch.setattr(state, "MIN_RETIRED_BYTES", 0)
    grow(220)
    named = sum((out / part["file"]).stat().st_size for part in read_log_info(out)["parts"])
    assert sum(part.stat().st_size for part in out.glob("part-*")) < 5 * named
    monkeypatch.setattr(state, "GRACE_S", 0.0)
    grow(240)
    grow(260)
    before = json.loads((out / "import.json").read_text())["retired"]
    assert {p.name for p in out.glob("part-*")} == {p["file"] for p in read_log_info(out)["parts"]} | before.keys()
    assert len(before) < 3


def test_one_more_row_costs_little(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = tmp_path / "a.jsonl", [line(i) for i in range(300)]
    monkeypatch.setattr(files, "CHUNK_BYTES", 10_000)
    again(put(file, lines), out, part_rows=100)
    parts = [part["file"] for part in read_log_info(out)["parts"]]
    real, read = pl.read_parquet, []

    def noted(source: Any, **options: Any) -> pl.DataFrame:
        read.append((Path(source).name, options.get("columns")))
        return real(source, **options)

    monkeypatch.setattr(pl, "read_parquet", noted)
    # A row that began before the last one that was read, as they do.
    late = line(999, time="2026-02-01T04:58:30Z")
    assert again(put(file, [*lines, late]), out, part_rows=100).added == 1
    assert {name for name, columns in read if columns is None and name in parts} == {parts[-1]}
    last = [part["file"] for part in read_log_info(out)["parts"]]
    assert last[: len(parts) - 1] == parts[:-1]
    # And the next one leaves most of the last part as it was, too.
    read.clear()
    again(put(file, [*lines, late, line(998, time="2026-02-01T04:59:30Z")]), out, part_rows=100)
    kept = [part["file"] for part in read_log_info(out)["parts"]]
    assert (
        len(parts) > 2
        and kept[: len(parts)] == last[: len(parts)]
        and read_log(out)["time"].is_sorted()
        and read_log(out).height == 302
    )


SPEND = """(request_id text primary key, call_type text, "startTime" timestamp, "endTime" timestamp, model text,
model_group text, model_id text, spend float, prompt_tokens int, completion_tokens int, status text, metadata jsonb,
messages jsonb, proxy_server_request jsonb, cache_hit text)"""
FILL = """insert into {} select {}||i, 'acompletion', at, at, 'm', 'm', 'i', 0.1, 10, 10, 'success', '{{}}', '{{}}',
jsonb_build_object('messages', jsonb_build_array(jsonb_build_object('role', 'user', 'content', repeat('x', 200)))),
'False' from generate_series({}, {}) i, lateral (select timestamp '2026-01-01' + i * interval '1 hour' as at) t"""


@pytest.fixture
def spend(postgres_url: str) -> str:
    url = postgres_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("create schema b")
        for name, letter, most in (('public."LiteLLM_SpendLogs"', "'x'", 100), ('b."LiteLLM_SpendLogs"', "'b'", 30)):
            db.execute(f"create table {name} {SPEND}")  # type: ignore[arg-type]
            db.execute(FILL.format(name, letter, 1, most))  # type: ignore[arg-type]
    return url


def test_a_postgres_is_read_whatever_was_read_before(spend: str, out: Path) -> None:
    read = lambda url=spend, **settings: import_log("litellm", url, out=out, settings=settings)  # noqa: E731
    assert read(since="2026-01-03T12:00").added == 41
    assert read(since="2026-01-04").added == 0
    assert read(since="2026-01-03").added == 12
    assert read().log.rows == 100 and read().known == 2
    assert read(f"{spend}?schema=b").added == 30
    with psycopg.connect(spend, autocommit=True) as db:
        db.execute(FILL.format('"LiteLLM_SpendLogs"', "'x'", 101, 120))  # type: ignore[arg-type]
    # A look at the end of it leaves nothing out of what is read next.
    assert read(since="2026-01-05T20:00").added == 5
    assert read().added == 15 and len(read_log_info(out)["meta"]["sources"]) == 2


def test_rows_without_a_time_and_clocks_that_are_wrong(spend: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "FIRST_ROWS", 7)
    with psycopg.connect(spend, autocommit=True) as db:
        db.execute("""update "LiteLLM_SpendLogs" set "startTime" = null where request_id in ('x1', 'x2', 'x100')""")
        db.execute("""update "LiteLLM_SpendLogs" set "startTime" = '2099-01-01' where request_id = 'x3'""")
        db.execute("""update "LiteLLM_SpendLogs" set "startTime" = 'infinity' where request_id = 'x4'""")
    done = import_log("litellm", spend, out=out, max_reject_share=0.06)
    assert done.added == 95
    reasons = {"missing time": 3, "time in the future": 1, "wrong type: time": 1, "negative latency_ms": 1}
    assert dict(done.log.reject_reasons) == reasons
    with psycopg.connect(spend, autocommit=True) as db:
        db.execute(FILL.format('"LiteLLM_SpendLogs"', "'x'", 101, 160))  # type: ignore[arg-type]
    done = import_log("litellm", spend, out=out, max_reject_share=0.06)
    assert (done.added, done.log.rejected) == (60, 2)


def test_pages_are_bound_by_their_bytes(spend: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "PAGE_BYTES", 2000)
    sizes: list[int] = []
    real = postgres._Pages._page

    def noted(self: Any, *args: Any) -> Any:
        text = real(self, *args)
        sizes.append(-1 if text is None else len(text))
        return text

    monkeypatch.setattr(postgres._Pages, "_page", noted)
    assert import_log("litellm", spend, out=out).added == 100
    assert sizes[0] == -1 and max(sizes) <= 4 * 2000 and 10 < len(sizes) < 60
