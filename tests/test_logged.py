"""From a log and a router to arrays: decisions, what the target would have done, what it expects, and slices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.load import load_router
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.policy import Policy, Rule
from router_ml.router import Router
from router_ml.types import Estimate as LearnerEstimate
from router_ml.types import RouteRequest
from training.logged import logged_of, one_row_a_request, predictions_of, target_of
from training.ope import evaluate_policy
from training.slices import language_of


def rows(catalog: Catalog, **columns: list[object]) -> pl.DataFrame:
    n = len(next(iter(columns.values())))
    base: dict[str, object] = {
        "request_id": [f"r{i}" for i in range(n)], "time": ["2026-01-01T00:00:00Z"] * n, "model": ["mid"] * n,
        "prompt": ["Where is my parcel?"] * n,
    }  # fmt: skip
    frame = pl.DataFrame(base | columns)
    frame = frame.with_columns(pl.col("time").str.to_datetime(time_unit="us", time_zone="UTC"))
    missing = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in LOG_SCHEMA.items() if name not in frame.columns]
    return frame.with_columns(missing).select(list(LOG_SCHEMA)).cast(dict(LOG_SCHEMA))  # type: ignore[arg-type]


def test_a_log_becomes_decisions(catalog: Catalog) -> None:
    log = rows(
        catalog,
        model=["mid", "frontier", "local", "mid"],
        fallback_from=[None, "hosted", None, None],
        status=["ok", "ok", "timeout", None],
        quality=[1.0, 0.5, None, None],
        cost_usd=[0.1, 0.2, None, 0.4],
        propensity=[0.5, 0.25, 1.0, None],
        session=["a", "a", None, None],
        candidates=[["mid", "local"], None, ["mid", "unheard-of"], None],
        task=["chat", None, "chat", None],
    )
    found = logged_of(log, catalog)
    assert [catalog.ids[i] for i in found.action] == ["mid", "hosted", "local", "mid"], "the policy's choice"
    np.testing.assert_array_equal(found.metrics["quality"], [1.0, 0.5, 0.0, np.nan])
    np.testing.assert_array_equal(found.metrics["cost_usd"], [0.1, 0.2, np.nan, 0.4])
    np.testing.assert_array_equal(found.propensity, [0.5, 0.25, 1.0, np.nan])
    assert found.eligible.tolist() == [
        [False, True, False, True], [True] * 4, [False, True, False, True], [True] * 4,
    ]  # fmt: skip
    assert found.cluster[0] == found.cluster[1] and len(set(found.cluster.tolist())) == 3
    assert found.slices["task"].to_list() == ["chat", "(none)", "chat", "(none)"]
    assert np.isnan(logged_of(log, catalog, failed_quality=None).metrics["quality"][2])
    taken = found.take(np.array([True, False, True, False]))
    assert len(taken) == 2 and taken.slices["task"].to_list() == ["chat", "chat"]


def test_logs_that_are_not_one_row_a_request(catalog: Catalog, tiny_log: pl.DataFrame) -> None:
    with pytest.raises(InputError, match="several rows of one request"):
        logged_of(tiny_log, catalog)
    one = one_row_a_request(tiny_log)
    assert len(one) == 240 and one["propensity"].unique().to_list() == [0.25]
    assert one["model"].value_counts()["count"].min() > 35, "drawn evenly"
    assert one_row_a_request(one).equals(one)
    target = np.tile([1.0, 0.0, 0.0, 0.0], (240, 1))
    found = evaluate_policy(logged_of(one, catalog), target)
    truth = tiny_log.filter(pl.col("model") == "frontier")["quality"].mean()
    assert abs(found.estimates["dr"].value - truth) < 4 * found.estimates["dr"].se  # type: ignore[operator]
    for bad, said in (
        (tiny_log.head(0), "has no rows"),
        (rows(catalog, model=["who"]), "does not list: who"),
    ):
        with pytest.raises(InputError, match=said):
            logged_of(bad, catalog)
    with pytest.raises(InputError, match="has no column 'speed'"):
        logged_of(one, catalog, metrics=("speed",))


@dataclass(frozen=True)
class ByLength:
    """Longer requests are harder, and harder for the cheaper models."""

    models: int

    def estimate(self, request: RouteRequest) -> LearnerEstimate:
        chars = sum(len(message.text) for message in request.messages)
        p_ok = 1.0 - (np.arange(self.models, dtype=np.float32) + 1) * np.float32(chars) / np.float32(1000)
        return LearnerEstimate(np.clip(p_ok, 0, 1), np.full(self.models, 500, np.float32), chars / 4)


def test_the_target_is_what_the_router_would_draw(catalog: Catalog) -> None:
    policy = Policy(exploration_rate=0.2, escalation_rate=0.0, rules=(Rule("mid", task="pinned"),))
    router = Router(catalog, ByLength(4), policy, "v1")
    log = rows(
        catalog, prompt=["x" * 40, "x" * 200, "x" * 40, "x" * 40], task=[None, None, "pinned", None],
        candidates=[None, None, None, ["mid", "hosted"]], model=["frontier", "hosted", "local", "mid"],
    )  # fmt: skip
    target = target_of(router, log)
    np.testing.assert_allclose(
        target, [[0.05, 0.05, 0.05, 0.85], [0.85, 0.05, 0.05, 0.05], [0, 1, 0, 0], [0, 0.1, 0.9, 0]]
    )
    dearer = target_of(router, log, min_probability=0.9)
    assert dearer[0].argmax() < target[0].argmax()
    longer = Catalog((*catalog, replace(catalog["mid"], id="newer")))
    assert target_of(router, log, longer)[:, :4].tolist() == target.tolist()
    with pytest.raises(InputError, match="may choose 'local'"):
        target_of(router, log, catalog.subset(["frontier", "mid", "hosted"]))
    unserved = target_of(router, rows(catalog, candidates=[list(catalog.ids), ["unheard-of"]]))
    assert unserved.sum(axis=1).tolist() == [1.0, 0.0]
    expects = predictions_of(router, log, longer)
    assert np.isclose(expects["quality"][0, 3], 1 - 4 * 40 / 1000) and np.isnan(expects["quality"][:, 4]).all()
    assert (expects["cost_usd"][:, :4] > 0).all()


def test_the_language_of_a_text() -> None:
    texts = {
        "en": "Where is the parcel that I ordered from you?",
        "de": "Wo ist das Paket, das ich bei Ihnen bestellt habe? Bitte",
        "fr": "Où est le colis que je vous ai commandé ?",
        "es": "¿Dónde está el paquete que me han enviado con la orden?",
        "it": "Dove è il pacco che ho ordinato da voi? Non è qui.",
        "ja": "荷物はどこですか",
        "zh": "我的包裹在哪里",
        "ko": "제 소포는 어디에 있나요",
        "ru": "Где моя посылка?",
        "ar": "أين طردي؟",
        "other": "x = 3; y += 1",
    }
    assert {code: language_of(text) for code, text in texts.items()} == {code: code for code in texts}
    assert language_of("") == "other"


def test_a_log_on_disk_is_evaluated_with_a_trained_router(tiny_bundle: Path, tiny_log: pl.DataFrame) -> None:
    router = load_router(tiny_bundle)
    log = one_row_a_request(tiny_log)
    target = target_of(router, log)
    found = evaluate_policy(logged_of(log, router.catalog), target, predictions=predictions_of(router, log))
    assert found.identifiable and 0.5 < found.estimates["dr"].value < 1.1
    np.testing.assert_allclose(target.sum(axis=1), 1)
