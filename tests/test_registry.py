"""The registry on a real MLflow, SQLite and Postgres: versions, aliases, downloads, errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
import requests
import sqlalchemy as sa
from conftest import new_postgres
from mlflow import MlflowClient

from router_ml.addresses import redacted, shown
from router_ml.bundle import read_bundle, write_bundle
from router_ml.catalog import Catalog
from router_ml.errors import BundleError, InputError, RegistryError
from router_ml.registry import (
    ModelVersion,
    connect,
    download,
    ensure_store,
    enter,
    promote,
    reported,
    resolve,
    versions,
)
from training.report import publish
from training.tracking import register_bundle
from training.train import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/nested/mlflow.db"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on SQLite or on Postgres, where the experiment has to be told where files go."""
    if request.param == "sqlite":
        yield str(request.getfixturevalue("store"))
        return
    with new_postgres() as url:
        ensure_store(url)
        artifacts = tmp_path_factory.mktemp("registry") / "mlartifacts"
        connect(url).create_experiment("router-ml", artifact_location=artifacts.as_uri())
        yield url


def a_bundle(folder: Path, text: str = "one") -> Path:
    files = {"booster.txt": f"tree {text}\n".encode(), "outcomes.npz": bytes(range(256))}
    write_bundle(folder, {"log_sha256": "ab" * 32}, files)
    return folder


def register(store: str, bundle: Path, name: str, alias: str | None = "champion", auc: float = 0.7) -> ModelVersion:
    return register_bundle(bundle, tracking_uri=store, name=name, params={"seed": 0}, metrics={"auc": auc}, alias=alias)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_comes_back_as_it_went_in(
    either: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = a_bundle(tmp_path / "made")
    (tmp_path / "frontier.png").write_bytes(b"\x89PNG")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    made = register_bundle(
        bundle,
        tracking_uri=either,
        name="whole",
        params={"seed": 0, "encoder": "static"},
        metrics={"auc": 0.71, "per model": {"org/model:7b@x": 0.5, "none": float("nan")}, "note": "not a number"},
        plots=[tmp_path / "frontier.png"],
        tags={"team": "search"},
        alias="champion",
    )
    assert (made.name, made.version, made.alias, made.aliases) == ("whole", "1", "champion", ("champion",))
    assert resolve(either, "whole") == made
    assert contents(download(either, "whole", made.version, tmp_path / "got" / "1")) == contents(bundle)
    assert [p.name for p in (tmp_path / "got").iterdir()] == ["1"]

    assert made.run_id is not None
    run = connect(either).get_run(made.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "encoder": "static"}
    assert run.data.metrics == {"auc": 0.71, "per model/org_model_7b_x": 0.5}
    assert run.data.tags["team"] == "search"
    assert run.data.tags["log_sha256"] == made.tags["log_sha256"] == "ab" * 32
    assert [f.path for f in connect(either).list_artifacts(made.run_id, "plots")] == ["plots/frontier.png"]

    artifacts = Path(run.info.artifact_uri.removeprefix("file://").partition("/mlartifacts/")[0]) / "mlartifacts"
    if either.startswith("sqlite"):
        assert artifacts == Path(either.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert not [p for p in artifacts.rglob("*") if p.suffix in (".pkl", ".pickle", ".joblib")]
    assert list((tmp_path / "cwd").iterdir()) == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_promotion_keeps_the_previous_champion(either: str, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        register(either, a_bundle(tmp_path / text, text), "promoted", alias=None)
    with pytest.raises(RegistryError, match=r"no alias 'champion' .*none yet.*promote a version"):
        resolve(either, "promoted")
    assert promote(either, "promoted", "1").aliases == ("champion",)
    with pytest.raises(RegistryError, match="no alias 'previous'"):
        resolve(either, "promoted", "previous")
    promote(either, "promoted", "2")
    promote(either, "promoted", "2")
    assert (resolve(either, "promoted").version, resolve(either, "promoted", "previous").version) == ("2", "1")
    promote(either, "promoted", "3", alias="challenger")
    assert (resolve(either, "promoted").version, resolve(either, "promoted", "previous").version) == ("2", "1")
    promote(either, "promoted", resolve(either, "promoted", "previous").version)
    assert (resolve(either, "promoted").version, resolve(either, "promoted", "previous").version) == ("1", "2")
    fetched = download(either, "promoted", "3", tmp_path / "fetched")
    assert (fetched / "booster.txt").read_text() == "tree three\n"


def test_the_first_version_enters_as_champion_and_two_at_once_make_one(either: str, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        register(either, a_bundle(tmp_path / text, text), "entered", alias=None)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda version: enter(either, "entered", version), "123"))
    assert sorted(str(version.alias) for version in made) == ["challenger", "challenger", "champion"]
    (champion,) = (version for version in made if version.alias == "champion")
    assert resolve(either, "entered").version == champion.version


def test_a_registry_that_fails_for_a_moment_makes_no_champion(
    store: str, tmp_path: Path, tiny_log: pl.DataFrame, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look-up of the champion fails as a database does that is locked; all others are the real ones."""
    made = train(tiny_log, catalog, out=tmp_path / "bundle", encoder="lexical")
    first = publish(made, tmp_path / "bundle", tracking_uri=store, name="moment")
    assert first.alias == "champion"
    look, failures = MlflowClient.get_registered_model, [OSError("database is locked")]

    def once(self: MlflowClient, name: str) -> object:
        if failures:
            raise failures.pop()
        return look(self, name)

    monkeypatch.setattr(MlflowClient, "get_registered_model", once)
    with pytest.raises(RegistryError, match="database is locked"):
        publish(made, tmp_path / "bundle", tracking_uri=store, name="moment")
    assert failures == [] and resolve(store, "moment").version == "1"
    assert publish(made, tmp_path / "bundle", tracking_uri=store, name="moment").alias == "challenger"
    with pytest.raises(InputError, match=r"has a champion, version 1.*router-ml promote moment"):
        publish(made, tmp_path / "bundle", tracking_uri=store, name="moment", alias="champion")
    assert resolve(store, "moment").version == "1"


def test_versions_are_listed_newest_first_with_what_is_known_of_them(either: str, tmp_path: Path) -> None:
    register(either, a_bundle(tmp_path / "a"), "listed", alias="champion", auc=0.6)
    register(either, a_bundle(tmp_path / "b", "two"), "listed", alias="challenger", auc=0.8)
    newest, oldest = versions(either, "listed")
    assert (newest.version, newest.aliases, newest.metrics) == ("2", ("challenger",), {"auc": 0.8})
    assert (oldest.version, oldest.aliases, oldest.metrics) == ("1", ("champion",), {"auc": 0.6})
    assert newest.tags["bundle_version"] == read_bundle(tmp_path / "b").version != oldest.tags["bundle_version"]


def test_a_download_replaces_a_bundle_whole_and_nothing_else(either: str, tmp_path: Path) -> None:
    register(either, a_bundle(tmp_path / "a"), "replaced")
    to = a_bundle(tmp_path / "here" / "current", "old")
    assert contents(download(either, "replaced", "1", to)) == contents(tmp_path / "a")
    assert [p.name for p in to.parent.iterdir()] == ["current"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a bundle, or not only that: choose another folder"):
        download(either, "replaced", "1", precious)
    assert contents(precious) == {"notes.txt": b"mine"}


def test_a_broken_version_is_reported_and_the_bundle_in_place_stays(store: str, tmp_path: Path) -> None:
    made = register(store, a_bundle(tmp_path / "broken-source"), "broken")
    model = Path(made.source.removeprefix("file://"))
    (manifest,) = model.rglob("manifest.json")
    manifest.unlink()
    to = a_bundle(tmp_path / "here" / "current", "good")
    before = contents(to)
    with pytest.raises(RegistryError, match=r"holds no bundle.*router-ml train --register broken"):
        download(store, "broken", "1", to)
    (model / "MLmodel").unlink()
    with pytest.raises(RegistryError, match="did not answer as it should"):
        download(store, "broken", "1", to)
    assert contents(to) == before
    assert [p.name for p in to.parent.iterdir()] == ["current"]


def test_a_model_of_another_make_is_not_taken_for_a_bundle(store: str, tmp_path: Path) -> None:
    register(store, a_bundle(tmp_path / "a"), "foreign")
    client = connect(store)
    (tmp_path / "MLmodel").write_text("flavors:\n  sklearn: {}\n")
    (experiment,) = [e for e in client.search_experiments() if e.name == "router-ml"]
    run = client.create_run(experiment.experiment_id)
    client.log_artifact(run.info.run_id, str(tmp_path / "MLmodel"), "model")
    client.create_model_version("foreign", f"{run.info.artifact_uri}/model", run.info.run_id)
    with pytest.raises(RegistryError, match="version 2 of 'foreign' was not made by router-ml"):
        download(store, "foreign", "2", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_is_not_there_is_named_with_what_is(either: str, tmp_path: Path) -> None:
    register(either, a_bundle(tmp_path / "a"), "known")
    with pytest.raises(RegistryError, match=r"no model 'unknown' is registered .*known.*router-ml train --register"):
        resolve(either, "unknown")
    with pytest.raises(RegistryError, match="no model 'unknown'"):
        versions(either, "unknown")
    with pytest.raises(RegistryError, match=r"no alias 'shadow' \(it has: champion\)"):
        resolve(either, "known", "shadow")
    for version in ("7", "latest"):
        with pytest.raises(RegistryError, match=rf"no version '{version}' \(it has: 1\)"):
            promote(either, "known", version)
        with pytest.raises(RegistryError, match=f"no version '{version}'"):
            download(either, "known", version, tmp_path / "to")
    assert resolve(either, "known").version == "1"


def test_reading_a_mistyped_path_makes_no_database(tmp_path: Path) -> None:
    for call in (resolve, versions):
        with pytest.raises(RegistryError, match=r"no model registry at .*register a bundle first"):
            call(f"sqlite:///{tmp_path}/typo/mlflow.db", "router")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "mlflow.db", "sqlite:///:memory:", "sqlite://"])
def test_a_store_that_cannot_hold_a_registry_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (ensure_store, lambda u: resolve(u, "router")):
        with pytest.raises(RegistryError, match=r"cannot hold a model registry: use .*sqlite:///mlflow\.db"):
            call(uri)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_said_soon() -> None:
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:9 did not answer.*check that the tracking URI"):
        resolve("http://127.0.0.1:9", "router")
    assert time.monotonic() - began < 30


def test_an_error_shows_no_password() -> None:
    with pytest.raises(RegistryError, match="did not answer") as caught:
        ensure_store("postgresql+psycopg://me:hush@127.0.0.1:9/mlflow")
    assert "://***@127.0.0.1:9/mlflow" in str(caught.value) and "hush" not in str(caught.value)


def test_a_server_that_is_away_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"http://\*\*\*@127\.0\.0\.1:9 did not answer") as caught:
        resolve("http://user:SECRET@127.0.0.1:9", "router")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://SECRET@127.0.0.1:9",
        "http://user:SEC%2FRET@127.0.0.1:9",
        "http://127.0.0.1:9?token=SECRET",
        "postgresql+psycopg://u:pa/SECRET@127.0.0.1:9/db",
        "postgresql+psycopg://127.0.0.1:9/db?user=u&password=SECRET",
        "postgresql+psycopg://127.0.0.1:9/db?no_option=1&sslpassword=SECRET",
        "mysql+none://u:SECRET@127.0.0.1:9/db",
    ],
)
def test_no_way_to_write_a_secret_shows_it(address: str) -> None:
    """With what requests, SQLAlchemy and libpq themselves say of an address that cannot be reached."""
    with pytest.raises(RegistryError) as caught, reported(address):
        requests.get(address, timeout=5) if address.startswith("http") else sa.create_engine(address).connect()
    assert "SECRET" not in str(caught.value) and "SEC/RET" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("postgresql://u:pa/SECRET@h/db", "postgresql://***@h/db"),
        ("postgresql://u:p@SECRET@h/db", "postgresql://***@h/db"),
        ("postgresql://u:p?SECRET#@h/db", "postgresql://***@h/db"),
        ("postgresql://h:5432/db?user=u&password=a@SECRET&sslmode=require", "postgresql://h:5432/db?user=u&password=***&sslmode=require"),
        ("postgresql://h/db?PassWD=SECRET&pwd=SECRET&secret=SECRET&key=SECRET&api_key=SECRET", "postgresql://h/db?PassWD=***&pwd=***&secret=***&key=***&api_key=***"),
        ("https://SECRET@mlflow.example/a@b", "https://***@mlflow.example/a@b"),
        ("sqlite:////home/a@b/c:d@e/mlflow.db", "sqlite:////home/a@b/c:d@e/mlflow.db"),
        ("http://127.0.0.1:5000/x?experiment=1", "http://127.0.0.1:5000/x?experiment=1"),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets_alone(address: str, seen: str) -> None:
    assert shown(address) == seen
    assert redacted(f"GET {address} of h\n failed", address) == f"GET {seen} of h failed"


def test_a_secret_that_a_library_quotes_by_itself_is_not_shown() -> None:
    said = redacted("no such user, or hush/hush is wrong; hush%2Fhush", "postgresql://me:hush%2Fhush@h/db")
    assert said == "no such user, or *** is wrong; ***"


def test_a_file_that_is_no_database_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("these are notes, and not a database\n" * 100)
    before = (tmp_path / "notes.db").read_bytes()
    with pytest.raises(RegistryError, match="did not answer as it should"):
        ensure_store(f"sqlite:///{tmp_path}/notes.db")
    assert (tmp_path / "notes.db").read_bytes() == before


def test_without_a_whole_bundle_nothing_is_registered(store: str, tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "a")
    (bundle / "booster.txt").write_text("tree two\n")
    with pytest.raises(BundleError, match=r"booster\.txt does not match its hash"):
        register(store, bundle, "nothing")
    with pytest.raises(BundleError, match="no bundle at"):
        register(store, tmp_path / "absent", "nothing")
    ensure_store(store)
    with pytest.raises(RegistryError, match="no model 'nothing'"):
        resolve(store, "nothing")


def test_a_registration_that_fails_makes_no_version_and_says_so_in_its_run(store: str, tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "a")
    register(store, bundle, "failing")
    with pytest.raises(RegistryError, match=r"could not be registered.*absent\.png"):
        register_bundle(
            bundle,
            tracking_uri=store,
            name="failing",
            params={},
            metrics={},
            plots=[tmp_path / "absent.png"],
            tags={"which": "the failing one"},
            alias="champion",
        )
    assert [v.version for v in versions(store, "failing")] == ["1"]
    assert resolve(store, "failing").version == "1"
    client = connect(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.which = 'the failing one'")
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_processes_that_first_use_a_store_at_once_all_succeed(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = (
        "import pathlib, sys, time, mlflow\n"
        "from router_ml.registry import ensure_store\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        "ensure_store(sys.argv[3])\n"
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db" if backend == "sqlite" else request.getfixturevalue("postgres_url")
    processes = []
    for i in range(2):
        command = [sys.executable, "-c", script, str(tmp_path / f"ready{i}"), str(tmp_path / "go"), uri]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    output = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    assert connect(uri).search_registered_models() == []


def test_mlflow_is_loaded_only_when_it_is_used() -> None:
    script = "import sys, router_ml.registry; sys.exit('mlflow' in sys.modules or 'filelock' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_without_mlflow_the_error_says_how_to_get_it(store: str, tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['mlflow'] = None\n"
        "from router_ml.registry import resolve\n"
        "from router_ml.errors import RegistryError\n"
        "try: resolve(sys.argv[1], 'router')\n"
        "except RegistryError as error: print(error)\n"
    )
    ensure_store(store)
    done = subprocess.run([sys.executable, "-c", script, store], capture_output=True, text=True, timeout=60)
    assert "pip install 'router-ml[train]'" in done.stdout, done.stderr
