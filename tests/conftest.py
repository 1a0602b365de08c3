"""What every test shares: a quiet, deterministic environment, the real outcome data, and the rule on skipped tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before any test imports numpy, torch or mlflow: each reads these once, at import.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402  (it imports plugins, which may import any of them)

if TYPE_CHECKING:
    import polars as pl

    from router_ml.catalog import Catalog
    from training.train import Training

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
def litellm_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new venv that has LiteLLM at its own pins."""
    import subprocess
    import sys
    import venv

    folder = tmp_path_factory.mktemp("litellm") / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [
            *pip,
            "--no-compile",
            "--no-deps",
            "-r",
            str(Path(__file__).parents[1] / "tests" / "litellm-requirements.txt"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A new, empty Postgres database; where none can be made the test is skipped, which CI lets fail."""
    with new_postgres() as url:
        yield url


@contextlib.contextmanager
def new_postgres() -> Iterator[str]:
    """The URL of a new, empty database of the Postgres at 127.0.0.1:5432 (`ROUTER_ML_POSTGRES` names another)."""
    import uuid

    import sqlalchemy as sa

    base = os.environ.get("ROUTER_ML_POSTGRES") or "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
    server = sa.create_engine(base, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"router_ml_{uuid.uuid4().hex}"
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f"create database {name}")
    except sa.exc.OperationalError as error:
        message = f"needs a Postgres that lets it make databases: {error.orig}"
        pytest.fail(message) if "ROUTER_ML_POSTGRES" in os.environ else pytest.skip(message)
    try:
        yield sa.make_url(base).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f"drop database {name} with (force)")
        server.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new store, of either kind: a test that takes it runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new folder/store.db"
    monkeypatch.chdir(tmp_path)  # where its spool will be
    return str(request.getfixturevalue("postgres_url"))


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


def _tiny_log_rows(catalog: Catalog) -> Iterator[dict[str, Any]]:
    """Easy questions that every model answers, and hard ones that only the dearer models do; all models are asked."""
    import numpy as np

    rng = np.random.default_rng(5)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    skill = {"frontier": 0.95, "mid": 0.75, "hosted": 0.5, "local": 0.3}
    nouns = ["river", "stone", "cloud", "engine", "ledger", "market", "protein", "theorem", "tensor", "violin", "comet"]
    for i in range(240):
        hard = i % 2 == 1
        topic = " ".join(rng.choice(nouns, 4))
        prompt = (
            f"Prove rigorously that the {topic} operator is bounded." if hard else f"What is the plural of {topic}?"
        )
        for model in catalog.ids:
            yield {
                "request_id": f"r{i}",
                "time": start + timedelta(minutes=i),
                "prompt": prompt,
                "candidates": list(catalog.ids),
                "model": model,
                "provider": catalog[model].provider,
                "propensity": 1.0,
                "policy_version": "full",
                "input_tokens": len(prompt) // 4,
                "output_tokens": int(rng.integers(20, 60)) * (10 if hard else 1),
                "status": "ok",
                "retries": 0,
                "quality": float(rng.random() < (skill[model] if hard else 0.95)),
                "quality_source": "test",
            }


@pytest.fixture(scope="session")
def tiny_log(catalog: Catalog) -> pl.DataFrame:
    """A request log of 240 prompts with the outcomes of all four models."""
    import polars as pl

    from router_ml.logs import LOG_SCHEMA

    return pl.DataFrame(list(_tiny_log_rows(catalog)), schema=LOG_SCHEMA)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really trained bundle, with the lexical encoder. It is shared: copy it before you change it."""
    import numpy as np

    from features.load import save_router
    from features.neighbours import newest
    from router_ml.logs import log_sha256
    from training.dataset import build_dataset
    from training.fit import fit

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    data = build_dataset(tiny_log, catalog)
    learned = fit(data, encoder="lexical")
    manifest = {"quality_threshold": 0.5, "log_sha256": log_sha256(tiny_log), "metrics": {}}
    embeddings = learned.embeddings(np.arange(len(data)))
    save_router(out, learned.estimator, manifest, newest(data.ids, embeddings, data.quality))
    return out


@pytest.fixture(scope="session")
def transformer_training(
    tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Training, Path]:
    """A training on half of the tiny log with the transformer, and the bundle it wrote, which holds a twin."""
    from training.train import train

    out = tmp_path_factory.mktemp("transformer") / "bundle"
    return train(tiny_log.head(4 * 120), catalog, out=out, encoder="transformer", holdout=0.0), out


@pytest.fixture(scope="session")
def transformer_bundle(transformer_training: tuple[Training, Path]) -> Path:
    """A bundle with a transformer and its twin. It is shared: copy it before you change it."""
    return transformer_training[1]


@pytest.fixture(scope="session")
def sparse_bundle(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained bundle that knows "local" well, ten rows of "frontier", ten successes of "hosted", no "mid"."""
    import polars as pl

    from features.load import save_router
    from training.dataset import build_dataset
    from training.fit import fit

    ten = [pl.col("model") == "frontier", (pl.col("model") == "hosted") & (pl.col("quality") == 1.0)]
    log = pl.concat([tiny_log.filter(pl.col("model") == "local"), *(tiny_log.filter(rows).head(10) for rows in ten)])
    out = tmp_path_factory.mktemp("bundle") / "sparse"
    save_router(out, fit(build_dataset(log, catalog), encoder="lexical").estimator, {"quality_threshold": 0.5})
    return out


@dataclass(frozen=True)
class Contest:
    """A simulated log, and two bundles: one that knows its first part, and one that held its newest part out."""

    log: pl.DataFrame
    folder: Path

    @property
    def champion(self) -> Path:
        return self.folder / "champion"

    @property
    def challenger(self) -> Path:
        return self.folder / "challenger"


@pytest.fixture(scope="session")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    """Two bundles that were trained on the same traffic, the challenger on more of it. Shared: copy before changing."""
    from router_ml.logs import read_log
    from training.simulate import simulate
    from training.train import train
    from training.world import SIMULATED_CATALOG

    folder = tmp_path_factory.mktemp("contest")
    simulate(4000, folder / "logs", logging="uniform", feedback_rate=0.8, seed=3)
    log = read_log(folder / "logs")
    train(log.head(1200), SIMULATED_CATALOG, out=folder / "champion", encoder="lexical", holdout=0.0)
    train(log, SIMULATED_CATALOG, out=folder / "challenger", encoder="lexical", holdout=0.6)
    return Contest(log, folder)
