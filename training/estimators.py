"""The estimators of off-policy evaluation as values a row: their mean is the estimate, their spread its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Estimator = Literal["dm", "ips", "snips", "dr", "switch-dr"]
_THRESHOLDS = 40


@dataclass(frozen=True)
class Parts:
    """What estimators are made of; n rows, m models.

    `change` [n, m]: the target's probabilities, or target minus baseline; `action` int64 [n]; `weight` [n]: change of
    the action / its propensity; `outcome` [n]: 0 where unknown; `known` [n]: 1 / probability of feedback where the
    outcome is known, 0 elsewhere; `model` [n, m]: expected outcomes, fitted on other rows.
    """

    change: Array
    action: npt.NDArray[np.int64]
    weight: Array
    outcome: Array
    known: Array
    model: Array

    def take(self, at: npt.NDArray[np.int64]) -> Parts:
        """The parts of some rows."""
        return Parts(*(getattr(self, name)[at] for name in self.__dataclass_fields__))

    @property
    def expected(self) -> Array:
        """The model of outcomes under the change, [n]."""
        return np.asarray((self.change * self.model).sum(axis=1))

    @property
    def error(self) -> Array:
        """Outcome minus what the model expected of the logged action, weighted by who gives feedback, [n]."""
        return self.known * (self.outcome - self.model[np.arange(len(self.action)), self.action])


def row_values(name: Estimator, parts: Parts, threshold: float) -> Array:
    """Values [n] whose mean is the estimate; `threshold` is switch-DR's (`switch_threshold`)."""
    if name == "dm":
        return parts.expected
    if name == "ips":
        return parts.weight * parts.known * parts.outcome
    if name == "snips":
        return _self_normalised(parts)
    correction = parts.weight * parts.error
    # What switch-DR drops is taken for nothing and is not known to be: its noise stays in the spread.
    dropped = 0.0 if name == "dr" else np.where(np.abs(parts.weight) > threshold, correction, 0.0).mean()
    return np.asarray(parts.expected + correction - dropped)


def _self_normalised(parts: Parts) -> Array:
    """Self-normalised IPS, linearised: the mean is the estimate itself, the spread that of its ratio.

    What the target does more often than the baseline and what it does less often are each divided by the mean of
    their own weights, then multiplied by how much they are: without a baseline that is SNIPS. A ratio is biased by
    the order of 1 / n, which is taken off as Tin (JASA 60, 1965) does.
    """
    value = np.zeros(len(parts.action))
    for sign in (1.0, -1.0):
        moved = np.maximum(sign * parts.change, 0.0).sum(axis=1)
        weight = np.maximum(sign * parts.weight, 0.0) * parts.known
        total = weight.mean()
        if total > 0:
            ratio = (weight * parts.outcome).mean() / total
            ratio += ((weight - total) * weight * (parts.outcome - ratio)).mean() / (len(weight) * total**2)
            error = weight * (parts.outcome - ratio) / total
            value += sign * (ratio * moved + moved.mean() * (error - error.mean()))
    return value


def switch_threshold(parts: Parts) -> float:
    """The weight above which switch-DR trusts the model: the least estimated squared error on this log.

    Estimated are the variance of what stays and the squared bias by what is dropped, the square of the dropped
    corrections' mean; its own noise is in it, so that only what is lost in the noise is dropped. The bound of Wang,
    Agarwal and Dudík (ICML 2017, section 4) puts the outcomes' whole range in the place of the corrections; that is
    at least the variance that dropping rows saves, whichever they are, so that it never switches on rows that a log
    has. Infinity: it is DR.
    """
    size, n = np.abs(parts.weight), len(parts.weight)
    correction, expected = parts.weight * parts.error, parts.expected
    used = size[size > 0]
    best, least = float("inf"), float((expected + correction).var()) / n
    if not len(used):
        return best
    for threshold in np.unique(np.quantile(used, np.linspace(0.0, 1.0, _THRESHOLDS)))[-2::-1]:
        dropped = np.where(size > threshold, correction, 0.0)
        error = float((expected + correction - dropped).var()) / n + float(dropped.mean()) ** 2
        if error < least:
            best, least = float(threshold), error
    return best
