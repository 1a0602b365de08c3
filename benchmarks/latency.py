"""Time of one decision, in process: `Router.decide` on 13 candidates over real prompts, split by stage.

    python -m benchmarks.latency --json OUT

The router is trained on MMLU-Pro (13 models, 7,000 requests of seed 0); the prompts are 300 that it has not seen, a
third each of MMLU-Pro, MMLU and GSM8K, so that their length is like that of real traffic (median some 300 characters).
A virtual processor's speed wanders by half from second to second. So the requests are timed in twelve blocks, a fixed
loop of plain Python before and after each; `decide_us` is over all blocks, `decide_us.quiet` over the third in which
that loop, not the router, was fastest. `first_sight_us` is the first decision on half of the prompts, after a warm-up
on words of the other half: words that were never seen have to be cut into pieces. Microseconds of wall clock.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.problems import load_problem
from benchmarks.results import write_results
from features.featurizer import CandidateFeaturizer
from features.load import load_router, save_router
from features.text import request_text, text_statistics, words
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.quality import LearnedEstimator
from router_ml.router import Router
from router_ml.types import RouteRequest
from training.encoders import ENCODERS
from training.fit import fit
from training.matrix import read_matrix

BLOCKS = 12
WARM_UP_S = 3.0
"""A virtual processor that was idle takes seconds to come up to speed; a gateway's router is not idle."""
SOURCES = ("mmlu_pro", "routellm_mmlu", "routellm_gsm8k")


def real_prompts(folder: Path, count: int) -> list[str]:
    """`count` prompts of the published data, a third of each set; those of MMLU-Pro are not in the training split."""
    problem = load_problem("mmlu_pro", folder)
    unseen = [problem.data.requests[i].messages[0].text for i in problem.split(0)[1]]
    sets = [unseen] + [read_matrix(folder / f"{s}.parquet", _cards(folder)).prompts for s in SOURCES[1:]]
    rng = np.random.default_rng(0)
    parts = [[texts[i] for i in rng.permutation(len(texts))[: -(-count // 3)]] for texts in sets]
    return [text for group in zip(*parts, strict=True) for text in group][:count]


def trained_bundle(folder: Path, to: Path, encoder: str) -> None:
    """A bundle trained on seed 0's MMLU-Pro rows."""
    problem = load_problem("mmlu_pro", folder)
    made = fit(problem.data.take(problem.split(0)[0]), encoder=encoder)
    save_router(to, made.estimator, {"quality_threshold": 0.5, "log_sha256": "", "metrics": {}})


def measure(router: Router, requests: list[RouteRequest], repeats: int) -> dict[str, Any]:
    """Percentiles of the whole decision and of each stage, timed one after another so that each finds the caches so."""
    first_sight = _first_sight(router, requests)
    whole = _time([lambda r=r: router.decide(r) for r in requests], repeats)
    estimator = router.estimator
    assert isinstance(estimator, LearnedEstimator)
    featurizer = estimator.featurizer
    assert isinstance(featurizer, CandidateFeaturizer)
    own, now = featurizer.requests, time.perf_counter_ns
    stages: dict[str, list[int]] = {}

    def lap(name: str, since: int) -> int:
        stages.setdefault(name, []).append(now() - since)
        return now()

    for _ in range(repeats):
        for request in requests:
            t = now()
            text = request_text(request)
            text_words = words(text)
            t = lap("words", t)
            statistics = text_statistics(request, text, text_words)
            t = lap("statistics", t)
            tokens = own.encoder.token_ids(text_words)
            embedding = own.encoder.embed(tokens)
            t = lap("embedding", t)
            kernel = own.kernel_map.apply(embedding, statistics)
            t = lap("kernel", t)
            term_ids = own.lexicon.term_ids(tokens)
            t = lap("terms", t)
            featurizer.heads.apply(kernel, embedding, term_ids, own.lexicon)
            lap("heads", t)
            features = featurizer.transform(request)
            t = now()
            estimate = estimator.score(features)
            t = lap("booster_and_calibration", t)
            cost = router.expected_cost(request, estimate)
            router.constraints.eligible(request, router.policy, cost, estimate.input_tokens)
            lap("cost_and_constraints", t)
    return {
        "decide_us": whole,
        "first_sight_us": first_sight,
        "stages_us": {name: percentiles(v) for name, v in stages.items()},
    }


def _first_sight(router: Router, requests: list[RouteRequest]) -> dict[str, float]:
    """Each request's first decision, after three seconds of decisions on the words of the others, shuffled."""
    rng = np.random.default_rng(1)
    seen = " ".join(request.messages[0].text for request in requests[::2]).split()
    others = [request_of(prompt=" ".join(rng.permutation(seen)[:60])) for _ in range(100)]
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        for request in others:
            router.decide(request)
    taken = []
    for request in requests[1::2]:
        started = time.perf_counter_ns()
        router.decide(request)
        taken.append(time.perf_counter_ns() - started)
    return percentiles(taken)


def _time(calls: list[Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Times every call `repeats` times in each of `BLOCKS` blocks, with the fixed loop before and after each block."""
    gc.collect()
    gc.freeze()  # as the service does: the bundle is not walked by the collector again
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        for call in calls:
            call()
    blocks: list[tuple[float, list[int]]] = []
    before = reference_us()
    for _ in range(BLOCKS):
        taken = []
        for _ in range(repeats):
            for call in calls:
                started = time.perf_counter_ns()
                call()
                taken.append(time.perf_counter_ns() - started)
        after = reference_us()
        blocks.append((max(before, after), taken))
        before = after
    blocks.sort(key=lambda block: block[0])
    quiet = blocks[: BLOCKS // 3]
    return {
        **percentiles([t for _, taken in blocks for t in taken]),
        "reference_us": [round(reference) for reference, _ in blocks],
        "quiet": {**percentiles([t for _, taken in quiet for t in taken]), "reference_us": round(quiet[-1][0])},
    }


def reference_us() -> float:
    """Median time of a fixed piece of plain Python, µs: says how fast the machine is just now."""
    taken = []
    for _ in range(50):
        started = time.perf_counter_ns()
        total = 0
        for i in range(10_000):
            total += i
        taken.append(time.perf_counter_ns() - started)
    return float(np.median(taken)) / 1000.0


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    values = np.array(nanoseconds) / 1000.0
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "mean": float(values.mean()),
    }


def one_thread(module: str) -> None:
    """Starts this process again as `module` with one thread, as the service runs: libraries read it when they load."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if any(os.environ.get(name) != "1" for name in threads):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **threads})


def _cards(folder: Path) -> Catalog:
    return Catalog.load(folder / "catalog.json")


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option(
    "--bundle", type=click.Path(path_type=Path, exists=True), help="A trained bundle, instead of training one."
)
@click.option("--requests", "count", default=300, show_default=True, type=click.IntRange(3))
@click.option("--repeats", default=4, show_default=True, type=click.IntRange(1))
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
def main(data: Path, bundle: Path | None, count: int, repeats: int, encoder: str, json_path: Path | None) -> None:
    one_thread("benchmarks.latency")
    console = Console()
    if not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR")
    prompts = real_prompts(data, count)
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            with console.status("training a router on MMLU-Pro"):
                trained_bundle(data, bundle, encoder)
        router = load_router(bundle)
    found: dict[str, Any] = measure(router, [request_of(prompt=p) for p in prompts], repeats)
    lengths = [len(p) for p in prompts]
    found |= {
        "candidates": len(router.catalog),
        "prompts": {"count": len(prompts), "median_chars": float(np.median(lengths)), "max_chars": max(lengths)},
        "machine": platform.processor() or platform.machine(),
    }
    table = Table("stage", "p50 µs", "p99 µs", title=f"{len(router.catalog)} candidates, {len(prompts)} prompts")
    for name, value in {
        "decide": found["decide_us"],
        "first sight": found["first_sight_us"],
        **found["stages_us"],
    }.items():
        table.add_row(name, f"{value['p50']:.0f}", f"{value['p99']:.0f}")
    console.print(table)
    whole, quiet = found["decide_us"], found["decide_us"]["quiet"]
    console.print(
        f"the fixed loop took {whole['reference_us'][0]} to {whole['reference_us'][-1]} µs; in the quiet third of the "
        f"blocks (at most {quiet['reference_us']}) a decision took {quiet['p50']:.0f} and {quiet['p99']:.0f}"
    )
    if json_path:
        write_results(console, json_path, found)


if __name__ == "__main__":
    main()
