"""The notebooks are pairs in step, hold no logic and no outputs, run on a small log, and open in Jupyter."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import jupytext
import pytest
from live_service import free_port, wait_for

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ("01_look_at_the_log", "02_retrain", "03_evaluate_and_promote", "04_cost_quality", "05_new_model")
EACH = pytest.mark.parametrize("name", NAMES)
MOST_LINES, MOST_CELLS = 25, 3
# What would be logic of a notebook's own: functions, classes, loops, branches, and comprehensions beyond one line.
LOGIC = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.AsyncFor, ast.While, ast.Try),
    *(ast.With, ast.AsyncWith, ast.If, ast.IfExp, ast.Match, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
MAY_IMPORT = {"polars", "router_ml", "features", "training"}


def cells(name: str) -> list[Any]:
    return list(jupytext.read(FOLDER / f"{name}.ipynb").cells)


def code(name: str) -> list[str]:
    return [cell.source for cell in cells(name) if cell.cell_type == "code"]


def logic(source: str) -> list[str]:
    """What a cell holds that belongs into the product, in words."""
    plain = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
    found = [f"{type(node).__name__}" for node in ast.walk(ast.parse(plain)) if isinstance(node, LOGIC)]
    for node in ast.walk(ast.parse(plain)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
            found += [f"imports {a.name}, which is private" for a in node.names if a.name.startswith("_")]
        found += [f"imports {m}" for m in modules if m.partition(".")[0] not in MAY_IMPORT]
    if len(source.splitlines()) > MOST_LINES:
        found.append(f"{len(source.splitlines())} lines")
    return found


def test_there_are_these_and_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@EACH
def test_the_pair_is_in_step(name: str) -> None:
    notebook, text = (jupytext.read(FOLDER / f"{name}.{end}") for end in ("ipynb", "py"))
    both = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, text)]
    assert both[0] == both[1], f"run: .venv/bin/jupytext --sync notebooks/{name}.py"
    for one in (notebook, text):
        assert one.metadata["jupytext"]["formats"] == "ipynb,py:percent"
        assert one.metadata["kernelspec"]["name"] == "python3"


@EACH
def test_outputs_are_stripped(name: str) -> None:
    for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@EACH
def test_it_holds_no_logic(name: str) -> None:
    assert [found for source in code(name) if (found := logic(source))] == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return 1",
        "f = lambda x: x",
        "for x in y:\n    print(x)",
        "if x:\n    y = 1",
        "[x for x in y]",
        "with open('x') as f:\n    pass",
        "from benchmarks.ope import main",
        "from training.ope import _Rows",
        "import subprocess",
        "\n".join(["x = 1"] * 26),
    ],
)
def test_logic_is_seen(source: str) -> None:
    assert len(logic(source)) == 1


@EACH
def test_it_reads_as_an_explanation_and_has_one_cell_to_change(name: str) -> None:
    made = cells(name)
    kinds = "".join(cell.cell_type[0] for cell in made)
    assert kinds.startswith("mmc") and "c" * (MOST_CELLS + 1) not in kinds
    assert made[0].source.startswith(f"# {int(name[:2])}. ") and made[1].source.startswith("## The one cell to change")
    settings, rest = code(name)[0], "\n".join(code(name)[1:])
    named = []
    for line in ast.parse(settings).body:
        assert isinstance(line, ast.Assign), "settings are assigned and nothing else"
        ast.literal_eval(line.value if not isinstance(line.value, ast.Tuple) else ast.Tuple(line.value.elts))
        named += [n.id for target in line.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    assert {"LOG", "KIND", "CATALOG", "FOLDER"} <= set(named)
    assert [one for one in named if not re.search(rf"\b{one}\b", rest)] == [], "set and not used"
    assert re.search(r"\b[A-Z][A-Z_]+ = ", rest) is None, "a setting outside the settings"
    for cell in made:
        assert cell.cell_type == "code" or len(cell.source.split()) >= 20


@EACH
def test_everything_that_it_speaks_of_exists(name: str) -> None:
    spoken = "\n".join(cell.source for cell in cells(name) if cell.cell_type == "markdown")
    for other in re.findall(r"`(\d\d_\w+)`", spoken):
        assert other in NAMES
    for module in re.findall(r"`((?:router_ml|training|features)\.[\w.]+)`", spoken):
        parts = module.split(".")
        assert any((ROOT / Path(*parts[:end])).with_suffix(".py").is_file() for end in (len(parts), len(parts) - 1))


def executed(folder: Path, *names: str, timeout: int = 1700) -> dict[str, str]:
    """Runs notebooks by nbmake in their order, and gives what each showed as text; fails with what failed."""
    files = [f"{name}.ipynb" for name in names]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--overwrite",
        "--nbmake-timeout=300",
        "-p",
        "no:cacheprovider",
    ]
    own = {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "POLARS_TABLE_WIDTH": "600"}
    done = subprocess.run(
        [*command, "-p", "no:schemathesis", *files], cwd=folder, capture_output=True, text=True, timeout=timeout,
        env=os.environ | own,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    shown = {}
    for name in names:
        outputs = [o for cell in jupytext.read(folder / f"{name}.ipynb").cells for o in cell.get("outputs", ())]
        assert not [o for o in outputs if o.get("name") == "stderr"], name
        texts = [o.get("text") or o["data"].get("text/plain", "") for o in outputs]
        shown[name] = "\n".join(texts) + "\nimages: " + str(sum("image/png" in o.get("data", {}) for o in outputs))
    return shown


@pytest.mark.timeout(1800)
def test_they_run_on_a_small_log(tmp_path: Path) -> None:
    """The later ones first: none needs what an earlier one has made, and all share what is there."""
    for name in NAMES:
        shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    shown = executed(tmp_path, *reversed(NAMES))
    images = {name[:2]: int(text.rpartition("images: ")[2]) for name, text in shown.items()}
    assert images == {"01": 3, "02": 2, "03": 5, "04": 7, "05": 1}
    assert "propensities     good" in shown["01_look_at_the_log"]
    assert "shuffled" in shown["02_retrain"] and "'challenger'" in shown["02_retrain"]
    third = shown["03_evaluate_and_promote"]
    assert "version 2 is champion" in third and "version 1 is champion again; version 2 is rolled back" in third
    assert "off-policy" in third and "rehearsed in notebook 03" in third
    assert "break_even_mtok" in shown["04_cost_quality"] and "within" in shown["04_cost_quality"]
    assert "promised" in shown["05_new_model"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} - {"runtime"} == {"work"}, "all in one folder"


def test_one_changed_cell_runs_on_the_readers_own_log(tmp_path: Path, tiny_log: Any, catalog: Any) -> None:
    from router_ml.logs import write_log

    write_log([tiny_log], tmp_path / "mine", catalog=catalog)
    notebook = jupytext.read(FOLDER / f"{NAMES[0]}.ipynb")
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for line, mine in (("LOG = None", "LOG = 'mine'"), ("BASELINE = None", "BASELINE = 'mid'")):
        settings.source = re.sub(f"^{line}", mine, settings.source, flags=re.MULTILINE)
    jupytext.write(notebook, tmp_path / f"{NAMES[0]}.ipynb")
    (shown,) = executed(tmp_path, NAMES[0]).values()
    assert "960 rows of 240 requests" in shown and "paired" in shown and "frontier" in shown
    assert "sim-" not in shown


def test_make_notebooks_opens_them_in_jupyter(tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    port = free_port()
    args = f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token=t --allow-root"
    said = subprocess.run(
        [make, "--no-print-directory", "-n", "notebooks", f"ARGS={args}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    command = shlex.split(said.stdout.strip().splitlines()[-1])
    assert command[0] == ".venv/bin/jupyter"
    own = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "HOME")}
    with (tmp_path / "said.txt").open("wb") as out:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "jupyter"), *command[1:]], cwd=ROOT, env=os.environ | own, stdout=out,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def asked(path: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"authorization": "token t"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "said.txt").read_text()
        try:
            asked("/api/status")
        except OSError:
            return False
        return True

    try:
        wait_for(answers, 90)
        assert b"JupyterLab" in asked("/lab")
        there = {entry["name"] for entry in json.loads(asked("/api/contents"))["content"]}
        assert {f"{name}.ipynb" for name in NAMES} <= there
        opened = json.loads(asked(f"/api/contents/{NAMES[0]}.py?type=notebook"))  # jupytext is at work in it
        assert [cell["cell_type"] for cell in opened["content"]["cells"]][:3] == ["markdown", "markdown", "code"]
        assert "python3" in json.loads(asked("/api/kernelspecs"))["kernelspecs"]
    finally:
        server.terminate()
        server.wait(20)
