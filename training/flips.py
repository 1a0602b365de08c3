"""What new prices would change: the same requests decided under the old and the new catalogue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.price_file import aligned
from router_ml.router import Router
from router_ml.types import Estimate, RouteRequest
from training.logged import requests_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COSTS = ("old_usd", "stay_usd", "new_usd")


@dataclass(frozen=True)
class Flips:
    """Requests decided under two catalogues. `rows` has one a request: request_id, task, old_model, new_model, and the
    expected costs of a call in USD `old_usd` (old choice, old prices), `stay_usd` (old choice, new prices; null where
    the old choice may not serve any more) and `new_usd` (new choice, new prices).

    `requests` were decided of `of` in the log; `refused` of them no model may serve under one of the two.
    """

    rows: pl.DataFrame
    requests: int
    of: int
    refused: int

    @property
    def flipped(self) -> pl.DataFrame:
        """The requests that would go to another model, the largest difference of costs first."""
        other = self.rows.filter(pl.col("old_model") != pl.col("new_model"))
        return other.sort((pl.col("new_usd") - pl.coalesce("stay_usd", "old_usd")).abs(), descending=True)

    @property
    def share(self) -> float:
        """The share of requests that would go to another model."""
        return self.flipped.height / max(self.rows.height, 1)

    def to_frame(self) -> pl.DataFrame:
        """A row for each pair of old and new model: requests, and the sums of the three expected costs in USD."""
        sums = (pl.col("old_usd", "stay_usd", "new_usd")).sum()
        return (
            self.rows.group_by("old_model", "new_model")
            .agg(pl.len().alias("requests"), sums)
            .sort("requests", "old_model", "new_model", descending=[True, False, False])
        )

    def to_json(self, examples: int = 5) -> dict[str, Any]:
        """Counts, the share, the pairs of models and some requests that flip, for JSON."""
        counts = {"requests": self.requests, "of": self.of, "refused": self.refused, "share": self.share}
        return counts | {"pairs": self.to_frame().to_dicts(), "examples": self.flipped.head(examples).to_dicts()}

    def as_text(self, examples: int = 5) -> str:
        """The same in a few lines."""
        old, stay, new = (1000 * (self.rows[name].sum() / max(self.rows.height, 1)) for name in _COSTS)
        lines = [
            f"{self.flipped.height} of {self.rows.height} decisions flip ({self.share:.1%}; {self.requests:,} of the "
            f"log's {self.of:,} requests, {self.refused} of which no model may serve)",
            f"expected USD a thousand calls: {old:.4g} now, {stay:.4g} with the new prices and the same choices, "
            f"{new:.4g} with the new choices",
        ]
        for row in self.flipped.head(examples).iter_rows(named=True):
            usd = "not served" if row["stay_usd"] is None else f"{row['stay_usd']:.3g}"
            lines.append(
                f"  {row['request_id']}: {row['old_model']} to {row['new_model']}, {usd} to {row['new_usd']:.3g} USD"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The requests of each model before and after."""
        from matplotlib.figure import Figure

        counts = {
            when: dict(self.rows.group_by(column).len().iter_rows())
            for when, column in (("before", "old_model"), ("after", "new_model"))
        }
        models = sorted({model for of in counts.values() for model in of})
        figure = Figure(figsize=(7, 0.5 * len(models) + 1.5), layout="constrained")
        axes = figure.subplots()
        for at, (when, of) in enumerate(counts.items()):
            axes.barh([i + 0.2 - 0.4 * at for i in range(len(models))], [of.get(m, 0) for m in models], 0.4, label=when)
        axes.set_yticks(range(len(models)), models)
        axes.set_xlabel(f"requests of {self.requests:,}")
        axes.legend()
        return figure


class _Known(NamedTuple):
    """An estimator that has one estimate already: it does not depend on the prices of the catalogue."""

    known: Estimate

    def estimate(self, request: RouteRequest) -> Estimate:
        return self.known


def flips(
    router: Router, old: Catalog, new: Catalog, log: pl.DataFrame, *, sample: int | None = 2_000, seed: int = 0
) -> Flips:
    """Decides requests of the log by `router` under the prices of two catalogues, without exploring.

    The learner's estimates are the same under both, and clearances stay the bundle's: only prices and limits of tokens
    differ. Each request counts as its session's first. `sample` requests are drawn evenly (None: all that there are).
    Raises InputError where a catalogue lacks a model of the bundle, or the log has no texts.
    """
    texts = log.filter(pl.col("prompt").is_not_null() | pl.col("messages").is_not_null())
    requests = texts.unique("request_id", keep="first", maintain_order=True)
    if requests.is_empty():
        raise InputError("none of the log's rows has a prompt or messages: decisions cannot be made again")
    taken = requests if sample is None or sample >= requests.height else requests.sample(sample, seed=seed)
    still = replace(router, policy=router.policy.with_changes(exploration_rate=0.0, explore=()), draw=lambda: 1.0)
    before = replace(still, catalog=aligned(old, router.catalog, "old"))
    after = replace(still, catalog=aligned(new, router.catalog, "new"))
    rows: list[dict[str, Any]] = []
    refused = 0
    for of, request in zip(taken.select("request_id", "task").iter_rows(named=True), requests_of(taken), strict=True):
        known = _Known(router.estimator.estimate(request))
        try:
            first, _ = before.decide_with_estimate(request, estimator=known)
            then, _ = after.decide_with_estimate(request, estimator=known)
        except NoEligibleModelError:
            refused += 1
            continue
        stays = next((c.expected_cost_usd for c in then.candidates if c.model == first.model), None)
        costs = {"old_usd": first.chosen.expected_cost_usd, "stay_usd": stays, "new_usd": then.chosen.expected_cost_usd}
        rows.append({**of, "old_model": first.model, "new_model": then.model, **costs})
    schema = {"request_id": pl.String, "task": pl.String, "old_model": pl.String, "new_model": pl.String}
    frame = pl.DataFrame(rows, schema={**schema, **dict.fromkeys(_COSTS, pl.Float64)})
    return Flips(frame, taken.height, requests.height, refused)
