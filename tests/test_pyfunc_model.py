"""A registered router in a data scientist's hands: `mlflow.pyfunc.load_model` gives what the router itself decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pytest

from features.load import load_router, save_router
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.router import Router
from router_ml.types import Message, RouteRequest
from training.dataset import Dataset
from training.fit import fit
from training.tracking import register_bundle

EASY = ("capital of {}", "translate {} into French", "who wrote {}", "spell {} backwards")
HARD = ("prove the theorem about {} by induction", "derive the integral of {} step by step")
NOUNS = ("France", "rivers", "music", "numbers", "paper", "glass", "cities", "winter", "bread", "light")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> Path:
    rng = np.random.default_rng(0)
    prompts = [f"{template.format(noun)}, case {i}" for i in range(5) for template in EASY + HARD for noun in NOUNS]
    hard = np.array(["theorem" in prompt or "integral" in prompt for prompt in prompts])
    # The cheap half of the catalogue fails on what is hard, the dear half seldom fails.
    p_ok = np.where(hard[:, None], [0.95, 0.85, 0.2, 0.1], [0.95, 0.95, 0.9, 0.85])
    n, m = p_ok.shape
    data = Dataset(
        catalog,
        [str(i) for i in range(n)],
        [RouteRequest(messages=(Message("user", prompt),)) for prompt in prompts],
        (rng.random((n, m)) < p_ok).astype(np.float32),
        np.full((n, m), 200.0, dtype=np.float32),
        np.array([len(prompt) / 4 for prompt in prompts], dtype=np.float32),
        np.ones((n, m), dtype=np.float32),
        np.arange(n),
    )
    out = tmp_path_factory.mktemp("pyfunc") / "bundle"
    save_router(out, fit(data, encoder="lexical").estimator, {"log_sha256": "cd" * 32, "quality_threshold": 0.5})
    return out


@pytest.fixture(scope="module")
def uri(bundle: Path) -> str:
    uri = f"sqlite:///{bundle.parent}/mlflow.db"
    register_bundle(bundle, tracking_uri=uri, name="router", params={}, metrics={}, alias="champion")
    return uri


@pytest.fixture(scope="module")
def model(uri: str) -> Any:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        return mlflow.pyfunc.load_model("models:/router@champion")
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def router(bundle: Path) -> Router:
    return load_router(bundle)


FRAME: dict[str, list[Any]] = {
    "prompt": ["capital of Peru, case 9", "prove the theorem about sums by induction", "who wrote winter"],
    "min_probability": [None, 0.7, 0.5],
    "region": [None, None, "us"],
}


@pytest.mark.parametrize("frame", [pd.DataFrame(FRAME, index=[7, 8, 9]), pl.DataFrame(FRAME)], ids=["pandas", "polars"])
def test_predictions_are_the_routers_own_decisions(model: Any, router: Router, frame: Any) -> None:
    answer = model.predict(frame)
    assert list(answer.columns) == [
        "model",
        "p_ok",
        "expected_cost_usd",
        "expected_total_cost_usd",
        "meets_threshold",
        "reason",
        *(f"p_ok/{name}" for name in router.catalog.ids),
    ]
    assert list(answer.index) == ([7, 8, 9] if isinstance(frame, pd.DataFrame) else [0, 1, 2])
    for i in range(3):
        request = RouteRequest(
            messages=(Message("user", FRAME["prompt"][i]),),
            min_probability=FRAME["min_probability"][i],
            region=FRAME["region"][i],
        )
        decision, row = router.decide(request), answer.iloc[i]
        assert (row["model"], row["p_ok"]) == (decision.model, decision.chosen.p_ok)
        assert row["expected_cost_usd"] == decision.chosen.expected_cost_usd
        assert row["expected_total_cost_usd"] == decision.chosen.expected_total_cost_usd
        assert (row["meets_threshold"], row["reason"]) == (decision.meets_threshold, decision.reason)
        estimates = answer.filter(like="p_ok/").to_numpy()[i]
        np.testing.assert_array_equal(estimates.astype(np.float32), router.estimator.estimate(request).p_ok)
    assert answer["model"].nunique() > 1


def test_a_row_without_an_eligible_model_says_why_and_the_others_are_answered(model: Any) -> None:
    answer = model.predict(pd.DataFrame({"prompt": ["who wrote bread"] * 2, "data_class": ["secret", "public"]}))
    assert answer["model"].isna().tolist() == [True, False]
    assert np.isnan(answer["p_ok"][0])
    for name in ("frontier", "mid", "hosted", "local"):
        assert f"{name}: " in answer["reason"][0]
    assert answer.filter(like="p_ok/").notna().all(axis=None)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"text": ["x"]}, "no column 'prompt'"),
        ({"prompt": ["x"], "min_prob": [0.5]}, "column 'min_prob' that is not a request's: known are prompt, tier"),
        ({"prompt": ["x", None]}, "row 1: 'prompt' has to be a text"),
        ({"prompt": ["x"], "tier": ["deluxe"]}, "row 0: .*deluxe"),
        ({"prompt": ["x"], "max_tokens": ["many"]}, "row 0: .*many"),
        ({"prompt": ["x"], "quality_threshold": [0.9]}, "row 0: quality_threshold 0.9 .* which are 0.5"),
        ({"prompt": ["x"], "objective": ["quality"]}, "row 0: .*give 'max_cost_usd'"),
        ({"prompt": ["x"], "needs": ["tools"]}, "row 0: 'needs' has to be a list of names"),
    ],
)
def test_a_bad_frame_is_refused_with_the_row_and_the_column(model: Any, frame: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.predict(pd.DataFrame(frame))


def test_an_altered_registered_bundle_is_refused(bundle: Path, uri: str) -> None:
    made = register_bundle(bundle, tracking_uri=uri, name="altered", params={}, metrics={}, alias="champion")
    (booster,) = Path(made.source.removeprefix("file://")).rglob("booster.txt")
    booster.write_bytes(booster.read_bytes() + b" ")
    script = (
        "import sys, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "print(mlflow.pyfunc.load_model('models:/' + sys.argv[2] + '@champion'))\n"
    )
    for name, code in (("router", 0), ("altered", 1)):
        command = [sys.executable, "-c", script, uri, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert ("booster.txt does not match its hash" in done.stderr) == (code == 1)
