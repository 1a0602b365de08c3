"""How far labels can be trusted: what several sources say of one answer, and what one says when asked again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from training.examination import Check, State

FEW_RETESTS = 30
"""With fewer repeated questions, or answers that two sources judge, how far labels agree is not known."""
LEAST_RETESTED = 0.2
"""The share of outcomes that are of repeated questions from which these speak for the log."""
AGREED = 0.4
"""Cohen's kappa below which agreement is no more than fair (Landis and Koch 1977)."""
MOST_SOURCES = 10


def label_noise(log: pl.DataFrame, judgements: pl.DataFrame | None) -> Check:
    """Whether labels agree: those of several sources on one answer, and those of one text and model judged again.

    `judgements` (`row`, `request_id`, `source`, `q`) is what each source says of each answer, where that is known.
    """
    numbers: dict[str, object] = {}
    pairs = [] if judgements is None else _agreements(judgements)
    said, states = [], []
    if pairs:
        least = pairs[0]
        numbers["sources"] = pairs
        said.append(
            f"of {least['answers']:,} answers that {least['a']} and {least['b']} both judge, {least['alike']:.0%} are "
            f"judged alike, Cohen's kappa {least['kappa']:.2f} ({least['low']:.2f} to {least['high']:.2f}; 0 is chance)"
        )
        said[0] += f", the least of {len(pairs)} pairs of sources" if len(pairs) > 1 else ""
        states.append("good" if least["low"] >= AGREED else "partly")
    state, again, retested = _retests(log)
    if state != "not known" or not pairs:
        said.append(again)
        states.append(state)
    whole: State = "partly" if "partly" in states else "good" if "good" in states else "not known"
    return Check("label noise", whole, "; ".join(said), numbers | retested)


def _agreements(judgements: pl.DataFrame) -> list[dict[str, Any]]:
    """Each pair of sources with enough answers in common, the least agreement first; good is a quality of 0.5 or more.

    The interval of kappa is the middle 95 % of its posterior under Jeffreys' prior on the four counts, answers taken
    for independent.
    """
    common = judgements["source"].value_counts(sort=True)["source"].head(MOST_SOURCES)
    good = judgements.filter(pl.col("source").is_in(common.implode())).select("row", "source", good=pl.col("q") >= 0.5)
    both = good.join(good, on="row").filter(pl.col("source") < pl.col("source_right"))
    found = []
    for (a, b), rows in both.group_by("source", "source_right", maintain_order=True):
        one, other = rows["good"].to_numpy(), rows["good_right"].to_numpy()
        counts = np.bincount(2 * one + other, minlength=4).astype(float)
        alike, kappa = _kappa(counts / counts.sum())
        if len(rows) < FEW_RETESTS or np.isnan(kappa):
            continue
        drawn = np.random.default_rng(0).dirichlet(counts + 0.5, 4000)
        low, high = np.quantile([_kappa(shares)[1] for shares in drawn], [0.025, 0.975])
        found.append({"a": a, "b": b, "answers": len(rows), "alike": alike, "kappa": kappa, "low": float(low),
                      "high": float(high)})  # fmt: skip
    return sorted(found, key=lambda pair: (pair["kappa"], pair["a"], pair["b"]))


def _kappa(shares: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(share judged alike, Cohen's kappa) of the shares of (bad, bad), (bad, good), (good, bad), (good, good).

    NaN where both always say the same: there is nothing to agree on.
    """
    neither, second, first, both = (float(share) for share in shares)
    alike, one, other = neither + both, first + both, second + both
    chance = one * other + (1.0 - one) * (1.0 - other)
    return alike, (alike - chance) / (1.0 - chance) if chance < 1.0 else np.nan


def _retests(log: pl.DataFrame) -> tuple[State, str, dict[str, float]]:
    """Test and retest: the same text, answered by the same model, judged twice; (state, sentence, numbers).

    What lies within a question is held against what lies within and between those questions, not against the log's
    others: greetings that are always good say nothing of questions that come once.
    """
    known = log.filter("_outcome").select("quality", "model", t=pl.struct("prompt", "messages").hash(7))
    again = known.filter(pl.len().over("t", "model") > 1)
    seen = again.group_by("t", "model").agg(n=pl.len(), variance=pl.col("quality").var())
    part = again.height / known.height if known.height else 0.0
    numbers: dict[str, float] = {"retested": len(seen), "share_of_outcomes": part}
    if len(seen) < FEW_RETESTS:
        said = f"how far labels agree with themselves is not known: {len(seen)} questions were judged twice of the "
        return "not known", f"{said}same model, {FEW_RETESTS} are the least", numbers
    spread = float(np.average(seen["variance"].to_numpy(), weights=seen["n"].to_numpy() - 1.0))
    total = float(again["quality"].var() or 0.0)  # type: ignore[arg-type]
    if total == 0.0:
        said = f"how far labels agree with themselves is not known: the {len(seen):,} questions that one model was "
        return "not known", f"{said}judged on more than once ({part:.0%} of the outcomes) all have one quality", numbers
    share = min(spread / total, 1.0)
    numbers["share_of_variance"] = share
    said = f"of {len(seen):,} questions that one model was judged on more than once ({part:.0%} of the outcomes), "
    said += f"{share:.0%} of the variance of quality lies within the same question and model: noise of labels, and of "
    said += "answers that differ"
    if part < LEAST_RETESTED:
        return "not known", f"{said}; of the other outcomes that says little", numbers
    return "good" if share < 0.5 else "partly", said, numbers
