"""What a challenger's shadow costs beside the champion's decision, in process.

    python -m benchmarks.shadow --json OUT

Two bundles are trained on MMLU-Pro (13 models), the challenger on other requests than the champion. Each of 300 real
prompts is decided by the champion, queued for the challenger and scored as the service does after its answer: the
challenger's decision, the comparison, the row in the spool. Both are timed one after the other, so a machine whose
speed wanders is as slow for either; `overhead` is the ratio of the medians, `overhead_mean` of the means. `canary_us`
is a decision for which both bundles are asked before the answer. Microseconds of wall clock, one thread.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.latency import WARM_UP_S, one_thread, percentiles, real_prompts, reference_us
from benchmarks.problems import load_problem
from benchmarks.results import write_results
from features.load import save_router
from router_ml.canary import CanaryPolicy, assign, mixture
from router_ml.conversation import request_of
from router_ml.store import Store
from router_ml.types import RouteRequest
from serving.challenger import Arms, Challenger
from serving.live import LiveRouter
from serving.shadow import Shadow
from training.fit import fit


def trained(data: Path, folder: Path, rows: int) -> tuple[Path, Path]:
    """Champion and challenger, each of so many training rows of seed 0."""
    problem = load_problem("mmlu_pro", data)
    train = problem.split(0)[0]
    made = []
    for name, part in (("champion", train[:rows]), ("challenger", train[rows : 2 * rows])):
        save_router(folder / name, fit(problem.data.take(part)).estimator, {"quality_threshold": 0.5})
        made.append(folder / name)
    return made[0], made[1]


async def measure(
    arms: Arms, shadow: Shadow, requests: list[RouteRequest], repeats: int, warm_up_s: float = WARM_UP_S
) -> dict[str, Any]:
    """Percentiles of both, and their ratios."""
    now = time.perf_counter_ns
    taken: dict[str, list[int]] = {"decide_us": [], "shadow_us": [], "canary_us": []}
    policy = CanaryPolicy(share=0.05, by="request")
    champion, until = arms.champion.router, time.perf_counter() + warm_up_s
    while time.perf_counter() < until:
        for request in requests:
            arms.quiet_challenger.decide(request)
            champion.decide(request)
    references = []
    for _ in range(repeats):
        references.append(reference_us())
        for request in requests:
            started = now()
            served, _estimate = champion.decide_with_estimate(request)
            decided = now()
            shadow.add(arms, request, None, {}, served)
            await shadow.score_next()
            scored = now()
            other = await shadow.decide(arms.challenger, arms.quiet_challenger, request, None, {}, 1.0)
            own = champion.decide(request)
            assert not isinstance(other, str)
            mixture(assign(policy, "v", request, 0.5), own, other.decision)
            for name, value in zip(taken, (decided - started, scored - decided, now() - scored), strict=True):
                taken[name].append(value)
    found: dict[str, Any] = {name: percentiles(values) for name, values in taken.items()}
    for name, of in (("overhead", "p50"), ("overhead_mean", "mean")):
        found[name] = found["shadow_us"][of] / found["decide_us"][of]
    return found | {"reference_us": [round(min(references)), round(max(references))]}


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--rows", default=1500, show_default=True, type=click.IntRange(100), help="Training rows of each bundle.")
@click.option("--bundles", nargs=2, type=click.Path(path_type=Path, exists=True), help="Two bundles, instead.")
@click.option("--requests", "count", default=300, show_default=True, type=click.IntRange(3))
@click.option("--repeats", default=10, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
def main(
    data: Path, rows: int, bundles: tuple[Path, Path] | None, count: int, repeats: int, json_path: Path | None
) -> None:
    one_thread("benchmarks.shadow")
    console = Console()
    if not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR")
    with tempfile.TemporaryDirectory() as folder:
        with console.status("training two routers on MMLU-Pro"):
            first, second = bundles or trained(data, Path(folder), rows)
        challenger = Challenger(second)
        challenger.reload()
        arms = challenger.arms(LiveRouter(first).live)
        if arms is None:
            raise click.ClickException("the two bundles are the same one: give another")
        store = Store(f"{folder}/store.db", drain="process").start()
        requests = [request_of(prompt=prompt) for prompt in real_prompts(data, count)]
        gc.collect()
        gc.freeze()  # as the service does
        found = asyncio.run(measure(arms, Shadow(challenger, store), requests, repeats))
        store.close()
    table = Table("", "p50 µs", "p99 µs", "mean µs", title=f"{len(arms.champion.router.catalog)} candidates")
    for name in ("decide_us", "shadow_us", "canary_us"):
        table.add_row(name[:-3], *(f"{found[name][of]:.0f}" for of in ("p50", "p99", "mean")))
    console.print(table)
    console.print(f"overhead {found['overhead']:.2f} (means {found['overhead_mean']:.2f}), bar 1.5")
    if json_path:
        write_results(console, json_path, found)


if __name__ == "__main__":
    main()
