"""docs/api.md and docs/cli.md say what the service and the command line say now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from command_lines import ROOT, commands
from live_service import running

REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"), run_name="reference")


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_a_page_is_what_the_code_says_now(name: str) -> None:
    said = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert said == REFERENCE["PAGES"][name](), f"docs/{name} has drifted: run 'make docs', and commit what it writes"


def test_the_openapi_is_the_one_that_a_service_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db") as service:
        assert service.http.get("/openapi.json").json() == REFERENCE["openapi"]()


def test_every_endpoint_field_and_command_is_there() -> None:
    api, cli = (REFERENCE["PAGES"][name]() for name in ("api.md", "cli.md"))
    found = REFERENCE["openapi"]()
    for path, methods in found["paths"].items():
        for method in methods:
            assert f"\n## {method.upper()} {path}\n" in api
    for name in ("RouteBody", "RouteAnswer", "CandidateAnswer", "OutcomeBody", "ExplanationAnswer", "ReadyAnswer"):
        section = api.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert all(f"| `{field}` |" in section for field in found["components"]["schemas"][name]["properties"])
    for name, _ in commands():
        section = cli.partition(f"\n### router-ml {name}\n")[2].partition("\n### ")[0]
        assert f"Usage: router-ml {name} " in section and f"Example: router-ml {name}" in section
