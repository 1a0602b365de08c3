"""A challenge as a person reads it: in the terminal, as one self-contained HTML page, as files, and in MLflow."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from router_ml.errors import RegistryError
from router_ml.registry import ModelVersion, connect, reported
from router_ml.writing import finite, write_aside
from training.challenge import BEST_SINGLE, Challenge
from training.challenge_plots import calibration_plot
from training.gate import Verdict
from training.policy_value import Estimate, PolicyValue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATION = "evaluation"
"""The folder among a version's artifacts in MLflow."""
_MOST_CHANGES = 15


def as_text(challenge: Challenge, verdict: Verdict | None = None) -> str:
    """The report for a terminal."""
    c = challenge
    lines = [
        f"challenger {c.challenger} against champion {c.champion}",
        f"  {c.n:,} of {c.considered:,} requests ({c.outcomes:,} outcomes), {c.oldest:%Y-%m-%d %H:%M} to "
        f"{c.newest:%Y-%m-%d %H:%M} UTC; {c.confidence:.0%} intervals, doubly robust",
        f"  under policy {' and '.join(dict.fromkeys(c.policies_in_force))}",
        *(f"  note: {note}" for note in (*c.notes, *c.quality.warnings)),
        f"  quality  {_said(c.quality, '+.4f')}",
        f"  cost     {_said(c.cost_usd, '+.3g')} USD a request",
        f"  {c.changed:.1%} of the requests would go to another model",
        "",
        *_table(
            ["policy", "quality", "", "cost, USD", ""],
            [
                [_named(name, c), *_cells(c.policies["quality"][name].headline, ".4f"),
                 *_cells(c.policies["cost_usd"][name].headline, ".3g")]
                for name in c.policies["quality"]
            ],
        ),
        "",
        *_table(
            ["slice", "n", "quality change", ""],
            [
                [f"{by}={name}", f"{value.n:,}", *_cells(value.headline, "+.3f")]
                for (by, name), value in c.slices.values.items()
            ],
        ),
        "",
        *_table(
            ["from", "to", "requests", "expected cost", "P(ok)", "quality change"],
            [
                [row["from"], row["to"], f"{row['n']:,} ({row['share']:.1%})", _move(row, "cost_usd", ".2g"),
                 _move(row, "p_ok", ".2f"), _cells(_estimate(row), "+.3f")[1] if row["quality"] is not None else ""]
                for row in c.changes.head(_MOST_CHANGES).iter_rows(named=True)
            ],
        ),
    ]  # fmt: skip
    if len(c.changes) > _MOST_CHANGES:
        lines.append(f"… and {len(c.changes) - _MOST_CHANGES} pairs more")
    if verdict is not None:
        lines += ["", *conditions_text(verdict)]
    return "\n".join(lines)


def conditions_text(verdict: Verdict) -> list[str]:
    """A line a condition."""
    return [f"{'holds ' if c.holds else 'FAILS '} {c.name}: {c.says}" for c in verdict.conditions]


def judged_rows(challenge: Challenge) -> dict[str, Any]:
    """What a challenge rests on, as JSON values: how many rows, of when, under which policies, and its notes."""
    c = challenge
    return {
        "champion": c.champion, "challenger": c.challenger, "n": c.n, "considered": c.considered,
        "outcomes": c.outcomes, "policies_in_force": list(c.policies_in_force), "oldest": c.oldest.isoformat(),
        "newest": c.newest.isoformat(), "confidence": c.confidence, "changed": c.changed, "notes": list(c.notes),
    }  # fmt: skip


def as_json(challenge: Challenge, verdict: Verdict | None = None) -> dict[str, Any]:
    """Everything as JSON values: no number is not finite."""
    c = challenge
    frames = ("calibration", "frontier", "changes", "who")
    return {
        **judged_rows(c), "best_single": c.best_single,
        "quality": _value_json(c.quality), "cost_usd": _value_json(c.cost_usd),
        "policies": _rows(c.to_frame()), "slices": _rows(c.slices.to_frame()),
        "promise": {name: _value_json(value) for name, value in c.promise.items()},
        **{name: _rows(getattr(c, name)) for name in frames},
        "verdict": None if verdict is None else {"passed": verdict.passed, "conditions": _rows(verdict.to_frame())},
    }  # fmt: skip


def as_html(challenge: Challenge, verdict: Verdict | None = None, *, made: datetime | None = None) -> str:
    """One page that needs nothing beside it: no script, no font, no address outside."""
    from jinja2 import Environment

    page = files("training").joinpath("challenge.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cells": _cells, "said": _said, "move": _move, "estimate": _estimate}
    plots = {
        "frontier": challenge.plot(), "calibration": calibration_plot(challenge.calibration),
        "slices": challenge.slices.plot(),
    }  # fmt: skip
    return environment.from_string(page).render(
        c=challenge, verdict=verdict, made=made or datetime.now(UTC), named=lambda name: _named(name, challenge),
        plots={name: _svg(figure) for name, figure in plots.items()},
    )  # fmt: skip


def write_report(challenge: Challenge, to: Path, verdict: Verdict | None = None) -> list[Path]:
    """Writes report.html, report.json and a CSV per table into the folder `to`; returns the files."""
    to.mkdir(parents=True, exist_ok=True)
    tasks = pl.col("tasks").list.join(", ")
    frames = {
        "policies": challenge.to_frame(), "slices": challenge.slices.to_frame(), "frontier": challenge.frontier,
        "calibration": challenge.calibration, "changes": challenge.changes.with_columns(tasks), "who": challenge.who,
    }  # fmt: skip
    contents = {f"{name}.csv": frame.write_csv() for name, frame in frames.items()}
    contents["report.html"] = as_html(challenge, verdict)
    contents["report.json"] = json.dumps(as_json(challenge, verdict), indent=1, allow_nan=False) + "\n"
    for name, content in contents.items():
        write_aside(to / name, content)
    return [to / name for name in sorted(contents)]


def log_report(uri: str, version: ModelVersion, challenge: Challenge, verdict: Verdict | None = None) -> None:
    """Keeps the report with the version's MLflow run, under `evaluation/`, and its main figures as metrics.

    Raises RegistryError where MLflow does not take them, or the version has no run.
    """
    if version.run_id is None:
        raise RegistryError(f"version {version.version} of {version.name!r} has no run to keep the report with")
    numbers: dict[str, float] = {"evaluation/n": challenge.n, "evaluation/changed": challenge.changed}
    for name, value in (("quality_change", challenge.quality), ("cost_change", challenge.cost_usd)):
        if value.headline is not None:
            numbers |= {f"evaluation/{name}/{end}": n for end, n in value.headline._asdict().items()}
    if verdict is not None:
        numbers["evaluation/passed"] = float(verdict.passed)
    client = connect(uri)
    with reported(uri), tempfile.TemporaryDirectory(prefix="router-ml-") as folder:
        write_report(challenge, Path(folder), verdict)
        client.log_artifacts(version.run_id, folder, EVALUATION)
        for key, number in numbers.items():
            client.log_metric(version.run_id, key, number)


def _named(name: str, challenge: Challenge) -> str:
    return f"{name} ({challenge.best_single})" if name == BEST_SINGLE else name


def _said(value: PolicyValue, form: str) -> str:
    if value.headline is None:
        return value.why
    v, low, high, _ = value.headline
    return f"{v:{form}} ({low:{form}} to {high:{form}})"


def _cells(estimate: Estimate | None, form: str) -> list[str]:
    """The value, and its interval."""
    if estimate is None:
        return ["not identifiable", ""]
    return [f"{estimate.value:{form}}", f"{estimate.low:{form}} to {estimate.high:{form}}"]


def _estimate(row: dict[str, Any]) -> Estimate | None:
    return None if row["quality"] is None else Estimate(row["quality"], row["low"], row["high"], float("nan"))


def _move(row: dict[str, Any], name: str, form: str) -> str:
    ends = [row[f"{name}_{when}"] for when in ("before", "after")]
    return " → ".join("unknown" if end is None else f"{end:{form}}" for end in ends)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def _value_json(value: PolicyValue) -> dict[str, Any]:
    return {
        "identifiable": value.identifiable, "why": value.why, "n": value.n, "clusters": value.clusters,
        "identifiable_share": value.identifiable_share,
        "estimate": None if value.headline is None else finite(value.headline._asdict()),
        "support": finite(asdict(value.support)), "warnings": list(value.warnings),
    }  # fmt: skip


def _rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [finite(row) for row in frame.iter_rows(named=True)]


def _svg(figure: Figure) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "router-ml", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]  # without the declaration, which a page has no place for
