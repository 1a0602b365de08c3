"""What one setting of the dial changes against today's: worth, slices, who goes elsewhere, what the gate says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from training.changes import changed_for, moves_of
from training.estimators import row_values
from training.gate import Limits
from training.logged import Decided, Logged
from training.ope import FittedModels, Look, value_of
from training.slices import SLICES
from training.support import LEAST_ESS, MOST_UNSUPPORTED

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Interval = tuple[float, float, float]
_LEAST_ROWS = 50
_MOST_MOVES = 8
_EXAMPLES = 40
_EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True)
class Change:
    """A setting less today's: `quality` and `cost_usd` a request as (value, low, high), None where the log cannot tell.

    `slices` has a row a slice with its n; their intervals hold together. `moves` are pairs of models between which
    requests would go, `who` a row a task and tenant with the share that would. `weaker` says in sentences which of the
    promises that a promotion's gate holds this setting does not keep; none: it may be applied without asking.
    `examples` are positions among the trade-off's examples, with the models before and after.
    """

    quality: Interval | None
    cost_usd: Interval | None
    why: Mapping[str, str]
    changed: float
    slices: tuple[Mapping[str, Any], ...]
    moves: tuple[Mapping[str, Any], ...]
    who: tuple[Mapping[str, Any], ...]
    examples: tuple[Mapping[str, Any], ...]
    weaker: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        lists = ("slices", "moves", "who", "examples")
        return {
            "quality": self.quality, "cost_usd": self.cost_usd, "why": dict(self.why), "changed": self.changed,
            **{name: [dict(one) for one in getattr(self, name)] for name in lists}, "weaker": list(self.weaker),
        }  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """Judges changes on one log: `models` are its fitted models by metric, `shown` the rows that serve as examples."""

    logged: Logged
    models: Mapping[str, FittedModels]
    look: Look
    shown: Sequence[int] = ()
    limits: Limits = field(default_factory=Limits)

    def of(self, old: Decided, new: Decided, mask: BoolArray) -> Change:
        """What `new` changes against `old` on the rows of the mask [n]."""
        at = np.flatnonzero(mask)
        values: dict[str, Interval | None] = {}
        why: dict[str, str] = {}
        for metric in ("quality", "cost_usd"):
            values[metric] = None
            if metric in self.models:
                found = value_of(self.models[metric].rows(new.target, old.target, None).take(at), self.look)
                values[metric] = None if found.headline is None else found.headline[:3]
                why |= {} if found.headline else {metric: found.why}
            else:
                why[metric] = "the log does not have it"
        part, before, after = self.logged.take(at), _take(old, at), _take(new, at)
        slices = self._slices(old, new, at)
        grouped = (
            moves_of(before, after)
            .with_columns(part.slices.select("task", "tenant"))
            .filter("moved")
            .group_by("from", "to")
            .agg(
                n=pl.len(),
                tasks=pl.col("task").value_counts(sort=True).struct.field("task").head(3),
                **{
                    f"{name}_{when}": pl.col(f"{name}_{when}").mean()
                    for name in ("cost_usd", "p_ok")
                    for when in ("before", "after")
                },
            )
            .sort("n", "from", "to", descending=[True, False, False])
            .head(_MOST_MOVES)
        )
        who = changed_for(part, before, after).filter(pl.col("n") >= _LEAST_ROWS)
        return Change(
            values["quality"], values["cost_usd"], why, float((before.choice != after.choice).mean()), slices,
            tuple(grouped.iter_rows(named=True)), tuple(who.filter(pl.col("changed") > 0).iter_rows(named=True)),
            self._examples(old, new, mask), tuple(self._weaker(values["quality"], why, slices)),
        )  # fmt: skip

    def apart(self, today: Decided, settings: Sequence[Decided], mask: BoolArray) -> dict[str, Any]:
        """How sure the difference of any two settings is, on the rows of the mask [n]: its standard error.

        By metric, and for quality by slice: the pairs (0, 1), (0, 2), … (1, 2), … of positions in `settings`, None
        where too few rows tell the two apart; a metric that the log does not have is left out. By these a setting can
        be held against one that is in force later, with what both do alike bringing no noise: values are differences of
        the changes that `of` gives.
        """
        at = np.flatnonzero(mask)
        found: dict[str, Any] = {}
        for metric in ("quality", "cost_usd"):
            if metric in self.models:
                pairs = _Pairs.of(self.models[metric], self.logged, metric, today, settings, at)
                found[metric] = pairs.errors(np.arange(len(at)))
                if metric == "quality":
                    found["slices"] = {}
                    for (by, name), rows in self._masks(at).items():
                        found["slices"].setdefault(by, {})[name] = pairs.errors(rows)
        return found

    def _masks(self, at: npt.NDArray[np.int64]) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        """Positions among the rows `at` by slice, of the slices that have enough of them."""
        frame = self.logged.slices[at]
        return {
            (by, name): np.flatnonzero((frame[by] == name).to_numpy())
            for by in SLICES
            if by in frame.columns
            for name, count in frame[by].value_counts(sort=True).iter_rows()
            if count >= _LEAST_ROWS
        }

    def _slices(self, old: Decided, new: Decided, at: npt.NDArray[np.int64]) -> tuple[Mapping[str, Any], ...]:
        if "quality" not in self.models or (old.target == new.target).all():
            return ()
        rows = self.models["quality"].rows(new.target, old.target, None)
        masks = self._masks(at)
        each = 1.0 - (1.0 - self.look.confidence) / max(len(masks), 1)  # Bonferroni: all hold together
        look, found = replace(self.look, confidence=each), []
        for (by, name), rows_of in masks.items():
            value = value_of(rows.take(at[rows_of]), look)
            headline = value.headline
            found.append(
                {
                    "by": by, "name": name, "n": len(rows_of), "why": value.why or None,
                    "quality": None if headline is None else headline[:3],
                }
            )  # fmt: skip
        return tuple(found)

    def _weaker(
        self, quality: Interval | None, why: Mapping[str, str], slices: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """The gate's conditions on quality and slices, with its own margins, that do not hold."""
        limits, said = self.limits, []
        if quality is None:
            said.append(f"quality: not identifiable: {why['quality']}")
        elif quality[1] < -limits.quality:
            said.append(
                f"quality changes by {quality[0]:+.3f} ({quality[1]:+.3f} to {quality[2]:+.3f}); its lower bound has "
                f"to be {-limits.quality:+g} or more"
            )
        for one in slices:
            large, margin = one["n"] >= limits.slice_rows, limits.of_slice(one["by"], one["name"])
            if one["quality"] is None:
                said += [f"{one['by']} {one['name']}: not identifiable"] * large
            elif one["quality"][1 if large else 2] < -margin:
                value, low, high = one["quality"]
                said.append(
                    f"{one['by']} {one['name']}: {value:+.3f} ({low:+.3f} to {high:+.3f}); the "
                    f"{'lower' if large else 'upper'} bound has to be {-margin:+g} or more"
                )
        return said

    def _examples(self, old: Decided, new: Decided, mask: BoolArray) -> tuple[Mapping[str, Any], ...]:
        found = []
        for position, row in enumerate(self.shown):
            before, after = int(old.choice[row]), int(new.choice[row])
            if mask[row] and before != after and min(before, after) >= 0:
                p = [None if np.isnan(new.p_ok[row, j]) else float(new.p_ok[row, j]) for j in (before, after)]
                ids = new.catalog.ids
                found.append({"example": position, "from": ids[before], "to": ids[after], "p_ok": p})
        return tuple(found[:3])


def examples_of(rows: pl.DataFrame, dialled: Sequence[Decided], seed: int) -> tuple[dict[str, Any], ...]:
    """Some requests that settings send to different models, drawn evenly: row, request_id, task, tenant and how their
    text begins.
    """
    choices = np.stack([one.choice for one in dialled], axis=1)
    differ = np.flatnonzero((choices != choices[:, :1]).any(axis=1))
    drawn = np.sort(np.random.default_rng(seed).permutation(differ)[:_EXAMPLES])
    names = ("request_id", "task", "tenant")
    made = []
    for row in map(int, drawn):
        found = rows.row(row, named=True)
        text = found["prompt"] or found["messages"] or ""
        made.append({"row": row, **{n: found[n] for n in names}, "text": text[:_EXAMPLE_CHARACTERS]})
    return tuple(made)


@dataclass(frozen=True)
class _Pairs:
    """What each row says of the settings [n, k], less today's: its value, and its weight.

    `seen` [n] says whether its outcome is known, `moved` [n, pairs] is how much of a row's decision differs between the
    two settings of a pair.
    """

    values: Array
    weights: Array
    seen: BoolArray
    moved: Array
    cluster: npt.NDArray[Any]

    @classmethod
    def of(
        cls, models: FittedModels, logged: Logged, metric: str, today: Decided, settings: Sequence[Decided],
        at: npt.NDArray[np.int64],
    ) -> _Pairs:  # fmt: skip
        """Of the rows `at`."""
        parts = [models.rows(one.target, today.target, None).parts for one in settings]
        targets = [one.target[at] for one in settings]
        moved = [
            np.abs(targets[i] - targets[j]).sum(axis=1) for i, j in zip(*np.triu_indices(len(settings), 1), strict=True)
        ]
        return cls(
            np.stack([row_values("dr", each, math.inf)[at] for each in parts], axis=1),
            np.stack([each.weight[at] for each in parts], axis=1),
            ~np.isnan(logged.metrics[metric][at]), np.stack(moved, axis=1), logged.cluster[at],
        )  # fmt: skip

    def errors(self, rows: npt.NDArray[np.int64]) -> list[float | None]:
        """Standard errors of the differences of each pair's means on these rows, clusters drawn whole."""
        values, weights = self.values[rows], self.weights[rows][self.seen[rows]]
        _, of = np.unique(self.cluster[rows], return_inverse=True)
        sums = np.zeros((of.max() + 1, values.shape[1]))
        np.add.at(sums, of, values - values.mean(axis=0))
        products = sums.T @ sums * (len(sums) / max(len(sums) - 1, 1)) / len(values) ** 2
        changed = self.moved[rows].mean(axis=0)
        found: list[float | None] = []
        for pair, (i, j) in enumerate(zip(*np.triu_indices(values.shape[1], 1), strict=True)):
            squared = products[i, i] + products[j, j] - 2.0 * products[i, j]
            apart = np.abs(weights[:, i] - weights[:, j])
            effective = float(apart.sum()) ** 2 / max(float(np.square(apart).sum()), 1e-300)
            if changed[pair] >= MOST_UNSUPPORTED and effective < LEAST_ESS:  # as `support.why_not_identifiable` has it
                found.append(None)
            else:
                found.append(float(f"{math.sqrt(squared):.3g}") if squared > 1e-18 else 0.0)
        return found


def _take(of: Decided, at: npt.NDArray[np.int64]) -> Decided:
    names = ("target", "choice", "eligible", "p_ok", "cost_usd")
    return replace(of, **{name: getattr(of, name)[at] for name in names})
