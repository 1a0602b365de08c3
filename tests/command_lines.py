"""Command lines as documents and help texts quote them, held against the commands that exist; nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.calibration import main as calibration
from benchmarks.cold_start import main as cold_start
from benchmarks.latency import main as latency
from benchmarks.learning_curve import main as learning_curve
from benchmarks.load import main as load
from benchmarks.ope import main as ope
from benchmarks.quality import main as quality
from benchmarks.scale import main as scale
from benchmarks.service import main as service
from benchmarks.sessions import main as sessions
from benchmarks.shadow import main as shadow
from benchmarks.tune import main as tune
from router_ml.cli import main as router_ml

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS: dict[str, click.Command] = {
    "router-ml": router_ml,
    "python -m benchmarks.quality": quality,
    "python -m benchmarks.scale": scale,
    "python -m benchmarks.latency": latency,
    "python -m benchmarks.load": load,
    "python -m benchmarks.cold_start": cold_start,
    "python -m benchmarks.learning_curve": learning_curve,
    "python -m benchmarks.calibration": calibration,
    "python -m benchmarks.tune": tune,
    "python -m benchmarks.ope": ope,
    "python -m benchmarks.service": service,
    "python -m benchmarks.sessions": sessions,
    "python -m benchmarks.shadow": shadow,
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def commands(command: click.Command = router_ml, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command of the program that does something, as (its name with its groups', itself)."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))
    else:
        yield " ".join(path), command


def mistakes(line: str, *, whole: bool = True) -> list[str]:
    """What is wrong with a command line; without `whole` it may leave out what the command requires."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        return [f"make has no {word}" for word in words[1:] if not _make_knows(word)]
    program = next((p for p in PROGRAMS if words[: len(p.split())] == p.split()), None)
    if program is None:
        return [f"no program {words[0]}"]
    rest = words[len(program.split()) :]
    command = PROGRAMS[program]
    # click keeps what a command's first context says of help options: it has to be the command's own.
    context = click.Context(command, info_name=program, **command.context_settings)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return [f"{context.command_path} has no command {rest[0]}"]
        command, context, rest = found, click.Context(found, parent=context, info_name=rest[0]), rest[1:]
    try:
        given, left, seen = command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        return [] if not whole and isinstance(error, click.MissingParameter) else [error.format_message()]
    if {"--help", "-h", "--version"} & set(rest):
        return []
    wrong = [f"{context.command_path} takes no {word}" for word in left] if not isinstance(command, click.Group) else []
    for parameter in command.params:
        value = given.get(str(parameter.name))
        if parameter not in seen or (isinstance(parameter, click.Argument) and not isinstance(value, str)):
            if whole and parameter.required:
                wrong.append(f"{context.command_path} needs {parameter.name}")
        elif isinstance(parameter.type, click.Choice | click.types.IntParamType | click.types.FloatParamType):
            for one in value if isinstance(value, list) else [value]:
                try:
                    parameter.type.convert(one, parameter, context)
                except click.UsageError as error:
                    wrong.append(error.format_message())
    return wrong


def options() -> set[str]:
    """Every option of every program."""
    every = [p for _, c in commands() for p in c.params] + [p for c in PROGRAMS.values() for p in c.params]
    return {name for p in every if isinstance(p, click.Option) for name in p.opts} | {"--help", "-h"}


def _make_knows(word: str) -> bool:
    name, given, _ = word.partition("=")
    return bool(re.search(rf"\$[({{]+{name}\b|\${name}\b", MAKEFILE)) if given else name in TARGETS
