"""What the commands share: their options, errors in a line, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_ml.errors import MovedError, RouterError
from router_ml.writing import finite

if TYPE_CHECKING:
    from router_ml.logs import LogSummary

PathArg = click.Path(path_type=Path)
ExistingFile = click.Path(exists=True, dir_okay=False, path_type=Path)
TRACKING = click.option(
    "--tracking-uri",
    default="sqlite:///mlflow.db",
    show_default=True,
    envvar="MLFLOW_TRACKING_URI",
    help="MLflow's store.",
)
REGISTER = click.option("--register", "name", help="Register the bundle in MLflow under this name.")
ALIAS = click.option("--alias", help="The version's alias; champion where there is none yet, else challenger.")


class LogPath(click.Path):
    """A log on this disk, which has to exist, as a Path; or the URL of one, as it is."""

    def __init__(self) -> None:
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See the class."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


class Commands(click.Group):
    """Turns the project's own errors into one line on stderr and exit code 2, an interruption into one and 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; its errors end the program here."""
        try:
            return super().invoke(ctx)
        except RouterError as error:
            excluded = "".join(f"\n  {m}: {why}" for m, why in getattr(error, "excluded", {}).items())
            click.echo(f"router-ml: {error}{excluded}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as error:
            click.echo(
                f"router-ml: this command needs the package {error.name!r}: install router-ml[train] (or [serve])",
                err=True,
            )
            ctx.exit(2)
        except OSError as error:
            if not any(library in str(error) for library in ("libgomp", "libomp")):
                raise
            click.echo(
                f"router-ml: LightGBM cannot load the OpenMP library ({error}): install it (Debian and Ubuntu: "
                "apt-get install libgomp1; Fedora: dnf install libgomp; macOS: brew install libomp)",
                err=True,
            )
            ctx.exit(2)
        except KeyboardInterrupt:  # results are written aside and renamed, so that nothing has to be put right here
            click.echo(
                "router-ml: interrupted: nothing is left half-written, and the same command may be given again",
                err=True,
            )
            ctx.exit(130)


class Outcome:
    """What a command tells of its work: lines for a person, or one JSON object a line for a program."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def stage(self, stage: str, *, moving: bool = False) -> None:
        """What begins now, for a program that shows it; `moving`: from here on the registry may change."""
        if self.as_json:
            self._put({"stage": stage, "moving": moving})

    @contextmanager
    def move(self) -> Iterator[Callable[[], None]]:
        """What a move of the alias calls as it `begins`; a move that finds another champion then has moved nothing."""
        try:
            yield lambda: self.stage("moving the alias", moving=True)
        except MovedError:
            self.stage("another one was faster", moving=False)
            raise

    def say(self, line: str) -> None:
        """A line for a person."""
        if not self.as_json:
            click.echo(line)

    def end(self, line: str, result: Mapping[str, Any], *, err: bool = False) -> None:
        """What came of it: `line` for a person (on stderr with `err`), `result` with that line for a program."""
        if self.as_json:
            self._put({"result": finite({**result, "says": line})})
        else:
            click.echo(line, err=err)

    @staticmethod
    def _put(value: Mapping[str, Any]) -> None:
        click.echo(json.dumps(value, allow_nan=False))


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, told of the number done so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def stages(*, transient: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar per stage on stderr; one that is transient is gone when all is done, and no file sees it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    tasks: dict[str, TaskID] = {}
    console = Console(stderr=True)
    columns = TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn()
    unseen = transient and not console.is_terminal
    with Progress(*columns, console=console, transient=transient, disable=unseen) as progress:

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on stderr that something is worked on, and for how long."""
    with stages(transient=True) as report:
        report(what, 0.0)
        yield
        report(what, 1.0)


def say_log(summary: LogSummary, out: Path) -> None:
    """Says how many rows a log has, and why others were set aside."""
    click.echo(f"{summary.rows} rows in {out}, {summary.rejected} set aside")
    for reason, count in sorted(summary.reject_reasons.items(), key=lambda item: -item[1]):
        click.echo(f"  {count} x {reason}")
