"""What a log can and cannot support, before anything is trained on it: `examine`."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import combinations

import numpy as np
import polars as pl

from router_ml.catalog import Catalog
from router_ml.log_texts import unreadable_messages, unreadable_tools
from router_ml.types import ModelCard
from training import log_checks
from training.compare import LEAST_PAIRS
from training.dataset import FAILURES
from training.examination import GOOD_OUTCOMES, LEAST_OUTCOMES, Check, Examination
from training.label_noise import label_noise
from training.logged import Logged, logged_of, one_row_a_request
from training.remedies import remedies_for
from training.support import CERTAIN, support_of, supported, unsupported_of, why_not_identifiable

MOST_MODELS, MOST_TASKS, MOST_VALUES = 20, 5, 20
_HAS_TEXT = pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()
_CHOSEN = pl.coalesce("fallback_from", "model")


def examine(
    log: pl.DataFrame, catalog: Catalog | None, *, judgements: pl.DataFrame | None = None, now: datetime | None = None
) -> Examination:
    """Looks at a log (`LOG_SCHEMA`), without training anything; `now` (default: the clock) is what freshness is from.

    Without a catalogue every model counts as a candidate, and none has a card. Candidates are the catalogue's models.
    `judgements` is what several sources say of the same answers (`importers.settle.judgements_of` an imported log).
    An outcome is a known quality on a row with a prompt: without a prompt nothing can be learnt from it. What is said
    of always choosing a model is by `training.support`, from logged propensities alone. Raises nothing for a log that
    supports nothing: that is what it says then.
    """
    now = datetime.now(UTC) if now is None else now
    unreadable = unreadable_messages(log["messages"]) | unreadable_tools(log["tools"])
    has_text = _HAS_TEXT & ~pl.lit(unreadable)
    log = log.with_columns(
        _text=has_text,
        _unreadable=pl.lit(unreadable),
        _outcome=has_text & pl.col("quality").is_not_null(),
        _answered=pl.col("status").is_null() | ~pl.col("status").is_in([*FAILURES, "cancelled"]),
    )
    if log.is_empty():
        check = Check("rows", "missing", "the log has no rows: it supports nothing", {"rows": 0, "requests": 0})
        nothing = _models(log, catalog, {})
        return Examination((check,), nothing, _feedback(log), _overlap(None, log), remedies_for((check,), nothing))
    logged = _decisions(log, catalog)
    models = _models(log, catalog, {} if logged is None else _always(logged))
    feedback, overlap = _feedback(log), _overlap(logged, log)
    checks = (
        *log_checks.volume(log, now),
        log_checks.cards(models, catalog),
        log_checks.prompts(log),
        log_checks.propensities(log),
        log_checks.off_policy(models, overlap),
        log_checks.outcomes(log, feedback),
        label_noise(log, judgements),
        log_checks.learning(models, log),
        *log_checks.complete(log),
        log_checks.sessions(log),
        log_checks.reliability(log),
        log_checks.clock(log, now),
    )
    return Examination(checks, models, feedback, overlap, remedies_for(checks, models))


def _decisions(log: pl.DataFrame, catalog: Catalog | None) -> Logged | None:
    """The log's decisions between known models, texts left out; None where there are none."""
    ids = _candidates(log, catalog)
    rows = log.filter(_CHOSEN.is_in(ids) & pl.col("request_id").is_not_null()).with_columns(
        prompt=pl.lit(None, pl.String), messages=pl.lit(None, pl.String)
    )
    if rows.is_empty():
        return None
    cards = catalog or Catalog(
        tuple(ModelCard(id=m, provider="", tier="hosted-open", input_usd_per_mtok=0, output_usd_per_mtok=0,
                        context_window=1) for m in ids)
    )  # fmt: skip
    return logged_of(one_row_a_request(rows.unique(["request_id", "model"], maintain_order=True)), cards)


def _candidates(log: pl.DataFrame, catalog: Catalog | None) -> list[str]:
    return list(catalog.ids) if catalog else log.select(_CHOSEN.drop_nulls().unique().sort()).to_series().to_list()


def _always(logged: Logged) -> dict[str, dict[str, object]]:
    """What the log can tell of choosing each model always: effective rows, decisions out of reach, and why not."""
    can, seen = supported(logged, None), ~np.isnan(logged.metrics["quality"])
    found = {}
    for at, model in enumerate(logged.catalog.ids):
        target = np.zeros_like(logged.eligible, dtype=float)
        target[:, at] = 1.0
        weight = np.nan_to_num((logged.action == at) / logged.propensity)
        lost = unsupported_of(target, target, can)
        support = support_of(weight, target, np.zeros(len(logged)), lost)
        share = 1.0 - support.unsupported_mass
        why = why_not_identifiable(support, share, weight, target, weight, seen, logged.cluster)
        found[model] = {
            "identifiable": not why,
            "ess": support.ess,
            "unsupported": support.unsupported_mass,
            "why": why,
        }
    return found


def _models(log: pl.DataFrame, catalog: Catalog | None, always: dict[str, dict[str, object]]) -> pl.DataFrame:
    counts = log.group_by("model").agg(
        rows=pl.len(), answers=pl.col("_answered").sum(), outcomes=pl.col("_outcome").sum()
    )  # fmt: skip
    names = pl.DataFrame({"model": _candidates(log, catalog)}, schema={"model": pl.String})
    told = pl.DataFrame(
        [{"model": model, **row} for model, row in always.items()],
        schema={"model": pl.String, "identifiable": pl.Boolean, "ess": pl.Float64, "unsupported": pl.Float64,
                "why": pl.String},
    )  # fmt: skip
    every = pl.concat([names, counts.select("model").drop_nulls()]).unique(maintain_order=True)
    card = pl.col("model").is_in(list(catalog.ids)) if catalog else pl.lit(False)
    outcomes = pl.col("outcomes")
    learnt = (
        pl.when(outcomes == 0)
        .then(pl.lit("no"))
        .when(outcomes < LEAST_OUTCOMES)
        .then(pl.lit("thin"))
        .when(outcomes < GOOD_OUTCOMES)
        .then(pl.lit("yes"))
        .otherwise(pl.lit("well"))
    )
    if catalog:  # training takes the catalogue's models
        learnt = pl.when(card).then(learnt).otherwise(pl.lit("no"))
    return (
        every.join(counts, on="model", how="left")
        .with_columns(pl.col("rows", "answers", "outcomes").fill_null(0).cast(pl.Int64))
        .with_columns(card=card, learnt=learnt)
        .join(told, on="model", how="left")
        .sort("rows", "model", descending=[True, False])
        .select("model", "card", "rows", "answers", "outcomes", "learnt", "identifiable", "ess", "unsupported", "why")
    )


def _feedback(log: pl.DataFrame) -> pl.DataFrame:
    """Answers and how many of them have a quality: of all, by model, by tenant; and outcomes by source."""
    answers = log.filter("_answered")
    counts = {"answers": pl.len(), "outcomes": pl.col("quality").count()}
    tables = [answers.select(by=pl.lit("all"), value=pl.lit("all"), **counts)]
    for by in ("model", "tenant"):
        found = answers.drop_nulls(by).group_by(pl.col(by).alias("value")).agg(**counts)
        tables.append(found.sort("answers", "value", descending=[True, False]).head(MOST_VALUES)
                      .select(pl.lit(by).alias("by"), "value", "answers", "outcomes"))  # fmt: skip
    sources = answers.filter(pl.col("quality").is_not_null()).select(
        pl.col("quality_source").fill_null("not named").str.split("+").alias("value")
    )
    named = sources.explode("value").group_by("value").agg(outcomes=pl.len()).sort("outcomes", descending=True)
    tables.append(named.head(MOST_VALUES).select(
        pl.lit("source").alias("by"), "value", pl.lit(answers.height).alias("answers"), "outcomes"))  # fmt: skip
    text, count = pl.col("by", "value").cast(pl.String), pl.col("answers", "outcomes").cast(pl.Int64)
    rows = pl.concat([table.select(text, count) for table in tables])
    return rows.with_columns(rate=pl.when(pl.col("answers") > 0).then(pl.col("outcomes") / pl.col("answers")))


def _overlap(logged: Logged | None, log: pl.DataFrame) -> pl.DataFrame:
    """Which pairs of models can be compared, of all requests and of the commonest tasks."""
    schema = {"task": pl.String, "model_a": pl.String, "model_b": pl.String, "pairs": pl.Int64, "drawn_a": pl.Int64,
              "drawn_b": pl.Int64, "comparable": pl.String}  # fmt: skip
    if logged is None:
        return pl.DataFrame(schema=schema)
    rows = np.bincount(logged.action, minlength=len(logged.catalog))
    common = [int(at) for at in np.argsort(-rows, kind="stable")[:MOST_MODELS] if rows[at]]
    ids = logged.catalog.ids
    can, drawn = supported(logged, None), logged.propensity < CERTAIN
    seen = ~np.isnan(logged.metrics["quality"]) & drawn
    tasks = logged.slices["task"]
    known = log.filter(pl.col("task").is_not_null())["task"].value_counts(sort=True)["task"][:MOST_TASKS].to_list()
    both = log.filter(pl.col("quality").is_not_null()).select("request_id", "task", "model").unique()
    both = both.filter(pl.col("request_id").is_duplicated())
    made = []
    for task in (None, *known):
        here = np.ones(len(logged), dtype=bool) if task is None else (tasks == task).to_numpy()
        sent = (both if task is None else both.filter(pl.col("task") == task)).select("request_id", "model")
        asked = {m: set(sent.filter(pl.col("model") == m)["request_id"]) for m in sent["model"].unique()}
        for a, b in combinations(common, 2):
            pairs = len(asked.get(ids[a], set()) & asked.get(ids[b], set()))
            may = here & seen & can[:, a] & can[:, b]
            of_a, of_b = int((may & (logged.action == a)).sum()), int((may & (logged.action == b)).sum())
            how = "pairs" if pairs >= LEAST_PAIRS else "drawn" if min(of_a, of_b) >= LEAST_PAIRS else "no"
            made.append((task, ids[a], ids[b], pairs, of_a, of_b, how))
    return pl.DataFrame(made, schema=schema, orient="row")
