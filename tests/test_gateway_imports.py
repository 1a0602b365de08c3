"""Logs of Langfuse, OpenTelemetry, Portkey and Helicone, in the shapes that their documentation gives.

The fixtures are written by hand after these pages: Langfuse's "Blob storage export field reference"; the OTLP JSON
encoding (opentelemetry-proto, as the collector's file exporter writes it) with the attributes and the event of
open-telemetry/semantic-conventions-genai; Portkey's "Logs Export" and its feedback API; Helicone's public types
`HeliconeRequest` and `RequestResponseRMT`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from router_ml.cli import main
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.logs import read_log
from training.feedback import parse_rule
from training.importers.importing import ImportSummary, import_log

FIXTURES = Path(__file__).parent / "fixtures"
LANGFUSE, OTEL = FIXTURES / "langfuse", FIXTURES / "otel" / "otlp.jsonl"
HARD = 'And "now"?\n\tC:\\dir\\new \\n \x01 \U0001f600'
"""What the fixtures hold to see whether a text comes through as it was written."""
PORTKEY, HELICONE = FIXTURES / "portkey" / "logs.jsonl", FIXTURES / "helicone"


def bring(
    kind: str, source: Path, out: Path, *rules: str, **settings: Any
) -> tuple[ImportSummary, dict[str, dict[str, Any]]]:
    done = import_log(kind, str(source), out=out, feedback=[parse_rule(rule) for rule in rules], settings=settings)
    assert done.log.rejected == 0
    return done, {row["request_id"]: row for row in read_log(out).to_dicts()}


SCORES = ("api:thumbs=thumbs", "eval:helpfulness=score", "annotation:verdict=labels,solved=1,wrong=0")


def test_langfuse_takes_generations_in_one_unit_and_a_trace_s_score_once(tmp_path: Path) -> None:
    done, rows = bring("langfuse", LANGFUSE, tmp_path / "log", *SCORES)
    assert sorted(rows) == ["gen-1", "gen-2", "gen-3", "gen-4", "gen-5"]
    assert done.skipped["no call of a model: AGENT"] == 1 and sum(done.skipped.values()) == 6
    # The first file's latencies are ms, the second's s; a call that was running is replaced by itself, ended.
    assert [rows[f"gen-{i}"]["latency_ms"] for i in range(1, 6)] == [1500, 4250, 30000, 2000, 750]
    assert rows["gen-4"]["status"] == "ok" and rows["gen-4"]["output_tokens"] == 5 and done.updated == 1
    assert rows["gen-3"]["status"] == "timeout"
    # Maps: cached tokens are input, too; without total_cost the parts are summed, and nothing is no 0.
    assert [rows[f"gen-{i}"]["input_tokens"] for i in (1, 2, 3)] == [140, 200, None]
    assert [rows[f"gen-{i}"]["cost_usd"] for i in (1, 2, 3)] == [0.0005, 0.003, None]
    assert (rows["gen-1"]["propensity"], rows["gen-1"]["candidates"]) == (None, None)  # it was between other names
    assert (rows["gen-1"]["task"], rows["gen-1"]["tenant"], rows["gen-1"]["session"]) == ("refunds", "acme", "s1")
    assert rows["gen-4"]["prompt"] == "Still running" and rows["gen-2"]["tools"]
    assert json.loads(rows["gen-2"]["messages"]) == [{"role": "user", "content": HARD}]
    assert request_of_log_row(None, rows["gen-1"]["messages"]).messages[-1].text == "Where is my refund?"
    # The trace has two answers: its thumb goes to the last, the judge's score to the one that it names.
    assert [rows[f"gen-{i}"]["quality"] for i in range(1, 6)] == [0.25, 1.0, 0.0, None, 1.0]
    assert (done.signals, done.unjoined) == (4, 0)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_langfuse_says_the_same_in_other_files(tmp_path: Path, ending: str) -> None:
    _, expected = bring("langfuse", LANGFUSE, tmp_path / "log", *SCORES)
    for folder in ("observations_v2", "scores"):
        (tmp_path / "export" / folder).mkdir(parents=True)
        for file in (LANGFUSE / folder).glob("*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            to = tmp_path / "export" / folder / f"{file.stem}.{ending}"
            if ending == "csv":
                flat = [{k: v if isinstance(v, str | None) else json.dumps(v) for k, v in x.items()} for x in lines]
                pl.DataFrame(flat, infer_schema_length=None).write_csv(to)
            else:
                # ClickHouse writes its maps as Parquet's, which polars reads as lists of keys and values.
                for row in lines:
                    for name in ("usage_details", "cost_details"):
                        if name in row:
                            row[name] = [{"key": k, "value": float(v)} for k, v in row[name].items()]
                    if "metadata" in row:
                        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row["metadata"].items()}
                        row["metadata"] = [{"key": k, "value": v} for k, v in text.items()]
                pair = pl.List(pl.Struct({"key": pl.String, "value": pl.Float64}))
                maps = {"usage_details": pair, "cost_details": pair}
                said = {"metadata": pl.List(pl.Struct({"key": pl.String, "value": pl.String}))}
                types = {k: v for k, v in (maps | said).items() if k in lines[0]}
                types |= {"tags": pl.List(pl.String)} if "tags" in lines[0] else {}
                pl.DataFrame(lines, schema_overrides=types, infer_schema_length=None).write_parquet(to)
    _, rows = bring("langfuse", tmp_path / "export", tmp_path / "other", *SCORES)
    text = ("messages", "tools")
    for row in (*rows.values(), *expected.values()):
        row.update({name: row[name] and json.loads(row[name]) for name in text})
    assert rows == expected


def test_langfuse_by_the_names_that_callers_use(tmp_path: Path) -> None:
    _, rows = bring("langfuse", LANGFUSE, tmp_path / "log", model_key="model_group", task_column="name")
    assert [rows[f"gen-{i}"]["model"] for i in range(1, 5)] == ["large", "small", "gpt-4o-mini", "local-model"]
    assert rows["gen-2"]["task"] == "answer"
    assert (rows["gen-1"]["propensity"], rows["gen-1"]["candidates"]) == (0.25, ["small", "large"])
    with pytest.raises(InputError, match="task_column cannot be"):
        bring("langfuse", LANGFUSE, tmp_path / "no", task_column="tags")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").touch()
    with pytest.raises(InputError, match="compressed"):
        bring("langfuse", tmp_path / "packed", tmp_path / "no")


def test_a_folder_that_grew_is_read_on(tmp_path: Path) -> None:
    shutil.copytree(LANGFUSE, tmp_path / "export")
    newer = tmp_path / "export" / "observations_v2" / "20260504-10.jsonl"
    kept = newer.read_text()
    newer.unlink()
    first, _ = bring("langfuse", tmp_path / "export", tmp_path / "log", *SCORES)
    assert (first.added, first.unjoined) == (4, 1)  # a score that came before its answer
    newer.write_text(kept)
    second, rows = bring("langfuse", tmp_path / "export", tmp_path / "log", *SCORES)
    assert (second.added, second.known, second.unjoined, second.signals) == (1, 1, 0, 4)
    assert rows["gen-5"]["quality"] == 1.0 and rows["gen-4"]["status"] == "ok"
    again, same = bring("langfuse", tmp_path / "export", tmp_path / "log", *SCORES)
    assert (again.added, again.known) == (0, 0) and same == rows


def test_otlp_spans_of_both_generations_of_names(tmp_path: Path) -> None:
    rules = ("Relevance=score,min=1,max=5", "Pass=labels,pass=1,fail=0", "TaskSuccess=score")
    done, found = bring("otel", OTEL, tmp_path / "log", *rules)
    rows = {row["request_id"].rpartition(":")[2][-1]: row for row in found.values()}
    assert sorted(rows) == ["1", "2", "3", "7"]
    assert done.skipped == {
        "no call of a model: invoke_agent": 1, "no call of a model: execute_tool": 1, "no span of generative AI": 1,
        "no call of a model: embeddings": 1, "a line without spans or log records": 1,
    }  # fmt: skip
    new, old, nested, bare = (rows[i] for i in "1237")
    assert (new["provider"], new["model"], new["input_tokens"], new["output_tokens"]) == ("openai", "gpt-4o", 120, 15)
    assert (old["provider"], old["model"], old["input_tokens"], old["output_tokens"]) == ("anthropic", "claude-3", 8, 4)
    assert (new["latency_ms"], new["session"], new["tenant"], new["cost_usd"]) == (1500, "conv-1", "u1", None)
    assert (old["prompt"], old["cost_usd"], old["session"]) == ("Say hi", 0.0021, None)
    # JSON text and nested OTLP values say the same; a span without an operation's name is known by its usage.
    asked = request_of_log_row(None, new["messages"])
    assert [m.role for m in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.messages[0].text == f"Be terse. {HARD}"
    assert asked.messages[1].text == "Capital of Peru?" and asked.messages[3].text == "Lima"
    assert json.loads(nested["messages"]) == [{"role": "user", "content": "Capital of Peru?"}]
    assert nested["status"] == "timeout" and (bare["propensity"], bare["policy_version"]) == (0.125, "p-2")
    # A span's own event and its agent's (the trace's last answer); a log record by the answer's id, one by its span.
    assert new["quality"] == pytest.approx((0.75 + 1.0) / 2) and new["quality_source"] == "Relevance+TaskSuccess"
    assert (old["quality"], nested["quality"], bare["quality"]) == (0.25, None, 0.0)
    assert (done.signals, done.unjoined) == (4, 0)
    again, same = bring("otel", OTEL, tmp_path / "log", *rules)
    assert (again.added, again.signals) == (0, 4) and same == found


def test_otlp_settings_and_lines_that_are_no_json(tmp_path: Path) -> None:
    file = tmp_path / "otlp.jsonl"
    lines = OTEL.read_text().splitlines()
    wrong = lines[1].replace('"startTimeUnixNano": "1782900020', '"startTimeUnixNano": "x1782900020')
    file.write_text("\n".join([lines[0], "{broken", wrong]) + "\n")
    settings = {"model": "response", "tenant_attribute": "deployment.tenant"}
    done = import_log("otel", str(file), out=tmp_path / "log", settings=settings, max_reject_share=0.5)
    assert (done.added, done.log.rejected) == (3, 2)
    rejects = pl.read_parquet(tmp_path / "log" / "rejects.parquet")
    (original,) = rejects.filter(pl.col("reason") == "missing time")["original"]
    assert json.loads(original)["spanId"] == "eee19b7ec3c1b173"  # the span, not the whole line
    log = read_log(tmp_path / "log")
    assert log["model"].to_list() == ["gpt-4o-2024-08-06", "claude-3", "gpt-4o-2024-08-06"]
    assert log["tenant"].to_list() == ["acme", None, "acme"]


def test_portkey_cents_retries_caches_and_weighted_feedback(tmp_path: Path) -> None:
    done, rows = bring("portkey", PORTKEY, tmp_path / "log", "feedback=score,min=-10,max=10")
    assert done.skipped == {"no chat or text completion": 1} and len(rows) == 7
    assert rows["pk-1"]["cost_usd"] == pytest.approx(0.000345) and rows["pk-6"]["cost_usd"] == pytest.approx(0.015)
    assert rows["pk-7"]["cost_usd"] is None  # euros
    assert (rows["pk-2"]["latency_ms"], rows["pk-2"]["retries"]) == (3050.5, 2)
    assert json.loads(rows["pk-2"]["messages"]) == [{"role": "user", "content": HARD}]
    assert (rows["pk-3"]["status"], rows["pk-3"]["retries"], rows["pk-3"]["cost_usd"]) == ("rate_limited", None, None)
    nothing = [rows["pk-4"][name] for name in ("latency_ms", "retries", "provider")]
    assert nothing == [None] * 3 and rows["pk-4"]["output_tokens"] == 30
    assert (rows["pk-4"]["status"], rows["pk-4"]["cost_usd"]) == ("cached", 0.0)
    assert (rows["pk-1"]["tenant"], rows["pk-1"]["session"], rows["pk-1"]["task"]) == ("acme", "s9", "chat")
    assert (rows["pk-6"]["propensity"], rows["pk-6"]["policy_version"]) == (0.5, "p1")
    (older,) = (row for row in rows.values() if row["prompt"])
    assert older["prompt"] == "Once upon" and older["request_id"].startswith("tr-8|")
    # The trace tr-1 has two calls: its vote goes to the later one, once.
    assert [rows[f"pk-{i}"]["quality"] for i in (1, 2, 6)] == [None, 0.25, 1.0]
    assert (done.signals, done.unjoined) == (2, 0)


def test_portkey_weights_a_vote(tmp_path: Path) -> None:
    votes = [{"trace_id": "tr-3", "value": 10, "weight": 1.0}]
    more = [json.dumps(vote | {"id": f"v{i}", "created_at": "2026-06-02T00:00:00Z"}) for i, vote in enumerate(votes)]
    (tmp_path / "logs.jsonl").write_text(PORTKEY.read_text() + "\n".join(more) + "\n")
    (tmp_path / "judge.csv").write_text("trace_id,value\ntr-2,1\n")
    from training.importers.signals import read_signals

    rules = [parse_rule("feedback=score,min=-10,max=10"), parse_rule("judge=score")]
    judged = read_signals(tmp_path / "judge.csv")
    import_log("portkey", str(tmp_path / "logs.jsonl"), out=tmp_path / "log", feedback=rules, signals=judged)
    rows = {row["request_id"]: row for row in read_log(tmp_path / "log").to_dicts()}
    assert rows["pk-3"]["quality"] == 1.0
    assert rows["pk-2"]["quality"] == pytest.approx((0.25 * 0.5 + 1.0 * 1.0) / 1.5)


def test_helicone_rows_of_its_api_and_of_its_table(tmp_path: Path) -> None:
    rules = ("accuracy=score,max=100", "feedback=thumbs", "on_topic=thumbs,weight=3")
    done, rows = bring("helicone", HELICONE, tmp_path / "log", *rules)
    assert done.skipped == {"no chat or text completion": 1}
    assert sorted(rows) == ["h-1", "h-2", "h-3", "h-4", "h-6", "h-7", "t-1"]
    assert [rows[i]["cost_usd"] for i in ("h-1", "h-7", "t-1")] == [None, 0.00125, None]
    assert [rows[i]["latency_ms"] for i in ("h-1", "h-4", "t-1")] == [640, None, 900]
    assert [rows[i]["status"] for i in ("h-1", "h-3", "h-4", "h-6")] == ["ok", "timeout", "cached", None]
    assert rows["h-4"]["cost_usd"] == 0.0
    assert [rows[i]["session"] for i in ("h-1", "h-7", "t-1")] == ["s3", None, "s4"]
    assert (rows["h-1"]["model"], rows["t-1"]["model"], rows["t-1"]["tenant"]) == ("gpt-4o-mini", "gpt-4o", "globex")
    assert rows["h-3"]["input_tokens"] is None
    asked = request_of_log_row(None, rows["t-1"]["messages"])
    assert asked.messages[0].text == f"Hi {HARD}"
    assert json.loads(rows["h-2"]["messages"]) == [{"role": "user", "content": HARD}]
    # The rating stands among the scores, too, and counts once.
    assert rows["h-1"]["quality"] == pytest.approx((0.85 + 3 * 1.0) / 4)
    assert rows["h-2"]["quality"] == pytest.approx((0.2 + 0.0) / 2) and rows["t-1"]["quality"] == 0.5
    assert rows["h-2"]["quality_source"] == "accuracy+feedback"
    with pytest.raises(InputError, match="model cannot be"):
        bring("helicone", HELICONE, tmp_path / "no", model="path")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [
        ("langfuse", LANGFUSE, ["--model-key", "model_group", "--rule", "api:thumbs=thumbs"], 5),
        ("otel", OTEL, ["--model", "response"], 4),
        ("portkey", PORTKEY, ["--tenant-key", "_user"], 7),
        ("helicone", HELICONE, ["--rule", "accuracy=score,max=100"], 7),
    ]
    for kind, source, options, count in calls:
        argv = ["import", kind, str(source), *options, "--out", str(tmp_path / kind)]
        assert main(argv, standalone_mode=False) is None
        assert f"{count} added, " in capsys.readouterr().out
