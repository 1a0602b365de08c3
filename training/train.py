"""From a log to a bundle: split by time, fit, judge on the newest requests, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.load import Learned, save_router
from features.neighbours import newest as newest_neighbours
from features.neighbours import newest_rows
from features.text import request_text
from router_ml.bundle import check_replaceable
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_files import LogFiles, is_url, log_files
from router_ml.logs import log_sha256, read_log, scan_log
from router_ml.types import Estimate
from training.dataset import Dataset, build_dataset, reliability, split_by_time
from training.encoders import ENCODERS
from training.engines import Engine, Local
from training.evaluate import Frontier, cost_at, frontier, scores
from training.fit import Fit, fit
from training.passes import TASK, Estimates, estimates, joined
from training.reading import Report, count_of
from training.requests import pieces

_LEAST_FRONTIER_ROWS = 50


@dataclass(frozen=True)
class Training:
    """What `train` made.

    `judged` holds p_ok and labels [n, m] of the held-out requests, or of the training requests out of fold where none
    are held out. `frontier` is there only where enough held-out requests have every model's outcome and cost.
    """

    fit: Fit
    version: str
    params: dict[str, Any]
    metrics: dict[str, Any]
    held_out: Dataset
    judged: tuple[np.ndarray, np.ndarray]
    frontier: Frontier | None


def train(
    logs: str | Path | pl.DataFrame,
    catalog: Catalog,
    *,
    out: str | Path,
    threshold: float | Sequence[float] = 0.5,
    encoder: str = "static",
    encoder_model: str | None = None,
    holdout: float = 0.2,
    seed: int = 0,
    keep_prompts: bool = False,
    report: Report | None = None,
    engine: Engine | None = None,
) -> Training:
    """Trains on a log's older requests, judges on its newest `holdout` share, and writes the bundle to `out`.

    The same log, options and machine give the same bytes. The bundle holds the model that was judged: the held-out
    requests do not enter it. With the encoder "transformer" it also holds a twin: the static learner, trained on the
    same requests and judged on the same, for whoever cannot wait. With `holdout` 0 every request is trained on and
    the metrics are out of fold. The newest training requests are kept for explanations, with the beginnings of their
    texts only if `keep_prompts`.
    Raises InputError when an option or the log is not fit for it.
    """
    if not 0.0 <= holdout < 1.0:
        raise InputError(f"--holdout {holdout} has to lie in [0, 1)")
    thresholds = [threshold] if isinstance(threshold, int | float) else sorted(set(threshold))
    for value in thresholds or [0.0]:
        if not 0.0 < value <= 1.0:
            raise InputError(f"--quality-threshold {value} has to lie in (0, 1]")
    default = thresholds[0]
    engine = engine or Local()
    if encoder not in ENCODERS:
        raise InputError(f"unknown encoder {encoder!r}: choose one of {', '.join(ENCODERS)}")
    check_replaceable(Path(out))
    log, frame = opened(logs)
    present = set(frame.select(pl.col("model").unique()).collect()["model"].to_list())
    catalog = catalog.subset([model for model in catalog.ids if model in present] or list(catalog.ids))
    data = build_dataset(log, catalog)
    older, newest = split_by_time(data, holdout)
    train_data = data.take(older)
    made = fit(
        train_data, threshold=thresholds, encoder=encoder, encoder_model=encoder_model, seed=seed, report=report,
        engine=engine,
    )  # fmt: skip
    held_out = data.take(newest)
    measured, judged, front = _judged(made, train_data, held_out, default, engine)
    metrics: dict[str, Any] = {
        "train_requests": len(older),
        "train_outcomes": int(data.observed[older].sum()),
        "held_out_requests": len(newest),
        **measured,
    }
    kept = newest_rows(train_data.quality)
    texts = [request_text(request) for request in train_data.take(kept).requests] if keep_prompts else None

    def learned(of: Fit) -> Learned:
        ids = [train_data.ids[i] for i in kept]
        return Learned(of.estimator, newest_neighbours(ids, of.embeddings(kept), train_data.quality[kept], texts))

    twin = None
    if encoder == "transformer":
        stand_in = fit(
            train_data, threshold=thresholds, encoder_model=encoder_model, seed=seed, report=report, engine=engine
        )
        twin = learned(stand_in)
        metrics["twin"] = _judged(stand_in, train_data, held_out, default, engine)[0]
    params: dict[str, Any] = {
        "quality_threshold": default,
        **({"quality_thresholds": thresholds} if len(thresholds) > 1 else {}),
        "encoder": encoder,
        "holdout": holdout,
        "seed": seed,
        "keep_prompts": keep_prompts,
    }
    sha = log_sha256(log)
    before = _before(frame, held_out)
    calls = reliability(before, catalog).to_json()
    until = before.select(pl.col("time").max()).collect(engine="streaming").item()
    manifest = {**params, "metrics": metrics, "log_sha256": sha, "reliability": calls}
    if isinstance(until, datetime):  # what `held_out` goes by for other logs
        manifest["trained_until"] = until.isoformat()
    version = save_router(out, made.estimator, manifest, learned(made).neighbours, twin)
    return Training(made, version, params, metrics, held_out, judged, front)


def opened(logs: str | Path | pl.DataFrame) -> tuple[pl.DataFrame | LogFiles, pl.LazyFrame]:
    """A log as what `build_dataset` takes and as a lazy frame: Parquet stays where it is, text files are read here.

    Raises InputError as `scan_log` does.
    """
    if isinstance(logs, pl.DataFrame):
        return logs, logs.lazy()
    if not is_url(logs) and Path(logs).is_file() and Path(logs).suffix.lower() != ".parquet":
        return opened(read_log(logs))
    files = log_files(logs)
    return opened(read_log(files)) if files.here else (files, scan_log(files))


def _judged(
    made: Fit, train_data: Dataset, held_out: Dataset, threshold: float, engine: Engine
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray], Frontier | None]:
    """The metrics of what was fitted, and what `Training` keeps of the requests that it was judged on."""
    judged = made.out_of_fold, train_data.labels(threshold)
    metrics: dict[str, Any] = {"rounds": made.rounds, "out_of_fold": scores(*judged)}
    if not len(held_out):
        return metrics, judged, None
    tasks = pieces(held_out.requests, TASK)
    found = joined(list(engine.map(estimates, made.estimator, tasks, count_of(held_out.requests))))
    judged = found.p_ok, held_out.labels(threshold)
    metrics["held_out"] = scores(*judged)
    front = _frontier(held_out, found)
    if front is not None:
        metrics["held_out"]["cost_at"] = cost_at(front)
    return metrics, judged, front


def _before(log: pl.LazyFrame, held_out: Dataset) -> pl.LazyFrame:
    """The log's rows that are older than every held-out request."""
    if not len(held_out):
        return log
    held = pl.LazyFrame({"request_id": held_out.ids}, schema={"request_id": pl.String})
    began = log.join(held, on="request_id", how="semi").select(pl.col("time").min()).collect(engine="streaming")
    return log.filter(pl.col("time") < began.item())


def _frontier(data: Dataset, found: Estimates) -> Frontier | None:
    """The frontier on the requests of which every model's outcome and cost is known, if those are enough."""
    cost = realised_cost(data)
    rows = np.flatnonzero(data.observed.all(axis=1) & ~np.isnan(cost).any(axis=1))
    if len(rows) < _LEAST_FRONTIER_ROWS:
        return None
    inputs = found.input_tokens[rows, None] * data.catalog.input_price
    expected = inputs + found.output_tokens[rows] * data.catalog.output_price
    return frontier(found.p_ok[rows], expected, cost[rows], data.quality[rows])


def realised_cost(data: Dataset) -> np.ndarray:
    """What each model's answer cost in USD by the log's token counts and the catalogue's prices, float64 [n, m]."""
    tokens_in = data.input_tokens[:, None].astype(np.float64)
    return tokens_in * data.catalog.input_price + data.output_tokens.astype(np.float64) * data.catalog.output_price


def expected_costs(estimates: Sequence[Estimate], catalog: Catalog) -> np.ndarray:
    """Expected cost in USD per request and model, float32 [n, m]."""
    return np.stack([e.input_tokens * catalog.input_price + e.output_tokens * catalog.output_price for e in estimates])
