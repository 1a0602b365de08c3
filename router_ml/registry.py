"""Versions of bundles and their aliases in MLflow: thin functions over its client, with errors that say what to do.

MLflow is imported inside the functions alone: a process that only routes never loads it. Versions are named by aliases
(stages are deprecated since MLflow 2.9); `models:/NAME@champion` is the version that serves.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_ml.addresses import redacted, shown
from router_ml.bundle import MANIFEST, check_replaceable, swap
from router_ml.errors import NoAliasError, NotRegisteredError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowModelVersion

CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"
# The key of the bundle among an MLflow model's artifacts.
BUNDLE = "bundle"
_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One immutable version of a registered bundle. `alias` is the one that it was resolved by."""

    name: str
    version: str
    run_id: str | None
    source: str
    alias: str | None = None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def ensure_store(uri: str) -> None:
    """Creates the store behind `uri`, or brings its schema up to date; does nothing more where it is ready.

    Processes that use a new store at once would each run the schema migration over the other's tables, so one does it
    under a lock (SQLite: a file beside the database; Postgres: an advisory one) and the rest wait.
    Raises RegistryError.
    """
    with reported(uri), locked(uri):
        _client(uri).search_experiments(max_results=1)


def resolve(uri: str, name: str, alias: str = CHAMPION) -> ModelVersion:
    """The version of `name` that `alias` points to now. Raises RegistryError for an unknown name or alias."""
    client = _open(uri)
    with reported(uri):
        model = registered(client, uri, name)
        if alias not in model.aliases:
            known = ", ".join(sorted(model.aliases)) or "none yet"
            raise NoAliasError(
                f"model {name!r} in {shown(uri)} has no alias {alias!r} (it has: {known}): "
                f"promote a version to it first, or name another alias"
            )
        return _version(client, uri, name, str(model.aliases[alias]), alias)


def versions(uri: str, name: str) -> list[ModelVersion]:
    """Every version of `name`, the newest first, with its aliases, tags and its run's metrics. Raises RegistryError."""
    client = _open(uri)
    with reported(uri):
        registered(client, uri, name)
        found: list[MlflowModelVersion] = []
        token = None
        while True:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            found += page
            token = page.token
            if not token:
                break
        # A search leaves the aliases out, a look-up of the one version has them.
        numbers = sorted((int(v.version) for v in found), reverse=True)
        return [_version(client, uri, name, str(number), None, metrics=True) for number in numbers]


def promote(uri: str, name: str, version: str, alias: str = CHAMPION) -> ModelVersion:
    """Points `alias` at `version` in one step; readers see the old version or the new one, never none.

    The version that was champion until then stays reachable under the alias `previous`. Raises RegistryError.
    """
    client = _open(uri)
    with reported(uri), locked(uri):
        model = registered(client, uri, name)
        _version(client, uri, name, version, alias)
        before = model.aliases.get(alias)
        if alias == CHAMPION and before is not None and str(before) != str(version):
            client.set_registered_model_alias(name, PREVIOUS, str(before))
        client.set_registered_model_alias(name, alias, str(version))
        return _version(client, uri, name, version, alias)


def enter(uri: str, name: str, version: str) -> ModelVersion:
    """Makes a new version the champion where there is none yet, else the challenger, in one turn. RegistryError."""
    client = _open(uri)
    with reported(uri), locked(uri):
        alias = CHALLENGER if CHAMPION in registered(client, uri, name).aliases else CHAMPION
        client.set_registered_model_alias(name, alias, str(version))
        return _version(client, uri, name, version, alias)


def download(uri: str, name: str, version: str, to: Path) -> Path:
    """Copies the bundle of one version to the directory `to` and returns it.

    The copy is made aside and renamed, so `to` is never half a bundle; a bundle that is there already is replaced. What
    the files hold is checked where the bundle is loaded. Raises RegistryError, InputError when `to` is not a bundle.
    """
    to = Path(to)
    check_replaceable(to)
    client = _open(uri)
    with reported(uri):
        _version(client, uri, name, version, None)
        source = str(client.get_model_version_download_uri(name, str(version))).rstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
        try:
            fetched = _fetch(uri, f"{source}/{_bundle_path(uri, name, version, source, aside)}", aside / "new")
            if not (fetched / MANIFEST).is_file():
                raise RegistryError(
                    f"version {version} of {name!r} holds no bundle (no {MANIFEST} in {shown(source)}): register "
                    f"it again with `router-ml train --register {name}`"
                )
            swap(fetched, to, aside / "old")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return to


def sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite store, None for any other kind of store."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """A client of a store that exists, for what these functions do not cover. Raises RegistryError."""
    return _open(uri)


def _open(uri: str) -> MlflowClient:
    _check_uri(uri)
    path = sqlite_path(uri)
    # MLflow would make an empty database, and its folders, of a mistyped path.
    if path is not None and not path.is_file():
        raise RegistryError(
            f"no model registry at {path}: register a bundle first with `router-ml train --register NAME`, "
            f"or correct the tracking URI"
        )
    with reported(uri):
        return _client(uri)


def _check_uri(uri: str) -> None:
    if "://" not in uri or uri.startswith("file:") or uri in ("sqlite://", _SQLITE, f"{_SQLITE}:memory:"):
        raise RegistryError(
            f"{shown(uri)!r} cannot hold a model registry: use a database such as sqlite:///mlflow.db, or the address "
            f"of an MLflow server such as http://127.0.0.1:5000"
        )


def _client(uri: str) -> MlflowClient:
    _check_uri(uri)
    # Read by MLflow at import and at each call. What is set already stays.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise RegistryError(
            "the model registry needs MLflow, which is not installed: pip install 'router-ml[train]', or load a bundle "
            "from a folder"
        ) from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    path = sqlite_path(uri)
    if path is not None:  # MLflow keeps one store per URI: a relative one would outlive a change of folder
        uri = f"{_SQLITE}{path.resolve()}{uri[uri.find('?') :] if '?' in uri else ''}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def registered(client: MlflowClient, uri: str, name: str) -> Any:
    """MLflow's own record of the model, its `aliases` of one moment. Raises NotRegisteredError where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted(m.name for m in client.search_registered_models(max_results=20))) or "none yet"
        raise NotRegisteredError(
            f"no model {name!r} is registered in {shown(uri)} (registered: {known}): register one with "
            f"`router-ml train --register {name}`, or correct the name"
        ) from None


def _version(
    client: MlflowClient, uri: str, name: str, version: str, alias: str | None, *, metrics: bool = False
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        registered(client, uri, name)
        numbers = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'", max_results=20))
        known = ", ".join(map(str, numbers)) or "none"
        raise RegistryError(
            f"model {name!r} in {shown(uri)} has no version {version!r} (it has: {known}): name one it has"
        ) from None
    return ModelVersion(
        name=name,
        version=str(found.version),
        run_id=found.run_id or None,
        source=str(found.source),
        alias=alias,
        aliases=tuple(sorted(found.aliases)),
        tags=dict(found.tags),
        metrics=dict(client.get_run(found.run_id).data.metrics) if metrics and found.run_id else {},
    )


def _bundle_path(uri: str, name: str, version: str, source: str, aside: Path) -> str:
    """Where the bundle lies inside the MLflow model, as the model's own description says."""
    from mlflow.models import Model

    described = Model.load(str(_fetch(uri, f"{source}/MLmodel", aside / "described"))).flavors
    try:
        return str(described["python_function"]["artifacts"][BUNDLE]["path"])
    except (KeyError, TypeError):
        raise RegistryError(
            f"version {version} of {name!r} was not made by router-ml: its model has no artifact {BUNDLE!r}; register "
            f"a bundle with `router-ml train --register {name}`"
        ) from None


def _fetch(uri: str, artifact_uri: str, to: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    to.mkdir(parents=True, exist_ok=True)
    return Path(download_artifacts(artifact_uri=artifact_uri, dst_path=str(to), tracking_uri=uri))


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Takes turns with other writers to a database; an MLflow server offers nothing to take turns by."""
    _check_uri(uri)
    if uri.startswith("postgresql"):
        with _locked_postgres(uri):
            yield
        return
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise RegistryError("a SQLite registry needs filelock: pip install 'router-ml[train]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=120):
            yield
    except Timeout:
        raise RegistryError(
            f"another process has held {path}.lock for two minutes: wait for it to end, or stop it"
        ) from None


@contextmanager
def _locked_postgres(uri: str) -> Iterator[None]:
    import sqlalchemy as sa

    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    with engine.begin() as connection:  # the lock ends with its transaction, however the process does
        connection.exec_driver_sql("set local lock_timeout = '120s'")
        connection.exec_driver_sql("select pg_advisory_xact_lock(7205759405)")
        yield


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turns what MLflow, its database and its HTTP client raise into a RegistryError that names the store."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        if not _is_store_error(error):
            raise
        reason = redacted(str(error), uri)[:300]  # cut last: half a password would be known no more
        raise RegistryError(
            f"the model registry {shown(uri)} did not answer as it should: {reason}; check that the tracking URI is "
            f"right and that it can be reached and written to"
        ) from error


def _is_store_error(error: Exception) -> bool:
    if isinstance(error, OSError):  # requests' own errors among them
        return True
    return any(kind.__module__.partition(".")[0] in ("mlflow", "sqlalchemy", "alembic") for kind in type(error).__mro__)
