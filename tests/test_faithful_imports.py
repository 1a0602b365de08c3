"""What someone wrote comes out of an import as it was written, whatever its letters, and is checked first."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.log_texts import unreadable_messages, unreadable_tools
from router_ml.log_writer import LogWriter
from router_ml.logs import read_log
from training.importers.batch import ReadOptions
from training.importers.importing import import_log
from training.importers.jsontext import keys_of
from training.importers.kinds import kind_of

T, T2 = "2026-10-01T00:00:00Z", "2026-10-01T00:00:01Z"
Row = dict[str, Any]


def litellm(i: int, messages: Any) -> Row:
    return {
        "request_id": f"r{i}", "call_type": "acompletion", "spend": 0.1, "startTime": T, "endTime": T2, "model": "m",
        "model_group": "m", "model_id": "x", "status": "success", "cache_hit": "False",
        "metadata": {"attempted_retries": 0}, "proxy_server_request": {"messages": messages, "model": "m"},
    }  # fmt: skip


def langfuse(i: int, messages: Any) -> Row:
    return {
        "id": f"r{i}", "trace_id": "t", "type": "GENERATION", "start_time": T, "end_time": T2,
        "provided_model_name": "m", "input": messages,
    }  # fmt: skip


def langfuse_object(i: int, messages: Any) -> Row:
    return langfuse(i, {"tools": [], "messages": messages})


def langfuse_text(i: int, messages: Any) -> Row:
    return langfuse(i, json.dumps({"messages": messages}))


def portkey(i: int, messages: Any) -> Row:
    return {
        "id": f"r{i}", "trace_id": "t", "created_at": T, "ai_model": "m", "ai_org": "o", "is_success": True, "cost": 1,
        "request": {"body": {"messages": messages}}, "response": {"body": {}}, "response_time": 5,
    }  # fmt: skip


def helicone(i: int, messages: Any) -> Row:
    return {
        "request_id": f"r{i}", "request_created_at": T, "response_created_at": T2, "request_model": "m",
        "request_body": {"messages": messages}, "response_status": 200,
    }  # fmt: skip


def table(i: int, messages: Any) -> Row:
    return {"request_id": f"r{i}", "time": T, "model": "m", "messages": messages}


def otel(i: int, messages: Any, **more: str) -> Row:
    said = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.input.messages": json.dumps(messages)}
    attributes = [{"key": k, "value": {"stringValue": v}} for k, v in (said | more).items()]
    span = {"traceId": "aa", "spanId": f"r{i}", "startTimeUnixNano": "1790000000000000000",
            "endTimeUnixNano": "1790000001000000000", "attributes": attributes}  # fmt: skip
    return {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}


def write(rows: list[Row], file: Path, *, ascii: bool = True) -> Path:
    """The rows as a file: JSON values as they are in JSON lines, as JSON text in CSV and Parquet."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows))
        return file
    flat = [
        {k: json.dumps(v, ensure_ascii=ascii) if isinstance(v, dict | list) else v for k, v in row.items()}
        for row in rows
    ]
    if file.suffix == ".csv":
        with file.open("w", newline="") as to:
            writer = csv.DictWriter(to, list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)
    else:
        pl.DataFrame(flat).write_parquet(file)
    return file


KINDS = [litellm, langfuse, langfuse_object, langfuse_text, portkey, helicone, table, otel]
WAYS = [(make, end) for make in KINDS for end in ("jsonl", "csv", "parquet") if end == "jsonl" or make is not otel]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        'say "hi"\nnow',
        "if x:\n\treturn 1",
        r"grep '\d+' C:\dir",
        r"print('a\nb')",
        "\x00\x01\x1f\x7f\r",
        "\\ud83d",
        "😀é\u2028",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT | st.lists(PART | TEXT)},
    optional={"extra": JSON},
)
CONVERSATIONS = st.lists(st.lists(MESSAGE, min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.mark.parametrize(("make", "end"), WAYS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations=CONVERSATIONS, ascii=st.booleans())
def test_messages_come_as_they_were_written(
    make: Callable[..., Row], end: str, conversations: list[Any], ascii: bool, tmp_path: Path
) -> None:
    rows = [make(i, messages) for i, messages in enumerate(conversations)]
    file = write(rows, tmp_path / f"a.{end}", ascii=ascii)
    (batch,) = kind_of(make.__name__.partition("_")[0]).reader(str(file), ReadOptions())
    assert batch.rejects.is_empty() and batch.rows["prompt"].null_count() == len(rows)
    assert [json.loads(text) for text in batch.rows["messages"]] == conversations


def test_messages_that_are_nested_in_parquet(tmp_path: Path) -> None:
    texts = ['say "hi"\nnow', "a\tb", "C:\\dir \\n", "\x01", "😀é", ""]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    pl.DataFrame([table(i, said) for i, said in enumerate(conversations)]).write_parquet(tmp_path / "a.parquet")
    import_log("table", str(tmp_path / "a.parquet"), out=tmp_path / "log")
    assert [json.loads(text) for text in read_log(tmp_path / "log")["messages"]] == conversations


def test_keys_of_json_objects() -> None:
    keys = ["a", "x.y", 'q"\\', "é"]
    objects = {
        '{"a": 1.0, "x.y": 1, "é": 1e400}': ("1.0", "1", None, "1e400"),
        '{"a": 1, "a": 2, "x.y": null}': ("2", None, None, None),
        '{"\\u0061": "\\ud83d\\ude00\\t\\\\ \\"", "\\u00e9": ""}': ('😀\t\\ "', None, None, ""),
        '{"a": [ "\\n" , {"b" : "\\ud83d\\ude00"} ]}': ('[ "\\n" , {"b" : "\\ud83d\\ude00"} ]', None, None, None),
        '{"q\\"\\\\": {"k": 1}, "a": true}': ("true", None, '{"k": 1}', None),
        '{"other": NaN, "a": [1.5, -Infinity], "x.y": NaN}': ("[1.5, -Infinity]", "NaN", None, None),
        '{"a": "half \\ud800 of it"}': ("half � of it", None, None, None),
        **dict.fromkeys(["", "null", "[1]", '"a"', "{", "{'a': 1}", '{"a": "\t"}', "[" * 9999], (None,) * 4),
    }
    # All keys at once, and without the one that msgspec has no name for.
    assert keys_of(pl.Series([None, *objects], dtype=pl.String), keys).rows() == [(None,) * 4, *objects.values()]
    some = [(a, b, d) for a, b, _, d in objects.values()]
    assert keys_of(pl.Series(list(objects)), ["a", "x.y", "é"]).rows() == some


def test_errors_with_backslashes_are_failures_and_tabs_lose_no_propensity(tmp_path: Path) -> None:
    said = {"error_code": "429", "error_class": "RateLimitError", "llm_provider": "openai"}
    failed = {"error_information": said | {"error_message": "b'{\\n error: \"x\" \\d'\t"}}
    ours = {"propensity": 0.25, "candidates": ["m", "n"], "policy_version": "v"}
    rows = [
        litellm(0, []) | {"status": "failure", "metadata": failed},
        litellm(1, []) | {"metadata": {"spend_logs_metadata": {"note": "a\tb \\d", "router_ml": ours}}},
        litellm(2, []) | {"request_tags": ["other", 'task:say "C:\\dir"']},
    ]
    done = import_log("litellm", str(write(rows, tmp_path / "a.jsonl")), out=tmp_path / "log")
    log = read_log(tmp_path / "log")
    assert done.skipped == {} and log["status"].to_list() == ["rate_limited", "ok", "ok"]
    assert log["propensity"].to_list() == [None, 0.25, None] and log["candidates"][1].to_list() == ["m", "n"]
    assert log["task"].to_list() == [None, None, 'say "C:\\dir"']


AGENT = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "List files"}]},
    {"type": "reasoning", "summary": []},
    {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "a.txt\tb"},
    {"role": "model", "content": {"type": "text", "text": "There is a.txt"}},
]


def test_other_apis_messages_are_mapped_and_what_is_none_is_a_prompt(tmp_path: Path) -> None:
    rows = [
        litellm(0, None) | {"call_type": "aresponses", "proxy_server_request": {"input": AGENT}},
        litellm(1, "hello"),
        litellm(2, [{"who": "user", "what": "x"}]),
        litellm(3, [{"role": "user", "content": "plain"}]),
    ]
    done = import_log("litellm", str(write(rows, tmp_path / "a.jsonl")), out=tmp_path / "log")
    log = read_log(tmp_path / "log")
    assert done.log.rejected == 0 and log["prompt"].to_list() == [None, "hello", '[{"who": "user", "what": "x"}]', None]
    requests = [request_of_log_row(*row) for row in log.select("prompt", "messages", "tools").iter_rows()]
    said = [(m.role, m.text) for m in requests[0].messages]
    assert said == [
        ("developer", "List files"), ("assistant", ""), ("tool", "a.txt\tb"), ("assistant", "There is a.txt"),
    ]  # fmt: skip
    assert json.loads(log["messages"][0])[1]["tool_calls"][0]["function"] == {"name": "ls", "arguments": "{}"}


def test_no_door_lets_in_what_is_no_conversation(tmp_path: Path, catalog: Catalog) -> None:
    good, half = [{"role": "user", "content": "x"}], '[{"role": "user", "content": "a \\ud83d"}]'
    wrong = ["hello", {"a": 1}, [{"role": "robot", "content": "x"}], [{"role": "user", "content": 1}], [["x"]]]
    rows = [table(i, said) for i, said in enumerate([good, AGENT, half, [], *wrong])]
    rows.append(table(99, good) | {"tools": {"type": "function"}})
    done = import_log("table", str(write(rows, tmp_path / "a.jsonl")), out=tmp_path / "log", max_reject_share=1)
    assert done.log.reject_reasons == {"messages are no conversation": 5, "tools are no JSON array": 1}
    log = read_log(tmp_path / "log").select("prompt", "messages", "tools")
    assert [request_of_log_row(*row).messages[-1].text for row in log.iter_rows()] == ["x", "There is a.txt", "a �", ""]
    rejects = pl.read_parquet(tmp_path / "log" / "rejects.parquet")
    assert [json.loads(text)["messages"] for text in rejects["original"]][:5] == wrong
    frame = pl.DataFrame({
        "request_id": ["a", "b"], "time": ["2026-01-01", "2026-01-02"], "model": [catalog.ids[0]] * 2,
        "messages": [json.dumps(good), "hello"],
    })  # fmt: skip
    with LogWriter(tmp_path / "direct", catalog=catalog, max_reject_share=1.0) as writer:
        writer.write(frame)
    assert writer.summary is not None and writer.summary.reject_reasons == {"messages are no conversation": 1}


ALMOST = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "tool", "robot", "", None, 1]),
            "content": TEXT | st.none() | st.integers() | st.lists(TEXT | PART | st.integers()) | st.just({}),
            "tool_calls": JSON,
        },
    )
    | JSON,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ALMOST | JSON, max_size=5), st.booleans())
def test_what_is_said_to_be_readable_is_what_training_reads(values: list[Any], ascii: bool) -> None:
    texts = pl.Series([json.dumps(value, ensure_ascii=ascii) for value in values], dtype=pl.String)
    for column, found in ((0, unreadable_messages(texts)), (1, unreadable_tools(texts))):
        refused = []
        for text in texts:
            try:
                request_of_log_row("p", *((text, None) if column == 0 else (None, text)))
                refused.append(False)
            except InputError:
                refused.append(True)
        assert found.to_list() == refused


def test_a_number_that_json_has_not_costs_its_line_at_most(tmp_path: Path) -> None:
    lines = [json.dumps(table(i, None) | {"cost_usd": 0.1, "prompt": "a\tb"}) for i in range(6)]
    lines[1] = lines[1][:-1] + ', "other": [Infinity, NaN]}'
    lines[2] = lines[2][:-1] + ', "other": 1e400}'
    lines[3] = lines[3].replace("0.1", "NaN")
    lines[4] = lines[4].replace("0.1", "1e400")
    lines[5] = lines[5][:-1] + ",}"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    done = import_log("table", str(tmp_path / "a.jsonl"), out=tmp_path / "log", max_reject_share=1)
    assert done.log.reject_reasons == {"cost_usd not finite": 2, "not valid JSON": 1}
    assert read_log(tmp_path / "log").select("request_id", "cost_usd", "prompt").rows() == [
        (f"r{i}", 0.1, "a\tb") for i in range(3)
    ]


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [
        ("table", table(0, None) | {"cost_usd": "1,5"}, "cost_usd"),
        ("table", table(0, None) | {"latency_ms": "fast"}, "latency_ms"),
        ("litellm", litellm(0, []) | {"spend": "1,5"}, "cost_usd"),
        ("litellm", litellm(0, []) | {"request_duration_ms": "1,5"}, "latency_ms"),
        ("langfuse", langfuse(0, []) | {"total_cost": "1,5"}, "cost_usd"),
        ("langfuse", langfuse(0, []) | {"usage_details": {"input": "1,5"}}, "input_tokens"),
        ("langfuse", langfuse(0, []) | {"cost_details": {"input": [1]}}, "cost_usd"),
        ("langfuse", langfuse(0, []) | {"end_time": None, "latency": "1,5"}, "latency_ms"),
        ("portkey", portkey(0, []) | {"cost": "1,5"}, "cost_usd"),
        ("portkey", portkey(0, []) | {"retry_success_count": "x"}, "retries"),
        ("portkey", portkey(0, []) | {"req_units": "1,5"}, "input_tokens"),
        ("helicone", helicone(0, []) | {"costUSD": "1,5"}, "cost_usd"),
        ("helicone", helicone(0, []) | {"delay_ms": "1,5"}, "latency_ms"),
        ("otel", otel(0, [], **{"gen_ai.usage.cost": "1,5"}), "cost_usd"),
        ("otel", otel(0, [], **{"gen_ai.usage.input_tokens": "1,5"}), "input_tokens"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_read_is_a_reject(kind: str, row: Row, column: str, tmp_path: Path) -> None:
    units = {"settings": {"units": {"cost_usd": "cents", "latency_ms": "s"}}} if kind == "table" else {}
    good = {"table": table, "litellm": litellm, "langfuse": langfuse, "portkey": portkey, "helicone": helicone}
    file = write([good.get(kind, otel)(1, []), row], tmp_path / "a.jsonl")
    done = import_log(kind, str(file), out=tmp_path / "log", max_reject_share=1, **units)
    assert (done.log.rows, done.log.reject_reasons) == (1, {f"wrong type: {column}": 1})


def test_otlp_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    good = otel(0, [{"role": "user", "parts": [{"type": "text", "content": 'say "C:\\dir"\n\t'}]}])
    odd = otel(1, [])
    odd["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"] = "none"
    number = otel(2, "plain 'text' with \"quotes\"\t\\n")
    number["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"] += [
        {"key": "gen_ai.usage.cost", "value": {"doubleValue": math.nan}}
    ]
    rows = [good, odd, number, {"resourceSpans": "none"}]
    file = write(rows, tmp_path / "a.jsonl")
    done = import_log("otel", str(file), out=tmp_path / "log", max_reject_share=1)
    assert done.skipped == {"a span that is not as OTLP has it": 2}
    assert done.log.reject_reasons == {"cost_usd not finite": 1}
    assert json.loads(read_log(tmp_path / "log")["messages"][0])[0]["content"] == 'say "C:\\dir"\n\t'
