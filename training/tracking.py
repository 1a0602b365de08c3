"""Puts a trained bundle into MLflow: one run that says where it came from, and one registered version."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_ml.addresses import shown
from router_ml.bundle import read_bundle
from router_ml.errors import RegistryError
from router_ml.registry import BUNDLE, ModelVersion, connect, ensure_store, promote, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What the model needs where a data scientist loads it: this project (the code is in it) and what it predicts with.
_REQUIREMENTS = ("router-ml", "lightgbm", "numpy", "pandas")
_MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
_ARTIFACT = "router"


def register_bundle(
    bundle_dir: Path,
    *,
    tracking_uri: str,
    name: str,
    experiment: str = "router-ml",
    params: Mapping[str, Any],
    metrics: Mapping[str, Any],
    plots: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    alias: str | None = None,
) -> ModelVersion:
    """Logs one MLflow run with the bundle and registers it as a new version of `name`; `alias` then points to it.

    The run holds `params`, `metrics` (finite numbers; nested mappings are joined with a slash), the files `plots`, and
    the training log's hash and the bundle's version as tags, which the registered version carries too. The bundle is
    the artifact of an `mlflow.pyfunc` model that is logged from code, so nothing is pickled. On a SQLite store a new
    experiment keeps its artifacts beside the database, in `mlartifacts`.

    Raises BundleError for a bundle that does not match its hashes, RegistryError when the store cannot take it; the
    run is then marked as failed, no version is made and no alias moves.
    """
    bundle = read_bundle(bundle_dir)
    ensure_store(tracking_uri)
    client = connect(tracking_uri)
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    provenance = {"bundle_version": bundle.version} | {
        key: str(bundle.manifest[key]) for key in ("log_sha256", "format") if key in bundle.manifest
    }
    try:
        run = client.create_run(_experiment(client, tracking_uri, experiment), run_name=f"{name}-{bundle.version}")
        run_id, now = run.info.run_id, run.info.start_time
        try:
            logged = [Metric(key, value, now, 0) for key, value in _numbers(metrics)]
            for start in range(0, len(logged), 1000):  # MLflow's limit for one batch
                client.log_batch(run_id, logged[start : start + 1000])
            for key, value in params.items():
                client.log_param(run_id, _key(key), value)
            for key, value in (dict(tags or {}) | provenance).items():
                client.set_tag(run_id, key, value)
            for plot in plots:
                client.log_artifact(run_id, str(plot), "plots")
            with tempfile.TemporaryDirectory(prefix="router-ml-") as scratch, _quiet():
                model = _save(Path(bundle_dir), Path(scratch) / _ARTIFACT)
                client.log_artifacts(run_id, str(model), _ARTIFACT)
            version = _create_version(client, name, f"{run.info.artifact_uri}/{_ARTIFACT}", run_id, provenance)
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RegistryError(f"{bundle_dir} could not be registered in {shown(tracking_uri)}: {reason}") from error
    made = ModelVersion(
        name=name,
        version=version,
        run_id=run_id,
        source=f"{run.info.artifact_uri}/{_ARTIFACT}",
        tags=provenance,
        metrics=dict(_numbers(metrics)),
    )
    return promote(tracking_uri, name, version, alias) if alias else made


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        if database is None and not uri.startswith(("http://", "https://")):
            # A database that is used without a server would put the artifacts into the current folder.
            raise RegistryError(
                f"{shown(uri)} has no experiment {name!r}, and a database alone does not say where files go: make it "
                f"first, mlflow experiments create -n {name} --artifact-location URI"
            )
        location = (database.resolve().parent / "mlartifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was first
    assert found is not None
    if found.lifecycle_stage != "active":
        raise RegistryError(
            f"experiment {name!r} in {shown(uri)} is deleted: restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or name another one"
        )
    return str(found.experiment_id)


def _save(bundle_dir: Path, to: Path) -> Path:
    import mlflow.pyfunc

    requirements = []
    for package in _REQUIREMENTS:
        try:
            requirements.append(f"{package}=={installed_version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    mlflow.pyfunc.save_model(
        path=str(to),
        python_model=str(_MODEL_CODE),
        artifacts={BUNDLE: str(bundle_dir.resolve())},
        pip_requirements=requirements,
    )
    return to


def _create_version(client: MlflowClient, name: str, source: str, run_id: str, tags: dict[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, source=source, run_id=run_id, tags=tags).version)


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        key = f"{prefix}{_key(name)}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{key}/")
        elif hasattr(value, "__float__") and not isinstance(value, str) and math.isfinite(float(value)):
            yield key, float(value)


def _key(name: str) -> str:
    """The name with what MLflow does not take in keys (model ids may have it) made an underscore."""
    return re.sub(r"[^\w\-. ]", "_", name) or "_"


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow asks for type hints and input examples while it saves; the model checks its own input."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
