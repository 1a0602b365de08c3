"""The champion's way forward and back: promotions and rollbacks that no crash leaves half done, and their history.

The alias `champion` moves in one call of MLflow's, so readers see the old version or the new one. All else is written
before it moves, as tags of versions: a process that ends between two calls has either moved the alias or it has not,
and the next one finds in the tags what it needs. Writers to a database take turns (`registry.locked`). An MLflow
server offers no lock and no compare-and-set: of two moves at once one wins, and a version that is `expected` is looked
up once more right before the move, which leaves a gap of one call.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from router_ml.addresses import redacted, shown
from router_ml.errors import InputError, MovedError, NoWayBackError, RegistryError
from router_ml.registry import CHAMPION, PREVIOUS, connect, locked, reported
from router_ml.reigns import (
    AUTOMATIC,
    FORCED_WHY,
    GATE,
    LEFT,
    PROMOTED,
    PROMOTED_BY,
    PROMOTED_WHY,
    RETURNED,
    RETURNED_BY,
    ROLLED_BACK,
    ROLLED_BACK_BY,
    ROLLED_BACK_WHY,
    Past,
    Registry,
    Reign,
    history,
    look,
    reign,
    rolled_back,
    time_of,
)  # fmt: skip
from router_ml.writing import finite

if TYPE_CHECKING:
    import sqlalchemy as sa
    from mlflow import MlflowClient

__all__ = ["Past", "Promotion", "Reign", "history", "promote", "reign", "rollback", "rolled_back"]
_LONGEST = 2_000  # characters of a reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A move of `champion` of the model `name` from `before` (None: there was none) to `version`, forward or back."""

    name: str
    version: str
    before: str | None
    time: datetime
    who: str
    reason: str | None
    forced: bool


def promote(
    uri: str,
    name: str,
    version: str,
    *,
    who: str,
    reason: str | None = None,
    forced: bool = False,
    gate: Mapping[str, Any] | None = None,
    store: str | None = None,
    expected: str | None = None,
    begins: Callable[[], object] = lambda: None,
) -> Promotion:
    """Makes `version` the champion in one step; `previous` then points to the version to roll back to.

    The version gets tags first: when, by whom, why, the `gate`'s summary (null for a number that is not finite).
    With `store` (an existing service's store: SQLite file or SQLAlchemy URL) the audit log is told before the alias
    moves, and once more where it then does not.
    `forced` says that the gate was overruled, which takes a reason and a store. `expected` is the version that has to
    be champion still, "" if there has to be none. To promote the champion again is to stand by it: its record begins
    anew. `begins` is called when all has been looked at and the audit log told: an end before it has moved nothing,
    after it tags and alias are written.

    Raises InputError for a forced promotion without a reason or without a store that can be written to, MovedError
    where the champion is not the `expected` one, RegistryError for an unknown version or a registry that fails. After
    a failing registry the champion is one of the two versions, and the same call may simply be made again.
    """
    version, reason = str(version), _line(reason)
    if forced and reason is None:
        raise InputError("a forced promotion needs a reason: say why the gate is overruled")
    if forced and store is None:
        raise InputError("a forced promotion is noted in the audit log: give the service's store, SQLite file or URL")
    judged = None if gate is None else finite(dict(gate))
    engine = None if store is None else _opened(store)
    client = connect(uri)
    with reported(uri), locked(uri):
        found = look(client, uri, name)
        if version not in found.tags:
            known = ", ".join(sorted(found.tags, key=int)) or "none"
            raise RegistryError(
                f"model {name!r} in {shown(uri)} has no version {version!r} (it has: {known}): name one it has"
            )
        before = found.champion
        _expect(found, expected)
        now = max(_now_us(), 1 + found.us(version, PROMOTED, LEFT, ROLLED_BACK, RETURNED))
        told = {"action": "promote", "forced": forced, "reason": reason, "gate": judged}
        with _noted(engine, who, now, found, version, told, begins):
            stated = {
                PROMOTED_BY: who,
                PROMOTED_WHY: None if forced else reason,
                FORCED_WHY: reason if forced else None,
                GATE: None if gate is None else json.dumps(judged, sort_keys=True, allow_nan=False),
            }
            found.tag(version, {**stated, PROMOTED: str(now)})
            if before is not None and before != version:
                left = max(now, 1 + found.us(before, PROMOTED, ROLLED_BACK, RETURNED))
                found.tag(before, {LEFT: str(left)})
            if expected is not None:
                _expect(look(client, uri, name, tags=False), expected)
            if before is not None and before != version:
                found.point(PREVIOUS, before)
            found.point(CHAMPION, version)
            _tidy(client, uri, name)
    return Promotion(
        name=name, version=version, before=before, time=time_of(now), who=who, reason=reason, forced=forced
    )


def rollback(
    uri: str,
    name: str,
    *,
    who: str,
    reason: str,
    expected: str | None = None,
    store: str | None = None,
    automatic: bool = False,
    begins: Callable[[], object] = lambda: None,
) -> Promotion:
    """Makes the version champion that was it before; a second rollback goes further back, and not forth again.

    That is the version which `previous` names; where there is none (or a process ended between two calls), the one that
    was left last and not by a rollback. The version that is left is tagged as rolled back, with reason and time, and
    `previous` points to the one before the new champion, or is taken away. `store` and `begins` as in `promote`;
    what the store cannot be told is not done. Whoever comes second of two that roll back at once gets a MovedError and
    moves nothing.

    Raises InputError without a reason, MovedError where the champion is not the `expected` one (or changes meanwhile),
    NoWayBackError where there is nothing to go back to, RegistryError where the registry fails.
    """
    why = _line(reason)
    if why is None:
        raise InputError("a rollback needs a reason: it keeps this bundle from being promoted again unawares")
    engine = None if store is None else _opened(store)
    client = connect(uri)
    with reported(uri), locked(uri):
        found = look(client, uri, name)
        _expect(found, expected)
        left = found.champion
        if left is None:
            raise NoWayBackError(f"model {name!r} in {shown(uri)} has no champion: there is nothing to roll back")
        target = found.aliases.get(PREVIOUS)
        useless = target not in found.tags or found.bundle(str(target)) == found.bundle(left)
        if target is None or useless or found.rolled_back(target) is not None:
            target = found.last_champion(left)
        if target is None:
            raise NoWayBackError(
                f"nothing to go back to: {name!r} in {shown(uri)} knows no version that was champion before version "
                f"{left} and was not rolled back; promote one: router-ml promote {name} VERSION"
            )
        now = max(_now_us(), 1 + found.us(left, PROMOTED, LEFT, RETURNED), 1 + found.us(target, PROMOTED, LEFT))
        told = {"action": "rollback", "reason": why, "automatic": automatic}
        with _noted(engine, who, now, found, target, told, begins):
            # The times come last: they are what counts, and what a killed process has not written it has not done.
            found.tag(left, {ROLLED_BACK_BY: who, ROLLED_BACK_WHY: why, ROLLED_BACK: str(now)})
            found.tag(target, {RETURNED_BY: who, AUTOMATIC: "true" if automatic else None, RETURNED: str(now)})
            _expect(look(client, uri, name, tags=False), left)
            found.point(CHAMPION, target)
            found.point(PREVIOUS, found.last_champion(target, left))
            _tidy(client, uri, name)
    return Promotion(name=name, version=target, before=left, time=time_of(now), who=who, reason=why, forced=False)


def _expect(found: Registry, expected: str | None) -> None:
    if expected is not None and (found.champion or "") != str(expected):
        now = "there is none" if found.champion is None else f"it is version {found.champion}"
        raise MovedError(
            f"the champion of {found.name!r} is not {f'version {expected}' if expected else 'free'} any more, {now}: "
            f"nothing was moved; "
            f"router-ml history {found.name} tells who moved it"
        )


def _tidy(client: MlflowClient, uri: str, name: str) -> None:
    """Where two moves at once left `previous` on the champion, points it to the version before."""
    found = look(client, uri, name)
    if found.champion is not None and found.aliases.get(PREVIOUS) == found.champion:
        found.point(PREVIOUS, found.last_champion(found.champion))


@contextmanager
def _noted(
    engine: sa.Engine | None,
    who: str,
    time_us: int,
    found: Registry,
    version: str,
    told: Mapping[str, Any],
    begins: Callable[[], object],
) -> Iterator[None]:
    """Tells the audit log what is about to be done; and that it was not, where the steps inside raise."""
    if engine is None:
        begins()
        yield
        return
    moved = {"name": found.name, "version": version, "before": found.champion, "bundle": found.bundle(version)}
    _note(engine, who, time_us, {**moved, **told})
    try:
        begins()
        yield
    except BaseException as error:
        with contextlib.suppress(InputError):  # the first error is the one to report
            _note(engine, who, time_us, {**moved, **told, "failed": " ".join(str(error).split())[:300]})
        raise
    finally:
        engine.dispose()


def _note(engine: sa.Engine, who: str, time_us: int, content: Mapping[str, Any]) -> None:
    import sqlalchemy as sa

    from router_ml import audit
    from router_ml.router import new_id

    try:
        with engine.begin() as connection:
            # The log leaves out what is the same as before; two moves never are, whatever they have in common.
            audit.note(connection, "registry", who, time_us, {"id": new_id(), **content})
    except sa.exc.SQLAlchemyError as error:
        url = engine.url.render_as_string(hide_password=False)
        reason = redacted(str(getattr(error, "orig", None) or error), url)[:200]
        raise InputError(
            f"the audit log in {shown(url)} cannot be written to, so nothing was moved: {reason}"
        ) from None


def _opened(store: str) -> sa.Engine:
    from router_ml.tables import existing, open_database

    return open_database(existing(store))


def _line(text: str | None) -> str | None:
    return " ".join((text or "").split())[:_LONGEST] or None


def _now_us() -> int:
    return time.time_ns() // 1000
