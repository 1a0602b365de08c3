"""What every test shares: a quiet, deterministic environment, the real outcome data, and the rule on skipped tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Set before any test imports numpy, torch or mlflow: each reads these once, at import.
for _name, _value in {
    "OMP_NUM_THREADS": "2",
    "OPENBLAS_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402  (it imports plugins, which may import any of them)

if TYPE_CHECKING:
    from router_ml.catalog import Catalog

SKIPS = Path(__file__).with_name("skips.txt")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of published outcomes: `ROUTER_ML_DATA`, else `../shared/data` beside the project."""
    named = os.environ.get("ROUTER_ML_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "mmlu_pro.parquet").is_file():
        message = (
            f"needs the published outcomes, and {folder} has no mmlu_pro.parquet (ROUTER_ML_DATA names the folder)"
        )
        pytest.fail(message) if named else pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Four models, one of each tier, that differ in price, window, capabilities and clearances."""
    from router_ml.catalog import Catalog

    return Catalog.from_json(
        {
            "models": [
                {
                    "id": "frontier",
                    "provider": "acme",
                    "tier": "frontier-closed",
                    "input_usd_per_mtok": 5.0,
                    "output_usd_per_mtok": 15.0,
                    "context_window": 200_000,
                    "capabilities": ["tools", "vision", "json"],
                    "regions": ["us"],
                },
                {
                    "id": "mid",
                    "provider": "acme",
                    "tier": "mid-closed",
                    "input_usd_per_mtok": 0.5,
                    "output_usd_per_mtok": 2.0,
                    "context_window": 128_000,
                    "capabilities": ["tools", "json"],
                    "regions": ["us", "eu"],
                },
                {
                    "id": "hosted",
                    "provider": "nimbus",
                    "tier": "hosted-open",
                    "input_usd_per_mtok": 0.2,
                    "output_usd_per_mtok": 0.6,
                    "context_window": 32_768,
                    "capabilities": ["json"],
                    "regions": ["eu"],
                },
                {
                    "id": "local",
                    "provider": "self",
                    "tier": "self-hosted-open",
                    "input_usd_per_mtok": 0.05,
                    "output_usd_per_mtok": 0.1,
                    "context_window": 8_192,
                    "regions": ["eu"],
                    "data_classes": ["public", "internal", "confidential"],
                },
            ]
        },
        "the tests' catalogue",
    )


def _strict() -> bool:
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("CI", "ROUTER_ML_STRICT_SKIPS"))


def _listed() -> set[str]:
    lines = (line.partition("#")[0].strip() for line in SKIPS.read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line}


class StrictSkips:
    """Fails the run on a test, or a whole module, that was skipped or xfailed without being named in skips.txt.

    A line there is a node id; without its `[parameters]` it stands for all of a test's cases.
    """

    def __init__(self) -> None:
        self.unlisted: list[str] = []
        self.listed = _listed()

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not {report.nodeid, report.nodeid.partition("[")[0]} & self.listed:
            self.unlisted.append(report.nodeid)

    pytest_runtest_logreport = _note
    pytest_collectreport = _note

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skipped, and not named in tests/skips.txt: the run fails", red=True)
            for nodeid in self.unlisted:
                terminalreporter.line(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    if _strict():
        config.pluginmanager.register(StrictSkips(), "strict-skips")
