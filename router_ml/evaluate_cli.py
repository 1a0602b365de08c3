"""The commands `router-ml evaluate` and `promote`: what a challenger would change, and whether it may."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import InputError, NoAliasError, RegistryError, RouterError
from router_ml.rollout_cli import OUTCOME, WHO
from router_ml.terminal import TRACKING, Outcome, PathArg, stages
from router_ml.tune_cli import CONFIDENCE, LOGS, POLICY, log_rows, write_json

if TYPE_CHECKING:
    from router_ml.policy import Policy
    from router_ml.registry import ModelVersion

_SHARE = click.FloatRange(0.0, 1.0)
_LIMITS = (
    click.option(
        "--margin", "quality", default=0.02, show_default=True, type=_SHARE,
        help="How far below 0 the lower bound of the quality change may lie.",
    ),
    click.option(
        "--slice-margin", "slice_margins", multiple=True, metavar="[SLICE:]MARGIN",
        help="The same for each slice, 0.1 by default; for some with task=code:0.02 or task:0.05. May be repeated.",
    ),
    click.option("--max-cost-change", "cost", type=float, help="Most that costs may rise, as a share; any by default."),
    click.option(
        "--calibration-margin", "calibration", default=0.05, show_default=True, type=_SHARE,
        help="How much less success than promised there may be.",
    ),
    click.option("--max-latency-ratio", "latency", default=1.5, show_default=True, help="Of a decision's time."),
    click.option("--fresh-days", default=30.0, show_default=True, help="How old the newest judged request may be."),
    click.option("--min-rows", "rows", default=500, show_default=True, help="How many outcomes there have to be."),
    click.option("--min-clusters", "clusters", default=40, show_default=True, help="How many independent groups."),
)  # fmt: skip
_LIMITED = ("quality", "cost", "calibration", "latency", "fresh_days", "rows", "clusters")
SINCE = click.option("--since", type=click.DateTime(), help="Only rows after this time, UTC.")
STORE = click.option(
    "--store",
    help="The service's store, SQLite file or URL: its rows judge without --logs, under its policy without --policy.",
)
CLUSTER = click.option(
    "--cluster", default="session", show_default=True, type=click.Choice(["session", "tenant"]),
    help="What is independent of each other; what a canary drew together stays together.",
)  # fmt: skip


@dataclass(frozen=True)
class _Basis:
    """What a challenger is judged by: the rows, how they are read, and the limits of `training.gate.Limits`."""

    logs: Path | None
    store: str | None
    policy: Path | None
    since: datetime | None
    cluster: str
    confidence: float
    limits: Mapping[str, Any]


def judged_by(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a challenger is judged by, handed to the command as one `basis`."""

    @functools.wraps(command)
    def with_basis(**options: Any) -> None:
        limits: dict[str, Any] = {name: options.pop(name) for name in _LIMITED}
        named = {field.name: options.pop(field.name) for field in fields(_Basis) if field.name in options}
        margins = _margins(options.pop("slice_margins"))
        limits |= {"slice": margins.pop("")} if "" in margins else {}
        command(**options, basis=_Basis(**named, limits=limits | {"slices": margins}))

    for option in reversed((LOGS, STORE, POLICY, SINCE, CLUSTER, CONFIDENCE, *_LIMITS)):
        with_basis = option(with_basis)
    return with_basis


@click.command()
@click.argument("challenger")
@click.option("--champion", help="A bundle directory, or NAME@ALIAS or NAME/VERSION; by default NAME@champion.")
@judged_by
@click.option("--html", type=PathArg, help="Write the report as one HTML page.")
@click.option("--json", "json_path", type=PathArg, help="Write everything as JSON.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the report with a registered version.")
@TRACKING
def evaluate(
    challenger: str, champion: str | None, basis: _Basis, html: Path | None, json_path: Path | None, keep: bool,
    tracking_uri: str,
) -> None:  # fmt: skip
    """Compare CHALLENGER with the champion on the newest rows that neither has learnt from.

    CHALLENGER is a bundle directory, NAME@ALIAS, NAME/VERSION, or NAME for NAME@challenger. A registered one keeps the
    report among its artifacts in MLflow. Says which of a promotion's conditions hold; exits with 0 either way.

    Example: router-ml evaluate router --logs logs --html report.html
    """
    from router_ml.writing import write_aside
    from training.challenge_report import as_html, as_json, as_text, log_report

    with _both(tracking_uri, challenger, champion) as (new, old):
        if old is None:
            raise InputError(f"{challenger} has no champion to be compared with: give --champion")
        found, verdict = _judged(new, old, basis, tracking_uri)
        click.echo(as_text(found, verdict))
        if html is not None:
            write_aside(html, as_html(found, verdict))
        write_json(json_path, as_json(found, verdict))
        if keep and new.version is not None:
            log_report(tracking_uri, new.version, found, verdict)
            click.echo(f"kept with {new.version.name} version {new.version.version}, artifacts evaluation/")


@click.command()
@click.argument("name")
@click.argument("version", required=False)
@judged_by
@click.option("--force", is_flag=True, help="Promote whatever the conditions say; needs --reason and --store.")
@click.option("--reason", help="Why; kept with the version and in the audit log.")
@OUTCOME
@WHO
@TRACKING
def promote(
    name: str, version: str | None, basis: _Basis, force: bool, reason: str | None, as_json: bool, who: str,
    tracking_uri: str,
) -> None:  # fmt: skip
    """Make VERSION of NAME (by default its challenger) the champion, if every condition holds.

    It is compared with the champion on the newest rows that neither has learnt from. The one before stays under the
    alias previous, for router-ml rollback. A store is told in its audit log. Exits with 1 where a condition fails.

    Example: router-ml promote router 3 --logs logs --store router-ml.db
    """
    from router_ml import registry, rollout
    from training.challenge_report import conditions_text, judged_rows, log_report
    from training.gate import Verdict, golden_rows, taken_back

    if force and (not (reason or "").strip() or basis.store is None):
        raise InputError("--force needs --reason, which is kept, and --store, whose audit log is told")
    out = Outcome(as_json)
    out.stage("fetching the two bundles")
    wanted = registry.resolve(tracking_uri, name, "challenger").version if version is None else version
    found: Any = None
    verdict: Any = None
    with _both(tracking_uri, f"{name}/{wanted}", None) as (new, old):
        assert new.version is not None
        before = "" if old is None or old.version is None else old.version.version
        if before == new.version.version:
            raise InputError(f"{name} version {before} is the champion already")
        if basis.logs is None and basis.store is None and old is not None:
            raise InputError(
                "nothing to judge by: give the newest rows with --logs LOG or --store FILE, or overrule the gate with "
                "--force --reason TEXT --store FILE"
            )
        gate: dict[str, Any] | None = None
        try:
            if old is None:
                out.say(f"{name} has no champion: there is nothing to compare version {wanted} with")
                back = rollout.rolled_back(tracking_uri, name, new.version.version)
                verdict = Verdict((golden_rows(new.bundle), *([] if back is None else [taken_back(back)])))
            elif basis.logs is not None or not force:
                found, verdict = _judged(new, old, basis, tracking_uri, out.stage)
                out.stage("keeping the report with the version")
                log_report(tracking_uri, new.version, found, verdict)
            gate = None if verdict is None else verdict.to_json()
        except RouterError as error:
            if not force:
                raise
            gate = {"passed": False, "error": str(error)}
            click.echo(f"not judged: {error}", err=True)
        out.say("\n".join(conditions_text(verdict) if verdict else ["not judged"]))
        result = {
            "name": name, "version": wanted, "before": before or None, "bundle": new.version.tags.get("bundle_version"),
            "judged": None if found is None else judged_rows(found),
            "conditions": [] if verdict is None else [asdict(condition) for condition in verdict.conditions],
        }  # fmt: skip
        if verdict is not None and not verdict.passed and not force:
            failed = ", ".join(condition.name for condition in verdict.failed)
            out.end(f"{name} version {wanted} is not promoted: {failed}", {**result, "moved": False}, err=True)
            sys.exit(1)
        with out.move() as begins:
            moved = rollout.promote(
                tracking_uri,
                name,
                wanted,
                who=who,
                reason=reason,
                forced=force,
                gate=gate,
                store=basis.store,
                expected=before,
                begins=begins,
            )
    said = f"; version {moved.before} was it before" if moved.before is not None else ""
    out.end(
        f"{moved.name} version {moved.version} is now champion{said}{' (forced)' if force else ''}",
        {**result, "moved": True},
    )


@dataclass(frozen=True)
class _Named:
    """A bundle by its address: its directory, and its registered version where it has one."""

    bundle: Path
    version: ModelVersion | None


@contextmanager
def _both(uri: str, challenger: str, champion: str | None) -> Iterator[tuple[_Named, _Named | None]]:
    """Both bundles on disk; the champion is None where a registered router has none yet."""
    with tempfile.TemporaryDirectory(prefix="router-ml-") as folder:
        new = _named(uri, challenger, "challenger", Path(folder) / "challenger")
        if champion is None and new.version is None:
            yield new, None
            return
        try:
            assert champion is not None or new.version is not None
            address = champion or f"{new.version.name}@champion"  # type: ignore[union-attr]
            old = _named(uri, address, "champion", Path(folder) / "champion")
        except NoAliasError:
            if champion is not None:
                raise
            yield new, None
            return
        yield new, old


def _named(uri: str, address: str, alias: str, to: Path) -> _Named:
    from router_ml import registry

    if (Path(address) / "manifest.json").is_file() or Path(address).is_dir():
        return _Named(Path(address), None)
    name, slash, number = address.partition("/")
    if slash and number.isdecimal():
        version = next((v for v in registry.versions(uri, name) if v.version == number), None)
        if version is None:
            known = ", ".join(v.version for v in reversed(registry.versions(uri, name)))
            raise RegistryError(f"model {name!r} has no version {number!r} (it has: {known}): name one it has")
    elif slash:
        raise InputError(f"there is no bundle at {address}: give a bundle directory, NAME@ALIAS or NAME/VERSION")
    else:
        name, _, stated = address.partition("@")
        version = registry.resolve(uri, name, stated or alias)
    return _Named(registry.download(uri, name, version.version, to), version)


def _judged(
    new: _Named, old: _Named, basis: _Basis, uri: str, stage: Callable[[str], None] = lambda stage: None
) -> tuple[Any, Any]:
    """What the log says of the challenger, and the verdict; `stage` is told what begins."""
    from router_ml.rollout import rolled_back
    from training.challenge import Contender, challenge
    from training.gate import Limits, judge

    limits = Limits(**basis.limits)
    stage("reading the log")
    rows = log_rows(basis.logs, None if basis.logs is not None else basis.store)
    under = policy_under(basis.policy, basis.store)
    champion, challenger = Contender.load(old.bundle, under), Contender.load(new.bundle, under)
    what = f"judging the newest of the log's {len(rows):,} rows"
    stage(what)
    with stages(transient=True) as shown:

        def report(part: str, share: float) -> None:
            shown(part, share)
            stage(f"{what}: {part}, {share:.0%}")

        found = challenge(
            champion, challenger, rows, since=basis.since, cluster=basis.cluster, confidence=basis.confidence,
            report=report,
        )  # fmt: skip
    stage("holding the conditions against it")
    before = None if new.version is None else rolled_back(uri, new.version.name, new.version.version)
    verdict = judge(found, champion.router, challenger.router, bundle=new.bundle, limits=limits, rolled_back=before)
    return found, verdict


def policy_under(file: Path | None, store: str | None) -> Policy | None:
    """The policy that is judged under: the file's, else the one in force at the store's services, else the default."""
    from router_ml.audit import changes
    from router_ml.policy import Policy
    from router_ml.tables import existing, open_database

    if file is not None:
        return Policy.load(file)
    if store is None:
        return None
    noted = [change["after"] for change in changes(open_database(existing(store))) if change["kind"] == "policy"]
    if not noted:
        click.echo("the store has noted no policy: the default one is judged under, or give --policy", err=True)
        return None
    return Policy.from_json(noted[-1]["policy"], f"the policy in force at {noted[-1]['version']}")


def _margins(stated: tuple[str, ...]) -> dict[str, float]:
    """Margins by slice; "" is that of all the others."""
    found: dict[str, float] = {}
    for text in stated:
        name, _, number = text.rpartition(":")
        try:
            found[name] = float(number)
        except ValueError:
            raise InputError(f"--slice-margin {text}: give a number, or SLICE:NUMBER such as task=code:0.02") from None
    return found
