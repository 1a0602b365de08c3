"""Golden rows: a bundle that computes other numbers here than where it was made is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from features import golden
from features.load import GOLDEN, load_estimator, load_router
from router_ml.bundle import Bundle, read_bundle, write_bundle
from router_ml.errors import BundleError
from serving.live import LiveRouter


def with_golden(bundle: Bundle, out: Path, said: object | None) -> Path:
    """The same bundle, every hash in order, with other golden rows or none."""
    files = {name: data for name, data in bundle.files.items() if name != GOLDEN}
    if said is not None:
        files[GOLDEN] = said if isinstance(said, bytes) else json.dumps(said).encode()
    write_bundle(out, {k: v for k, v in bundle.manifest.items() if k not in ("files", "format")}, files)
    return out


def test_a_bundle_has_them_and_they_hold(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    said = json.loads(bundle.file(GOLDEN))
    estimator = load_estimator(bundle)
    assert np.shape(said["p_ok"]) == (len(golden.CONVERSATIONS), 1, len(bundle.catalog))
    assert np.std(said["p_ok"], axis=0).max() > golden.TOLERANCE  # rows that were all alike would show nothing
    assert golden.check(estimator, bundle.file(GOLDEN), GOLDEN) < 1e-5


@pytest.mark.parametrize("by", [0.5, -0.02, float("nan")])
def test_a_difference_is_refused_by_name_and_size(tiny_bundle: Path, tmp_path: Path, by: float) -> None:
    bundle = read_bundle(tiny_bundle)
    said = json.loads(bundle.file(GOLDEN))
    said["p_ok"][1][0][2] += by
    bad = with_golden(bundle, tmp_path / "bundle", said)
    version = read_bundle(bad).version
    size = "inf" if np.isnan(by) else f"{abs(by):.4f}"
    with pytest.raises(
        BundleError, match=rf"golden.json of bundle {version} expects p_ok .* of 'hosted' for its request 2.*{size}"
    ):
        load_router(bad)
    live = LiveRouter(tiny_bundle)
    with pytest.raises(BundleError, match="golden"):
        live.reload(bad)
    assert live.live.router.model_version == bundle.version and live.bundle == tiny_bundle


def test_another_calibration_than_the_one_that_was_judged_is_noticed(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    estimator = load_estimator(bundle)
    shifted = dataclasses.replace(estimator.calibration, intercept=estimator.calibration.intercept + 0.2)
    with pytest.raises(BundleError, match="largest difference"):
        golden.check(dataclasses.replace(estimator, calibration=shifted), bundle.file(GOLDEN), GOLDEN)


def test_what_two_machines_differ_by_passes(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    said = json.loads(bundle.file(GOLDEN))
    said["p_ok"] = (np.array(said["p_ok"]) + 1e-4).tolist()
    assert load_router(with_golden(bundle, tmp_path / "bundle", said)).catalog.ids


def test_a_bundle_from_before_there_were_any_loads(tiny_bundle: Path, tmp_path: Path) -> None:
    older = with_golden(read_bundle(tiny_bundle), tmp_path / "older", None)
    assert not (older / GOLDEN).exists()
    assert load_router(older).catalog.ids == load_router(tiny_bundle).catalog.ids


@pytest.mark.parametrize(
    "said",
    [
        b"{",
        [],
        {"messages": []},
        {"messages": [], "p_ok": []},
        {"messages": [[["user", "x"]]], "p_ok": [[[0.5]]]},
        {"messages": [[["user"]]], "p_ok": [[[0.5] * 4]]},
        {"messages": [[["user", 7]]], "p_ok": [[[0.5] * 4]]},
        {"messages": [[["user", "x"]]], "p_ok": [[["a"] * 4]]},
    ],
)
def test_rows_of_another_form_are_named(tiny_bundle: Path, tmp_path: Path, said: object) -> None:
    with pytest.raises(BundleError, match=r"golden\.json of bundle \w+ holds no golden rows of this bundle"):
        load_router(with_golden(read_bundle(tiny_bundle), tmp_path / "bundle", said))
