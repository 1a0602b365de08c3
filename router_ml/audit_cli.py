"""The commands `router-ml audit …`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import sqlalchemy as sa

_SHOWN = 20
STORE = click.option("--store", default="router-ml.db", show_default=True, help="SQLite file or SQLAlchemy URL.")


@click.group()
def audit() -> None:
    """Prove from the store what was done, and by whom."""


@audit.command()
@STORE
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with all that was before and after.")
def changes(store: str, as_json: bool) -> None:
    """List who changed policy, keys or model, and when.

    Example: router-ml audit changes --store router-ml.db
    """
    from router_ml.audit import changes as noted

    for change in noted(_opened(store)):
        if as_json:
            click.echo(json.dumps(change))
        else:
            after = change["after"]
            now = after.get("version") or after.get("model_version") or ", ".join(after) or "none"
            if change["kind"] == "registry":
                now = _moved(after)
            click.echo(f"{_time(change['time_us'])}  {change['kind']:6}  by {change['who']}: {now}")


@audit.command()
@STORE
@click.option(
    "--catalog",
    multiple=True,
    type=(str, click.Path(exists=True, dir_okay=False, path_type=Path)),
    metavar="VERSION FILE",
    help="The catalogue of a bundle whose start the store has not noted; may be repeated.",
)
@click.option("--since", type=click.DateTime(), help="Only decisions from this time on, UTC.")
def residency(store: str, catalog: tuple[tuple[str, Path], ...], since: datetime | None) -> None:
    """Check every stored decision's models, fallbacks too, against its data class and region.

    Exits with 1 when a model was offered that was not cleared, or when nothing proves that it was.

    Example: router-ml audit residency --store router-ml.db
    """
    import sqlalchemy as sa

    from router_ml.audit import catalogs
    from router_ml.audit import changes as noted
    from router_ml.audit import residency as violations
    from router_ml.catalog import Catalog
    from router_ml.tables import DECISIONS

    engine = _opened(store)
    known = catalogs(noted(engine))
    for version, file in catalog:
        known.setdefault(version, []).append(Catalog.load(file))
    since_us = int(since.replace(tzinfo=UTC).timestamp() * 1e6) if since else 0
    with engine.connect() as connection:
        total = connection.scalar(
            sa.select(sa.func.count()).select_from(DECISIONS).where(DECISIONS.c.time_us >= since_us)
        )
    found = 0
    for violation in violations(engine, known, since_us):
        found += 1
        if found <= _SHOWN:
            click.echo(
                f"{_time(violation.time_us)}  {violation.decision_id}  {violation.role} {violation.model}: "
                f"{violation.problem}"
            )
    if found > _SHOWN:
        click.echo(f"… and {found - _SHOWN} more")
    click.echo(f"{total} decisions, {found} violations")
    sys.exit(1 if found else 0)


def _moved(after: dict[str, Any]) -> str:
    """A move of the champion in a line, as `rollout` notes it."""
    if after.get("asked"):
        return f"{after['action']} of {after['name']} version {after['version']} asked for: {after['reason']}"
    how = {"promote": "promoted", "rollback": "rolled back to"}[after["action"]]
    how = f"{'automatically ' if after.get('automatic') else ''}{how}{' by force' if after.get('forced') else ''}"
    was = "the first" if after["before"] is None else f"was {after['before']}"
    why = f": {after['reason']}" if after.get("reason") else ""
    doubt = "may not have come to pass" if after.get("unsure") else "did not come to pass"
    failed = f" ({doubt}: {after['failed']})" if "failed" in after else ""
    return f"{after['name']} version {after['version']} {how}, {was}{why}{failed}"


def _opened(store: str) -> sa.Engine:
    from router_ml.tables import existing, open_database

    return open_database(existing(store))


def _time(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S")
