"""What the examination of a log says is true of logs that differ in what they can support."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import cohen_kappa_score
from test_store import decision, request

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.log_schema import LOG_SCHEMA
from router_ml.logs import read_log
from router_ml.store import Store
from training import label_noise
from training.compare import compare
from training.doctor import examine
from training.examination import LEAST_OUTCOMES, Check, Examination
from training.feedback import parse_rule
from training.importers.importing import import_feedback, import_log
from training.importers.signals import read_signals
from training.simulate import simulate
from training.world import SIMULATED_CATALOG

NOW = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, Path]:
    out = tmp_path_factory.mktemp("doctor") / "logs"
    simulate(3000, out, logging="uniform", feedback_rate=0.8, seed=3)
    return read_log(out), out


def of(found: Examination) -> dict[str, Check]:
    return {check.topic: check for check in found.checks}


def first_remedies(found: Examination) -> list[str]:
    return [remedy.what for remedy in found.remedies]


def soon(log: pl.DataFrame) -> datetime:
    last = log["time"].max()
    assert isinstance(last, datetime)
    return last + timedelta(hours=1)


def test_a_drawn_log_supports_choices_and_their_judgement(drawn: tuple[pl.DataFrame, Path]) -> None:
    log, _ = drawn
    found = examine(log, SIMULATED_CATALOG, now=soon(log))
    said = of(found)
    assert found.routable and set(found.learnable) <= set(SIMULATED_CATALOG.ids)
    assert said["propensities"].state == "good"
    assert said["propensities"].numbers["drawn"] == pytest.approx((log["propensity"] < 1).mean())
    whole = found.feedback.filter(pl.col("by") == "all").row(0, named=True)
    assert said["feedback"].numbers["rate"] == whole["rate"] == whole["outcomes"] / whole["answers"]
    # What it says of pairs is what the comparison finds: the same models can be told apart.
    pair = found.overlap.filter(pl.col("task").is_null() & (pl.col("comparable") == "drawn")).row(0, named=True)
    judged = compare(log, SIMULATED_CATALOG, pair["model_a"], pair["model_b"])
    assert judged.how == "randomised" and judged.quality is not None
    # A model that some requests cannot be served by cannot be judged on all of them, and the table says how many.
    told = found.models.filter(pl.col("unsupported") > 0.01)
    assert not told["identifiable"].any()
    for why, share in told.select("why", "unsupported").iter_rows():
        assert f"{share:.1%}" in why


def test_a_deterministic_log_judges_nothing_that_it_did_not_do(drawn: tuple[pl.DataFrame, Path]) -> None:
    log = drawn[0].with_columns(propensity=pl.lit(1.0))
    found = examine(log, SIMULATED_CATALOG, now=soon(log))
    said = of(found)
    assert "deterministic" in said["propensities"].sentence and said["propensities"].state == "missing"
    assert not found.models["identifiable"].any() and set(found.overlap["comparable"]) == {"no"}
    assert said["other choices"].state == "missing" and "not identifiable for any" in said["other choices"].sentence
    assert found.routable  # its outcomes can still be learnt
    assert first_remedies(found)[0] == "random choices with their propensities"
    bare = examine(log.with_columns(propensity=pl.lit(None, pl.Float64)), SIMULATED_CATALOG, now=soon(log))
    assert "no row has a propensity" in of(bare)["propensities"].sentence


def test_without_prompts_nothing_is_learnt(drawn: tuple[pl.DataFrame, Path]) -> None:
    log = drawn[0].with_columns(pl.lit(None, pl.String).alias(name) for name in ("prompt", "messages"))
    found = examine(log, SIMULATED_CATALOG, now=soon(log))
    assert not found.routable and found.learnable == () and found.models["outcomes"].sum() == 0
    assert of(found)["prompts"].state == of(found)["learning"].state == "missing"
    assert of(found)["feedback"].numbers["outcomes"] > 0  # which is there all the same
    assert "prompts" in first_remedies(found)[:2]
    assert "store_prompts_in_spend_logs" in next(r.how for r in found.remedies if r.what == "prompts")


def test_conversations_that_cannot_be_read_are_told(drawn: tuple[pl.DataFrame, Path]) -> None:
    wrong = {0: '[{"role": "robot", "content": "x"}]', 1: "hello", 2: "[]"}  # as logs of before had them
    texts = pl.Series([wrong.get(at) for at in range(drawn[0].height)], dtype=pl.String)
    found = examine(drawn[0].with_columns(messages=texts), SIMULATED_CATALOG, now=soon(drawn[0]))
    assert of(found)["prompts"].numbers["unreadable"] == 2 and "2 rows have messages" in of(found)["prompts"].sentence
    assert "messages that can be read" in first_remedies(found)
    clean = examine(drawn[0], SIMULATED_CATALOG, now=soon(drawn[0]))
    assert found.models["outcomes"].sum() == clean.models["outcomes"].sum() - drawn[0][:2]["quality"].count()


def test_without_feedback_nothing_says_what_was_good(drawn: tuple[pl.DataFrame, Path]) -> None:
    log = drawn[0].with_columns(quality=pl.lit(None, pl.Float64), quality_source=pl.lit(None, pl.String))
    found = examine(log, SIMULATED_CATALOG, now=soon(log))
    said = of(found)
    assert not found.routable and said["feedback"].state == "missing" and said["label noise"].state == "not known"
    assert first_remedies(found)[0] == "feedback" and "/outcomes" in found.remedies[0].how


def test_one_model_is_no_choice(drawn: tuple[pl.DataFrame, Path]) -> None:
    model = drawn[0]["model"].value_counts(sort=True)["model"][0]
    log = drawn[0].filter((pl.col("model") == model) & pl.col("fallback_from").is_null())
    found = examine(log.with_columns(candidates=pl.lit([model])), SIMULATED_CATALOG, now=soon(log))
    assert found.learnable == (model,) and not found.routable
    assert f"only {model}" in of(found)["learning"].sentence
    assert "answers of a second model" in first_remedies(found)
    assert of(found)["other choices"].state == "missing" and found.overlap.is_empty()


def test_a_full_information_log_is_seen_and_not_estimated(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    found = examine(tiny_log, catalog, now=NOW)
    said = of(found)
    assert said["propensities"].numbers["requests_to_several_models"] == 1.0
    assert said["rows"].numbers == {
        "rows": 960, "requests": 240, "rows_of_requests_to_several_models": 960, "duplicates": 0
    }  # fmt: skip
    assert found.models["outcomes"].to_list() == [240] * 4 and set(found.models["learnt"]) == {"well"}
    assert found.overlap["pairs"].to_list() == [240] * 6 and set(found.overlap["comparable"]) == {"pairs"}
    assert found.routable and "random choices with their propensities" not in first_remedies(found)
    assert said["sessions"].state == "missing" and "sessions" in first_remedies(found)


def test_an_empty_log(catalog: Catalog) -> None:
    found = examine(pl.DataFrame(schema=LOG_SCHEMA), catalog, now=NOW)
    assert [check.sentence for check in found.checks] == ["the log has no rows: it supports nothing"]
    assert not found.routable and found.models["rows"].sum() == 0 and first_remedies(found) == ["requests"]
    json.dumps(found.to_json(), allow_nan=False)
    assert found.plot().axes


def test_rows_that_are_wrong_are_told(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    log = pl.concat([tiny_log, tiny_log.head(8)]).with_columns(
        model=pl.col("model").replace("local", "stranger"),
        status=pl.when(pl.int_range(pl.len()) % 10 == 0).then(pl.lit("error")).otherwise("status"),
        fallback_from=pl.when(pl.int_range(pl.len()) % 97 == 1).then(pl.lit("mid")),
        candidates=pl.lit(None, pl.List(pl.String)),
    )
    said = of(examine(log, catalog, now=NOW))
    assert said["rows"].numbers["duplicates"] == 16
    assert said["clock"].numbers["backwards"] == 1 and "older than the row before" in said["clock"].sentence
    assert said["models"].numbers["without_card"] == ["stranger"] and "(242 rows: stranger)" in said["models"].sentence
    assert said["failures"].numbers["failed"] == pytest.approx(97 / 968)
    early = of(examine(tiny_log, catalog, now=datetime(2026, 1, 1, tzinfo=UTC)))
    assert "rows are in the future" in early["clock"].sentence
    late = of(examine(tiny_log, catalog, now=datetime(2027, 1, 1, tzinfo=UTC)))
    assert late["time"].state == "partly"
    without = examine(tiny_log, None, now=NOW)
    assert of(without)["models"].state == "missing" and without.routable


def test_label_noise_by_questions_that_come_again(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    again = tiny_log.with_columns(request_id=pl.col("request_id") + "-again")
    same = of(examine(pl.concat([tiny_log, again]), catalog, now=NOW))["label noise"]
    assert same.state == "good" and same.numbers == {
        "retested": 960,
        "share_of_outcomes": 1.0,
        "share_of_variance": 0.0,
    }
    flipped = again.with_columns(quality=1 - pl.col("quality"))
    other = of(examine(pl.concat([tiny_log, flipped]), catalog, now=NOW))["label noise"]
    assert other.state == "partly" and other.numbers["share_of_variance"] == 1.0


def test_repeated_greetings_say_nothing_of_other_questions(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    """40 greetings five times each, always good; all other labels are coin tosses."""
    rng = np.random.default_rng(0)
    log = pl.concat([tiny_log.head(1)] * 1000).with_columns(
        request_id=pl.format("r{}", pl.int_range(pl.len())),
        prompt=pl.format("{}", pl.when(pl.int_range(pl.len()) < 200).then(pl.int_range(pl.len()) // 5)
                         .otherwise(pl.int_range(pl.len()) + 1000)),
    )  # fmt: skip
    greeting = np.arange(1000) < 200

    def said(quality: np.ndarray) -> Check:
        return of(examine(log.with_columns(quality=pl.Series(quality.astype(float))), catalog, now=NOW))["label noise"]

    always = said(np.where(greeting, 1.0, rng.random(1000) < 0.5))
    assert always.state == "not known" and "(20% of the outcomes) all have one quality" in always.sentence
    assert "share_of_variance" not in always.numbers
    tossed = said(rng.random(1000) < 0.5)
    assert tossed.state == "partly" and tossed.numbers["share_of_variance"] > 0.9
    few = log.filter((pl.int_range(pl.len()) < 190) | (pl.int_range(pl.len()) >= 200))
    found = of(examine(few.with_columns(quality=pl.Series((rng.random(990) < 0.5).astype(float))), catalog, now=NOW))
    assert found["label noise"].state == "not known" and "says little" in found["label noise"].sentence


def judged(tmp_path: Path, judge: list[float], more: str = "") -> Path:
    """An imported log of 400 answers with a quality, and a second source's word on them."""
    first = [float(i % 3 > 0) for i in range(400)]
    rows = [
        {"request_id": f"r{i}", "time": f"2026-01-{1 + i // 100:02d}T{i % 24:02d}:00:{i % 60:02d}Z",
         "model": "mn"[i % 2], "quality": q, "prompt": f"word{i}", "propensity": 0.5, "cost_usd": 0.1}
        for i, q in enumerate(first)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    import_log("table", str(tmp_path / "rows.jsonl"), out=tmp_path / "log")
    lines = "".join(f"r{i},{value}\n" for i, value in enumerate(judge))
    (tmp_path / "judge.csv").write_text("request_id,value\n" + lines)
    import_feedback(
        read_signals(tmp_path / "judge.csv", source="judge"), out=tmp_path / "log",
        feedback=[parse_rule("judge=score,reliability=0.8")],
    )  # fmt: skip
    return tmp_path / "log"


def test_a_second_source_shows_how_far_labels_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, right, state in (("against", 0.0, "partly"), ("with", 0.95, "good"), ("coin", 0.5, "partly")):
        rng = np.random.default_rng(1)
        agree = rng.random(400) < right
        judge = [float((i % 3 > 0) == bool(agree[i])) for i in range(400)]
        (tmp_path / name).mkdir()
        log = judged(tmp_path / name, judge)
        before = {file.name: file.stat().st_mtime_ns for file in log.iterdir()}
        path = tmp_path / f"{name}.json"
        run(capsys, "doctor", str(log), "--json", str(path))
        assert {file.name: file.stat().st_mtime_ns for file in log.iterdir()} == before, "reading changes nothing"
        said = json.loads(path.read_text())
        noise = next(check for check in said["checks"] if check["topic"] == "label noise")
        (pair,) = noise["numbers"]["sources"]
        truth = cohen_kappa_score([i % 3 > 0 for i in range(400)], [value > 0 for value in judge])
        assert noise["state"] == state and "400 answers that judge and row both judge" in noise["sentence"]
        assert pair["kappa"] == pytest.approx(truth) and pair["low"] < max(truth, -0.9) and truth < pair["high"]
        assert pair["high"] - pair["low"] < 0.25 and pair["alike"] == pytest.approx(agree.mean())
        remedies = [remedy["what"] for remedy in said["remedies"]]
        assert ("which of judge and row is right" in remedies) == (state == "partly")
        assert "a second judgement of some answers" not in remedies


def test_sources_that_always_say_the_same_show_no_agreement() -> None:
    rows = [{"row": i, "request_id": f"r{i}", "source": s, "q": 1.0} for i in range(50) for s in "ab"]
    assert label_noise._agreements(pl.DataFrame(rows)) == []


def test_feedback_by_source_and_by_model(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    silent = pl.col("model") == "mid"
    log = tiny_log.with_columns(
        quality=pl.when(silent & (pl.int_range(pl.len()) % 3 > 0)).then(None).otherwise("quality"),
        quality_source=pl.when(pl.col("model") == "local").then(pl.lit("judge+thumbs")).otherwise("quality_source"),
        tenant=pl.lit("acme"),
    )
    found = examine(log, catalog, now=NOW)
    table = {(row["by"], row["value"]): row for row in found.feedback.to_dicts()}
    assert table["source", "judge"]["outcomes"] == table["source", "thumbs"]["outcomes"] == 240
    assert table["tenant", "acme"]["rate"] == table["all", "all"]["rate"] == found.checks[6].numbers["rate"]
    assert "of mid to 100.0%" in of(found)["feedback"].sentence
    few = examine(log.filter(~silent | (pl.int_range(pl.len()).over("model") < LEAST_OUTCOMES)), catalog, now=NOW)
    row = few.models.row(by_predicate=pl.col("model") == "mid", named=True)
    assert row["learnt"] == "thin" and "more outcomes of models that have few" in first_remedies(few)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, str]:
    code = main(list(argv), standalone_mode=False)
    return code, capsys.readouterr().out


def test_the_command(drawn: tuple[pl.DataFrame, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, folder = drawn
    path, plot = tmp_path / "found.json", tmp_path / "found.png"
    code, text = run(capsys, "doctor", str(folder), "--json", str(path), "--plot", str(plot))
    assert code in (None, 0) and "From now on, the most valuable first:" in text and plot.stat().st_size > 1000
    said = json.loads(path.read_text())
    assert said["routable"] and said["models"][0]["rows"] == log["model"].value_counts(sort=True)["count"][0]
    sentences = examine(log, SIMULATED_CATALOG).to_frame().filter(pl.col("topic") != "time")["sentence"].to_list()
    assert [check["sentence"] for check in said["checks"] if check["topic"] != "time"] == sentences
    assert all(sentence in text for sentence in sentences)
    # A gateway's log as it was imported, without a catalogue.
    fixture = Path(__file__).parent / "fixtures" / "portkey" / "logs.jsonl"
    import_log("portkey", str(fixture), out=tmp_path / "portkey")
    code, text = run(capsys, "doctor", str(tmp_path / "portkey"))
    assert code == 1 and "no catalogue" in text and "1. feedback" in text


def test_the_command_on_a_store(store_url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = Store(store_url).start()
    for _ in range(3):
        assert store.record(request(key="k"), decision(), provider="acme", prompt="What?")
    assert store.flush()
    store.close()
    cards = tmp_path / "catalog.json"
    cards.write_text(json.dumps(SIMULATED_CATALOG.to_json()))
    code, text = run(capsys, "doctor", "--store", store_url, "--catalog", str(cards))
    assert code == 1 and "3 rows of 3 requests" in text and "of 100.0% of the rows the model was drawn" in text
    assert run(capsys, "doctor")[0] == 2
