"""Importing: nothing is lost, nothing is there twice, whatever ends an import, and late feedback finds its rows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_store import decision, request

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.logs import log_sha256, read_log, read_log_info
from router_ml.rawfiles import ROW
from router_ml.store import Store
from router_ml.types import Outcome
from training.feedback import parse_rule
from training.importers import files
from training.importers.files import read_columns
from training.importers.importing import import_feedback, import_log
from training.importers.jsontext import keys_of
from training.importers.kinds import KINDS
from training.importers.signals import read_signals
from training.importers.state import LogFolder

START = datetime(2026, 1, 1, tzinfo=UTC)
UP = parse_rule("thumb=thumbs")


def table(path: Path, numbers: range, *, disorder: int = 7, extra: str = "") -> Path:
    """A CSV of calls: seconds, cents and milliseconds in their own units, in no order of time."""
    lines = ["id,ts,model,cents,secs,code,thumb,trace,user text"]
    for i in numbers:
        code, thumb = 429 if i % 5 == 0 else 200, ("up", "", "down")[i % 3]
        ts = int(START.timestamp()) + (i * disorder) % len(numbers)
        lines.append(f'r{i},{ts},m{i % 3},{i},{i / 10},{code},{thumb},t{i // 4},"say ""{i}"",\nplease"')
    path.write_text("\n".join(lines) + "\n" + extra, encoding="utf-8")
    return path


SETTINGS: dict[str, Any] = {
    "columns": {
        "request_id": "id", "time": "ts", "cost_usd": "cents", "latency_ms": "secs", "status": "code",
        "trace_id": "trace", "prompt": "user text",
    },
    "units": {"time": "s", "cost_usd": "cents", "latency_ms": "s"},
    "constants": {"provider": "acme"},
    "signals": {"thumb": "thumb"},
}  # fmt: skip


def test_a_table_is_read_as_it_is_meant(tmp_path: Path) -> None:
    file = table(
        tmp_path / "calls.csv", range(50), extra='r50,soon,m1,1,1,200,,,""\nr0,1767225600,m0,1,1,200,,,\nx,y\n'
    )
    out = tmp_path / "log"
    done = import_log("table", str(file), out=out, settings=SETTINGS, feedback=[UP], max_reject_share=0.1, part_rows=20)
    assert (done.added, done.log.rows, done.log.rejected, done.signals) == (50, 50, 3, 33)
    log = read_log(out)
    # Every import would read a growing log whole for its hash, so it has none.
    assert log["time"].is_sorted() and done.log.sha256 is None and read_log_info(out)["sha256"] is None
    row = log.row(by_predicate=pl.col("request_id") == "r12", named=True)
    assert row["time"] == START + timedelta(seconds=(12 * 7) % 50) and row["prompt"] == 'say "12",\nplease'
    assert (row["cost_usd"], row["latency_ms"], row["provider"]) == (0.12, 1200, "acme")
    by_id = {row["request_id"]: row for row in log.to_dicts()}
    assert [by_id[f"r{i}"]["status"] for i in (5, 6)] == ["rate_limited", "ok"]
    assert [by_id[f"r{i}"]["quality"] for i in (3, 4, 5)] == [1.0, None, 0.0]
    assert [by_id[f"r{i}"]["quality_source"] for i in (3, 4)] == ["thumb", None]
    rejects = pl.read_parquet(out / "rejects.parquet").sort("row")
    assert rejects["row"].to_list() == [51, 52, 53]
    assert rejects["reason"].to_list() == ["missing time", "duplicate request_id", "wrong number of fields"]
    assert json.loads(rejects["original"][0])["ts"] == "soon" and json.loads(rejects["original"][2]) == "x,y"


def test_importing_twice_adds_nothing_and_a_file_that_grew_what_is_new(tmp_path: Path) -> None:
    out, file = tmp_path / "log", tmp_path / "calls.csv"
    table(file, range(30))
    first = import_log("table", str(file), out=out, settings=SETTINGS, part_rows=10)
    before = read_log_info(out)["parts"]
    again = import_log("table", str(file), out=out, settings=SETTINGS, part_rows=10)
    assert (first.added, again.added, again.log.rows) == (30, 0, 30)
    assert before == read_log_info(out)["parts"]
    with file.open("a") as more:
        more.write(f"r99,{int(START.timestamp()) - 5},m1,1,1,200,up,,late\n")
    grown = import_log("table", str(file), out=out, settings=SETTINGS, part_rows=10)
    assert (grown.added, grown.known, grown.log.rows) == (1, 0, 31)
    assert read_log(out)["time"].is_sorted() and read_log(out)["request_id"][0] == "r99"
    # The same rows in another file, and in one that begins otherwise than when it was read: known by their ids.
    table(tmp_path / "other.csv", range(20, 40))
    other = import_log("table", str(tmp_path / "other.csv"), out=out, settings=SETTINGS, part_rows=10)
    assert (other.added, other.known, other.log.rows) == (10, 10, 41)


class Killed(BaseException):
    """Stands for a kill: nothing of the product catches it, so the disk is as a kill would leave it."""


STEPS = ("write_as", "save", "publish", "_swap")


def count_steps(monkeypatch: pytest.MonkeyPatch, kill_at: int) -> list[int]:
    """Ends the program before, or within, its n-th step that changes the log's folder."""
    seen = [0]
    for name in STEPS:
        real = getattr(LogFolder, name)

        def step(self: LogFolder, *args: Any, _real: Any = real) -> Any:
            seen[0] += 1
            if seen[0] == kill_at:
                raise Killed
            return _real(self, *args)

        monkeypatch.setattr(LogFolder, name, step)
    return seen


def test_an_import_that_is_ended_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)  # so that there are several parts
    file = table(tmp_path / "calls.csv", range(60), extra="x,y\n")

    def run(out: Path, source: Path) -> Any:
        return import_log("table", str(source), out=out, settings=SETTINGS, feedback=[UP], part_rows=20)

    run(tmp_path / "whole", file)
    sha256 = log_sha256(tmp_path / "whole")
    rejects = pl.read_parquet(tmp_path / "whole" / "rejects.parquet")
    step = 0
    while True:
        step += 1
        out = tmp_path / f"log-{step}"
        with pytest.MonkeyPatch.context() as patch:
            seen = count_steps(patch, step)
            with contextlib.suppress(Killed):
                run(out, file)
        if seen[0] < step:
            break
        if step > 1 and (out / "log.json").is_file():  # what readers see is whole at any time
            assert read_log(out).height == 60
        done = run(out, file)
        assert (done.log.rows, log_sha256(out)) == (60, sha256), step
        assert pl.read_parquet(out / "rejects.parquet").equals(rejects), step
        assert read_log_info(out)["rejected"] == 1, step
    assert step > 10


def test_a_real_kill_between_two_parts(tmp_path: Path) -> None:
    file = table(tmp_path / "calls.csv", range(60))
    code = (
        "import os, signal, sys, json\n"
        "from training.importers import files, importing, state\n"
        "files.CHUNK_BYTES = 500\n"
        "real, seen = state.LogFolder.save, []\n"
        "def save(self):\n"
        "    real(self)\n"
        "    seen.append(1)\n"
        "    if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "state.LogFolder.save = save\n"
        "importing.import_log('table', sys.argv[1], out=sys.argv[2], settings=json.loads(sys.argv[3]), part_rows=20)\n"
    )
    argv = [sys.executable, "-c", code, str(file), str(tmp_path / "log"), json.dumps(SETTINGS)]
    killed = subprocess.run(
        argv, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "log" / "log.json").exists()
    began = json.loads((tmp_path / "log" / "import.json").read_text())
    assert 0 < sum(part["rows"] for part in began["parts"]) < 60
    done = import_log("table", str(file), out=tmp_path / "log", settings=SETTINGS, part_rows=20)
    assert done.log.rows == 60 and read_log(tmp_path / "log")["request_id"].n_unique() == 60


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    out = tmp_path / "log"
    import_log("table", str(table(tmp_path / "calls.csv", range(40))), out=out, settings=SETTINGS, feedback=[UP])
    return out


def test_late_feedback_reaches_rows_that_are_in_the_log(imported: Path, tmp_path: Path) -> None:
    before = read_log(imported)
    file = tmp_path / "judge.jsonl"
    file.write_text(
        '{"request_id": "r1", "score": 4}\n{"trace_id": "t2", "score": 1}\n'
        '{"request_id": "r999", "score": 2}\n{"request_id": "r2", "score": 40}\n'
    )
    said = lambda: read_signals(file, columns={"value": "score"})  # noqa: E731
    unheard = import_feedback(said(), out=imported)
    assert unheard.requality == 0 and unheard.without_rule == {"judge": 4}
    done = import_feedback(said(), out=imported, feedback=[UP, parse_rule("judge=stars,reliability=0.75")])
    assert (done.requality, done.unjoined, done.unread, done.log.rows) == (2, 1, 1, 40)
    log = {row["request_id"]: row for row in read_log(imported).to_dicts()}
    # r1 had no thumb; t2 is r8 to r11, of which the last by time has the judge's word, too.
    assert (log["r1"]["quality"], log["r1"]["quality_source"]) == (0.75, "judge")
    (last,) = before.filter(pl.col("request_id").is_in(["r8", "r9", "r10", "r11"])).sort("time")["request_id"][-1:]
    assert "judge" in log[last]["quality_source"]
    assert import_feedback(said(), out=imported).requality == 0
    assert import_feedback([], out=imported, feedback=[UP]).requality == 2  # without the rule all is as it was
    assert read_log(imported).equals(before)


def test_feedback_that_is_there_before_its_row(imported: Path, tmp_path: Path) -> None:
    file = tmp_path / "early.csv"
    file.write_text("request_id,value,source\nr45,1,thumb\n")
    assert import_feedback(read_signals(file), out=imported).unjoined == 1
    table(tmp_path / "more.csv", range(40, 50))
    settings = {**SETTINGS, "signals": {}}
    done = import_log("table", str(tmp_path / "more.csv"), out=imported, settings=settings)
    assert done.unjoined == 0
    row = read_log(imported).row(by_predicate=pl.col("request_id") == "r45", named=True)
    assert (row["quality"], row["quality_source"]) == (1.0, "thumb")


def test_a_quality_that_rows_bring_along_is_one_source_among_others(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "request_id,time,model,quality,quality_source\na,2026-01-01,m,0.5,eval\nb,2026-01-02,m,1,\nc,2026-01-03,m,,\n"
    )
    out = tmp_path / "log"
    import_log("table", str(file), out=out)
    assert read_log(out)["quality"].to_list() == [0.5, 1.0, None]
    (tmp_path / "thumb.csv").write_text("request_id,value\na,1\nc,1\n")
    import_feedback(read_signals(tmp_path / "thumb.csv"), out=out, feedback=[UP, parse_rule("eval=score,weight=3")])
    assert read_log(out).select("quality", "quality_source").rows() == [
        (0.625, "eval+thumb"),
        (1.0, None),
        (1.0, "thumb"),
    ]


def test_too_many_bad_rows_leave_the_log_as_it_was(imported: Path, tmp_path: Path) -> None:
    before = (imported / "log.json").read_text()
    (tmp_path / "bad.csv").write_text("request_id,time,model\nx,2026-01-01,m\ny,never,m\n")
    with pytest.raises(InputError, match=r"1 of 2 rows were rejected.*missing time|wrong type"):
        import_log("table", str(tmp_path / "bad.csv"), out=imported)
    assert (imported / "log.json").read_text() == before and read_log(imported).height == 40
    assert pl.read_parquet(f"{imported}.rejects.parquet").height == 1
    done = import_log("table", str(tmp_path / "bad.csv"), out=imported, max_reject_share=0.5)
    assert (done.added, done.log.rows) == (1, 41)


def test_what_is_refused(imported: Path, tmp_path: Path) -> None:
    csv = str(tmp_path / "calls.csv")
    for settings, said in (
        ({"columns": {"request_id": "nr"}}, "no column 'nr'"),
        ({"columns": {"id": "nr"}}, "the log has no column 'id'"),
        ({"columns": SETTINGS["columns"], "units": {"time": "hours"}}, "unknown unit of time 'hours'"),
        ({"columns": SETTINGS["columns"], "units": {"retries": "s"}}, "'retries' has no unit"),
        ({}, "no column 'request_id'"),
    ):
        with pytest.raises(InputError, match=said):
            import_log("table", csv, out=tmp_path / "new", settings=settings)
    with pytest.raises(InputError, match="unknown kind of log 'csv'"):
        import_log("csv", csv, out=tmp_path / "new")
    with pytest.raises(InputError, match="no log at"):
        import_feedback([], out=tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a log"):
        import_log("table", csv, out=tmp_path / "full", settings=SETTINGS)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"
    (imported / read_log_info(imported)["parts"][0]["file"]).unlink()
    with pytest.raises(InputError, match="is incomplete"):
        import_log("table", csv, out=imported, settings=SETTINGS)


def test_models_without_a_card_stay(tmp_path: Path, catalog: Catalog) -> None:
    file = table(tmp_path / "calls.csv", range(12))
    file.write_text(file.read_text().replace(",m0,", ",mid,"))
    done = import_log("table", str(file), out=tmp_path / "log", settings=SETTINGS, catalog=catalog)
    assert done.log.rows == 12 and done.without_card == {"m1": 4, "m2": 4}
    assert Catalog.from_json(read_log_info(tmp_path / "log")["catalog"]) == catalog


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id": "a", "o": {"k": {"x": 1}, "l": 2}}\n\n[1]\n{"id":\n'
        b'{"id": "\xff"}\n{"id": "b", "o": "{\\"l\\": 3}"}'
    )
    (tmp_path / "a.csv").write_bytes(b'id,o\na,"{""l"": 2}"\nb\n\nc,d,e\n"",\xff\n"d\n",\n')
    return tmp_path


def whole(file: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    chunks = list(read_columns(file, ["id", "o", "none"]))
    assert not list(read_columns(file, ["id"], cursor=chunks[-1].cursor))
    for chunk in chunks:
        assert chunk.raw.height == chunk.frame.height
    kept = [
        pl.concat([c.frame.select(ROW, "id", "none"), keys_of(c.frame["o"], ["k", "l"])], how="horizontal")
        for c in chunks
    ]
    return pl.concat(kept), pl.concat(c.rejects for c in chunks)


def test_broken_lines_cost_themselves_alone(broken: Path) -> None:
    frame, rejects = whole(broken / "a.jsonl")
    assert frame.rows() == [(1, "a", None, '{"x": 1}', "2"), (5, "b", None, None, "3")]
    assert rejects.select("row", "reason").rows() == [
        (2, "not a JSON object"),
        (3, "not valid JSON"),
        (4, "broken UTF-8"),
    ]
    frame, rejects = whole(broken / "a.csv")
    assert frame.rows() == [(1, "a", None, None, "2"), (5, "d\n", None, None, None)]
    assert rejects["row"].to_list() == [2, 3, 4]
    assert rejects["reason"].to_list() == ["wrong number of fields", "wrong number of fields", "broken UTF-8"]


@pytest.mark.parametrize("size", [40, 64, 1000])
def test_where_a_file_is_cut_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    lines = [json.dumps({"id": f"r{i}", "o": {"l": i, "k": "x" * (i % 60)}}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    frame, rejects = whole(tmp_path / "a.jsonl")
    assert frame["id"].to_list() == [f"r{i}" for i in range(30)] and frame[ROW].to_list() == list(range(1, 31))
    assert frame["l"].to_list() == [str(i) for i in range(30)] and not rejects.height


def test_a_line_that_its_writer_is_at_is_read_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b')
    chunks = list(read_columns(file, ["id"]))
    file.write_text('{"id": "a"}\n{"id": "bc"}\n')
    (rest,) = read_columns(file, ["id"], cursor=chunks[-1].cursor)
    assert rest.frame.rows() == [("bc", 2)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"{tmp_path}/store.db").start()
    yield store
    store.close()


def test_our_own_store_with_outcomes_that_come_later(store: Store, tmp_path: Path, catalog: Catalog) -> None:
    out, url = tmp_path / "log", f"{tmp_path}/store.db"
    made = [decision() for _ in range(5)]
    for at, one in enumerate(made):
        assert store.record(request(request_id=f"call-{at}", key="k"), one, provider="acme", prompt="What?")
    store.add_outcome(
        Outcome(decision_id=made[0].decision_id, status="ok", quality=0.25, quality_source="user"), key="k"
    )
    assert store.flush()
    first = import_log("store", url, out=out, catalog=catalog)
    assert (first.added, first.updated) == (5, 0)
    by_id = {row["request_id"]: row for row in read_log(out).to_dicts()}
    row = by_id[made[0].decision_id]
    assert (row["quality"], row["status"], row["propensity"]) == (0.25, "ok", 0.9)
    assert by_id[made[1].decision_id]["status"] is None
    late = Outcome(decision_id=made[1].decision_id, status="timeout", served_model="frontier", retries=2)
    store.add_outcome(late, key="k").result(10)
    again = import_log("store", url, out=out)
    assert (again.added, again.known, again.updated, again.log.rows) == (0, 5, 1, 5)
    row = read_log(out).row(by_predicate=pl.col("request_id") == made[1].decision_id, named=True)
    assert (row["status"], row["model"], row["fallback_from"], row["retries"]) == ("timeout", "frontier", "mid", 2)
    assert import_log("store", url, out=out).updated == 0
    (tmp_path / "f.csv").write_text("trace_id,value\ncall-2,1\n")  # by the id that the caller gave
    import_feedback(read_signals(tmp_path / "f.csv", source="thumb"), out=out, feedback=[UP])
    row = read_log(out).row(by_predicate=pl.col("request_id") == made[2].decision_id, named=True)
    assert (row["quality"], row["quality_source"]) == (1.0, "thumb")
    stored = {row["request_id"]: row for row in store.iter_log_rows()}
    same = read_log(out).drop("quality", "quality_source").to_dicts()
    assert all({k: stored[row["request_id"]][k] for k in row} == row for row in same)
    # A choice without alternatives has propensity 1; that another model served is no second row of it.
    sure = decision(propensity=1.0)
    assert store.record(request(key="k"), sure, provider="acme") and store.flush()
    assert import_log("store", url, out=out).added == 1
    fell = Outcome(decision_id=sure.decision_id, status="ok", served_model="frontier")
    store.add_outcome(fell, key="k").result(10)
    last = import_log("store", url, out=out)
    assert (last.added, last.updated, last.log.rows) == (0, 1, 6)
    with pytest.raises(InputError, match="no store at"):
        import_log("store", str(tmp_path / "no.db"), out=out)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = table(tmp_path / "calls.csv", range(20)), tmp_path / "log"
    options = [f"--column={k}={v}" for k, v in SETTINGS["columns"].items()]
    options += [f"--unit={k}={v}" for k, v in SETTINGS["units"].items()]
    argv = [
        "import",
        "table",
        str(file),
        *options,
        "--signal",
        "thumb=thumb",
        "--rule",
        "thumb=thumbs",
        "--out",
        str(out),
    ]

    def said(*argv: str) -> str:
        assert main(list(argv), standalone_mode=False) is None
        return capsys.readouterr().out

    assert "20 added, 0 were there already" in said(*argv)
    assert "0 added" in said(*argv)
    (tmp_path / "f.csv").write_text("request_id,value\nr1,9\n")
    text = said(
        "import",
        "feedback",
        str(tmp_path / "f.csv"),
        "--out",
        str(out),
        "--rule",
        "f=score,max=10",
        "--rule",
        "thumb=thumbs",
    )
    assert "the quality of 1 rows is another now" in text
    assert LOG_SCHEMA.names() == read_log(out).columns
    assert set(KINDS) <= set(main.commands["import"].commands)  # type: ignore[attr-defined]
