"""The wheel holds the product and nothing else; the lock serves every machine; a skipped test cannot go unnoticed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from router_ml import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("router_ml", "features", "training", "serving")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_product_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names} == {*FOLDERS, f"router_ml-{__version__}.dist-info"}
    for folder in FOLDERS:
        on_disk = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")}
        assert on_disk <= names
        assert f"{folder}/py.typed" in names
    page = {p.relative_to(ROOT).as_posix() for p in (ROOT / "serving" / "console" / "static").iterdir()}
    assert page <= names and len(page) > 10
    assert not [name for name in names if name.endswith((".pyc", ".db", ".ipynb"))]


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"router_ml-{__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert {f"Provides-Extra: {extra}" for extra in ("train", "serve", "dev")} <= set(metadata.splitlines())
    assert "router-ml = router_ml.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_the_lock_pins_every_requirement_and_no_machine_of_its_own() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"not a plain pin that holds on every machine: {line!r}"
        pins[_normal(match[1])] = match[2]
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    missing = [name for r in wanted if (name := _normal(re.split(r"[\[<>=!~ ;]", r)[0])) not in pins]
    assert missing == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


SKIPPING = """
import pytest

def test_passes(): pass

@pytest.mark.skip(reason="because")
def test_skipped(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_some(n):
    if n == 2: pytest.skip("not two")

@pytest.mark.xfail(strict=True)
def test_expected_to_fail(): assert False
"""


def run_suite(folder: Path, skips: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A pytest run over a small suite under this suite's own conftest."""
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "skips.txt").write_text(skips)
    (folder / "tests" / "test_skipping.py").write_text(SKIPPING)
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "ROUTER_ML_STRICT_SKIPS", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("env", [{"CI": "true"}, {"ROUTER_ML_STRICT_SKIPS": "1"}])
def test_an_unlisted_skip_fails_the_run_and_is_named(tmp_path: Path, env: dict[str, str]) -> None:
    done = run_suite(tmp_path, "# none\n", **env)
    assert done.returncode == 1
    section = done.stdout.partition("not named in tests/skips.txt")[2]
    for name in ("test_skipped", "test_some[2]", "test_expected_to_fail"):
        assert f"tests/test_skipping.py::{name}" in section
    assert "test_passes" not in section
    assert "test_some[1]" not in section
    assert re.search(r"2 passed, 2 skipped, 1 xfailed", done.stdout.splitlines()[-1])


def test_listed_skips_pass(tmp_path: Path) -> None:
    listed = (
        "tests/test_skipping.py::test_skipped  # why\n"
        "tests/test_skipping.py::test_some\n"
        "tests/test_skipping.py::test_expected_to_fail\n"
    )
    done = run_suite(tmp_path, listed, CI="true")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("env", [{}, {"CI": "false"}])
def test_elsewhere_a_skip_is_only_reported(tmp_path: Path, env: dict[str, str]) -> None:
    assert run_suite(tmp_path, "", **env).returncode == 0


def test_every_line_of_the_skip_list_names_a_test_that_exists() -> None:
    for line in (ROOT / "tests" / "skips.txt").read_text(encoding="utf-8").splitlines():
        nodeid = line.partition("#")[0].strip()
        if nodeid:
            file, *names = nodeid.partition("[")[0].split("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert set(names) <= defined, nodeid
