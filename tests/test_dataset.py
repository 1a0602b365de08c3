"""Logs to matrices."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from router_ml.catalog import Catalog
from router_ml.costs import Reliability
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA
from training.dataset import PRIOR_CALLS, build_dataset, folds_of, reliability, split_by_time


def _log(catalog: Catalog, rows: list[dict[str, Any]]) -> pl.DataFrame:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    base = {"model": catalog.ids[0], "status": "ok"}
    filled = [
        {"request_id": f"r{i}", "time": start + timedelta(seconds=i), **base, **row} for i, row in enumerate(rows)
    ]
    return pl.DataFrame(filled, schema=LOG_SCHEMA)


def test_outcomes_of_one_request_share_a_row(catalog: Catalog) -> None:
    first, second = catalog.ids[:2]
    data = build_dataset(
        _log(
            catalog,
            [
                {"prompt": "a", "model": first, "quality": 1.0, "output_tokens": 10},
                {"prompt": "b", "model": second, "quality": 0.25, "propensity": 0.5},
                {"prompt": "a", "model": second, "quality": 0.0},
                {"prompt": "a", "model": first, "quality": 0.0, "output_tokens": 30},
            ],
        ),
        catalog,
    )
    assert [r.messages[0].text for r in data.requests] == ["a", "b"]
    assert data.ids == ["r0", "r1"]
    assert data.quality[0, :2].tolist() == [0.5, 0.0]
    assert np.isnan(data.quality[1, 0]) and data.quality[1, 1] == 0.25
    assert data.output_tokens[0, 0] == 20
    assert data.propensity[1, 1] == 0.5
    assert data.labels(0.25)[1, 1] == 1.0


def test_rows_without_a_prompt_or_of_an_unknown_model_are_left_out(catalog: Catalog) -> None:
    data = build_dataset(
        _log(catalog, [{"quality": 1.0}, {"prompt": "a", "model": "unheard-of"}, {"prompt": "b", "quality": 1.0}]),
        catalog,
    )
    assert [r.messages[0].text for r in data.requests] == ["b"]
    with pytest.raises(InputError, match="log prompts, or check the catalogue"):
        build_dataset(_log(catalog, [{"quality": 1.0}]), catalog)


def test_a_failed_answers_length_says_nothing(catalog: Catalog) -> None:
    rows = [{"prompt": "a", "status": "timeout", "output_tokens": 3}, {"prompt": "a", "output_tokens": 40}]
    assert build_dataset(_log(catalog, rows), catalog).output_tokens[0, 0] == 40


def test_conversations_are_read_as_live_requests_are(catalog: Catalog) -> None:
    from router_ml.conversation import request_of

    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    import json

    data = build_dataset(_log(catalog, [{"messages": json.dumps(messages), "quality": 1.0}]), catalog)
    assert data.requests[0] == request_of(messages=messages)


def test_sessions_never_fall_on_both_sides(catalog: Catalog) -> None:
    rows = [{"prompt": f"p{i}", "session": f"s{i % 7}" if i % 2 else None, "quality": 1.0} for i in range(200)]
    data = build_dataset(_log(catalog, rows), catalog)
    older, newest = split_by_time(data, 0.3)
    assert set(older) | set(newest) == set(range(200))
    assert not set(data.group[older]) & set(data.group[newest])
    assert newest.min() >= 140
    folds = folds_of(data, 5, seed=0)
    for group in np.unique(data.group):
        assert len(set(folds[data.group == group])) == 1
    assert np.array_equal(folds, folds_of(data, 5, seed=0))
    assert not np.array_equal(folds, folds_of(data, 5, seed=1))


def test_a_fallbacks_propensity_is_that_of_another_model(catalog: Catalog) -> None:
    first, second = catalog.ids[:2]
    rows = [{"prompt": "a", "model": second, "fallback_from": first, "propensity": 0.95, "quality": 1.0}]
    data = build_dataset(_log(catalog, rows), catalog)
    assert data.quality[0, 1] == 1.0
    assert np.isnan(data.propensity[0]).all()


def test_retries_and_failures_are_shrunk_to_those_of_all_models(catalog: Catalog) -> None:
    first, second, third, fourth = catalog.ids
    rows = [
        *[{"model": first, "retries": 3, "quality": 1.0}] * 60,  # without prompts: they count all the same
        *[{"model": first, "status": "timeout", "retries": 3}] * 20,
        *[{"model": second, "retries": 0}] * 100,
        # The failed call and its retries are the chosen model's, the answer is the other's.
        *[{"model": second, "fallback_from": third, "retries": 2}] * 20,
        # Nothing that is known of how a call went.
        *[{"model": fourth, "status": None}] * 50,
        {"model": fourth, "status": "cancelled"},
        {"model": "unheard-of", "status": "error", "retries": 9},
    ]
    found = reliability(_log(catalog, rows), catalog)
    attempts, failure = (80 * 4 + 100 + 20 * 3) / 200, (20 + 20) / 220
    want = [
        ((80 * 4 + PRIOR_CALLS * attempts) / (80 + PRIOR_CALLS), (20 + PRIOR_CALLS * failure) / (80 + PRIOR_CALLS)),
        ((100 + PRIOR_CALLS * attempts) / (100 + PRIOR_CALLS), PRIOR_CALLS * failure / (120 + PRIOR_CALLS)),
        ((60 + PRIOR_CALLS * attempts) / (20 + PRIOR_CALLS), (20 + PRIOR_CALLS * failure) / (20 + PRIOR_CALLS)),
        (attempts, failure),
    ]
    np.testing.assert_allclose(np.transpose([found.attempts, found.failure]), want)


def test_a_log_that_says_nothing_of_calls_has_no_retries_and_no_failures(catalog: Catalog) -> None:
    found = reliability(_log(catalog, [{"prompt": "a", "status": None}]), catalog)
    assert found == Reliability.perfect(4)
    answered = reliability(_log(catalog, [{"prompt": "a", "quality": 0.0, "status": None}] * 5), catalog)
    assert answered == Reliability.perfect(4)
