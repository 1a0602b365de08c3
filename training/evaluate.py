"""How good are probabilities, and what do decisions cost and earn: scores, frontiers and their summaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
BINS = 15
SHARES = (0.90, 0.95, 0.98, 1.00)


@dataclass(frozen=True)
class Frontier:
    """What each setting of one dial would have cost and earned a request: arrays [k]; `share` [k, m] is the traffic.

    `single_cost` and `single_quality` [m] are those of always calling one model, on the same requests.
    """

    dial: Array
    cost_usd: Array
    quality: Array
    share: Array
    single_cost: Array
    single_quality: Array

    @property
    def best(self) -> int:
        """Position of the best single model."""
        return int(self.single_quality.argmax())


def scores(p_ok: Array, label: Array) -> dict[str, float]:
    """`auc`, `brier`, `log_loss` and `ece` (15 equal-mass bins), each per model over its known labels, then the mean.

    `p_ok` and `label` are [n, m], NaN labels are unknown. AUC leaves out a model without both classes.
    """
    from sklearn.metrics import roc_auc_score

    found: dict[str, list[float]] = {"auc": [], "brier": [], "log_loss": [], "ece": []}
    for j in range(label.shape[1]):
        known = ~np.isnan(label[:, j])
        p, y = p_ok[known, j].astype(np.float64), label[known, j].astype(np.float64)
        if not len(y):
            continue
        if 0.0 < y.mean() < 1.0:
            found["auc"].append(float(roc_auc_score(y, p)))
        found["brier"].append(float(np.mean((p - y) ** 2)))
        q = np.clip(p, 1e-6, 1 - 1e-6)
        found["log_loss"].append(float(-np.mean(y * np.log(q) + (1 - y) * np.log1p(-q))))
        found["ece"].append(calibration_error(p, y))
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def calibration_error(p: Array, y: Array, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass (Naeini et al., AAAI 2015) for one model's [n] rows."""
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(abs(p[at].mean() - y[at].mean()) * len(at) for at in parts) / len(order))


def choose_by_value(p_ok: Array, cost_usd: Array, willingness_to_pay_usd: float) -> IntArray:
    """`policy.choose` under a willingness to pay, for many requests whose candidates are all eligible; int64 [n]."""
    chosen: IntArray = np.argmin(cost_usd - willingness_to_pay_usd * p_ok, axis=1)
    return chosen


def choose_by_probability(p_ok: Array, cost_usd: Array, min_probability: float) -> IntArray:
    """`policy.choose` under a least probability, for many requests whose candidates are all eligible; int64 [n]."""
    meets = p_ok >= min_probability
    cheapest = np.where(meets, cost_usd, np.inf).argmin(axis=1)
    chosen: IntArray = np.where(meets.any(axis=1), cheapest, p_ok.argmax(axis=1))
    return chosen


def willingness_grid(cost_usd: Array, points: int = 400) -> Array:
    """Dial settings from "always the cheapest" to "always the most probable" for expected costs [n, m]."""
    spread = float(np.ptp(cost_usd)) or 1e-6
    return np.concatenate([[0.0], np.geomspace(spread * 1e-3, spread * 1e6, points - 1)])


def frontier(p_ok: Array, expected_cost: Array, cost_usd: Array, quality: Array, *, by: str = "value") -> Frontier:
    """Sweeps one dial over requests whose outcomes are all known; all inputs are [n, m].

    The router sees `p_ok` and `expected_cost`; it is charged `cost_usd` and earns `quality`. `by` is the dial: "value"
    (willingness to pay) or "probability" (least probability).
    """
    if by == "value":
        dials = willingness_grid(expected_cost)
    else:
        dials = np.unique(np.concatenate([np.linspace(0, 1, 201), np.quantile(p_ok, np.linspace(0, 1, 301))]))
    rows = np.arange(len(p_ok))
    choose = choose_by_value if by == "value" else choose_by_probability
    cost, earned, share = [], [], []
    for dial in dials:
        chosen = choose(p_ok, expected_cost, float(dial))
        cost.append(cost_usd[rows, chosen].mean())
        earned.append(quality[rows, chosen].mean())
        share.append(np.bincount(chosen, minlength=p_ok.shape[1]) / len(rows))
    return Frontier(
        dials, np.array(cost), np.array(earned), np.array(share), cost_usd.mean(axis=0), quality.mean(axis=0)
    )


def cost_at(front: Frontier, shares: tuple[float, ...] = SHARES) -> dict[str, float]:
    """The least mean cost, as a share of the best single model's, that reaches a share of that model's quality.

    Always calling the best single model is one of the settings, so no value is above 1.
    """
    best_cost, best_quality = float(front.single_cost[front.best]), float(front.single_quality[front.best])
    out = {}
    for share in shares:
        enough = front.quality >= share * best_quality
        least = float(front.cost_usd[enough].min()) if enough.any() else best_cost
        out[f"{share:g}" if share < 1 else "1.0"] = min(least, best_cost) / best_cost
    return out


def aiq_log(front: Frontier, points: int = 400) -> float:
    """Mean over log cost, between the cheapest and the dearest single model, of the best quality reached by then.

    Where no setting is that cheap, the cheapest model's quality counts. (The idea of RouterBench's AIQ, arXiv
    2403.12031, on a logarithmic axis.)
    """
    cost = np.append(front.cost_usd, front.single_cost[front.best])
    order = np.argsort(cost, kind="stable")
    reached = np.maximum.accumulate(np.append(front.quality, front.single_quality[front.best])[order])
    at = np.geomspace(front.single_cost.min(), front.single_cost.max(), points)
    position = np.searchsorted(cost[order], at, side="right") - 1
    floor = front.single_quality[front.single_cost.argmin()]
    return float(np.where(position >= 0, reached[np.maximum(position, 0)], floor).mean())


def strong_weak(score: Array, strong: Array, weak: Array) -> dict[str, float]:
    """RouteLLM's measures (arXiv 2406.18665, section 4): `apgr`, `cpt50` and `cpt80`; all inputs are [n].

    Requests go to the strong model in descending order of `score`; at each share of strong calls the performance gap
    recovered is (quality - weak) / (strong - weak).
    """
    order = np.argsort(-score, kind="stable")
    n = len(order)
    gain = np.concatenate([[0.0], np.cumsum((strong - weak)[order].astype(np.float64))]) / n
    recovered = gain / (strong.mean() - weak.mean())
    calls = np.arange(n + 1) / n
    return {
        "apgr": float(np.trapezoid(recovered, calls)),
        "cpt50": float(calls[np.argmax(recovered >= 0.5)]),
        "cpt80": float(calls[np.argmax(recovered >= 0.8)]),
    }
