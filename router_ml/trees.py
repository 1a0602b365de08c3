"""LightGBM's trees, applied to the few rows of one request without what its library spends on every call.

A tree with at most eight leaves is a byte: every split that a row does not pass takes its left leaves away, and of
those that stay the first is the row's (QuickScorer; Lucchese et al., SIGIR 2015). All splits of all trees are one
comparison, so a prediction is half a dozen numpy calls. The model is LightGBM's own text file, LightGBM itself the
oracle of the tests, and a process that only serves never loads the library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from router_ml.errors import BundleError
from router_ml.types import FloatArray

LEAVES = 8
_SPLITS = LEAVES - 1
_CHUNK = 4096
_OBJECTIVES = ("binary sigmoid:1", "cross_entropy")
_PLAIN_SPLIT = {0, 2}
"""decision_type of a numerical split without missing values; where a missing value would go does not matter then."""
_FIRST_LEFT = np.array([((gone + 1) & ~gone).bit_length() - 1 for gone in range(256)], dtype=np.intp)
"""For each set of leaves that are gone, the first one that is not."""


@dataclass(frozen=True)
class Trees:
    """The trees of one LightGBM model, from its text. `names` are its features, `size` is the number of trees.

    Raises BundleError for a model that is not of this kind: another objective, categorical features, larger trees.
    """

    text: str = field(repr=False)
    names: tuple[str, ...] = field(init=False)
    size: int = field(init=False)
    _feature: npt.NDArray[np.intp] = field(init=False, repr=False, compare=False)
    _threshold: FloatArray = field(init=False, repr=False, compare=False)
    _gone: npt.NDArray[np.uint8] = field(init=False, repr=False, compare=False)
    _value: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _first_leaf: npt.NDArray[np.intp] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        head, *blocks = self.text.partition("\nend of trees")[0].split("\nTree=")
        stated = _fields(head)
        if stated.get("objective") not in _OBJECTIVES:
            raise BundleError(f"the trees' objective {stated.get('objective')!r} is not one of {_OBJECTIVES}")
        try:
            trees = [_tree(_fields(block)) for block in blocks]
        except (KeyError, ValueError, IndexError, RecursionError) as error:
            raise BundleError(f"the trees cannot be read ({error!r}): train the bundle again") from None
        k = len(trees)
        feature, threshold, gone, value = (np.array([tree[i] for tree in trees]) for i in range(4))
        exact = threshold.astype(np.float64).reshape(k, _SPLITS)
        rounded = exact.astype(np.float32)
        # The largest float32 that is not above the threshold: a float32 passes it exactly if it passes the threshold.
        down = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
        for name, made in {
            "names": tuple(stated.get("feature_names", "").split()),
            "size": k,
            "_feature": feature.reshape(k, _SPLITS).T.ravel().astype(np.intp),
            "_threshold": np.ascontiguousarray(down.T)[:, :, None],
            "_gone": np.ascontiguousarray(gone.reshape(k, _SPLITS).T.astype(np.uint8))[:, :, None],
            "_value": value.astype(np.float64).ravel(),
            "_first_leaf": (np.arange(k) * LEAVES)[:, None],
        }.items():
            object.__setattr__(self, name, made)

    def raw(self, rows: FloatArray) -> npt.NDArray[np.float64]:
        """Log odds float64 [n] of rows float32 [n, d] without NaN."""
        if len(rows) > _CHUNK:
            return np.concatenate([self.raw(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)])
        seen = rows.T.take(self._feature, axis=0).reshape(_SPLITS, self.size, len(rows))
        failed = (seen > self._threshold).view(np.uint8)
        failed *= self._gone
        gone: npt.NDArray[np.uint8] = np.bitwise_or.reduce(failed, axis=0)
        leaf = _FIRST_LEFT.take(gone)
        leaf += self._first_leaf
        odds: npt.NDArray[np.float64] = np.add.reduce(self._value.take(leaf), axis=0)
        return odds

    def predict(self, rows: FloatArray) -> FloatArray:
        """Probabilities float32 [n]: what `Booster.predict` gives for the same rows."""
        odds = self.raw(rows)
        np.negative(odds, out=odds)
        np.exp(odds, out=odds)
        odds += 1.0
        p: FloatArray = np.reciprocal(odds).astype(np.float32)
        return p


def _fields(block: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in block.split("\n") if "=" in line)


def _tree(stated: dict[str, str]) -> tuple[list[int], list[float], list[int], list[float]]:
    """Feature, threshold and left leaves (as bits) of each split, and the values of the leaves from left to right."""
    n = int(stated["num_leaves"])
    values = [float(v) for v in stated["leaf_value"].split()]
    if not 1 <= n <= LEAVES or len(values) != n or stated.get("num_cat", "0") != "0" or stated.get("is_linear") == "1":
        raise ValueError(f"a tree of {n} leaves, or with categorical features")
    if n == 1:
        return [0] * _SPLITS, [np.inf] * _SPLITS, [0] * _SPLITS, values + [0.0] * (LEAVES - 1)
    feature = [int(v) for v in stated["split_feature"].split()]
    threshold = [float(v) for v in stated["threshold"].split()]
    left, right = ([int(v) for v in stated[side].split()] for side in ("left_child", "right_child"))
    if set(map(int, stated["decision_type"].split())) - _PLAIN_SPLIT or not len(feature) == len(threshold) == n - 1:
        raise ValueError("a split that is not numerical, or with missing values")
    if not all(map(math.isfinite, threshold)):
        raise ValueError("a threshold that is not a number")

    def leaves(node: int) -> list[int]:
        return [~node] if node < 0 else leaves(left[node]) + leaves(right[node])

    order = leaves(0)
    if sorted(order) != list(range(n)):
        raise ValueError("a tree that is not one")
    gone = [sum(1 << order.index(leaf) for leaf in leaves(left[split])) for split in range(n - 1)]
    idle = _SPLITS - len(gone)  # splits that every row passes
    return (
        feature + [0] * idle,
        threshold + [np.inf] * idle,
        gone + [0] * idle,
        [values[leaf] for leaf in order] + [0.0] * (LEAVES - n),
    )
