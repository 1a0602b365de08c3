"""Time of another router's decision: `paretobandit`'s `route()` with all-MiniLM-L6-v2, in a process of its own.

    python -m benchmarks.paretobandit --prompts prompts.json --catalog catalog.json

It embeds every prompt with the sentence transformer (its default), reduces it by its own PCA and picks an arm by
LinUCB. It gets our catalogue's prices, and torch as many threads as torch takes by itself. Prints JSON, microseconds.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import click
import numpy as np

from router_ml.catalog import Catalog
from training.encoders import find_minilm


def measure(prompts: list[str], catalog: Catalog, repeats: int) -> dict[str, float]:
    """Percentiles of `route()` over the prompts, the first pass not counted."""
    import pareto_bandit
    from pareto_bandit import BanditRouter

    logging.disable(logging.WARNING)
    registry = {
        card.id: {"input_cost_per_m": card.input_usd_per_mtok, "output_cost_per_m": card.output_usd_per_mtok}
        for card in catalog
    }
    shipped = Path(pareto_bandit.__file__).parent / "data" / "artifacts" / "pca_25.joblib"
    router = BanditRouter.create(registry, str(find_minilm()), priors="none", pca_path=shipped, bandit_seed=0)
    taken = []
    for turn in range(repeats + 1):
        for prompt in prompts:
            started = time.perf_counter_ns()
            router.route(prompt)
            if turn:
                taken.append((time.perf_counter_ns() - started) / 1e3)
    return {"p50_us": float(np.percentile(taken, 50)), "p99_us": float(np.percentile(taken, 99))}


@click.command(help=__doc__)
@click.option("--prompts", required=True, type=click.Path(path_type=Path, exists=True), help="A JSON array of texts.")
@click.option("--catalog", required=True, type=click.Path(path_type=Path, exists=True), help="Model cards, JSON.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1))
def main(prompts: Path, catalog: Path, repeats: int) -> None:
    click.echo(json.dumps(measure(json.loads(prompts.read_text()), Catalog.load(catalog), repeats)))


if __name__ == "__main__":
    main()
