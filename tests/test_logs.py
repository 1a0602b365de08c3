"""The log's one door: what is rejected and why, what survives, and that nothing is ever half-written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import (
    LOG_SCHEMA,
    LogWriter,
    ValidationState,
    log_sha256,
    read_frames,
    read_log,
    read_log_info,
    scan_log,
    validate,
    write_log,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def row(n: int = 0, **values: Any) -> dict[str, Any]:
    full = {
        "request_id": f"r{n}",
        "time": START + timedelta(seconds=n),
        "session": "s1",
        "tenant": "t1",
        "key": "k1",
        "task": "chat",
        "prompt": f"prompt {n} naïve",
        "messages": None,
        "tools": None,
        "candidates": ["frontier", "mid", "local"],
        "model": "mid",
        "provider": "acme",
        "propensity": 0.5,
        "policy_version": "p1",
        "input_tokens": 10,
        "output_tokens": 20,
        "cost_usd": 0.001,
        "latency_ms": 120.0,
        "status": "ok",
        "retries": 0,
        "fallback_from": None,
        "cluster": "c1",
        "quality": 1.0,
        "quality_source": "user",
    }
    assert set(values) <= set(full)
    return full | values


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=LOG_SCHEMA)


def reasons(rejects: pl.DataFrame) -> dict[int, str]:
    return dict(rejects.select("row", "reason").iter_rows())


INVALID = [
    ({"cost_usd": -0.1}, "negative cost_usd"),
    ({"cost_usd": 1e11}, "cost_usd of more than a million"),
    ({"input_tokens": 9 * 10**18}, "input_tokens of more than 10^10"),
    ({"cost_usd": float("nan")}, "cost_usd not finite"),
    ({"cost_usd": float("inf")}, "cost_usd not finite"),
    ({"quality": -0.01}, "quality outside [0, 1]"),
    ({"quality": 1.01}, "quality outside [0, 1]"),
    ({"quality": float("nan")}, "quality outside [0, 1]"),
    ({"model": "gpt-99", "candidates": None}, "unknown model"),
    ({"propensity": 0.0}, "propensity outside (0, 1]"),
    ({"propensity": 1.5}, "propensity outside (0, 1]"),
    ({"propensity": float("nan")}, "propensity outside (0, 1]"),
    ({"input_tokens": -1}, "negative input_tokens"),
    ({"output_tokens": -1}, "negative output_tokens"),
    ({"latency_ms": -1.0}, "negative latency_ms"),
    ({"latency_ms": float("nan")}, "latency_ms not finite"),
    ({"retries": -1}, "negative retries"),
    ({"request_id": None}, "missing request_id"),
    ({"request_id": ""}, "missing request_id"),
    ({"time": None}, "missing time"),
    ({"model": None}, "missing model"),
    ({"request_id": "r0"}, "duplicate request_id"),
    ({"time": START - timedelta(microseconds=1)}, "time runs backwards"),
    ({"time": NOW + timedelta(days=1, seconds=1)}, "time in the future"),
    ({"status": "great"}, "unknown status"),
    ({"model": "hosted"}, "model not among its candidates"),
    ({"candidates": []}, "model not among its candidates"),
    ({"fallback_from": "hosted"}, "model not among its candidates"),
    ({"candidates": ["mid", None]}, "wrong type: candidates"),
]


@pytest.mark.parametrize(("values", "reason"), INVALID)
def test_a_bad_row_is_set_aside_with_its_reason(catalog: Catalog, values: dict[str, Any], reason: str) -> None:
    rows = frame(row(0), row(1, **values), row(2))
    good, rejects = validate(rows, catalog=catalog, now=NOW)
    assert reasons(rejects) == {2: reason}
    assert_frame_equal(good, frame(row(0), row(2)))


@pytest.mark.parametrize(
    "values",
    [
        {"quality": 0.0},
        {"quality": 1.0},
        {"propensity": 1.0},
        {"propensity": 1e-9},
        {"cost_usd": 0.0},
        {"time": START},
        {"time": NOW + timedelta(days=1)},
        {"model": "hosted", "fallback_from": "mid"},
        {"status": "timeout"},
        {name: None for name in LOG_SCHEMA if name not in ("request_id", "time", "model")},
    ],
)
def test_a_row_at_the_edge_is_kept(catalog: Catalog, values: dict[str, Any]) -> None:
    rows = frame(row(0), row(1, **values))
    good, rejects = validate(rows, catalog=catalog, now=NOW)
    assert rejects.is_empty()
    assert_frame_equal(good, rows)


def test_all_reasons_and_the_whole_row_are_kept() -> None:
    bad = row(1, cost_usd=float("nan"), quality=2.0, status="great", prompt='say "ü"\n')
    extra = frame(row(0), bad).with_columns(note=pl.Series(["a", "b"]), time=pl.Series([START, START]))
    _, rejects = validate(extra, now=NOW)
    assert set(rejects["reason"][0].split("; ")) == {"cost_usd not finite", "quality outside [0, 1]", "unknown status"}
    original = json.loads(rejects["original"][0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(original) == {*LOG_SCHEMA, "note"}
    assert (original["prompt"], original["cost_usd"], original["note"]) == (bad["prompt"], "nan", "b")
    assert original["time"] == START.isoformat()


@pytest.mark.parametrize(
    ("column", "values", "wrong"),
    [
        ("cost_usd", ["0.5", "abc", " 1e-3 "], 2),
        ("cost_usd", [[1], None, None], 1),
        ("cost_usd", [None, None, {"usd": 1}], 3),
        ("quality", [True, False, None], None),
        ("input_tokens", [1.0, 2.5, None], 2),
        ("input_tokens", ["1", "2.0", "x"], 3),
        ("input_tokens", ["9999999999", None, None], None),
        ("input_tokens", [True, None, None], 1),
        ("retries", [2**63, 1, 0], 1),
        ("time", ["2026-01-01T00:00:00Z", "2026-01-01 02:00:01.5+02:00", "soon"], 3),
        ("time", [1767225600, 1767225601, 1767225602], 1),
        ("prompt", [["a"], None, None], 1),
        ("prompt", [5, 6, 7], None),
        ("candidates", ['["mid"]', "mid", None], 2),
        ("candidates", ['["mid"]', '["mid", 1]', None], 2),
    ],
)
def test_a_value_of_the_wrong_type_costs_its_row(column: str, values: list[Any], wrong: int | None) -> None:
    rows = frame(row(0), row(1), row(2)).drop(column)
    dtype = pl.UInt64 if values[0] == 2**63 else None
    rows = rows.with_columns(pl.Series(column, values, dtype=dtype))
    good, rejects = validate(rows, now=NOW)
    expected = set() if wrong is None else {1, 2, 3} if column == "time" and wrong == 1 else {wrong}
    assert reasons(rejects) == dict.fromkeys(expected, f"wrong type: {column}")
    assert good.schema == LOG_SCHEMA


def test_values_survive_the_cast() -> None:
    rows = frame(row(0), row(1)).with_columns(
        time=pl.Series(["2026-01-01T00:00:00Z", "2026-01-01 02:00:01.5+02:00"]),
        input_tokens=pl.Series(["9999999999", "2.0"]),
        cost_usd=pl.Series([" 1e-3 ", None]),
        quality=pl.Series([True, False]),
        candidates=pl.Series(['["mid","local"]', None]),
        messages=pl.Series([[{"role": "user", "content": "hé"}], None]),
        status=pl.Series(["ok", "error"], dtype=pl.Categorical),
    )
    good, rejects = validate(rows, now=NOW)
    assert rejects.is_empty()
    assert good["time"].to_list() == [START, START + timedelta(seconds=1.5)]
    assert good["input_tokens"].to_list() == [9999999999, 2]
    assert (good["cost_usd"].to_list(), good["quality"].to_list()) == ([1e-3, None], [1.0, 0.0])
    assert good["candidates"].to_list() == [["mid", "local"], None]
    assert good["messages"].to_list() == ['[{"role": "user", "content": "hé"}]', None]
    assert good["status"].to_list() == ["ok", "error"]


def test_naive_times_are_utc() -> None:
    rows = frame(row(0)).with_columns(time=pl.Series([datetime(2026, 1, 1, 5)], dtype=pl.Datetime("ms")))
    assert validate(rows, now=NOW)[0]["time"][0] == datetime(2026, 1, 1, 5, tzinfo=UTC)


def test_broken_utf8_in_a_binary_column() -> None:
    rows = frame(row(0), row(1)).with_columns(prompt=pl.Series([b"fine", b"br\xffken"]))
    good, rejects = validate(rows, now=NOW)
    assert good["prompt"].to_list() == ["fine"]
    assert reasons(rejects) == {2: "broken UTF-8"}
    assert json.loads(rejects["original"][0])["prompt"] == "br\\xffken"


def test_a_missing_required_column_is_named() -> None:
    with pytest.raises(InputError, match="no column 'time'"):
        validate(frame(row()).drop("time"))


def full(n: int, model: str, **values: Any) -> dict[str, Any]:
    return row(n, model=model, propensity=1.0, time=START, **values)


@pytest.mark.parametrize(
    ("rows", "duplicates"),
    [
        ([full(0, "mid"), full(0, "local"), full(0, "mid")], [3]),
        ([full(0, "mid"), row(0, time=START), full(0, "local")], [2]),
        ([row(0), full(0, "local", status="ok"), full(0, "mid")], [2, 3]),
        # A row that is rejected for something else does not make a later good one a duplicate.
        ([row(0, cost_usd=-1.0), row(0)], []),
        ([row(0), row(0, cost_usd=-1.0), row(0)], [2, 3]),
        ([full(0, "mid", quality=2.0), full(0, "mid"), full(0, "local")], []),
    ],
)
def test_one_row_is_one_attempt_unless_every_model_was_asked(rows: list[dict[str, Any]], duplicates: list[int]) -> None:
    for size in (1, len(rows)):
        state, found = ValidationState(), []
        for at in range(0, len(rows), size):
            _, rejects = validate(frame(*rows[at : at + size]), state=state, now=NOW)
            found += [number for number, reason in reasons(rejects).items() if "duplicate request_id" in reason]
        assert found == duplicates


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", None]),
            st.sampled_from(["mid", "local"]),
            st.sampled_from([None, 0.5, 1.0]),
            st.integers(0, 6),
            st.sampled_from([0.0, -1.0]),
        ),
        max_size=14,
    ),
    st.integers(1, 14),
)
def test_chunks_reject_what_a_plain_loop_over_the_file_rejects(rows: list[tuple[Any, ...]], size: int) -> None:
    expected, seen, latest = {}, {}, None
    for number, (name, model, propensity, second, cost) in enumerate(rows, start=1):
        why = set()
        if name is None:
            why.add("missing request_id")
        if cost < 0:
            why.add("negative cost_usd")
        if latest is not None and second < latest - 2:
            why.add("time runs backwards")
        latest = second if latest is None else max(latest, second)
        if name in seen:
            is_full, models = seen[name]
            if not (is_full and propensity == 1.0 and model not in models):
                why.add("duplicate request_id")
        if why:
            expected[number] = why
        else:
            seen.setdefault(name, (propensity == 1.0, set()))[1].add(model)
    state, found = ValidationState(), {}
    for at in range(0, len(rows), size):
        chunk = frame(
            *(
                row(0, request_id=i, model=m, propensity=p, time=START + timedelta(seconds=s), cost_usd=c)
                for i, m, p, s, c in rows[at : at + size]
            )
        )
        _, rejects = validate(chunk, state=state, max_disorder_s=2, now=NOW)
        found |= {number: set(reason.split("; ")) for number, reason in reasons(rejects).items()}
    assert found == expected


def csv_file(path: Path, lines: Iterable[bytes]) -> Path:
    path.write_bytes(b"request_id,time,model,cost_usd,prompt,candidates\n" + b"\n".join(lines) + b"\n")
    return path


def test_csv_keeps_every_line_but_the_broken_ones(tmp_path: Path, catalog: Catalog) -> None:
    file = csv_file(
        tmp_path / "log.csv",
        [
            b'r1,2026-01-01T00:00:01Z,mid,0.1,"two\nlines, ""quoted""","[""mid""]"',
            b"r2,2026-01-01T00:00:02Z,mid,0.1,br\xffken,",
            b"r3,2026-01-01T00:00:03Z,mid",
            b"r4,2026-01-01T00:00:04Z,mid,dear,p,",
            b"",
            b"r5,2026-01-01T00:00:05Z,local,,na\xc3\xafve,",
            b"r6,2026-01-01T00:00:06Z,mid,1,p,,surplus",
        ],
    )
    for chunk_rows in (1, 2, 100):
        out = tmp_path / f"log{chunk_rows}"
        chunks = read_frames(file, LOG_SCHEMA.get, chunk_rows=chunk_rows)
        summary = write_log(chunks, out, catalog=catalog, max_reject_share=0.9, now=NOW)
        log = read_log(out)
        assert log["request_id"].to_list() == ["r1", "r5"]
        assert log["prompt"].to_list() == ['two\nlines, "quoted"', "naïve"]
        assert (log["cost_usd"].to_list(), log["candidates"].to_list()) == ([0.1, None], [["mid"], None])
        rejects = pl.read_parquet(out / "rejects.parquet")
        assert reasons(rejects) == {
            2: "broken UTF-8",
            3: "wrong number of fields",
            4: "wrong type: cost_usd",
            6: "wrong number of fields",
        }
        original = json.loads(rejects["original"][0])
        assert original["prompt"].encode("utf-8", "surrogateescape") == b"br\xffken"
        assert json.loads(rejects["original"][3])[""] == ["surplus"]
        assert json.loads(rejects["original"][2])["cost_usd"] == "dear"
        assert (summary.rows, summary.rejected) == (2, 4)
        assert summary.reject_reasons["wrong number of fields"] == 2


def test_jsonl_keeps_every_line_but_the_broken_ones(tmp_path: Path, catalog: Catalog) -> None:
    good = {"request_id": "r1", "time": "2026-01-01T00:00:01Z", "model": "mid", "cost_usd": 1, "extra": {"a": 1}}
    lines = [
        json.dumps(good).encode(),
        b'{"request_id": "r2", "time": "2026-01-01T00:00:02Z", "model": "mid", "prompt": "br\xffken"}',
        b'{"request_id": "r3", "time": "2026-01-01T00:00:03Z", "mod',
        b'{"request_id": "r4", "time": "2026-01-01T00:00:04Z", "model": "mid", "prompt": "half \\ud83d"}',
        b"[1, 2]",
        b"",
        json.dumps(good | {"request_id": "r6", "cost_usd": [1], "prompt": ["x"]}).encode(),
        json.dumps(
            good | {"request_id": 7, "cost_usd": "0.5", "messages": [{"role": "user", "content": "é"}]}
        ).encode(),
        json.dumps(good | {"request_id": "r8", "cost_usd": float("nan"), "candidates": ["mid"]}).encode(),
        b'{"request_id": "r9", "model": "mid"}',
    ]
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"\n".join(lines))
    for chunk_rows in (1, 3, 100):
        out = tmp_path / f"log{chunk_rows}"
        chunks = read_frames(file, LOG_SCHEMA.get, chunk_rows=chunk_rows)
        write_log(chunks, out, catalog=catalog, max_reject_share=0.9, now=NOW)
        log = read_log(out)
        assert (log["request_id"].to_list(), log["cost_usd"].to_list()) == (["r1", "7"], [1.0, 0.5])
        assert json.loads(log["messages"][1]) == [{"role": "user", "content": "é"}]
        rejects = pl.read_parquet(out / "rejects.parquet")
        assert {n: set(r.split("; ")) for n, r in reasons(rejects).items()} == {
            2: {"broken UTF-8"},
            3: {"not valid JSON"},
            4: {"broken UTF-8"},
            5: {"not a JSON object"},
            6: {"wrong type: prompt", "wrong type: cost_usd"},
            8: {"cost_usd not finite"},
            9: {"missing time"},
        }
        assert json.loads(rejects["original"][0]).encode("utf-8", "surrogateescape") == lines[1]
        assert json.loads(rejects["original"][4])["extra"] == {"a": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "no header"),
        ("log.csv", b"a,b,a\n1,2,3\n", "'a' twice"),
        ("log.csv", b"a,br\xff\n1,2\n", "header is not UTF-8"),
        ("log.parquet", b"PAR1 nonsense", "not a readable parquet"),
        ("log.xlsx", b"", "neither .parquet nor .csv"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_frames(tmp_path / name, LOG_SCHEMA.get))
    with pytest.raises(InputError, match="no file"):
        list(read_frames(tmp_path / "absent.csv", LOG_SCHEMA.get))


def test_a_log_is_read_back_as_it_was_written(tmp_path: Path, catalog: Catalog) -> None:
    rows = frame(*(row(n, quality=None if n % 3 else 0.5, messages="[]" if n % 2 else None) for n in range(50)))
    done: list[int] = []
    chunks = [rows[:7], rows[7:20], rows[20:]]
    summary = write_log(
        chunks,
        tmp_path / "log",
        catalog=catalog,
        logging="uniform",
        meta={"seed": 3},
        progress=done.append,
        part_rows=10,
    )
    assert done == [7, 20, 50]
    assert_frame_equal(read_log(tmp_path / "log"), rows)
    info = read_log_info(tmp_path / "log")
    assert (info["format"], info["rows"], info["rejected"], info["logging"]) == (1, 50, 0, "uniform")
    assert Catalog.from_json(info["catalog"]) == catalog
    assert info["meta"] == {"seed": 3}
    assert len(info["parts"]) == 2
    assert info["sha256"] == summary.sha256 == log_sha256(tmp_path / "log") == log_sha256(rows)
    assert (summary.first, summary.last) == (START, START + timedelta(seconds=49))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 11), st.sampled_from([c for c in LOG_SCHEMA if c != "request_id"]))
def test_the_hash_depends_on_every_value_and_on_no_chunking(cut: int, column: str) -> None:
    rows = frame(*(row(n, messages="[]", tools="[]", fallback_from="mid") for n in range(12)))
    parts = pl.concat([rows[:cut], rows[cut:]], rechunk=False)
    assert log_sha256(parts) == log_sha256(rows)
    changed = rows.with_columns(
        pl.when(pl.int_range(pl.len()) == 11).then(None).otherwise(pl.col(column)).alias(column)
    )
    assert log_sha256(changed) != log_sha256(rows)


def test_the_hash_tells_text_that_moved_between_rows() -> None:
    one, two = frame(row(0, prompt="ab"), row(1, prompt="c")), frame(row(0, prompt="a"), row(1, prompt="bc"))
    assert log_sha256(one) != log_sha256(two)
    lists = [["mid", "a"], ["b"]], [["mid"], ["a", "b"]]
    first, second = (frame(row(0, candidates=a), row(1, candidates=b)) for a, b in lists)
    assert log_sha256(first) != log_sha256(second)


def test_too_many_rejects_write_nothing_and_lose_nothing(tmp_path: Path, catalog: Catalog) -> None:
    rows = frame(*(row(n, model="gpt-99" if n < 3 else "mid", candidates=None) for n in range(40)))
    with pytest.raises(InputError, match=r"3 of 40 .*unknown model: 3.*gpt-99.*log\.rejects\.parquet"):
        write_log([rows[:20], rows[20:]], tmp_path / "log", catalog=catalog)
    assert [p.name for p in tmp_path.iterdir()] == ["log.rejects.parquet"]
    assert pl.read_parquet(tmp_path / "log.rejects.parquet")["row"].to_list() == [1, 2, 3]
    summary = write_log([rows], tmp_path / "log", catalog=catalog, max_reject_share=0.075)
    assert (summary.rows, summary.rejected) == (37, 3)


def test_a_failure_on_the_way_leaves_no_trace(tmp_path: Path, catalog: Catalog) -> None:
    def chunks() -> Iterable[pl.DataFrame]:
        yield frame(*(row(n) for n in range(30)))
        raise RuntimeError("the disk went away")

    with pytest.raises(RuntimeError, match="disk"):
        write_log(chunks(), tmp_path / "log", catalog=catalog, part_rows=10)
    with pytest.raises(InputError, match="no rows"):
        write_log([], tmp_path / "log", catalog=catalog)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_log_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path, catalog: Catalog) -> None:
    out = tmp_path / "log"
    write_log([frame(row(0))], out, catalog=catalog)
    with pytest.raises(InputError, match="exists already"):
        write_log([frame(row(1))], out, catalog=catalog)
    with pytest.raises(InputError, match="were rejected"):
        write_log([frame(row(1, cost_usd=-1.0))], out, catalog=catalog, overwrite=True)
    assert read_log(out)["request_id"].to_list() == ["r0"]
    write_log([frame(row(1))], out, catalog=catalog, overwrite=True)
    assert read_log(out)["request_id"].to_list() == ["r1"]
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a log"):
        write_log([frame(row(1))], other, catalog=catalog, overwrite=True)
    assert (other / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.rejects.parquet", "precious"]


def test_an_out_that_cannot_be_made_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write beside"):
        write_log([frame(row(0))], tmp_path / "file" / "log", catalog=catalog)


def test_an_out_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(InputError, match="exists already"), LogWriter(tmp_path / "log", catalog=catalog) as writer:
        writer.write(frame(row(0)))
        (tmp_path / "log").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_scan_fits_single_files(tmp_path: Path) -> None:
    rows = frame(row(0), row(1))
    few = rows.select("request_id", "time", "model", "cost_usd", "input_tokens", extra=pl.lit(1))
    narrow = few.with_columns(
        pl.col("input_tokens").cast(pl.Int16),
        pl.col("model").cast(pl.Categorical),
        pl.col("time").dt.replace_time_zone(None),
    )
    narrow.write_parquet(tmp_path / "log.parquet")
    few.with_columns(pl.col("time").dt.strftime("%Y-%m-%dT%H:%M:%SZ")).write_csv(tmp_path / "log.csv")
    few.with_columns(pl.col("time").dt.to_string("iso:strict")).write_ndjson(tmp_path / "log.jsonl")
    expected = rows.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in LOG_SCHEMA.items() if name not in few.columns
    )
    for name in ("log.parquet", "log.csv", "log.jsonl"):
        assert_frame_equal(scan_log(tmp_path / name).collect(), expected)
        assert log_sha256(tmp_path / name) == log_sha256(expected)


def test_scan_says_what_does_not_fit(tmp_path: Path, catalog: Catalog) -> None:
    frame(row(0)).with_columns(cost_usd=pl.lit("dear")).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'cost_usd' is String"):
        scan_log(tmp_path / "a.parquet")
    frame(row(0)).drop("model").write_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no column 'model'"):
        scan_log(tmp_path / "b.parquet")
    csv_file(tmp_path / "c.csv", [b"r1,2026-01-01,mid,0.1,p,", b"r2,2026-01-01,mid,dear,p,"])
    with pytest.raises(InputError, match="row 2: wrong type: cost_usd"):
        scan_log(tmp_path / "c.csv")
    (tmp_path / "d.jsonl").write_text('{"request_id": "a", "time": "2026-01-01", "model": "mid"}\n{"request_id"')
    with pytest.raises(InputError, match="row 2: not valid JSON"):
        scan_log(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match="not a log"):
        scan_log(tmp_path)
    with pytest.raises(InputError, match="no log at"):
        scan_log(tmp_path / "absent.parquet")
    out = tmp_path / "log"
    write_log([frame(row(0))], out, catalog=catalog)
    (out / "part-00000.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00000\.parquet is missing"):
        scan_log(out)
    (out / "log.json").write_text('{"format": 999}')
    with pytest.raises(InputError, match="log format 1"):
        read_log_info(out)
