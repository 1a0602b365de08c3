"""The service needs the [serve] extra and nothing else: it answers in a venv without torch, mlflow or polars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEVER = {"torch", "mlflow", "polars", "sentence_transformers", "transformers", "model2vec", "tokenizers"}
# LightGBM itself imports these where they are installed; they are not needed.
NOT_NEEDED = {"sklearn", "pandas", "pyarrow", "matplotlib", "dask"}
ROUTE = """
import json, socket, sys, threading, time, urllib.request
from pathlib import Path
import uvicorn
from serving.app import create_app
from serving.settings import Settings

app = create_app(Settings(bundle=Path(sys.argv[1]), store=sys.argv[2]))
server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
listener = socket.create_server(("127.0.0.1", 0))
thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
thread.start()
while not server.started:
    time.sleep(0.01)
body = json.dumps({"messages": [{"role": "user", "content": sys.argv[3]}]}).encode()
url = f"http://127.0.0.1:{listener.getsockname()[1]}/route"
request = urllib.request.Request(url, body, {"content-type": "application/json"})
with urllib.request.urlopen(request, timeout=30) as said:
    answer = json.load(said)
server.should_exit = True
thread.join()
print(json.dumps({"answer": answer, "modules": sorted(sys.modules), "from": sys.modules["serving"].__file__}))
"""
PROMPT = "What is the plural of river cloud engine?"


def routed(python: Path | str, bundle: Path, folder: Path) -> dict[str, Any]:
    """Routes one request over HTTP in a fresh process, away from the source tree."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", ROUTE, str(bundle), str(folder / "store.db"), PROMPT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def slim_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new venv that has router-ml[serve] at the locked versions."""
    folder = tmp_path_factory.mktemp("slim") / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    # This venv's own pip does the work: installing another one first would take as long again.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-compile", "-c", str(ROOT / "requirements.lock"), f"{ROOT}[serve]"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def slim(slim_python: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return routed(slim_python, tiny_bundle, tmp_path_factory.mktemp("slim-run"))


def test_the_serve_extra_alone_answers_a_route(slim_python: Path, slim: dict[str, Any]) -> None:
    assert slim["answer"]["model"] == "local"
    assert Path(slim["from"]).is_relative_to(slim_python.parents[1])
    assert (NEVER | NOT_NEEDED) & set(slim["modules"]) == set()
    assert [name for name in slim["modules"] if name.partition(".")[0] == "training"] == []
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(slim_python), "list", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {package["name"].lower().replace("-", "_") for package in json.loads(listed.stdout)}
    assert "lightgbm" in installed and installed & (NEVER | NOT_NEEDED | {"scikit_learn"}) == set()


def test_with_everything_installed_the_answer_is_the_same_and_nothing_heavy_is_imported(
    slim: dict[str, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    full = routed(sys.executable, tiny_bundle, tmp_path)
    assert set(full["modules"]) & NEVER == set()
    assert {**full["answer"], "decision_id": ""} == {**slim["answer"], "decision_id": ""}


def test_a_bundle_with_a_transformer_says_what_it_needs(
    slim_python: Path, transformer_bundle: Path, tmp_path: Path
) -> None:
    command = [str(slim_python), "-m", "router_ml.cli", "route", "Hello", "--bundle", str(transformer_bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "pip install 'router-ml[transformer]'" in done.stderr and "Traceback" not in done.stderr
