"""Segments of a log's traffic: declared columns first, then clusters of the prompts; how narrow and how steady each is.

No outcome enters a segment, so what is estimated of it afterwards is not selected by its own estimate.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from threadpoolctl import threadpool_limits

from features.text import request_text, words
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.traffic_shape import MONTH_HOURS, WEEK_HOURS, Traffic
from training.encoders import lexical_encoder

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LEAST_ROWS = 200
LEAST_SHARE = 0.02
"""A segment has at least so many requests, and this share of the log's: each one more widens all intervals."""
MOST_CLUSTERS = 6
LEAST_SILHOUETTE = 0.2
"""Clusters that are less apart than this, on average (Rousseeuw 1987), are one segment."""
NEAR = 0.9
_FITTED, _SAMPLE, _TEXTS = 5000, 1500, 20_000
_OPENING = 5  # words
_TERMS = 3
_WIDTHS = (1, 2, 4, 6)
_LEAST_BIN = 20  # requests
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Texts:
    """What is known of the prompts of n requests: `embedding` float64 [n, d], length 1 or 0, and the texts' words."""

    embedding: Array
    words: list[list[str]]


@dataclass(frozen=True, eq=False)
class Segment:
    """Requests of one kind: `rows` are their positions in the log, `task` and `tenant` what all of them declare.

    `declared`: a policy's rule on these matches just these requests. `terms` tell a cluster from the others under the
    same columns; empty where the columns alone make the segment.
    `similarity` is the mean cosine of two of its prompts, `near_duplicates` the share of prompts that have a neighbour
    of cosine 0.9 or more among 1,500 others of the segment, `template_share` the share whose first five words (digits
    masked) open at least a twentieth of its prompts; all None without prompts. `peak_to_mean` is the busiest hour's
    requests by the mean hour's, `idle` the share of hours below a tenth of the mean: of the week where the log has two
    or more, else of the log, and of several hours together where one has too few requests to show more than chance.
    `traffic` has its tokens in each hour of the log, None where they are not known.
    """

    name: str
    task: str | None
    tenant: str | None
    terms: tuple[str, ...]
    declared: bool
    rows: IntArray
    requests_per_month: float
    input_tokens: float
    output_tokens: float
    multi_turn: float
    similarity: float | None
    near_duplicates: float | None
    template_share: float | None
    peak_to_mean: float
    idle: float
    traffic: Traffic | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def narrow(self) -> bool:
        """Whether its prompts are much alike: half of them open alike, or two of them are on average half the same."""
        return max(self.similarity or 0.0, self.template_share or 0.0) >= 0.5

    @property
    def repetitive(self) -> bool:
        """Whether half of its prompts have nearly been asked before."""
        return (self.near_duplicates or 0.0) >= 0.5

    @property
    def steady(self) -> bool:
        """Whether a machine for its busiest hour is worth having in most of the others."""
        return is_steady(self.peak_to_mean, self.idle)


def is_steady(peak_to_mean: float, idle: float) -> bool:
    """Whether the busiest hour is at most three times the mean one, and at most a quarter of the hours are idle."""
    return peak_to_mean <= 3.0 and idle <= 0.25


def texts_of(log: pl.DataFrame, *, seed: int = 0) -> Texts | None:
    """Embeddings of the log's prompts by their own words (`lexical_encoder`, fitted on 20,000), None without prompts.

    None, too, where all prompts are one, or none holds a word.
    """
    if not log.select((pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()).any()).item():
        return None
    said = [  # interned, or each word of each prompt would take 50 bytes
        list(map(sys.intern, words(request_text(request_of_log_row(*row)))))
        for row in log.select("prompt", "messages", "tools").iter_rows()
    ]
    rng = np.random.default_rng(seed)
    at = np.arange(len(said)) if len(said) <= _TEXTS else np.sort(rng.choice(len(said), _TEXTS, replace=False))
    try:
        made = lexical_encoder([said[i] for i in at], seed=seed)
    except InputError:
        return None
    return Texts(np.stack([made.embed(made.token_ids(text)) for text in said]).astype(np.float64), said)


def segments_of(
    log: pl.DataFrame, texts: Texts | None, *, scale: float = 1.0, peak_to_mean: float | None = None, most: int = 24,
    seed: int = 0,
) -> tuple[Segment, ...]:  # fmt: skip
    """The log's segments (`LOG_SCHEMA`, one row a request), the largest first; every row is in one of them.

    Tasks are taken apart, and within them tenants; what is too small for a segment (fewer than 200 requests or 2 % of
    the log) goes together under the column that it shares, or under none. Each is then split into the two to six
    clusters (k-means of the embeddings) that are furthest apart by their silhouette, if they are apart at all. `scale`
    is how many requests of the traffic one of the log stands for, `peak_to_mean` as in `Traffic.of_requests`. Raises
    InputError for a log without rows.
    """
    if log.is_empty():
        raise InputError("the log has no rows: there is nothing to advise on")
    least = max(LEAST_ROWS, round(LEAST_SHARE * len(log)), len(log) // most)
    hours = hours_of(log)
    common = _frequency(texts, np.arange(len(log)), seed) if texts is not None else Counter()
    made = []
    for task, tenant, rows in _declared(log, least):
        label = "/".join(filter(None, (task, tenant))) or "the rest"
        parts = _clusters(texts.embedding[rows], least, seed) if texts is not None else [np.arange(len(rows))]
        for part in parts:
            at = rows[part]
            terms: tuple[str, ...] = ()
            if len(parts) > 1 and texts is not None:
                terms = _typical(_frequency(texts, at, seed), _frequency(texts, rows, seed), common)
            name = f"{label}: {', '.join(terms)}" if terms else label
            made.append(_segment(log, texts, hours, name, task, tenant, terms, at, scale, peak_to_mean, seed))
    return tuple(sorted(made, key=lambda one: (-len(one), one.name)))


def _declared(log: pl.DataFrame, least: int) -> list[tuple[str | None, str | None, IntArray]]:
    """(task, tenant, rows) of each group that is large enough, and of what is left over."""
    frame = log.select("task", "tenant").with_row_index("row")
    groups: list[tuple[str | None, str | None, IntArray]] = []
    rest: list[IntArray] = []
    for (task,), of_task in frame.group_by("task", maintain_order=True):
        left = []
        for (tenant,), own in of_task.group_by("tenant", maintain_order=True):
            rows = own["row"].to_numpy().astype(np.int64)
            if len(rows) >= least:
                groups.append((_text(task), _text(tenant), rows))
            else:
                left.append(rows)
        pooled = np.sort(np.concatenate(left)) if left else np.empty(0, dtype=np.int64)
        if len(pooled) >= least and task is not None:
            groups.append((_text(task), None, pooled))
        elif len(pooled):
            rest.append(pooled)
    if rest:
        groups.append((None, None, np.sort(np.concatenate(rest))))
    return groups


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _clusters(embedding: Array, least: int, seed: int) -> list[IntArray]:
    """Positions of each cluster; one cluster where there is no more than one that is apart from the rest."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    n = len(embedding)
    rng = np.random.default_rng(seed)
    sample = embedding[np.sort(rng.choice(n, min(n, _FITTED), replace=False))]
    few = sample[:: max(1, len(sample) // _SAMPLE)]
    best, chosen = LEAST_SILHOUETTE, [np.arange(n)]
    with threadpool_limits(limits=1):
        for k in range(2, min(MOST_CLUSTERS, n // least) + 1):
            if len(np.unique(few, axis=0)) <= k:
                break
            fitted = KMeans(k, n_init=4, random_state=seed).fit(sample)
            label = fitted.predict(few)
            if len(np.unique(label)) < 2:
                continue
            score = float(silhouette_score(few, label))
            whole = fitted.predict(embedding)
            if score > best and np.bincount(whole, minlength=k).min() >= least:
                best, chosen = score, [np.flatnonzero(whole == one) for one in range(k)]
    return chosen


def _frequency(texts: Texts, rows: IntArray, seed: int) -> Counter[str]:
    """Share of the prompts, in per mille of at most 1,500 of them, that hold each word."""
    at = rows if len(rows) <= _SAMPLE else np.random.default_rng(seed).choice(rows, _SAMPLE, replace=False)
    counts: Counter[str] = Counter()
    for row in at:
        counts.update({word for word in texts.words[row] if _WORD.fullmatch(word)})
    return Counter({word: round(1000 * count / len(at)) for word, count in counts.items()})


def _typical(own: Counter[str], around: Counter[str], common: Counter[str]) -> tuple[str, ...]:
    """The words that tell a cluster from those around it; only such as stand in a twentieth of its prompts."""
    score = {
        word: share * np.log((share + 1) / (min(around[word], 1000) + 1)) for word, share in own.items() if share >= 50
    }
    ranked = sorted(score, key=lambda word: (-score[word], common[word], word))
    return tuple(ranked[:_TERMS]) or ("other",)


@dataclass(frozen=True, eq=False)
class Hours:
    """Each row's hour since the log's first [n], how many hours the log has, and the first one's since 1970."""

    of: IntArray
    count: int
    start: int

    @property
    def first(self) -> int:
        """The first hour's place in its week, from Monday on."""
        return (self.start + 72) % WEEK_HOURS  # 1 January 1970 was a Thursday


def hours_of(log: pl.DataFrame) -> Hours:
    """The hours of a log's rows."""
    hour = log.select(pl.col("time").dt.epoch("s") // 3600).to_series().to_numpy()
    start = int(hour.min())
    return Hours((hour - start).astype(np.int64), int(hour.max()) - start + 1, start)


def _segment(
    log: pl.DataFrame, texts: Texts | None, hours: Hours, name: str, task: str | None, tenant: str | None,
    terms: tuple[str, ...], rows: IntArray, scale: float, peak_to_mean: float | None, seed: int,
) -> Segment:  # fmt: skip
    own = log[rows]
    a_month = MONTH_HOURS / hours.count
    traffic, means = traffic_of(log, hours, rows, scale, peak_to_mean)
    peak, idle = profile_of(hours, rows)
    similarity, near, template = (None, None, None) if texts is None else _narrowness(texts, rows, seed)
    turns = own.select((pl.col("messages").str.count_matches('"role": ?"user"', literal=False) > 1).mean()).item()
    rule = [pl.col(column) == said for column, said in (("task", task), ("tenant", tenant)) if said is not None]
    declared = bool(rule) and log.select(pl.all_horizontal(rule).sum()).item() == len(rows)
    return Segment(
        name, task, tenant, terms, declared, rows, len(rows) * scale * a_month, means[0], means[1],
        float(turns * own["messages"].is_not_null().mean()) if turns is not None else 0.0,
        similarity, near, template, peak, idle, traffic,
    )  # fmt: skip


def traffic_of(
    log: pl.DataFrame, hours: Hours, rows: IntArray, scale: float, peak_to_mean: float | None
) -> tuple[Traffic | None, list[float]]:
    """(tokens of these rows in each hour of the log, or None where too little is known; mean input and output tokens).

    `scale` and `peak_to_mean` as in `Traffic.of_requests`. A request whose tokens are not known counts with the mean.
    """
    own = log[rows]
    tokens = [own[column].cast(pl.Float64) for column in ("input_tokens", "output_tokens")]
    means = [float(mean) if isinstance(mean := column.mean(), float) else float("nan") for column in tokens]
    if hours.count < 24 or any(mean != mean for mean in means) or not sum(means) > 0.0:
        return None, means
    filled = np.stack([column.fill_null(mean).to_numpy() for column, mean in zip(tokens, means, strict=True)], axis=1)
    seconds = own["time"].dt.epoch("us").to_numpy() * 1e-6
    return Traffic.of_requests(seconds, filled, hours.start, hours.count, scale=scale, peak_to_mean=peak_to_mean), means


def profile_of(hours: Hours, rows: IntArray) -> tuple[float, float]:
    """(busiest hour by the mean one, share of hours below a tenth of the mean)."""
    series = np.bincount(hours.of[rows], minlength=hours.count).astype(np.float64)
    if hours.count >= 2 * WEEK_HOURS:
        week = (np.arange(hours.count) + hours.first) % WEEK_HOURS
        series = np.bincount(week, series, WEEK_HOURS) / np.bincount(week, minlength=WEEK_HOURS)
    for width in _WIDTHS:  # hours together until chance alone makes no peak
        whole = series[: len(series) // width * width].reshape(-1, width).sum(axis=1)
        if len(rows) * width >= _LEAST_BIN * len(series):
            break
    series = whole
    mean = series.mean()
    return float(series.max() / mean), float((series < 0.1 * mean).mean())


def _narrowness(texts: Texts, rows: IntArray, seed: int) -> tuple[float, float, float]:
    """(mean cosine of two prompts, share with a near duplicate, share that opens as many others do)."""
    at = rows if len(rows) <= _SAMPLE else np.random.default_rng(seed).choice(rows, _SAMPLE, replace=False)
    one = texts.embedding[at]
    n = len(at)
    with threadpool_limits(limits=1):
        cosine = one @ one.T
    np.fill_diagonal(cosine, -1.0)
    similarity = float((cosine.sum() + n) / max(n * (n - 1), 1))
    openings = Counter(_opening(texts.words[row]) for row in at)
    alike = sum(count for count in openings.values() if count >= max(0.05 * n, 2))
    return similarity, float((cosine.max(axis=1) >= NEAR).mean()) if n > 1 else 0.0, alike / n


def _opening(said: Sequence[str]) -> tuple[str, ...]:
    return tuple(re.sub(r"\d+", "0", word) for word in said[:_OPENING])
