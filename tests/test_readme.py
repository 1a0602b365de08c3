"""What the documents say is true: files, commands, options, targets, links, examples and the answers they show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import PROGRAMS, ROOT, mistakes, options
from live_service import running
from small_demo import Demo, small_demo

from router_ml.catalog import Catalog
from router_ml.logs import LOG_SCHEMA, REQUIRED, read_log
from router_ml.policy import Policy
from training.outcomes import import_outcomes
from training.world import SIMULATED_CATALOG

README, GATEWAY, FORMATS, OWNER = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/gateway-engineer.md", "docs/formats.md", "docs/product-owner.md")
)
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/README.md", "deploy/README.md")
] + sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("router_ml", "features", "training", "serving", "benchmarks")
BY_NAME = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
_PROGRAM = re.compile(rf"(?:\.venv/bin/)?((?:{'|'.join(map(re.escape, PROGRAMS))}|make)\b.*)")


def fenced(text: str, language: str | None = None) -> list[str]:
    """The contents of the fenced code blocks, of one language or of all."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if language in (None, name)]


def shown_commands(text: str) -> Iterator[str]:
    """The command lines in code blocks, fenced or indented, in their order."""
    in_fence = False
    for line in text.replace("\\\n", " ").splitlines():
        in_fence ^= line.startswith("```")
        found = _PROGRAM.match(line.strip().removeprefix("$ "))
        if found and (in_fence or line.startswith("    ")):
            yield found[1]


def spoken_code(text: str) -> list[str]:
    """The code spans in running text, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]


@BY_NAME
def test_every_command_and_option_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    wrong = {line: found for line in shown_commands(text) if (found := mistakes(line))}
    for span in spoken_code(text):
        line = _PROGRAM.fullmatch(span)
        if line and (found := mistakes(line[1].replace("…", "x"), whole=False)):
            wrong[span] = found
        elif span.startswith("--") and span.split()[0] not in options():
            wrong[span] = ["no command has this option"]
    assert wrong == {}


@BY_NAME
def test_every_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith("#")]
    assert [t for t in local if not (path.parent / t).exists()] == []


@BY_NAME
def test_every_file_that_is_named_exists(path: Path) -> None:
    spans = spoken_code(path.read_text(encoding="utf-8"))
    named = {
        s for s in spans if re.fullmatch(rf"(?:{'|'.join(FOLDERS)}|docs|tests|notebooks|deploy)/[\w/.-]*(?:\.\w+|/)", s)
    }
    assert [s for s in sorted(named) if not (ROOT / s).exists()] == []


def test_the_readme_begins_with_the_two_commands() -> None:
    first = list(shown_commands(README))[:2]
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]
    assert README.index("make demo") < 900


def file_map() -> set[str]:
    """The paths that the README's file map lists, folders with a slash at the end."""
    (block,) = (body for body in fenced(README.partition("## Files")[2], "text") if body.startswith("router_ml/"))
    paths, folder = set(), ""
    for line in block.splitlines():
        name, _, what = line.strip().partition(" ")
        assert what.strip(), f"{name} has no line of its own"
        if not line.startswith(" "):
            folder = name
        paths.add(name if name == folder else folder + name)
    return paths


def modules() -> set[str]:
    """The project's Python files: those in git, or on disk where there is no git."""
    git = shutil.which("git")
    listed = subprocess.run([git, "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True) if git else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        files = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    else:
        files = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {f.as_posix() for f in files if f.parts[0] in FOLDERS and f.name != "__init__.py"}


def test_the_file_map_is_true() -> None:
    listed = file_map()
    assert sorted(modules() - listed) == [], "not in the README's file map"
    assert sorted(path for path in listed if not (ROOT / path).exists()) == [], "in the file map and not on disk"
    assert {f"{folder}/" for folder in (*FOLDERS, "notebooks", "tests", "docs")} <= listed


def test_the_columns_of_the_log_are_those_of_the_schema() -> None:
    (table,) = re.findall(r"\| columns \|.*\n((?:\|.*\n)+)", FORMATS)
    first_cells = [line.split("|")[1] for line in table.splitlines()[1:]]
    columns = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(columns) == sorted(LOG_SCHEMA)
    assert set(re.findall(r"`(\w+)`", first_cells[0])) == set(REQUIRED)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory)


def test_the_outcome_matrix_of_the_formats_imports(tmp_path: Path) -> None:
    (matrix,) = fenced(FORMATS, "csv")
    catalog = Catalog.from_json(json.loads(next(b for b in fenced(FORMATS, "json") if b.startswith('{"models"'))))
    (tmp_path / "outcomes.csv").write_text(matrix)
    summary = import_outcomes(tmp_path / "outcomes.csv", catalog, out=tmp_path / "logs")
    assert (summary.rows, summary.rejected) == (4, 0)
    log = read_log(tmp_path / "logs")
    assert (
        log["quality"].sum() == 3 and log["cost_usd"].null_count() == 0 and set(log["task"]) == {"geography", "maths"}
    )


def test_the_policy_and_the_answers_that_are_shown(demo: Demo, tmp_path: Path) -> None:
    (toml,) = fenced(GATEWAY, "toml")
    (tmp_path / "policy.toml").write_text(toml)
    policy = Policy.load(tmp_path / "policy.toml").check_models(SIMULATED_CATALOG)
    asked, told = (json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", GATEWAY, re.DOTALL)[:2])
    shown = json.loads(next(b for b in fenced(GATEWAY, "json") if '"decision_id"' in b))
    with running(demo.out / "bundle", tmp_path / "store.db", policy=tmp_path / "policy.toml") as service:
        answer = service.http.post("/route", json=asked)
        assert answer.status_code == 200, answer.text
        got = answer.json()
        receipt = service.http.post("/outcomes", json=told | {"decision_id": got["decision_id"]})
        assert receipt.status_code == 200, receipt.text
        assert service.service.store.flush()
        (row,) = (row for row in service.service.store.iter_log_rows() if row["quality"] is not None)
    assert list(got) == list(shown)
    for text in (README, GATEWAY):
        found = json.loads(next(b for b in fenced(text, "json") if '"decision_id"' in b))
        assert set(found) <= set(got) and found["excluded"] == got["excluded"]
        assert {c["model"] for c in found["candidates"]} == {c["model"] for c in got["candidates"]}
        assert got["min_probability"] == found["min_probability"] == policy.tiers["premium"]
    assert got["policy_version"] == shown["policy_version"] == policy.version
    assert row["output_tokens"] == told["output_tokens"] and row["quality_source"] == told["quality_source"]
    rate = policy.exploration_rate
    assert shown["propensity"] == pytest.approx(1 - rate + rate / len(shown["candidates"]))


def test_the_policies_that_a_product_owner_is_shown(demo: Demo, tmp_path: Path) -> None:
    (toml,) = fenced(OWNER, "toml")
    (tmp_path / "policy.toml").write_text(toml)
    assert Policy.load(tmp_path / "policy.toml").check_models(SIMULATED_CATALOG).rules
    (put,) = (json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", OWNER, re.DOTALL))
    with running(demo.out / "bundle", tmp_path / "store.db") as service:
        before = service.http.get("/policy").headers["etag"]
        said = service.http.put("/policy", json=put, headers={"if-match": before})
        assert said.status_code == 200 and said.json()["policy"].items() >= put.items()


def test_the_metrics_and_fields_that_are_named_exist(demo: Demo, tmp_path: Path) -> None:
    from serving.schemas import RouteBody

    (said,) = re.findall(r"The fields of the body are (.*?)\.\n", GATEWAY, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", said))
    assert named <= set(RouteBody.model_fields) and len(named) > 15
    with running(demo.out / "bundle", tmp_path / "store.db", challenger=demo.out / "bundle") as service:
        exposed = service.http.get("/metrics").text
    metrics = set(re.findall(r"`(router_\w+)`", GATEWAY)) - {"router_ml", "router_registry_up"}
    assert sorted(name for name in metrics if f"# TYPE {name} " not in exposed) == []
