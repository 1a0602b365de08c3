"""One small, real run of `router-ml demo`, shared by every test that looks at what a demo leaves behind."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Demo:
    """What a demo printed, and the folder it wrote; `folder` is where the command ran."""

    folder: Path
    out: Path
    said: str


def small_demo(factory: pytest.TempPathFactory) -> Demo:
    """Simulated traffic, few rows, the encoder that needs nothing; once a session, whoever asks first."""
    return _in(factory.getbasetemp() / "small-demo")


@functools.cache
def _in(folder: Path) -> Demo:
    folder.mkdir()
    return Demo(folder, folder / "demo", run_demo(folder, "--rows", "1500", "--encoder", "lexical"))


def run_demo(folder: Path, *options: str) -> str:
    """What `router-ml demo` prints, run in `folder`; fails with its last words when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "router_ml.cli", "demo", *options],
        cwd=folder,
        env=os.environ | {"COLUMNS": "220"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def table_rows(said: str) -> list[list[str]]:
    """The cells of the first table's rows that begin something, in the order printed."""
    lines = [line for line in said.splitlines() if line.startswith("│")]
    return [cells for line in lines if (cells := [cell.strip() for cell in line.strip("│").split("│")])[1:2] != [""]]
