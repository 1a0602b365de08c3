"""The simulator: its log is valid, its propensities are the ones it drew with, and its truth is true."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, log_sha256, read_log, read_log_info
from router_ml.types import TIERS
from training import simulate as simulator
from training.outcomes import LOGGINGS, Logging
from training.simulate import SIMULATED_CATALOG, simulate, true_quality
from training.world import BEST

ROWS = 20_000
TALK = pl.coalesce("messages", "prompt")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A log under each policy, in several chunks, with feedback on every answer; `missing` is one without."""
    folder = tmp_path_factory.mktemp("simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "_CHUNK", 6_000)
        for logging in LOGGINGS:
            simulate(ROWS, folder / logging, logging=logging, seed=7, feedback_rate=1.0, bad_feedback_ratio=1.0)
        simulate(ROWS, folder / "missing", seed=8, feedback_rate=0.4, bad_feedback_ratio=2.0)
    return {name: folder / name for name in (*LOGGINGS, "missing")}


@pytest.fixture(scope="module")
def uniform(logs: dict[str, Path]) -> pl.DataFrame:
    return read_log(logs["uniform"])


def test_the_log_is_whole_and_valid_over_chunks(logs: dict[str, Path], uniform: pl.DataFrame) -> None:
    info = read_log_info(logs["uniform"])
    assert (info["rows"], info["rejected"], info["logging"], info["meta"]["seed"]) == (ROWS, 0, "uniform", 7)
    assert uniform.schema == LOG_SCHEMA
    assert uniform["request_id"].n_unique() == ROWS
    assert uniform["time"].is_sorted()
    assert 24 < (uniform["time"][-1] - uniform["time"][0]).days < 28
    # No gap: every day has its share of the traffic.
    days = uniform.group_by(pl.col("time").dt.date()).len()["len"]
    assert days.min() > 0.5 * ROWS / 28  # type: ignore[operator]
    assert info["sha256"] == log_sha256(logs["uniform"])


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    one, two, other = (simulate(2_000, tmp_path / str(n), seed=s) for n, s in enumerate((3, 3, 4)))
    assert one.sha256 == two.sha256 != other.sha256
    assert true_quality(tmp_path / "0").equals(true_quality(tmp_path / "1"))


@pytest.mark.parametrize("logging", ["uniform", "mostly-best"])
def test_choices_follow_the_logged_propensities(logs: dict[str, Path], logging: str) -> None:
    log = read_log(logs[logging]).with_columns(chosen=pl.coalesce("fallback_from", "model"))
    k = pl.col("candidates").list.len()
    expected = 1 / k if logging == "uniform" else 0.3 / k + pl.when(pl.col("chosen") == BEST).then(0.7).otherwise(0.0)
    assert log.select((pl.col("propensity") - expected).abs().max()).item() < 1e-12
    for candidates, rows in log.group_by("candidates"):
        for model in candidates[0]:  # type: ignore[union-attr, attr-defined]
            share = (rows["chosen"] == model).mean()
            base = 0.3 / len(candidates[0]) + 0.7 * (model == BEST)  # type: ignore[arg-type]
            p = base if logging == "mostly-best" else 1 / len(candidates[0])  # type: ignore[arg-type]
            assert share == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / rows.height))


def test_full_asks_every_candidate(logs: dict[str, Path]) -> None:
    log = read_log(logs["full"])
    asked = log.group_by("request_id").agg(pl.col("model"), pl.col("candidates").first())
    assert asked.height == ROWS
    assert asked.select((pl.col("model").list.sort() == pl.col("candidates").list.sort()).all()).item()
    assert set(log["propensity"]) == {1.0}
    assert log["fallback_from"].null_count() == log.height


@pytest.mark.parametrize("logging", LOGGINGS)
def test_outcomes_come_true_as_often_as_the_truth_says(logs: dict[str, Path], logging: Logging) -> None:
    log = read_log(logs[logging])
    truth = true_quality(logs[logging], log["request_id"])
    p = truth.select(f"p/{m}" for m in SIMULATED_CATALOG.ids).to_numpy()
    served = log["model"].replace_strict(SIMULATED_CATALOG.index, return_dtype=pl.Int64).to_numpy()
    p_served = p[np.arange(len(p)), served].astype(float)
    seen = log["quality"].is_not_null().to_numpy()
    quality = log["quality"].fill_null(0.0).to_numpy()
    for low, high in ((0, 0.5), (0.5, 0.7), (0.7, 0.85), (0.85, 0.95), (0.95, 1)):
        some = seen & (p_served >= low) & (p_served < high)
        error = np.sqrt((p_served[some] * (1 - p_served[some])).sum()) / some.sum()
        assert quality[some].mean() == pytest.approx(p_served[some].mean(), abs=4.5 * error)
    if logging == "full":
        return
    # Inverse propensity weighting of the partial log finds each model's true mean where it is a candidate.
    weight = 1 / log["propensity"].to_numpy()
    for at, model in enumerate(SIMULATED_CATALOG.ids):
        able = log["candidates"].list.contains(model).to_numpy()
        hit = seen & (served == at) & log["fallback_from"].is_null().to_numpy()
        ess = weight[hit].sum() ** 2 / (weight[hit] ** 2).sum()
        estimate = np.average(quality[hit], weights=weight[hit])
        assert estimate == pytest.approx(p[able, at].mean(), abs=4.5 * 0.5 / np.sqrt(ess))


def test_bad_answers_are_heard_of_more_often(logs: dict[str, Path]) -> None:
    log = read_log(logs["missing"]).filter(pl.col("status") == "ok")
    truth = true_quality(logs["missing"], log["request_id"])
    p = truth.select(f"p/{m}" for m in SIMULATED_CATALOG.ids).to_numpy()
    served = log["model"].replace_strict(SIMULATED_CATALOG.index, return_dtype=pl.Int64).to_numpy()
    good = p[np.arange(len(p)), served].mean()
    assert log["quality"].is_not_null().mean() == pytest.approx(0.4 * good + 0.8 * (1 - good), abs=0.015)
    assert log["quality"].mean() == pytest.approx(0.4 * good / (0.4 * good + 0.8 * (1 - good)), abs=0.02)
    assert log["quality"].mean() < good - 0.1
    assert (log["quality"].is_null() == log["quality_source"].is_null()).all()


def test_failures_retries_and_fallbacks(uniform: pl.DataFrame) -> None:
    failed = uniform.filter(pl.col("status").is_in(["error", "timeout", "rate_limited"]))
    assert failed["status"].n_unique() == 3
    assert 0.001 < failed.height / ROWS < 0.02
    assert failed["quality"].is_null().all()
    assert (failed["output_tokens"] == 0).all()
    assert set(uniform["retries"]) == {0, 1, 2}
    retried = uniform.group_by("model").agg((pl.col("retries") > 0).mean().alias("share"))
    shares = dict(retried.iter_rows())
    assert shares["pocket-8b"] > 2 * shares["aurora-4"]
    fell = uniform.filter(pl.col("fallback_from").is_not_null())
    assert fell.height > 20
    assert (fell["fallback_from"] != fell["model"]).all()
    assert fell.select(pl.col("candidates").list.contains(pl.col("model")).all()).item()
    assert (uniform["status"] == "cancelled").any()
    assert uniform.filter(pl.col("status") == "ok").select((pl.col("cost_usd") > 0).all()).item()


def test_constraints_show_in_the_candidates(uniform: pl.DataFrame) -> None:
    able = {m.id for m in SIMULATED_CATALOG if "tools" in m.capabilities}
    inside = {m.id for m in SIMULATED_CATALOG if "eu" in m.regions}
    with_tools = uniform.filter(pl.col("tools").is_not_null())
    assert with_tools.height > 500
    assert set(with_tools["candidates"].explode()) == able
    assert all(json.loads(text)[0]["type"] == "function" for text in with_tools["tools"].unique())
    assert set(uniform.filter(pl.col("tenant") == "northbank")["candidates"].explode()) == inside
    assert {m.tier for m in SIMULATED_CATALOG} == set(TIERS)
    assert all(m.regions and m.data_classes for m in SIMULATED_CATALOG)


def test_conversations_are_openai_messages(uniform: pl.DataFrame) -> None:
    turns = uniform.filter(pl.col("messages").is_not_null())
    assert 0.15 < turns.height / ROWS < 0.5
    for row in turns.head(400).iter_rows(named=True):
        messages = json.loads(row["messages"])
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        assert len(messages) >= 3
        assert messages[-1]["content"] == row["prompt"]
    by_session = uniform.group_by("session", maintain_order=True).agg(
        pl.len(), pl.col("tenant", "key").n_unique(), first=pl.col("messages").first(), rest=pl.col("messages").slice(1)
    )
    assert by_session["len"].max() == 6
    assert (by_session["tenant"] == 1).all() and (by_session["key"] == 1).all()
    assert by_session["first"].is_null().all()
    assert by_session["rest"].list.drop_nulls().list.len().sum() == turns.height == ROWS - by_session.height
    # A follow-up continues its own session's first prompt.
    firsts = uniform.filter(pl.col("messages").is_null()).select("session", opening="prompt")
    joined = turns.join(firsts, on="session").select("opening", "messages").head(400)
    assert all(json.loads(text)[0]["content"] == opening for opening, text in joined.iter_rows())


def test_families_differ_in_words_and_length(logs: dict[str, Path], uniform: pl.DataFrame) -> None:
    log = uniform.with_columns(true_quality(logs["uniform"])["family"]).filter(pl.col("messages").is_null())
    assert log["family"].n_unique() == 7
    words = {
        family[0]: set(rows["prompt"].str.to_lowercase().str.extract_all(r"\p{L}{4,}").explode().drop_nulls().unique())
        for family, rows in log.group_by("family")
    }
    for a in words:
        assert len(words[a]) > 40
        for b in words:
            if a < b:
                assert len(words[a] & words[b]) / len(words[a] | words[b]) < 0.5
    lengths = dict(log.group_by("family").agg(pl.col("prompt").str.len_chars().mean()).iter_rows())
    assert lengths["legal"] > 2 * lengths["maths"] > 2 * 0.9 * lengths["chat"]
    assert log["prompt"].n_unique() > 0.97 * log.height
    tagged = log.filter(pl.col("task").is_not_null())
    assert (tagged["task"] == tagged["family"]).all()
    assert 0.1 < log["task"].is_null().mean() < 0.9  # type: ignore[operator]


def test_models_differ_by_family_and_difficulty_shows_in_part(logs: dict[str, Path], uniform: pl.DataFrame) -> None:
    truth = true_quality(logs["uniform"])
    ids = list(SIMULATED_CATALOG.ids)
    means = truth.select(pl.col(f"p/{m}").mean().alias(m) for m in ids).row(0, named=True)
    assert max(means, key=means.__getitem__) == BEST
    by_family = truth.group_by("family").agg(pl.col(f"p/{m}").mean().alias(m) for m in ids)
    best = {row["family"]: max(ids, key=row.__getitem__) for row in by_family.iter_rows(named=True)}
    assert len(set(best.values())) > 1
    assert by_family.filter(family="translation").select(pl.col("quill-8x7b") > pl.col("aurora-4-mini")).item()
    # Within a family longer prompts are harder, but not by much: the rest is their wording, or hidden.
    talk = uniform.select(TALK.str.len_chars().alias("length"), task=truth["family"], p=truth["p/pocket-8b"])
    first = talk.filter(uniform["messages"].is_null())
    for family in ("support", "code", "legal"):
        r = first.filter(task=family).select(pl.corr("length", "p")).item()
        assert -0.7 < r < -0.1
    sessions = truth.with_columns(session=uniform["session"]).group_by("session").agg(pl.col("p/pocket-8b"))
    spread = (
        sessions.filter(pl.col("p/pocket-8b").list.len() > 2).select(pl.col("p/pocket-8b").list.std().mean()).item()
    )
    assert 0.03 < spread < 0.25


def test_truth_by_request_id(logs: dict[str, Path], tmp_path: Path) -> None:
    truth = true_quality(logs["uniform"])
    assert truth.height == ROWS
    some = [5, 3, ROWS - 1]
    ids = truth["request_id"].gather(some)
    assert true_quality(logs["uniform"], ids).equals(truth[some])
    with pytest.raises(InputError, match="no request 'other'"):
        true_quality(logs["uniform"], [ids[0], "other"])
    with pytest.raises(InputError, match="no truth"):
        true_quality(tmp_path)
    costs = truth.select(pl.col("^cost_usd/.*$").mean()).row(0)
    assert costs[0] > 5 * costs[2] > 10 * costs[5] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "at least 1"),
        ({"logging": "greedy"}, "choose one of full"),
        ({"feedback_rate": 1.5}, "feedback rate"),
        ({"feedback_rate": float("nan")}, "feedback rate"),
        ({"bad_feedback_ratio": float("inf")}, "feedback rate"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(**({"rows": 10, "out": tmp_path / "log"} | options))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_CHUNK", 500)
    done: list[int] = []

    def stop(rows: int) -> None:
        done.append(rows)
        if rows > 1_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(3_000, tmp_path / "log", progress=stop)
    assert done == [500, 1_000, 1_500]
    assert list(tmp_path.iterdir()) == []
    simulate(1, tmp_path / "log")
    assert read_log(tmp_path / "log").height == 1


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*log: .*nothing of it was kept"):
            simulate(5_000, tmp_path / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
