"""The commands `router-ml rollback`, `watch` and `history`: the champion's way back, by hand or by its outcomes."""

from __future__ import annotations

import getpass
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import InputError, MovedError, NoWayBackError, RouterError, UnreachableError
from router_ml.terminal import TRACKING, Outcome
from router_ml.writing import finite

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

    from router_ml.registry import ModelVersion
    from router_ml.rollout import Reign

_SHARE = click.FloatRange(0.0, 1.0, max_open=True)


def user() -> str:
    """Who runs this command, as tags and the audit log name them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return f"user {os.getuid()}"


OUTCOME = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line: stages as they begin, then what came of it."
)
WHO = click.option("--who", default=user, show_default="the user", help="Who does it, for tags and audit log.")


@click.command()
@click.argument("name")
@click.option("--reason", required=True, help="Why; it keeps this bundle from being promoted again unawares.")
@click.option("--store", help="The service's store, whose audit log is told: SQLite file or SQLAlchemy URL.")
@click.option("--expected", metavar="VERSION", help="Only if this version is champion still.")
@OUTCOME
@WHO
@TRACKING
def rollback(
    name: str, reason: str, store: str | None, expected: str | None, as_json: bool, who: str, tracking_uri: str
) -> None:
    """Make the version before champion again; once more goes further back.

    Example: router-ml rollback router --reason "answers got worse" --store router-ml.db
    """
    from router_ml.rollout import rollback as run

    out = Outcome(as_json)
    with out.move() as begins:
        moved = run(tracking_uri, name, who=who, reason=reason, expected=expected, store=store, begins=begins)
    out.end(
        f"{name} version {moved.version} is champion again; version {moved.before} is rolled back",
        {"name": name, "version": moved.version, "before": moved.before, "moved": True},
    )


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the gate's summary with it.")
@click.option("--full", is_flag=True, help="The same with metrics and the last evaluation, one JSON object a line.")
@TRACKING
def history(name: str, as_json: bool, full: bool, tracking_uri: str) -> None:
    """List the versions of NAME: promoted and rolled back when, by whom and why.

    Example: router-ml history router
    """
    from router_ml.releases import releases
    from router_ml.rollout import history as run

    if full:
        for row in releases(tracking_uri, name):
            click.echo(json.dumps(finite(row)))
        return
    for past in run(tracking_uri, name):
        if as_json:
            row = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in asdict(past).items()}
            click.echo(json.dumps(row))
            continue
        said = [f"version {past.version}", f"bundle {past.bundle or 'unknown'}", *past.aliases]
        if past.promoted is not None:
            how = "promoted by force" if past.forced else "promoted"
            said.append(f"{how} {_clock(past.promoted)} by {past.by}" + (f" ({past.reason})" if past.reason else ""))
        if past.rolled_back is not None:
            said.append(f"rolled back {_clock(past.rolled_back)} by {past.rolled_back_by} ({past.rolled_back_reason})")
        elif past.until is not None:
            said.append(f"champion until {_clock(past.until)}")
        click.echo("  ".join(said))


@click.command()
@click.argument("name")
@click.option("--store", required=True, help="The store of the services that serve it: SQLite file or SQLAlchemy URL.")
@click.option("--every", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once, and say by the exit code what was found.")
@click.option("--tolerance", default=0.03, show_default=True, type=_SHARE, help="How far below its promise it may be.")
@click.option(
    "--confidence", default=0.95, show_default=True, type=click.FloatRange(0.5, 1.0, max_open=True),
    help="How sure, at all looks together.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what was found, and move nothing.")
@TRACKING
def watch(
    name: str, store: str, every: float, once: bool, tolerance: float, confidence: float, dry_run: bool,
    tracking_uri: str,
) -> None:  # fmt: skip
    """Hold the champion of NAME to its promise; roll it back where outcomes break it.

    It is rolled back once: a champion that an automatic rollback led to is reported and stays, until somebody promotes
    a version. A registry or a store that is away is tried again.

    Exits with --once: 0 the promise holds, or too little is known; 1 it is broken, rolled back or not; 2 registry or
    store did not answer. Otherwise it runs until SIGINT or SIGTERM, and exits with 0.

    Example: router-ml watch router --store router-ml.db --every 60
    """
    watcher = _Watcher(tracking_uri, name, store, tolerance, confidence, dry_run)
    try:
        watcher.open()
    except UnreachableError:
        if once:
            raise
    with _until_signal() as signalled:
        while True:
            try:
                code = watcher.look()
            except RouterError as error:
                if once:
                    raise
                click.echo(f"{_clock()}  {name}: not known, it is tried again in {every:g} s: {error}", err=True)
            else:
                if once:
                    sys.exit(code)
            until = time.monotonic() + every
            while not signalled and (left := until - time.monotonic()) > 0.0:
                time.sleep(min(left, 0.1))
            if signalled:
                click.echo(f"{_clock()}  {name}: the watch ends by {signal.Signals(signalled[0]).name}")
                return


class _Watcher:
    """Looks at one model's champion, again and again."""

    def __init__(self, uri: str, name: str, store: str, tolerance: float, confidence: float, dry_run: bool) -> None:
        self.uri, self.name, self.store, self.dry_run = uri, name, store, dry_run
        self.tolerance, self.confidence = tolerance, confidence
        self._engine: sa.Engine | None = None
        # A hung server must not hold a watch for minutes; there is always a next look.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

    def open(self) -> sa.Engine:
        """The store. Raises InputError, of the kind UnreachableError while its server is away."""
        from router_ml.tables import existing, open_database

        if self._engine is None:
            self._engine = open_database(existing(self.store))
        return self._engine

    def look(self) -> int:
        """Says the champion's state in a line and acts on it; 0 where the promise holds. Raises RouterError."""
        import sqlalchemy as sa

        from router_ml.addresses import redacted
        from router_ml.rollout import reign
        from router_ml.stored import told_decisions
        from training.watch import watch as run

        now = reign(self.uri, self.name)
        who = f"{_clock()}  {self.name} version {now.version}"
        if now.bundle is None:
            raise InputError(
                f"version {now.version} of {self.name!r} does not say which bundle it is: train --register"
            )
        try:
            rows = told_decisions(self.open(), now.bundle, now.since_us)
            found = run(rows, tolerance=self.tolerance, confidence=self.confidence)
        except sa.exc.SQLAlchemyError as error:
            raise UnreachableError(
                f"the store does not answer: {redacted(str(getattr(error, 'orig', None) or error), self.store)}"
            ) from None
        if not found.broken:
            click.echo(f"{who} holds: {found.why}")
            return 0
        click.echo(f"{who} breaks its promise: {found.why}")
        if self.dry_run:
            click.echo("  nothing is moved in a dry run")
        elif now.automatic:
            click.echo("  it stays, since an automatic rollback led to it: promote a version, this one or another")
        else:
            self._roll_back(now, found.why)
        return 1

    def _roll_back(self, now: Reign, why: str) -> None:
        from router_ml.rollout import rollback as run

        try:
            moved = run(
                self.uri, self.name, who=f"router-ml watch, {user()}", reason=why, expected=now.version,
                store=self.store, automatic=True,
            )  # fmt: skip
            click.echo(f"  rolled back to version {moved.version}")
        except (MovedError, NoWayBackError) as error:
            click.echo(f"  not rolled back: {error}")


@contextmanager
def _until_signal() -> Iterator[list[int]]:
    """The signals that came: the first one ends the watch after its look, a second one at once."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, note)
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _clock(time: datetime | None = None) -> str:
    return (datetime.now(UTC) if time is None else time).strftime("%Y-%m-%d %H:%M:%S")


def register_as(bundle: Path, name: str, alias: str | None, tracking_uri: str) -> None:
    """Registers a bundle that was not trained just now, and says so. Raises as `publish_bundle` does."""
    from training.report import publish_bundle

    say_registered(publish_bundle(bundle, tracking_uri=tracking_uri, name=name, alias=alias), tracking_uri)


def say_registered(made: ModelVersion, tracking_uri: str) -> None:
    """Prints which version a bundle became, and where."""
    from router_ml.addresses import shown

    click.echo(f"registered as {made.name} version {made.version}, alias {made.alias} ({shown(tracking_uri)})")
