"""Imports go one way, nothing in the product can execute data, and no file is two things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each folder may import of its siblings. The command line is the front door: any of them, inside its commands.
MAY = {
    "router_ml": set(),
    "features": {"router_ml"},
    "training": {"router_ml", "features"},
    "serving": {"router_ml", "features"},
}
OUTSIDE = {"benchmarks", "tests", "notebooks"}
EXECUTES = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_LINES = 350
PRODUCT = sorted(path for folder in MAY for path in (ROOT / folder).rglob("*.py"))
FRONT_DOOR = ROOT / "router_ml" / "cli.py"
ROOMS = ("advise", "catalog", "cost", "doctor", "evaluate", "import", "serve", "tradeoff", "tune", "rollout")
FRONT_DOORS = {FRONT_DOOR} | {ROOT / "router_ml" / f"{room}_cli.py" for room in ROOMS}


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node


def violations(path: Path, source: str, folder: str) -> list[str]:
    tree = ast.parse(source, str(path))
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    found = []
    for name, node in imports(tree):
        top = name.partition(".")[0]
        front_door = path in FRONT_DOORS and node in lazy
        if (top in set(MAY) - MAY[folder] - {folder} and not front_door) or top in OUTSIDE:
            found.append(f"line {node.lineno}: {folder} imports {name}")
        if top in UNPICKLES:
            found.append(f"line {node.lineno}: imports {name}, which executes what it loads")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called in EXECUTES or called == "torch.load" or called.endswith(".read_pickle"):
            found.append(f"line {call.lineno}: calls {called}")
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in call.keywords):
            found.append(f"line {call.lineno}: {called} with allow_pickle")
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(path, source, path.relative_to(ROOT).parts[0]) == []
    assert path.name != "utils.py", "name the file after what it does"
    assert source.count("\n") <= MAX_LINES, "the file is asking to be two things"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("router_ml", "import features.text"),
        ("router_ml", "def f():\n    from training import fit"),
        ("features", "from serving.app import create"),
        ("training", "import serving"),
        ("serving", "def f():\n    import training.fit"),
        ("serving", "from benchmarks import latency"),
        ("features", "import pickle"),
        ("training", "from joblib import load"),
        ("router_ml", "eval('1')"),
        ("training", "torch.load('x')"),
        ("features", "np.load(p, allow_pickle=True)"),
        ("features", "np.load(p, allow_pickle=trusted)"),
        ("features", "pd.read_pickle(p)"),
    ],
)
def test_the_rules_see_what_they_forbid(folder: str, source: str) -> None:
    assert len(violations(ROOT / folder / "x.py", source, folder)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (FRONT_DOOR, "def train():\n    from training.fit import fit"),
        (ROOT / "router_ml" / "x.py", "import numpy as np\nnp.load(p, allow_pickle=False)\nmodel.eval()"),
        (ROOT / "router_ml" / "x.py", "from router_ml.types import Message"),
    ],
)
def test_the_rules_let_the_rest_pass(path: Path, source: str) -> None:
    assert violations(path, source, "router_ml") == []


def test_the_front_door_imports_lazily() -> None:
    assert len(violations(FRONT_DOOR, "from training.fit import fit", "router_ml")) == 1
