"""Outcome matrices: what is read, what is set aside, and that the log's propensities are the ones it was drawn with."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, read_log, read_log_info
from training.outcomes import (
    LOGGINGS,
    START,
    Logging,
    draw_models,
    import_outcomes,
    logging_propensities,
    read_matrix,
)

NAN = float("nan")


def matrix_frame(n: int = 6, **columns: list[Any]) -> pl.DataFrame:
    base = {
        "prompt": [f"question {i}" for i in range(n)],
        "correct/local": [i % 2 for i in range(n)],
        "correct/frontier": [1] * n,
    }
    return pl.DataFrame({**base, **columns}, strict=False)


def write(frame: pl.DataFrame, path: Path) -> Path:
    {"parquet": frame.write_parquet, "csv": frame.write_csv, "jsonl": frame.write_ndjson}[path.suffix[1:]](path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_matrix_is_read_from_every_format(tmp_path: Path, catalog: Catalog, kind: str) -> None:
    frame = matrix_frame(
        3,
        question_id=[30, 10, 20],
        category=["law", None, "math"],
        split=["train", "test", "train"],
        **{
            "correct/frontier": [True, False, None],
            "correct/local": [1, None, 0],
            "quality/mid": [0.7, 0.25, 1.0],
            "output_chars/local": [10, None, 6],
            "output_tokens/frontier": [100, 200, None],
            "cost_usd/mid": [0.5, None, 0.25],
            "contaminated": [True, False, False],
        },
    )
    matrix = read_matrix(write(frame, tmp_path / f"m.{kind}"), catalog)
    assert matrix.models == ("frontier", "mid", "local")
    assert (matrix.ids, matrix.prompts) == (["30", "10", "20"], ["question 0", "question 1", "question 2"])
    assert matrix.quality.dtype == matrix.output_tokens.dtype == np.float32
    np.testing.assert_array_equal(matrix.quality, np.float32([[1, 0.7, 1], [0, 0.25, NAN], [NAN, 1, 0]]))
    np.testing.assert_array_equal(matrix.output_tokens, np.float32([[100, NAN, 2.5], [200, NAN, NAN], [NAN, NAN, 1.5]]))
    assert matrix.cost_usd is not None
    np.testing.assert_array_equal(matrix.cost_usd, [[NAN, 0.5, NAN], [NAN, NAN, NAN], [NAN, 0.25, NAN]])
    assert matrix.category is not None and matrix.category.tolist() == ["law", None, "math"]
    assert matrix.session is None
    assert matrix.rejects.is_empty()
    train = read_matrix(tmp_path / f"m.{kind}", catalog, "train")
    assert train.ids == ["30", "20"]
    assert train.rows.tolist() == [1, 3]
    np.testing.assert_array_equal(train.quality, matrix.quality[[0, 2]])
    with pytest.raises(InputError, match="no rows of split 'dev'; it has the splits test, train"):
        read_matrix(tmp_path / f"m.{kind}", catalog, "dev")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": ["a", " ", "c"]}, "empty prompt"),
        ({"prompt": ["a", None, "c"]}, "missing prompt"),
        ({"correct/local": [1, 2, 0]}, "correct/local is not 0 or 1"),
        ({"correct/local": [1.0, NAN, 0.0]}, "correct/local is not 0 or 1"),
        ({"correct/local": ["1", "yes", "0"]}, "wrong type: correct/local"),
        ({"correct/local": [None, [1], None]}, "wrong type: correct/local"),
        ({"quality/mid": [0.5, 1.5, 0.0]}, "quality/mid outside [0, 1]"),
        ({"quality/mid": [0.5, -0.5, 0.0]}, "quality/mid outside [0, 1]"),
        ({"quality/mid": [0.5, NAN, 0.0]}, "quality/mid outside [0, 1]"),
        ({"cost_usd/local": [0.5, -0.5, 0.0]}, "cost_usd/local negative or not finite"),
        ({"cost_usd/local": [0.5, float("inf"), 0.0]}, "cost_usd/local negative or not finite"),
        ({"output_tokens/local": [5, -5, 0]}, "output_tokens/local negative or not finite"),
        ({"correct/local": [1, None, 0], "correct/frontier": [1, None, 0]}, "no outcome"),
        ({"question_id": [1, None, 2]}, "missing question_id"),
        ({"question_id": [1, 1, 2]}, "duplicate question_id"),
        ({"session": [["a"], ["b"], ["c"]], "prompt": ["a", "b", "c"]}, "wrong type: session"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(
    tmp_path: Path, catalog: Catalog, columns: dict[str, list[Any]], reason: str
) -> None:
    file = write(matrix_frame(3, **columns), tmp_path / "m.parquet")
    every = reason == "wrong type: session"
    if every:
        with pytest.raises(InputError, match="3 of 3 rows were rejected"):
            read_matrix(file, catalog)
        return
    matrix = read_matrix(file, catalog, max_reject_share=0.5)
    assert matrix.rows.tolist() == [1, 3]
    assert matrix.rejects.select("row", "reason").rows() == [(2, reason)]
    assert set(json.loads(matrix.rejects["original"][0])) == {*matrix_frame(3, **columns).columns}


def test_broken_lines_of_a_csv_are_set_aside(tmp_path: Path, catalog: Catalog) -> None:
    file = tmp_path / "m.csv"
    file.write_bytes(b"id,prompt,correct/local\na,fine,1\nb,br\xffken,1\nc,short\nd,good,0\na,again,1\ne,last,\n")
    with pytest.raises(InputError, match=r"4 of 6 rows.*log\.rejects\.parquet"):
        import_outcomes(file, catalog, out=tmp_path / "log")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.rejects.parquet", "m.csv"]
    summary = import_outcomes(file, catalog, out=tmp_path / "log", max_reject_share=0.7)
    assert (summary.rows, summary.rejected) == (2, 4)
    rejects = pl.read_parquet(tmp_path / "log" / "rejects.parquet")
    reasons = [(2, "broken UTF-8"), (3, "wrong number of fields"), (5, "duplicate id"), (6, "no outcome")]
    assert rejects.select("row", "reason").rows() == reasons


@pytest.mark.parametrize(
    ("columns", "drop", "message"),
    [
        ({"correct/gpt-99": [1] * 6, "quality/gpt-98": [1] * 6}, [], "does not list: gpt-98, gpt-99"),
        ({"quality/local": [1] * 6}, [], "both 'correct/local' and 'quality/local'"),
        ({"cost_usd/mid": [1] * 6}, [], "'cost_usd/mid' has no 'correct/mid'"),
        ({}, ["prompt"], "no column 'prompt'"),
        ({}, ["correct/local", "correct/frontier"], "no outcomes"),
    ],
)
def test_a_matrix_of_another_form_is_refused(
    tmp_path: Path, catalog: Catalog, columns: dict[str, list[Any]], drop: list[str], message: str
) -> None:
    file = write(matrix_frame(**columns).drop(drop), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=message):
        import_outcomes(file, catalog, out=tmp_path / "log")
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]


def test_a_missing_split_column_and_an_unknown_policy_are_named(tmp_path: Path, catalog: Catalog) -> None:
    file = write(matrix_frame(), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="no column 'split'"):
        read_matrix(file, catalog, "train")
    with pytest.raises(InputError, match="'greedy': choose one of full, uniform, mostly-best"):
        import_outcomes(file, catalog, out=tmp_path / "log", logging="greedy")  # type: ignore[arg-type]


def test_full_logs_every_published_outcome(tmp_path: Path, catalog: Catalog) -> None:
    columns = {"correct/local": [1, None, 0], "output_chars/local": [9, None, 0], "session": ["s", None, "s"]}
    file = write(matrix_frame(3, **columns), tmp_path / "m.parquet")
    done: list[int] = []
    import_outcomes(file, catalog, out=tmp_path / "log", preamble_tokens=100, progress=done.append)
    log = read_log(tmp_path / "log")
    assert log.schema == LOG_SCHEMA
    assert log["time"].is_sorted()
    assert log["time"].unique().sort().to_list() == [START + timedelta(seconds=s) for s in range(3)]
    log = log.sort("request_id", "model")
    assert done == [5]
    assert list(zip(log["request_id"], log["model"], log["quality"], strict=True)) == [
        ("row-0000001", "frontier", 1.0),
        ("row-0000001", "local", 1.0),
        ("row-0000002", "frontier", 1.0),
        ("row-0000003", "frontier", 1.0),
        ("row-0000003", "local", 0.0),
    ]
    assert log["candidates"].to_list() == [["frontier", "local"]] * 2 + [["frontier"]] + [["frontier", "local"]] * 2
    assert set(log["propensity"]) == {1.0}
    assert log["session"].to_list() == ["s", "s", None, "s", "s"]
    assert set(log["input_tokens"]) == {103}  # "question 0" is ten characters
    assert log["output_tokens"].to_list() == [None, 3, None, None, 0]
    assert log["provider"].to_list() == ["acme", "self", "acme", "acme", "self"]
    price = catalog["local"]
    expected = (103 * price.input_usd_per_mtok + 3 * price.output_usd_per_mtok) * 1e-6
    assert log["cost_usd"][1] == pytest.approx(expected, rel=1e-12)
    assert log["cost_usd"][0] is None
    assert [m["id"] for m in read_log_info(tmp_path / "log")["catalog"]["models"]] == ["frontier", "local"]


def test_given_costs_win_over_prices_and_graded_quality_stays_exact(tmp_path: Path, catalog: Catalog) -> None:
    columns = {"quality/mid": [0.7, 0.1, 0.3], "cost_usd/local": [0.125, None, 0.0], "output_tokens/local": [8, 8, 8]}
    file = write(matrix_frame(3, **columns), tmp_path / "m.parquet")
    import_outcomes(file, catalog, out=tmp_path / "log")
    log = read_log(tmp_path / "log")
    assert log.filter(model="mid").sort("request_id")["quality"].to_list() == [0.7, 0.1, 0.3]
    costs = log.filter(model="local").sort("request_id")["cost_usd"].to_list()
    assert (costs[0], costs[2]) == (0.125, 0.0)
    assert costs[1] == pytest.approx((3 * 0.05 + 8 * 0.1) * 1e-6)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.sampled_from([0, 0.5, 1, NAN])
    ),
    st.sampled_from(["uniform", "mostly-best"]),
)
def test_propensities_are_a_distribution_over_the_candidates(quality: np.ndarray, logging: Logging) -> None:
    quality[np.isnan(quality).all(axis=1), 0] = 0.0
    p = logging_propensities(quality, logging)
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    assert ((p > 0) == ~np.isnan(quality)).all()
    drawn = draw_models(p, np.random.default_rng(0))
    assert (p[np.arange(len(p)), drawn] > 0).all()
    if logging == "mostly-best":
        means = [np.nanmean(q) if (~np.isnan(q)).any() else 0.0 for q in quality.T.astype(float)]
        best = int(np.argmax(means))
        k = (~np.isnan(quality)).sum(axis=1)
        has = ~np.isnan(quality[:, best])
        np.testing.assert_allclose(p[has, best], 0.7 + 0.3 / k[has])


def test_models_are_drawn_as_often_as_their_propensity_says() -> None:
    p = np.repeat([[0.85, 0.0, 0.15], [0.0, 0.5, 0.5]], 20_000, axis=0)
    drawn = draw_models(p, np.random.default_rng(1))
    for rows in (slice(0, 20_000), slice(20_000, None)):
        shares = np.bincount(drawn[rows], minlength=3) / 20_000
        np.testing.assert_allclose(shares, p[rows][0], atol=4 * 0.5 / np.sqrt(20_000))
    assert (np.bincount(drawn[:20_000], minlength=3) == 0).tolist() == [False, True, False]


def test_the_seed_decides_the_log(tmp_path: Path, catalog: Catalog) -> None:
    file = write(matrix_frame(200), tmp_path / "m.parquet")
    hashes = [
        import_outcomes(file, catalog, out=tmp_path / f"log{n}", logging="uniform", seed=seed).sha256
        for n, seed in enumerate([5, 5, 6])
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(read_log(tmp_path / "log0")["propensity"]) == {0.5}


@pytest.fixture(scope="module")
def published(data_dir: Path) -> tuple[Path, Catalog]:
    return data_dir, Catalog.load(data_dir / "catalog.json")


@pytest.mark.parametrize("logging", LOGGINGS)
def test_published_mmlu_pro(tmp_path: Path, published: tuple[Path, Catalog], logging: Logging) -> None:
    folder, models = published
    summary = import_outcomes(
        folder / "mmlu_pro.parquet", models, out=tmp_path / "log", logging=logging, preamble_tokens=1200
    )
    raw = pl.read_parquet(folder / "mmlu_pro.parquet")
    candidates = raw.select(pl.sum_horizontal(pl.col("^correct/.*$").is_not_null())).to_series()
    assert candidates.sum() == 12_032 * 13 - 67
    assert (summary.rows, summary.rejected) == (candidates.sum() if logging == "full" else 12_032, 0)
    log = read_log(tmp_path / "log")
    assert log["cost_usd"].null_count() == 0
    assert log["task"].n_unique() == 14
    by_prompt = log.unique("request_id").select("request_id", n=pl.col("candidates").list.len().cast(pl.UInt32))
    expected = raw.select(request_id=pl.col("question_id").cast(pl.String), n=candidates.cast(pl.UInt32))
    assert by_prompt.sort("request_id").equals(expected.sort("request_id"))
    if logging == "full":
        for model, mean in log.group_by("model").agg(pl.col("quality").mean()).iter_rows():
            assert mean == pytest.approx(raw[f"correct/{model}"].mean())
        return
    shares = dict(log["model"].value_counts(normalize=True).iter_rows())
    expected = 0.7 + 0.3 / 13 if logging == "mostly-best" else 1 / 13
    assert shares["gpt-4o"] == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(12_032))
    # The mean of 1/propensity of the logged choice estimates the number of candidates.
    assert log.select((1 / pl.col("propensity")).mean()).item() == pytest.approx(13, rel=0.06)


@pytest.mark.parametrize(("name", "prompts"), [("routellm_mmlu", 14_042), ("routellm_gsm8k", 1_319)])
def test_published_routellm(tmp_path: Path, published: tuple[Path, Catalog], name: str, prompts: int) -> None:
    folder, models = published
    summary = import_outcomes(folder / f"{name}.parquet", models, out=tmp_path / "log")
    assert (summary.rows, summary.rejected) == (2 * prompts, 0)
    log = read_log(tmp_path / "log")
    assert log["cost_usd"].null_count() == log["output_tokens"].null_count() == log.height
    assert log["model"].unique().sort().to_list() == ["gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"]


def test_prompts_arrive_in_an_order_drawn_under_the_seed(tmp_path: Path, catalog: Catalog) -> None:
    """A matrix sorted by subject must not make a split by time a split by subject."""
    file = write(matrix_frame(50), tmp_path / "m.parquet")
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_outcomes(file, catalog, out=tmp_path / name, seed=seed)
        orders.append(read_log(tmp_path / name)["request_id"].unique(maintain_order=True).to_list())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2])
