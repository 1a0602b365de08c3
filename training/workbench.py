"""What the notebooks stand on: one log with its catalogue, the bundles made of it, and the registry they are kept in.

A notebook names a log and gets the rest from here, made when it is first asked for and kept in a folder: so that each
notebook runs by itself, and none trains again what another one has trained. Nothing here touches a registry that it was
not given, and moves of its champion are made in a copy unless they are asked for.
"""

from __future__ import annotations

import getpass
import hashlib
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl

from router_ml import registry, rollout
from router_ml.addresses import shown
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog, load_card
from router_ml.errors import InputError, MovedError, NoAliasError, NotRegisteredError, NoWayBackError
from router_ml.logs import log_sha256, read_log, read_log_info
from router_ml.policy import Policy
from router_ml.registry import CHALLENGER, CHAMPION, ModelVersion
from router_ml.rollout import Promotion
from router_ml.types import ModelCard
from training.candidates import first_named
from training.challenge import Contender
from training.gate import Verdict
from training.importers.importing import ImportSummary, import_log
from training.report import publish, publish_bundle
from training.simulate import simulate
from training.tracking import register_bundle
from training.train import Training, train
from training.world import SIMULATED_CATALOG

SIMULATED_REQUESTS, SIMULATED_SEED = 5_000, 4
FIRST_PART = 0.1
"""The part of a log that the first champion of the notebooks' own registry has learnt from."""
_EXPORT = {"id": "request_id", "started_at": "time", "llm": "model", "score": "quality"}
"""The simulated gateway's names of columns, and what they are in the log."""


@dataclass(frozen=True)
class Entry:
    """A registered bundle at hand: its version in the registry, its directory, and the router with its manifest."""

    version: str
    bundle: Path
    contender: Contender


@dataclass(frozen=True)
class Move:
    """What became of a promotion or a rollback, in a sentence; `promotion` is None where nothing was moved."""

    promotion: Promotion | None
    says: str


@dataclass(frozen=True)
class Workbench:
    """A log (`LOG_SCHEMA`, by time) with its catalogue, and where what is made of it lies.

    `imported` is what the import did, None where the log was one already. `registry` is an MLflow tracking URI, and
    `name` the router's name in it; `own` says that it is the notebooks' own. `truth` is the simulated log that knows
    the truth, None for any other. `holdout` is the share of the newest requests that training holds out.
    """

    folder: Path
    log: pl.DataFrame
    catalog: Catalog
    imported: ImportSummary | None
    encoder: str
    holdout: float
    policy: Policy | None
    registry: str
    name: str
    own: bool
    truth: Path | None

    @property
    def bundle(self) -> Path:
        """Where the bundle lies that is trained on the whole log, or will."""
        return self.folder / "bundle"

    @property
    def now(self) -> datetime | None:
        """From when a log's freshness counts: the clock (None), but the end of a simulated log."""
        newest = self.log["time"].max()
        return newest if self.truth is not None and isinstance(newest, datetime) else None

    def champion(self) -> Entry:
        """The champion of the registry; in the notebooks' own one, where there is none, one is made.

        That one is trained on the log's first tenth: what a team has in force that trained once and long ago. Raises
        RegistryError where another registry has none.
        """
        if self.own and not self._has(CHAMPION):
            first = self.log.filter(pl.col("time") <= pl.col("time").quantile(FIRST_PART))
            to = self.folder / "first-bundle"
            made = train(first, self.catalog, out=to, encoder=self.encoder, holdout=0.0)
            publish(made, to, tracking_uri=self.registry, name=self.name)
        return self._entry(CHAMPION)

    def challenger(self) -> Entry:
        """The challenger of the registry; in the notebooks' own one, where there is none, it is trained and registered.

        Raises RegistryError where another registry has none.
        """
        if self.own and not self._has(CHALLENGER):
            self.champion()
            made = self._train(self.log, self.catalog, self.bundle)
            publish_bundle(made, tracking_uri=self.registry, name=self.name)
        return self._entry(CHALLENGER)

    def register(self, made: Training) -> ModelVersion:
        """Registers what was trained to `bundle`: as the challenger, or as the first champion of another registry."""
        if self.own:
            self.champion()
        return publish(made, self.bundle, tracking_uri=self.registry, name=self.name)

    def router(self, bundle: str | Path | None = None) -> Contender:
        """A bundle under the workbench's policy; by default the one of the whole log, which is trained if it is not."""
        made = self._train(self.log, self.catalog, self.bundle) if bundle is None else bundle
        return Contender.load(made, self.policy)

    def without(self, model: str) -> Path:
        """The bundle of a log in which the model does not occur, nor in its catalogue; trained if it is not yet.

        Raises InputError where that leaves fewer than two models.
        """
        rest = [other for other in self.catalog.ids if other != model]
        if len(rest) < 2:
            raise InputError(f"without {model} the catalogue has {len(rest)} models: a router needs two to choose from")
        to = self.folder / "without" / _name(f"model://{model}")
        to.parent.mkdir(exist_ok=True)
        return self._train(self.log.filter(pl.col("model") != model), self.catalog.subset(rest), to)

    def newcomer(self, card: str | Path | None = None, *, model: str | None = None) -> tuple[ModelCard, Path]:
        """A model's card, and a bundle that does not know it.

        `card` is a file with the card of a new model. Without one a `model` of the log plays the newcomer, by default
        the one that the log named last. Raises InputError for a model that the catalogue does not list.
        """
        if card is not None:
            new = load_card(card)
            return new, self.without(new.id) if new.id in self.catalog else self._train(
                self.log, self.catalog, self.bundle
            )
        since = first_named(self.log)
        named = model or max((m for m in self.catalog.ids if m in since), key=lambda m: since[m])
        if named not in self.catalog:
            raise InputError(f"the catalogue has no model {named!r}: it has {', '.join(self.catalog.ids)}")
        return replace(self.catalog[named], sibling=None), self.without(named)

    def stage(self, *, rehearse: bool = True) -> Workbench:
        """Where champions are moved: in a copy of the registry, made afresh, or, if not to `rehearse`, in itself."""
        if not rehearse:
            return self
        champion, challenger = self.champion(), self.challenger()
        # A new place each time: MLflow keeps a database open that this process has used once.
        folder = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=self.folder))
        uri = _sqlite(folder)
        database = registry.sqlite_path(self.registry)
        if database is not None:  # the artifacts stay where they are, and are only read
            with (
                closing(sqlite3.connect(database)) as real,
                closing(sqlite3.connect(folder / "mlflow.db")) as copy,
            ):
                real.backup(copy)
        else:
            for entry, alias in ((champion, CHAMPION), (challenger, CHALLENGER)):
                register_bundle(
                    entry.bundle, tracking_uri=uri, name=self.name, params={"version": entry.version}, metrics={},
                    alias=alias,
                )  # fmt: skip
        return replace(self, registry=uri, own=True)

    def promote(self, verdict: Verdict, champion: Entry, challenger: Entry, *, reason: str | None = None) -> Move:
        """Makes `challenger` the champion if every condition of the verdict on the two holds, else says which does not.

        Raises MovedError where the registry's champion or challenger is another bundle than the one that was judged,
        RegistryError where the registry fails.
        """
        champion_version = self._judged(CHAMPION, champion)
        version = self._judged(CHALLENGER, challenger)
        if not verdict.passed:
            failed = ", ".join(condition.name for condition in verdict.failed)
            return Move(None, f"version {version} is not promoted: {failed}")
        moved = rollout.promote(
            self.registry, self.name, version, who=getpass.getuser(), reason=reason,
            gate=verdict.to_json(), expected=champion_version,
        )  # fmt: skip
        return Move(moved, f"version {moved.version} is champion; version {moved.before} was it before")

    def rollback(self, *, reason: str) -> Move:
        """Makes the version before champion again. Raises RegistryError where the registry fails."""
        try:
            moved = rollout.rollback(self.registry, self.name, who=getpass.getuser(), reason=reason)
        except NoWayBackError as error:
            return Move(None, str(error))
        return Move(moved, f"version {moved.version} is champion again; version {moved.before} is rolled back")

    def rolled_back(self, entry: Entry) -> str | None:
        """Why the entry's bundle was rolled back before, if it was."""
        return rollout.rolled_back(self.registry, self.name, entry.version)

    def history(self) -> pl.DataFrame:
        """A row a version of the registry: version, bundle, aliases, and when, by whom and why it came and went."""
        rows = [asdict(past) for past in rollout.history(self.registry, self.name)]
        columns = ["version", "bundle", "aliases", "promoted", "by", "reason", "until", "rolled_back"]
        return pl.DataFrame(rows, infer_schema_length=None).select(
            *columns, pl.col("rolled_back_reason").cast(pl.String)
        )

    def _judged(self, alias: str, entry: Entry) -> str:
        """The registry's number of a judged bundle, which in a rehearsal is another. Raises MovedError."""
        version, judged = self._version(alias), entry.contender.version
        if (now := version.tags.get("bundle_version")) != judged:
            raise MovedError(f"the {alias} is bundle {now} by now, and {judged} was judged: judge them again")
        return version.version

    def _has(self, alias: str) -> bool:
        try:
            self._version(alias)
        except (NoAliasError, NotRegisteredError):
            return False
        return True

    def _version(self, alias: str) -> ModelVersion:
        registry.ensure_store(self.registry)
        return registry.resolve(self.registry, self.name, alias)

    def _entry(self, alias: str) -> Entry:
        version = self._version(alias)
        to = self.folder / "registered" / (version.tags.get("bundle_version") or f"version-{version.version}")
        if not to.is_dir():
            registry.download(self.registry, self.name, version.version, to)
        return Entry(version.version, to, Contender.load(to, self.policy))

    def _train(self, log: pl.DataFrame, catalog: Catalog, to: Path) -> Path:
        """A bundle of the log at `to`: the one that is there, whatever its options, or one that is trained now."""
        if not (to / "manifest.json").is_file() or read_bundle(to).manifest["log_sha256"] != log_sha256(log):
            train(log, catalog, out=to, encoder=self.encoder, holdout=self.holdout)
        return to


def workbench(
    log: str | Path | None = None,
    *,
    kind: str | None = None,
    settings: Mapping[str, Any] | None = None,
    catalog: str | Path | None = None,
    policy: str | Path | None = None,
    encoder: str | None = None,
    holdout: float | None = None,
    registry: str | None = None,
    name: str = "router",
    folder: str | Path = "work",
) -> Workbench:
    """A workbench on a log: a log directory, a file, a URL; with `kind` a gateway's export, which is imported first.

    `kind` and its `settings` are those of `router-ml import` (`training.importers.kinds`). Without a log a small one is
    simulated as a gateway's table, and imported. `catalog` is a file of model cards, by default those that lie in the
    log; `policy` a TOML file; `encoder` as in `train` (default: "lexical" for the simulated log, else "static");
    `holdout` likewise (default: half of the simulated log, else a fifth). Without a `registry` (an MLflow tracking URI)
    there is one in the folder. What is made is kept in `folder`, by the log's hash. Raises InputError where the log or
    its cards cannot be read.
    """
    at = Path(folder)
    cards = Catalog.load(catalog) if catalog is not None else None
    truth: Path | None = None
    imported: ImportSummary | None = None
    if log is None:
        truth, export = at / "simulated" / "truth", at / "simulated" / "gateway.parquet"
        kind, log, cards, to = "table", export, SIMULATED_CATALOG, at / "simulated" / "log"
        settings = {"columns": {name: column for column, name in _EXPORT.items()}}
        _simulated(truth, export)
    else:
        to = at / "imported" / _name(log) / "log"
    if kind is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        imported = import_log(kind, str(log), out=to, catalog=cards, settings=settings)
        log = to
    rows = read_log(log).sort("time", maintain_order=True)
    if cards is None:
        known = read_log_info(log).get("catalog") if (Path(log) / "log.json").is_file() else None
        if known is None:
            raise InputError(f"nothing says what the models of {log} cost and may do: name a file of cards as catalog")
        cards = Catalog.from_json(known, f"{log}/log.json")
    home = at / log_sha256(rows)[:12]
    home.mkdir(parents=True, exist_ok=True)
    simulated = truth is not None
    return Workbench(
        folder=home, log=rows, catalog=cards, imported=imported,
        encoder=encoder or ("lexical" if simulated else "static"),
        holdout=(0.5 if simulated else 0.2) if holdout is None else holdout,
        policy=None if policy is None else Policy.load(policy), registry=registry or _sqlite(home), name=name,
        own=registry is None, truth=truth,
    )  # fmt: skip


def _name(source: str | Path) -> str:
    """A folder's name for what comes of a source: its own end, which holds no password, and a hash of all of it."""
    whole = str(source) if "://" in str(source) else str(Path(source).resolve())
    path = urlsplit(shown(whole)).path if "://" in whole else whole  # the rest of a URL may hold a password
    end = path.rstrip("/").rpartition("/")[2]
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in end).lstrip(".")
    return f"{kept}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _simulated(truth: Path, export: Path) -> None:
    """A simulated log with its truth, and what a gateway would have exported of it; both only once."""
    if not (truth / "log.json").is_file():
        truth.parent.mkdir(parents=True, exist_ok=True)
        simulate(SIMULATED_REQUESTS, truth, seed=SIMULATED_SEED, feedback_rate=0.8, overwrite=True)
    if not export.is_file():
        aside = export.with_name(f".{export.name}")
        read_log(truth).rename({name: column for column, name in _EXPORT.items()}).write_parquet(aside)
        aside.replace(export)


def _sqlite(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"
