"""The whole path in a few minutes: a log, a trained router in MLflow, a running service, requests routed over HTTP."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from features.text import request_text
from router_ml import registry
from router_ml.catalog import Catalog
from router_ml.errors import InputError, RouterError
from router_ml.logs import read_log_info
from training.encoders import ENCODERS, find_minilm
from training.evaluate import Frontier, cost_at, frontier
from training.local_service import local_service, send
from training.matrix import read_matrix
from training.outcomes import import_outcomes
from training.report import plot_frontier, publish
from training.simulate import simulate, true_quality
from training.train import Training, expected_costs, train

NAME = "router"
SHOWN = 10
_MARKER = ".router-ml-demo"
_WRITTEN = re.compile(
    r"\.router-ml-demo|\.?(log|bundle|serving-bundle)(\.\w+)*|(mlflow|decisions)\.db\S*|mlartifacts|service\.log|frontier\.png"
)


def run(*, data: Path | None, catalog: Path | None, out: Path, rows: int, encoder: str) -> None:
    """Runs the demo and leaves everything in `out`: log, bundle, MLflow's store, decisions, `frontier.png`.

    Raises InputError when `out` holds something else, and whatever the steps raise.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=140)  # a file has room for the tables
    _refuse_foreign(out)
    if encoder not in ENCODERS:
        raise InputError(f"unknown encoder {encoder!r}: choose one of {', '.join(ENCODERS)}")
    if data is not None:
        catalog = catalog or data.parent / "catalog.json"
        if not catalog.is_file():
            raise InputError(f"{data} needs model cards: give --catalog FILE, or put catalog.json beside it")
        cards = Catalog.load(catalog)
        read_matrix(data, cards)  # a file that cannot be used is refused before the last demo is cleared away
    if encoder == "static":
        find_minilm()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARKER).touch()
    started = time.perf_counter()

    console.rule("1  the log")
    with _progress() as report:
        if data is not None:
            report("import", 0.0)
            summary = import_outcomes(data, cards, out=out / "log", logging="full")
            report("import", 1.0)
        else:
            summary = simulate(rows, out / "log", progress=lambda done: report("simulate", done / rows))
    console.print(
        f"{summary.rows} rows of {data or 'simulated traffic'} in {out / 'log'}, {summary.rejected} set aside"
    )

    console.rule("2  learn, judge on the newest requests, register")
    cards_of_log = Catalog.from_json(read_log_info(out / "log")["catalog"])
    with _progress() as report:
        made = train(out / "log", cards_of_log, out=out / "bundle", encoder=encoder, report=report)
    held = made.metrics["held_out"]
    console.print(
        f"bundle {made.version}: {made.metrics['train_outcomes']} outcomes of {made.metrics['train_requests']} "
        f"requests; on {made.metrics['held_out_requests']} newer ones AUC {held['auc']:.3f}, "
        f"calibration error {held['ece']:.3f}"
    )
    uri = f"sqlite:///{(out / 'mlflow.db').resolve()}"
    with console.status("registering in MLflow"):
        version = publish(made, out / "bundle", tracking_uri=uri, name=NAME, alias="challenger")
        champion = registry.promote(uri, NAME, version.version)
    console.print(f"registered in MLflow as {NAME} version {version.version}, promoted to {champion.alias}")

    console.rule("3  serve and route")
    with _service(out, uri, console) as url:
        _route_some(made, url, console)

    console.rule("4  the frontier")
    _show_frontier(made, out, console, simulated=data is None)
    console.print(f"done in {time.perf_counter() - started:.0f} s; everything is in {out}")


def _refuse_foreign(out: Path) -> None:
    """Raises InputError when `out` holds anything that no earlier demo wrote: a demo begins by emptying it."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists()):
        raise InputError(f"{out} is not an earlier demo's folder: choose another --out")
    foreign = sorted(p.name for p in out.iterdir() if not _WRITTEN.fullmatch(p.name))
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which no demo wrote: move it, or choose another --out")


def _route_some(made: Training, url: str, console: Console) -> None:
    """Sends held-out requests, easy and hard ones, and compares with always using the best model."""
    held, catalog = made.held_out, made.held_out.catalog
    p_ok, _ = made.judged
    best = int(np.argmax(p_ok.mean(axis=0)))
    # From the easiest to the hardest for the best model, evenly: what the service answers is not looked at here.
    by_ease = np.argsort(-p_ok[:, best], kind="stable")
    picked = by_ease[np.linspace(0, len(by_ease) - 1, SHOWN).astype(int)]
    table = Table(
        "request",
        Column("chosen model", overflow="fold", min_width=13),
        "P(ok)",
        "cost, USD",
        "why",
        f"always {catalog.ids[best]}, USD",
        show_lines=True,
    )
    spent, always = 0.0, 0.0
    for i in picked:
        request = held.requests[int(i)]
        answer = send(f"{url}/route", {"messages": [{"role": m.role, "content": m.text} for m in request.messages]})
        costs = {c["model"]: c["expected_cost_usd"] for c in answer["candidates"]}
        first = answer["candidates"][0]
        reference = costs.get(catalog.ids[best])
        if reference is None:
            raise RouterError(f"the service left {catalog.ids[best]} out: {answer['excluded']}")
        spent, always = spent + first["expected_cost_usd"], always + reference
        text = " ".join(request_text(request).split())
        table.add_row(
            text[:70] + ("…" if len(text) > 70 else ""), answer["model"], f"{first['p_ok']:.2f}",
            f"{first['expected_cost_usd']:.6f}", answer["reason"], f"{reference:.6f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("together", "", "", f"{spent:.6f}", f"{spent / always:.0%} of always the best", f"{always:.6f}")
    console.print(table)


def _show_frontier(made: Training, out: Path, console: Console, *, simulated: bool) -> None:
    front = _true_frontier(made, out) if simulated else made.frontier
    if front is None:
        console.print("no frontier: too few held-out requests have every model's outcome and cost")
        return
    models = made.held_out.catalog.ids
    plot_frontier(front, models, out / "frontier.png")
    table = Table(
        "share of the best model's quality",
        "cost, share of the best model's",
        title=f"against always {models[front.best]}",
    )
    for share, least in cost_at(front).items():
        table.add_row(f"{float(share):.0%}", f"{least:.1%}")
    console.print(table)
    source = "the simulation's true qualities" if simulated else "held-out outcomes"
    console.print(f"from {source}; plot: {out / 'frontier.png'}")


def _true_frontier(made: Training, out: Path) -> Frontier:
    """The log has one outcome a request; the simulation knows what every model would have done."""
    held = made.held_out
    truth = true_quality(out / "log", held.ids)
    quality = truth.select([f"p/{m}" for m in held.catalog.ids]).to_numpy()
    cost = truth.select([f"cost_usd/{m}" for m in held.catalog.ids]).to_numpy()
    estimates = made.fit.estimator.estimate_many(held.requests)
    return frontier(made.judged[0], expected_costs(estimates, held.catalog), cost, quality)


@contextmanager
def _service(out: Path, uri: str, console: Console) -> Iterator[str]:
    """The real service on what the registry's alias points to."""
    options = [
        "--model", f"{NAME}@{registry.CHAMPION}", "--tracking-uri", uri, "--cache", str(out / "serving-bundle"),
        "--store", str(out / "decisions.db"),
    ]  # fmt: skip
    with console.status("starting the service") as status, local_service(options, out / "service.log") as url:
        status.stop()
        console.print(f"service at {url}, decisions in {out / 'decisions.db'}")
        yield url


@contextmanager
def _progress() -> Iterator[Any]:
    tasks: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn()) as progress:

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report
