"""Bundles: written whole, read only when every byte is right, and nothing in them is executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.load import load_router
from router_ml.bundle import (
    FORMAT,
    MANIFEST,
    MANIFEST_HASH,
    pack_arrays,
    read_bundle,
    read_later,
    swap,
    unpack_arrays,
    write_bundle,
)
from router_ml.conversation import request_of
from router_ml.errors import BundleError, InputError

FILES = {"a.bin": b"\x00\x01\x02", "b.json": b"[1]"}


def _copy(bundle: Path, to: Path) -> Path:
    return Path(shutil.copytree(bundle, to / "copy"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    version = write_bundle(tmp_path / "b", {"note": "x"}, FILES)
    bundle = read_bundle(tmp_path / "b")
    assert (bundle.version, dict(bundle.files), bundle.manifest["note"]) == (version, FILES, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_the_same_content_is_the_same_version(tmp_path: Path) -> None:
    assert write_bundle(tmp_path / "b", {"n": 1}, FILES) == write_bundle(tmp_path / "c", {"n": 1}, FILES)
    assert write_bundle(tmp_path / "d", {"n": 2}, FILES) != write_bundle(tmp_path / "e", {"n": 1}, FILES)


def test_a_bundle_is_replaced_but_nothing_else_is(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", {"n": 1}, FILES)
    write_bundle(tmp_path / "b", {"n": 2}, {"a.bin": b"new"})
    assert read_bundle(tmp_path / "b").files == {"a.bin": b"new"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="not a bundle"):
        write_bundle(tmp_path / "mine", {}, FILES)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


def test_one_byte_changed_in_any_file_is_refused_by_its_name(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = _copy(tiny_bundle, tmp_path)
    names = sorted(p.name for p in copy.iterdir())
    parts = {"booster.txt", "outcomes.npz", "encoder.npz", "tokens.json", "neighbours.npz", "golden.json"}
    assert {MANIFEST, MANIFEST_HASH, *parts} == set(names)
    for name in names:
        original = (copy / name).read_bytes()
        for at in (0, len(original) // 2, len(original) - 1):
            altered = bytearray(original)
            altered[at] ^= 1
            (copy / name).write_bytes(bytes(altered))
            with pytest.raises(BundleError, match=name.replace(".", r"\.")):
                load_router(copy)
        (copy / name).write_bytes(original)
    load_router(copy)


def test_a_file_that_is_left_is_checked_and_read_when_it_is_needed(tmp_path: Path) -> None:
    version = write_bundle(tmp_path / "b", {}, FILES)
    assert read_bundle(tmp_path / "b", leave=("b.json",)).files == {"a.bin": FILES["a.bin"]}
    assert read_later(tmp_path / "b", version, "b.json") == FILES["b.json"]
    assert read_later(tmp_path / "b", version, "c.json") is None
    (tmp_path / "b" / "b.json").write_bytes(b"[2]")
    for read in (
        lambda: read_bundle(tmp_path / "b", leave=("b.json",)),
        lambda: read_later(tmp_path / "b", version, "b.json"),
    ):
        with pytest.raises(BundleError, match=r"b\.json does not match its hash"):
            read()
    newer = write_bundle(tmp_path / "b", {}, {"a.bin": b"new"})
    with pytest.raises(BundleError, match=f"holds bundle {newer} now, not {version}"):
        read_later(tmp_path / "b", version, "b.json")


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_HASH, "booster.txt"])
def test_a_missing_file_is_named(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = _copy(tiny_bundle, tmp_path)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_router(copy)


def test_another_format_says_what_to_do(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", {"format": FORMAT + 1}, FILES)
    with pytest.raises(BundleError, match=f"reads {FORMAT}: install the version that made it"):
        read_bundle(tmp_path / "b")


def test_a_path_in_the_manifest_cannot_leave_the_bundle(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "b"
    folder.mkdir()
    text = json.dumps({"format": FORMAT, "files": {"../secret": hashlib.sha256(b"x").hexdigest()}}).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_HASH).write_text(hashlib.sha256(text).hexdigest() + "\n")
    with pytest.raises(BundleError, match="not a plain file name"):
        read_bundle(folder)


def test_pickled_arrays_are_refused() -> None:
    import io

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("executed",))

    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([Bomb()], dtype=object))
    with pytest.raises(BundleError, match="no readable arrays"):
        unpack_arrays(buffer.getvalue(), "x.npz")
    with pytest.raises(ValueError, match="pickle"):
        pack_arrays({"x": np.array([Bomb()], dtype=object)})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=300))
def test_garbage_is_a_bundle_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BundleError):
        unpack_arrays(data, "x.npz")
    (tmp_path / MANIFEST).write_bytes(data)
    (tmp_path / MANIFEST_HASH).write_bytes(data[:65])
    with pytest.raises(BundleError):
        read_bundle(tmp_path)


def test_a_loaded_router_decides_as_the_fitted_one(tiny_bundle: Path, tiny_log: object, catalog: object) -> None:
    from training.dataset import build_dataset
    from training.fit import fit

    data = build_dataset(tiny_log, catalog)  # type: ignore[arg-type]
    fitted = fit(data, encoder="lexical").estimator
    loaded = load_router(tiny_bundle)
    for request in [*data.requests[:20], request_of(prompt="something never seen"), request_of(prompt="")]:
        ours, theirs = fitted.estimate(request), loaded.estimator.estimate(request)
        assert np.array_equal(ours.p_ok, theirs.p_ok)
        assert np.array_equal(ours.output_tokens, theirs.output_tokens)
        assert ours.input_tokens == theirs.input_tokens


def test_a_folder_with_a_manifest_of_another_kind_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST).write_text('{"name": "web app"}')
    with pytest.raises(InputError, match="not a bundle"):
        write_bundle(tmp_path / "app", {}, FILES)
    write_bundle(tmp_path / "b", {}, FILES)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="or not only that"):
        write_bundle(tmp_path / "b", {}, FILES)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


def test_a_swap_that_fails_brings_the_old_bundle_back(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", {}, FILES)
    with pytest.raises(OSError):
        swap(tmp_path / "never made", tmp_path / "b", tmp_path / "old")
    assert read_bundle(tmp_path / "b").files == FILES


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"attempts": [1.0], "failure": [0.0]}, "of 1 models"),
        ({"attempts": [1.0] * 4}, "failure"),
        ({"attempts": [0.5] * 4, "failure": [0.0] * 4}, "attempts of 1 or more"),
        (7, "cannot be used"),
    ],
)
def test_reliability_that_cannot_be_is_refused(tiny_bundle: Path, tmp_path: Path, stated: object, says: str) -> None:
    bundle = read_bundle(tiny_bundle)
    write_bundle(tmp_path / "b", {**bundle.manifest, "reliability": stated}, bundle.files)
    with pytest.raises(BundleError, match=f"'reliability'.*{says}.*train again"):
        load_router(tmp_path / "b")


def test_a_bundle_knows_its_threshold_and_how_calls_went(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    known = {"attempts": [1.0, 1.5, 2.0, 1.0], "failure": [0.0, 0.1, 0.0, 0.0]}
    write_bundle(tmp_path / "b", {**bundle.manifest, "reliability": known}, bundle.files)
    request = request_of(prompt="What is the plural of river?")
    plain, told = (load_router(path).decide(request) for path in (tiny_bundle, tmp_path / "b"))
    cost, dearer = ({c.model: c.expected_cost_usd for c in made.candidates} for made in (plain, told))
    for model, attempts in zip(bundle.catalog.ids, known["attempts"], strict=True):
        assert dearer[model] == pytest.approx(attempts * cost[model], rel=1e-6)
    assert plain.quality_threshold == told.quality_threshold == 0.5
