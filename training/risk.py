"""Is a mean at least so much? p-values and bounds that hold at every sample size, without a normal approximation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_LARGEST_BET = 0.9
"""Share of the capital that may be lost on one row: all of it would end the game at the first bad answer."""
_STEPS = 14


def betting_p(z: Array, floor: float, alpha: float) -> float:
    """p-value of "the mean of `z` is at most 0", z [n] independent, in order, and never below -`floor`.

    A gambler's capital, who stakes a predictable share on each row: multiplied by 1 + bet * z, and under the hypothesis
    never expected to grow, so it reaches 1 / p with probability p at most (Ville's inequality). The bets are those of
    the predictable plug-in of Waudby-Smith and Ramdas (JRSS B 2024, arXiv 2010.09686), equation 26: they learn the
    variance, so that weights which are mostly zero cost little. `alpha` is the level that the bets are best for; the
    p-value holds at every level.
    """
    n = len(z)
    if not n or floor <= 0.0:
        return 1.0
    before = np.arange(1, n + 1)
    mean = np.cumsum(z) / (before + 1.0)
    spread = np.cumsum((z - mean) ** 2)
    variance = (0.25 * floor * min(floor, 1.0) + np.concatenate([[0.0], spread[:-1]])) / before
    bets = np.minimum(np.sqrt(2.0 * math.log(1.0 / alpha) / (n * variance)), _LARGEST_BET / floor)
    capital = np.cumsum(np.log1p(bets * z))
    return float(min(1.0, math.exp(-max(float(capital.max()), 0.0))))


def binomial_p(x: Array, least: float, uniform: Array) -> float:
    """p-value of "the mean of `x` is below `least`", x [n] independent in [0, 1].

    Each x is rounded to 0 or 1 by its uniform number, to 1 with probability x. That keeps the mean, makes the exact
    binomial test valid for graded quality, too, and leaves 0 and 1 as they are.
    """
    from scipy.stats import binom

    if not len(x):
        return 1.0
    return float(binom.sf(int((uniform < x).sum()) - 1, len(x), least))


def binomial_bound(x: Array, alpha: float, uniform: Array) -> float:
    """The largest mean that `binomial_p` shows at level `alpha` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    good = int((uniform < x).sum())
    return float(beta.ppf(alpha, good, len(x) - good + 1)) if good else 0.0


def hoeffding_bentkus_p(x: Array, least: float) -> float:
    """The same by the smaller of Hoeffding's and Bentkus' inequalities (Bates et al. 2021, arXiv 2101.02703), no draw.

    As in Learn then Test (arXiv 2110.01052), with the loss 1 - x: some e times the binomial test's where x is 0 or 1.
    """
    from scipy.stats import binom

    n = len(x)
    if not n:
        return 1.0
    risk, most = 1.0 - float(x.mean()), 1.0 - least
    if risk >= most:
        return 1.0
    kl = risk * math.log(risk / most) if risk > 0.0 else 0.0
    kl += (1.0 - risk) * math.log((1.0 - risk) / (1.0 - most)) if most < 1.0 else math.inf
    bentkus = math.e * float(binom.cdf(math.ceil(n * risk - 1e-9), n, most))
    return min(1.0, math.exp(-n * kl), bentkus)


def lower_bound(p_value: Callable[[float], float], alpha: float) -> float:
    """The largest mean in [0, 1] that is shown at level `alpha`; `p_value(least)` grows with `least`."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(middle) <= alpha else (low, middle)
    return low
