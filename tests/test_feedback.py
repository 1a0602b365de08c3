"""Feedback to quality: what each kind of rule makes of a signal, how sources combine, and that no join multiplies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_ml.errors import InputError
from training.feedback import Rule, apply_rules, load_rules, parse_rule, qualities, rule_of
from training.importers.batch import SIGNALS
from training.importers.signals import read_signals

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def signals(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([dict.fromkeys(SIGNALS) | row for row in rows], schema=SIGNALS)


def rows_of(*ids: tuple[str, str | None]) -> pl.DataFrame:
    """Rows (request_id, trace_id) a second apart, whose response is called after the request."""
    return pl.DataFrame(
        [
            {
                "row": at,
                "time": NOW + timedelta(seconds=at),
                "request_id": r,
                "trace_id": t,
                "response_id": f"resp-{r}",
                "model": f"m{at}",
                "status": "ok",
            }
            for at, (r, t) in enumerate(ids)
        ],
        {"row": pl.Int64, "time": SIGNALS["time"]}
        | dict.fromkeys(("request_id", "trace_id", "response_id", "model", "status"), pl.String),
    )


def quality(rows: pl.DataFrame, said: pl.DataFrame, rules: list[Rule], **own: Any) -> dict[int, tuple[float, str]]:
    heard = apply_rules(said, rules).filter(pl.col("q").is_not_null()).with_row_index("_signal")
    mine = pl.DataFrame([own] if own else [], {"row": pl.Int64, "source": pl.String, "q": pl.Float64, "w": pl.Float64})
    found, _, _ = qualities(rows, heard, mine)
    return {row: (q, source) for row, q, source in found.iter_rows()}


@pytest.mark.parametrize(
    ("rule", "value", "label", "q"),
    [
        ("x=thumbs", 1, None, 1.0),
        ("x=thumbs", -1, None, 0.0),
        ("x=thumbs", 0, None, 0.0),
        ("x=thumbs", 10, "down", 1.0),  # a number says more than its word
        ("x=thumbs", None, " Thumbs_Up ", 1.0),
        ("x=thumbs", None, "👎", 0.0),
        ("x=thumbs", None, "perhaps", None),
        ("x=stars", 1, None, 0.0),
        ("x=stars", 4, None, 0.75),
        ("x=stars", None, "5", 1.0),
        ("x=stars", 0, None, None),
        ("x=stars,max=10", 10, None, 1.0),
        ("x=score", 0.25, None, 0.25),
        ("x=score", 1.2, None, None),
        ("x=score,min=-10,max=10", 5, None, 0.75),
        ("x=score,min=1,max=0", 0.2, None, 0.8),  # an error rate: less is better
        ("x=labels,pass=1,fail=0,partly=0.5", None, "PARTLY", 0.5),
        ("x=labels,pass=1", None, "other", None),
        ("x=labels,1=1,0=0", 1, None, 1.0),
        ("x=regeneration", 1, None, 0.0),
        ("x=regeneration", 0, None, None),  # that nobody asked again says nothing
        ("x=regeneration", None, "false", None),
        ("x=regeneration,quality=0.2", None, None, 0.2),
        ("x=copy", None, "copied", 1.0),
        ("x=copy", 0, None, None),
        ("x=thumbs", float("nan"), None, None),
        ("x=score", float("inf"), None, None),
    ],
)
def test_what_a_signal_means(rule: str, value: float | None, label: str | None, q: float | None) -> None:
    made = apply_rules(signals({"source": "x", "value": value, "label": label}), [parse_rule(rule)])
    assert made["q"].to_list() == [None if q is None else pytest.approx(q)]


def test_sources_are_weighed_by_weight_and_by_what_their_noise_leaves() -> None:
    rules = [parse_rule("user=thumbs,weight=2,reliability=0.75"), parse_rule("judge=score,reliability=0.9")]
    said = signals(
        {"request_id": "a", "source": "user", "value": 0.0}, {"request_id": "a", "source": "judge", "value": 0.8}
    )
    # weights 2 (2 * 0.75 - 1) = 1 and 2 * 0.9 - 1 = 0.8
    assert quality(rows_of(("a", None)), said, rules) == {0: (pytest.approx(0.8 * 0.8 / 1.8), "judge+user")}
    of_portkey = said.with_columns(weight=pl.Series([0.5, None]))
    assert quality(rows_of(("a", None)), of_portkey, rules)[0][0] == pytest.approx(0.8 * 0.8 / 1.3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 100), st.floats(0.51, 1)), min_size=1, max_size=5))
def test_quality_stays_between_what_was_said(given_: list[tuple[float, float, float]]) -> None:
    rules = [Rule(source=f"s{i}", kind="score", weight=w, reliability=r) for i, (_, w, r) in enumerate(given_)]
    said = signals(*({"request_id": "a", "source": f"s{i}", "value": q} for i, (q, *_) in enumerate(given_)))
    ((q, _),) = quality(rows_of(("a", None)), said, rules).values()
    assert min(v for v, *_ in given_) - 1e-9 <= q <= max(v for v, *_ in given_) + 1e-9


def test_the_newest_signal_of_a_source_counts_and_a_rows_own_word_is_the_oldest() -> None:
    said = signals(
        {"request_id": "a", "source": "user", "value": 1.0, "time": NOW + timedelta(hours=2)},
        {"request_id": "a", "source": "user", "value": 0.0, "time": NOW + timedelta(hours=1)},
    )
    rules = [parse_rule("user=thumbs")]
    assert quality(rows_of(("a", None)), said, rules) == {0: (1.0, "user")}
    own = {"row": 0, "source": "user", "q": 0.3, "w": 1.0}
    assert quality(rows_of(("a", None)), said, rules, **own) == {0: (1.0, "user")}
    assert quality(rows_of(("a", None)), said, rules, **own | {"source": "row"}) == {0: (0.65, "row+user")}


def test_a_signal_finds_its_answer_by_any_id_and_a_traces_does_not_multiply() -> None:
    rows = rows_of(("a", "t"), ("b", "t"), ("c", "t"), ("d", None))
    rules = [parse_rule("user=thumbs")]
    up = {"source": "user", "value": 1.0}
    assert quality(rows, signals(up | {"request_id": "b"}), rules) == {1: (1.0, "user")}
    assert quality(rows, signals(up | {"response_id": "resp-d"}), rules) == {3: (1.0, "user")}
    assert quality(rows, signals(up | {"request_id": "b", "trace_id": "t"}), rules) == {1: (1.0, "user")}
    assert quality(rows, signals(up | {"trace_id": "t"}), rules) == {2: (1.0, "user")}
    assert quality(rows, signals(up | {"trace_id": "t"}), [parse_rule("user=thumbs,trace=only")]) == {}
    every = quality(rows, signals(up | {"trace_id": "t"}), [parse_rule("user=thumbs,trace=every")])
    assert every == dict.fromkeys((0, 1, 2), (1.0, "user"))
    # Spread over three answers it weighs a third on each: against a judge of weight 1 that said 0.
    said = signals(up | {"trace_id": "t"}, {"request_id": "a", "source": "judge", "value": 0.0})
    both = quality(rows, said, [parse_rule("user=thumbs,trace=every"), parse_rule("judge=score")])
    assert both[0] == (pytest.approx(0.25), "judge+user") and both[1] == (1.0, "user")


def test_patterns_and_the_first_rule_that_matches() -> None:
    said = signals(*({"source": name, "value": 1.0} for name in ("lf:good", "lf:bad.x", "other")))
    made = apply_rules(said, [parse_rule("lf:bad*=score,min=1,max=0"), parse_rule("lf:*=score,weight=3")])
    assert made["q"].to_list() == [1.0, 0.0, None] and made["w"].to_list() == [3.0, 1.0, None]


def test_a_file_of_rules(tmp_path: Path) -> None:
    file = tmp_path / "feedback.toml"
    file.write_text(
        '[[source]]\nname = "thumbs"\nkind = "thumbs"\nreliability = 0.9\n'
        '[[source]]\nname = "verdict"\nkind = "labels"\nlabels = {good = 1, bad = 0}\ntrace = "only"\n'
    )
    rules = load_rules(file)
    assert rules == [
        Rule(source="thumbs", kind="thumbs", reliability=0.9),
        Rule(source="verdict", kind="labels", labels={"good": 1.0, "bad": 0.0}, trace="only"),
    ]
    assert [rule_of(rule.to_json(), "log") for rule in rules] == rules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x=votes", "choose one of thumbs"),
        ("x=thumbs,reliability=0.5", "above 0.5"),
        ("x=thumbs,weight=0", "above 0"),
        ("x=stars,min=3,max=3", "two ends"),
        ("x=labels", "no labels"),
        ("x=labels,good=2", "in [0, 1]"),
        ("x=score,maximum=3", "no 'maximum'"),
        ("x=score,max=much", "has to be a number"),
        ("x=thumbs,trace=all", "choose one of last"),
        ("x", "NAME=KIND"),
        ("x=thumbs,weight", "KEY=VALUE"),
    ],
)
def test_rules_that_make_no_sense_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        parse_rule(text)


@pytest.mark.parametrize(
    "text", ["", "[source]\nname = 'x'", "[[source]]\nkind = 'thumbs'", "[[rule]]\nname = 'x'", "= no toml"]
)
def test_a_file_of_rules_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(InputError, match=r"f\.toml"):
        load_rules(tmp_path / "f.toml")


def test_feedback_in_files(tmp_path: Path) -> None:
    (tmp_path / "votes.csv").write_text("answer,when,vote\na,1767225600,up\nb,1767225601.5,3\n,,\n")
    (frame,) = read_signals(
        tmp_path / "votes.csv", columns={"response_id": "answer", "time": "when", "value": "vote"}, time_unit="s"
    )
    assert frame["source"].to_list() == ["votes"] * 3 and frame["response_id"].to_list() == ["a", "b", None]
    assert frame["value"].to_list() == [None, 3.0, None] and frame["label"].to_list() == ["up", "3", None]
    assert frame["time"].to_list() == [NOW, NOW + timedelta(seconds=1.5), None]
    (tmp_path / "bare.jsonl").write_text('{"value": 1}\n')
    with pytest.raises(InputError, match="none of request_id, response_id, trace_id"):
        list(read_signals(tmp_path / "bare.jsonl"))
    with pytest.raises(InputError, match="no column 'score'"):
        list(read_signals(tmp_path / "bare.jsonl", columns={"score": "value"}))


def test_the_rules_of_the_document_are_rules(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "importing.md").read_text(encoding="utf-8")
    (tmp_path / "feedback.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    assert [rule.kind for rule in load_rules(tmp_path / "feedback.toml")] == [
        "thumbs", "stars", "score", "labels", "regeneration", "copy"
    ]  # fmt: skip
