"""The bundle: what training makes, the registry versions and serving loads. Every byte is checked, nothing is executed.

A directory: `manifest.json` lists every file with its SHA-256, `manifest.sha256` holds the manifest's own. Arrays are
`.npz` read without pickle, the booster is LightGBM's own text. A bundle needs no network and no other file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router_ml.catalog import Catalog
from router_ml.errors import BundleError, InputError

FORMAT = 2
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
_RETRAIN = "fetch the bundle again, or train a new one"


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory, verified: its manifest and the bytes of its files by name."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]
    version: str

    @property
    def catalog(self) -> Catalog:
        """The catalogue that decisions go by: the learner's, with the prices that `repriced` brought since."""
        brought = self.manifest.get("prices")
        if brought is None:
            return self.learnt
        catalog = Catalog.from_json(brought["catalog"], f"{MANIFEST}: 'prices'")
        if catalog.ids != self.learnt.ids:
            raise BundleError(f"{MANIFEST}: 'prices' is of other models than 'catalog': {_RETRAIN}")
        return catalog

    @property
    def learnt(self) -> Catalog:
        """The catalogue that the learner was trained on, whose prices are among its features."""
        return Catalog.from_json(self.manifest["catalog"], MANIFEST)

    def arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of one `.npz` file."""
        return unpack_arrays(self.file(name), name)

    def json(self, name: str) -> Any:
        """One JSON file, parsed."""
        return json.loads(self.file(name))

    def file(self, name: str) -> bytes:
        """The bytes of one file. Raises BundleError when the bundle does not list it."""
        if name not in self.files:
            raise BundleError(f"the bundle lists no file {name!r}: {_RETRAIN}")
        return self.files[name]


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Arrays as the bytes of an `.npz` file, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def unpack_arrays(data: bytes, name: str) -> dict[str, npt.NDArray[Any]]:
    """The inverse of `pack_arrays`. Raises BundleError."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{name} holds no readable arrays ({error}): {_RETRAIN}") from None


def write_bundle(out: str | Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """Writes a bundle aside and renames it into place; returns its version, the first 12 digits of the manifest's hash.

    A directory that already holds a bundle is replaced. Raises InputError when `out` is something else.
    """
    out = Path(out)
    check_replaceable(out)
    full = {
        "format": FORMAT,
        **manifest,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    text = (json.dumps(full, indent=1, sort_keys=True) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, data in {**files, MANIFEST: text, MANIFEST_HASH: f"{digest}\n".encode()}.items():
            with (aside / name).open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        aside.chmod(0o755)
        old = aside.with_name(f"{aside.name}.old")
        swap(aside, out, old)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return digest[:12]


def swap(new: Path, to: Path, old: Path) -> None:
    """Renames the bundle `new` to `to`; what was there becomes `old`, and comes back when the renaming fails."""
    if to.exists():
        to.replace(old)
    try:
        new.replace(to)
    except OSError:
        if (to / MANIFEST).is_file():  # another process was first with it
            return
        if old.exists():
            old.replace(to)
        raise


def check_replaceable(out: Path) -> None:
    """Raises InputError when `out` holds anything but a bundle's own files: ask before the work, not after it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        listed = set(json.loads((out / MANIFEST).read_bytes())["files"])
        foreign = {path.name for path in out.iterdir()} - listed - {MANIFEST, MANIFEST_HASH}
        if not foreign and (out / MANIFEST_HASH).is_file():
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{out} exists and is not a bundle, or not only that: choose another folder, or remove it")


def read_bundle(path: str | Path, *, leave: Collection[str] = ()) -> Bundle:
    """Reads and verifies a bundle. Raises BundleError that names the file at fault and what to do.

    The files named in `leave` are verified, too, but not held in memory: `read_later` reads one when it is needed.
    """
    path = Path(path)
    manifest, version = _read_manifest(path)
    files = {}
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise BundleError(f"{path / MANIFEST} lists {name!r}, which is not a plain file name: {_RETRAIN}")
        data = _read(path, name, expected)
        if name not in leave:
            files[name] = data
    return Bundle(manifest, files, version)


def read_later(path: str | Path, version: str, name: str) -> bytes | None:
    """One file of the bundle at `path` that has this `version`, verified; None where the bundle has no such file.

    Raises BundleError as `read_bundle` does, and when another bundle has taken that one's place.
    """
    manifest, found = _read_manifest(Path(path))
    if found != version:
        raise BundleError(f"{path} holds bundle {found} now, not {version}: load it again")
    return _read(Path(path), name, manifest["files"][name]) if name in manifest["files"] else None


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest, verified, and the bundle's version."""
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: make one with 'router-ml train --out {path}', or correct the path")
    text = _read(path, MANIFEST)
    stated = _read(path, MANIFEST_HASH)
    digest = hashlib.sha256(text).hexdigest()
    if len(stated) != 65 or stated[64:] != b"\n" or set(stated[:64]) - set(b"0123456789abcdef"):
        raise BundleError(f"{path / MANIFEST_HASH} is not a SHA-256 digest, so it was altered: {_RETRAIN}")
    if stated != f"{digest}\n".encode():
        raise BundleError(
            f"{path / MANIFEST} does not match its hash in {MANIFEST_HASH}, so one was altered: {_RETRAIN}"
        )
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"{path} has bundle format {manifest.get('format')!r}, this version of router-ml reads {FORMAT}: "
            "install the version that made it, or train again"
        )
    return manifest, digest[:12]


def _read(path: Path, name: str, expected: str | None = None) -> bytes:
    """A file's bytes; where its SHA-256 is `expected`, they are held against it."""
    try:
        data = (path / name).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path / name} is missing: {_RETRAIN}") from None
    except OSError as error:
        raise BundleError(f"{path / name} cannot be read ({error.strerror}): check its permissions") from None
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise BundleError(f"{path / name} does not match its hash in {MANIFEST}, so it was altered: {_RETRAIN}")
    return data
