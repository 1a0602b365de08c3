"""Populations that logs are drawn from: requests of which every model's outcome is known, under a logging policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.problems import Problem, logged
from benchmarks.quality import THRESHOLD
from router_ml.catalog import Catalog
from router_ml.logs import read_log
from router_ml.types import RouteRequest
from training import simulate, world
from training.dataset import FAILURES, build_dataset
from training.evaluate import choose_by_value
from training.fit import Fit, fit
from training.logged import Logged, requests_of
from training.outcomes import draw_models, logging_propensities
from training.slices import context_of, slices_of
from training.train import expected_costs

Array = npt.NDArray[np.float64]
WORTH = 20.0  # what an acceptable answer is worth to the target, in the best single model's mean cost
EXPLORES = 0.02
LOGGER_EXPLORES = 0.2
BAD_FEEDBACK = 1.5
CARES = np.array([0.6, 0.35, 0.5, 0.45, 0.4])  # of tenants, how often they give feedback
NOTICED = np.array([1.0, 1.0, 0.9, 0.8, 0.8, 0.6])  # of models: people answer the dear ones


@dataclass(frozen=True)
class Population:
    """What logs are drawn from: N requests with every model's outcome; arrays [N, m] unless they say otherwise.

    `session` [N] groups the requests that are drawn together; `feedback` is the probability that an outcome is told,
    which an outcome of 0 multiplies by `ratio`.
    """

    catalog: Catalog
    outcomes: dict[str, Array]
    propensity: Array
    target: Array
    baseline: Array
    predictions: dict[str, Array]
    eligible: npt.NDArray[np.bool_]
    session: npt.NDArray[np.int64]
    slices: pl.DataFrame
    context: Array
    feedback: Array | None = None
    ratio: float = 1.0

    def truth(self, metric: str, *, paired: bool = False, rows: npt.NDArray[np.bool_] | None = None) -> float:
        """The target's value a request, or its difference to the baseline; of all requests or where `rows` says."""
        policy = self.target - self.baseline if paired else self.target
        values = (policy * self.outcomes[metric]).sum(axis=1)
        return float(values.mean() if rows is None else values[rows].mean())

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Logged, npt.NDArray[np.int64]]:
        """A log of some n requests, whole sessions with replacement, and which requests they are."""
        order = np.argsort(self.session, kind="stable")
        _, starts, sizes = np.unique(self.session[order], return_index=True, return_counts=True)
        chosen = rng.integers(0, len(sizes), max(round(n / sizes.mean()), 1))
        cluster = np.repeat(np.arange(len(chosen)), sizes[chosen])
        first = np.repeat(np.cumsum(sizes[chosen]) - sizes[chosen], sizes[chosen])
        rows = order[starts[chosen][cluster] + np.arange(len(cluster)) - first]
        at = np.arange(len(rows)), draw_models(self.propensity[rows], rng)
        metrics = {name: values[rows][at] for name, values in self.outcomes.items()}
        if self.feedback is not None:
            told = self.feedback[rows][at] * np.where(metrics["quality"] == 0, self.ratio, 1.0)
            metrics["quality"] = np.where(rng.random(len(rows)) < told, metrics["quality"], np.nan)
        log = Logged(
            self.catalog, at[1], metrics, self.propensity[rows][at], self.eligible[rows], cluster,
            pl.Series("time", np.arange(len(rows))), self.slices[rows], self.context[rows],
        )  # fmt: skip
        return log, rows


def best_of(values: Array, eligible: npt.NDArray[np.bool_], share: float = 0.0) -> Array:
    """The policy [n, m] of the eligible model of the highest value, [n, m] or [m]; with `share` any eligible one."""
    policy = share * eligible / eligible.sum(axis=1, keepdims=True)
    policy[np.arange(len(eligible)), np.where(eligible, values, -np.inf).argmax(axis=1)] += 1.0 - share
    return policy


def learned_logging(made: Fit, requests: list[RouteRequest], eligible: npt.NDArray[np.bool_]) -> Array:
    """A router's softmax over its log odds, with a share drawn evenly; [n, m]."""
    p = np.clip(np.stack([e.p_ok for e in made.estimator.estimate_many(requests)]).astype(np.float64), 1e-3, 1 - 1e-3)
    odds = np.where(eligible, 4.0 * np.log(p / (1 - p)), -np.inf)
    softmax = np.exp(odds - odds.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    return (1 - LOGGER_EXPLORES) * softmax + LOGGER_EXPLORES * eligible / eligible.sum(axis=1, keepdims=True)


def outcome_populations(problem: Problem, encoder: str, seed: int = 0) -> dict[str, Population]:
    """The test rows of an outcome matrix under three logging policies; the target has learnt from its training rows."""
    train_rows, test_rows = problem.split(seed)
    train, test = problem.data.take(train_rows), problem.data.take(test_rows)
    assert problem.cost_usd is not None
    router = fit(train, threshold=THRESHOLD, encoder=encoder, seed=seed)
    early = logged(train.take(np.arange(len(train) // 2)), "uniform", seed)
    logger = fit(early, threshold=THRESHOLD, encoder=encoder, seed=seed)
    estimates = router.estimator.estimate_many(test.requests)
    p_ok = np.stack([e.p_ok for e in estimates]).astype(np.float64)
    cost = expected_costs(estimates, test.catalog).astype(np.float64)
    best = int(train.labels(THRESHOLD).mean(axis=0).argmax())
    eligible = np.ones_like(p_ok, dtype=bool)
    greedy = np.eye(p_ok.shape[1])[choose_by_value(p_ok, cost, WORTH * cost[:, best].mean())]
    quality = test.quality.astype(np.float64)
    lengths = np.array([len(r.messages[-1].text) for r in test.requests], dtype=np.float64)
    third = np.searchsorted(np.quantile(lengths, [1 / 3, 2 / 3]), lengths)
    slices = pl.DataFrame({"length": np.array(["short", "middle", "long"])[third]})
    population = Population(
        catalog=test.catalog,
        outcomes={"quality": quality, "cost_usd": problem.cost_usd[test_rows].astype(np.float64)},
        propensity=logging_propensities(quality, "uniform"),
        target=(1 - EXPLORES) * greedy + EXPLORES * eligible / eligible.shape[1],
        baseline=np.tile(np.eye(p_ok.shape[1])[best], (len(quality), 1)),
        predictions={"quality": p_ok, "cost_usd": cost},
        eligible=eligible,
        session=np.arange(len(quality)),
        slices=slices,
        context=context_of(slices, lengths / 4),
    )
    return {
        "uniform": population,
        "mostly-best": replace(population, propensity=logging_propensities(quality, "mostly-best", best=best)),
        "learned": replace(population, propensity=learned_logging(logger, test.requests, eligible)),
    }


def simulated_populations(rows: int, seed: int = 0) -> dict[str, Population]:
    """Simulated sessions with every candidate's outcome; the target has learnt from another such log."""
    catalog = simulate.SIMULATED_CATALOG
    with TemporaryDirectory() as folder:
        made = Path(folder)
        simulate.simulate(rows // 4, made / "train", seed=seed + 1, logging="uniform", feedback_rate=1.0)
        simulate.simulate(rows, made / "all", seed=seed + 2, logging="full", feedback_rate=1.0)
        train, log = read_log(made / "train"), read_log(made / "all")
        one = log.unique("request_id", keep="first", maintain_order=True)
        p = simulate.true_quality(made / "all", one["request_id"])
    true = p.select(f"p/{model}" for model in catalog.ids).to_numpy().astype(np.float64)
    n, m = true.shape
    number = dict(zip(one["request_id"], range(n), strict=True))
    at = log["request_id"].replace_strict(number).to_numpy(), log["model"].replace_strict(catalog.index).to_numpy()
    eligible = np.zeros((n, m), dtype=bool)
    eligible[at] = True
    quality, cost = np.zeros((n, m)), np.zeros((n, m))
    failed = log["status"].is_in(FAILURES).to_numpy()
    quality[at] = np.where(failed, 0.0, log["quality"].fill_null(np.nan).to_numpy())
    # Who cancelled would have said something all the same.
    quality = np.where(np.isnan(quality), (np.random.default_rng(seed).random((n, m)) < true) * 1.0, quality)
    cost[at] = log["cost_usd"].to_numpy()
    router = fit(build_dataset(train, catalog), threshold=THRESHOLD, encoder="lexical", seed=seed)
    requests = requests_of(one)
    estimates = router.estimator.estimate_many(requests)
    p_ok = np.stack([e.p_ok for e in estimates]).astype(np.float64)
    expected = expected_costs(estimates, catalog).astype(np.float64)
    best = catalog.index[world.BEST]
    value = WORTH * expected[:, best].mean() * p_ok - expected
    tenant = one["tenant"].replace_strict({name: i for i, name in enumerate(world.TENANTS)}).to_numpy()
    slices = slices_of(one)
    tokens = one["input_tokens"].cast(pl.Float64).to_numpy()
    population = Population(
        catalog=catalog,
        outcomes={"quality": quality, "cost_usd": cost},
        propensity=logging_propensities(np.where(eligible, true, np.nan), "mostly-best", best=best),
        target=best_of(value, eligible, EXPLORES),
        baseline=best_of(np.eye(m)[best] + 0.1 * true.mean(axis=0), eligible),
        predictions={"quality": p_ok, "cost_usd": expected},
        eligible=eligible,
        session=one["session"].rank("dense").cast(pl.Int64).to_numpy(),
        slices=slices,
        context=context_of(slices, tokens),
        feedback=CARES[tenant][:, None] * NOTICED,
    )
    return {"simulator": population, "selected": replace(population, ratio=BAD_FEEDBACK)}
