"""The checks of a log's examination (`training.doctor`), each a sentence that is true of the log and its numbers.

`log` is one with `_text`, `_outcome` and `_answered` (bool) beside the log's columns: a text is there; a quality, too;
the call was answered, as far as is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import polars as pl

from router_ml.catalog import Catalog
from router_ml.types import CACHED
from training.dataset import FAILURES
from training.examination import LEAST_OUTCOMES, Check, State
from training.support import CERTAIN


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _state(share: float, good: float = 0.95) -> State:
    return "good" if share >= good else "partly" if share > 0 else "missing"


def volume(log: pl.DataFrame, now: datetime) -> Sequence[Check]:
    """Rows, requests, duplicates, and the time that they span."""
    requests = log["request_id"].n_unique()
    first, last = log.select(first=pl.col("time").min(), last=pl.col("time").max()).row(0)
    again = int(log.select(pl.struct("request_id", "model").is_duplicated().sum()).item())
    several = int(log.select("request_id", "model").unique()["request_id"].is_duplicated().sum())
    said = f"{log.height:,} rows of {requests:,} requests"
    said += f", some sent to several models ({several:,} rows)" if several else ""
    said += f", {again:,} rows there more than once" if again else ", none there twice"
    counted = Check("rows", "partly" if again else "good", said, {
        "rows": log.height, "requests": requests, "rows_of_requests_to_several_models": several, "duplicates": again,
    })  # fmt: skip
    if first is None:
        return counted, Check("time", "missing", "no row has a time", {})
    days, age = (last - first).total_seconds() / 86400, (now - last).total_seconds() / 86400
    fresh: State = "good" if age <= 30 else "partly"
    said = f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, {days:,.1f} days; the newest row is "
    said += f"{age:,.1f} days old" if age >= 0 else "in the future"
    said += ": models and traffic may have changed since" if fresh == "partly" else ""
    numbers = {"first": first.isoformat(), "last": last.isoformat(), "days": days, "age_days": age}
    return counted, Check("time", fresh, said, numbers)


def cards(models: pl.DataFrame, catalog: Catalog | None) -> Check:
    """Which models have a card."""
    used = models.filter(pl.col("rows") > 0)
    numbers = {"used": used["model"].to_list(), "without_card": used.filter(~pl.col("card"))["model"].to_list()}
    named = f"{len(used)} model{'s' if len(used) != 1 else ''}"
    if catalog is None:
        said = f"{named} and no catalogue: neither prices nor what a model may serve are known"
        return Check("models", "missing", said, numbers)
    unknown = used.filter(~pl.col("card"))
    if unknown.is_empty():
        return Check("models", "good", f"{named}, each with a card in the catalogue", numbers)
    rows = int(unknown["rows"].sum())
    first = ", ".join(unknown["model"].head(3))
    said = f"{named}, {len(unknown)} of them without a card ({rows:,} rows: {first}): these are not learnt"
    return Check("models", "partly" if len(unknown) < len(used) else "missing", said, numbers)


def prompts(log: pl.DataFrame) -> Check:
    """How many rows have a text that can be read."""
    share, unreadable = _share(int(log["_text"].sum()), log.height), int(log["_unreadable"].sum())
    if share == 0:
        said = "no row has a prompt: it can be counted what was spent and what failed, but nothing can be learnt"
    else:
        said = f"{share:.1%} of the rows have a prompt; the others count for cost, latency and reliability alone"
        said = "every row has a prompt" if share == 1 else said
    if unreadable:
        said += f"; {unreadable} rows have messages or tools that cannot be read, for which training refuses the log"
    return Check("prompts", _state(share), said, {"share": share, "unreadable": unreadable})


def propensities(log: pl.DataFrame) -> Check:
    """What is known of how models were chosen."""
    known, drawn = pl.col("propensity").is_not_null(), pl.col("propensity") < CERTAIN
    have, random = (_share(int(log.select(e.sum()).item() or 0), log.height) for e in (known, drawn))
    sent = log.select("request_id", "model").unique()["request_id"].is_duplicated()
    requests = log["request_id"].n_unique()
    all_of = _share(log.select("request_id", "model").unique().filter(sent)["request_id"].n_unique(), requests)
    numbers = {"share": have, "drawn": random, "requests_to_several_models": all_of}
    if all_of > 0.5:
        said = f"{all_of:.1%} of the requests went to several models: what each would have done is seen, not estimated"
        return Check("propensities", "good", said, numbers)
    if have == 0:
        said = "no row has a propensity: why a model was chosen is not known, and other choices cannot be judged"
        return Check("propensities", "missing", said, numbers)
    if random == 0:
        said = f"{have:.1%} of the rows have a propensity and all are 1: the log is deterministic, and nothing that it "
        said += "did not do can be judged"
        return Check("propensities", "missing", said, numbers)
    said = f"{have:.1%} of the rows have a propensity; of {random:.1%} of the rows the model was drawn at random"
    return Check("propensities", "good" if have >= 0.95 else "partly", said, numbers)


def off_policy(models: pl.DataFrame, overlap: pl.DataFrame) -> Check:
    """What can be told of other choices."""
    told = models.filter(pl.col("identifiable") & (pl.col("rows") > 0))
    pairs = overlap.filter(pl.col("task").is_null())
    usable = pairs.filter(pl.col("comparable") != "no")
    numbers = {"always": told["model"].to_list(), "pairs": pairs.height, "comparable": usable.height}
    if pairs.is_empty():
        said = "one model at most was chosen: there is nothing to compare"
        return Check("other choices", "missing", said, numbers)
    said = f"{usable.height} of {pairs.height} pairs of models can be compared"
    if told.is_empty():
        said += "; what choosing one model always would bring is not identifiable for any"
    else:
        least = told.sort("ess").row(0, named=True)
        said += f"; always choosing one model can be judged for {', '.join(told['model'].head(5))}"
        said += f" (effective rows: {least['ess']:,.0f} or more)"
    return Check("other choices", _state(_share(usable.height, pairs.height), 1.0), said, numbers)


def outcomes(log: pl.DataFrame, feedback: pl.DataFrame) -> Check:
    """How many answers have a quality, and whether models differ in that."""
    whole = feedback.filter(pl.col("by") == "all").row(0, named=True)
    rate = whole["rate"] or 0.0
    numbers = {"rate": rate, "answers": whole["answers"], "outcomes": whole["outcomes"]}
    if not whole["outcomes"]:
        return Check("feedback", "missing", "no answer has a quality: nothing says which were good", numbers)
    said = f"{rate:.1%} of {whole['answers']:,} answers have a quality"
    by = feedback.filter((pl.col("by") == "model") & (pl.col("answers") >= LEAST_OUTCOMES)).sort("rate")
    if len(by) > 1:
        low, high = by.row(0, named=True), by.row(-1, named=True)
        numbers |= {"least_rate": low["rate"], "most_rate": high["rate"]}
        if high["rate"] > 1.5 * low["rate"]:
            said += f", from {low['rate']:.1%} of {low['value']} to {high['rate']:.1%} of {high['value']}: who answers "
            said += "is no sample of all"
    sources = feedback.filter(pl.col("by") == "source")["value"].to_list()
    said += f"; from {', '.join(sources[:3])}" + (" and others" if len(sources) > 3 else "")
    return Check("feedback", "good" if rate >= 0.3 else "partly", said, numbers)


def learning(models: pl.DataFrame, log: pl.DataFrame) -> Check:
    """Which models have outcomes enough."""
    learnt = models.filter(pl.col("learnt").is_in(["yes", "well"]))
    thin = models.filter(pl.col("learnt") == "thin")
    numbers = {"learnable": learnt["model"].to_list(), "thin": thin["model"].to_list(),
               "outcomes": int(log["_outcome"].sum())}  # fmt: skip
    bar = f"{LEAST_OUTCOMES} outcomes with a prompt, as the learning curve of docs/benchmarks.md has it"
    if len(learnt) > 1:
        said = f"{len(learnt)} of {len(models)} models have at least {bar}"
        said += f"; too few: {', '.join(thin['model'].head(5))}" if len(thin) else ""
        return Check("learning", "good" if len(learnt) == len(models) else "partly", said, numbers)
    if len(learnt) == 1:
        (one,) = learnt["model"]
        said = f"only {one} has at least {bar}: its own quality can be learnt, a choice between models cannot"
    else:
        said = f"no model has at least {bar}: nothing can be learnt yet"
    return Check("learning", "missing", said, numbers)


def complete(log: pl.DataFrame) -> Sequence[Check]:
    """Costs, tokens, latencies and statuses."""
    called = log.filter("_answered")
    names = {"cost_usd": "a cost", "input_tokens": "input tokens", "output_tokens": "output tokens",
             "latency_ms": "a latency", "status": "a status"}  # fmt: skip
    shares = {name: 1.0 - _share(called[name].null_count(), called.height) if called.height else 0.0 for name in names}
    parts = ", ".join(f"{shares[name]:.0%} {what}" for name, what in names.items())
    tokens = min(shares["input_tokens"], shares["output_tokens"])
    said = f"of the answers have {parts}"
    if shares["cost_usd"] < 0.95 and tokens >= 0.95:
        said += "; costs follow from tokens and prices"
    state = _state(max(shares["cost_usd"], tokens))
    return (Check("cost and tokens", state, said, shares),)


def sessions(log: pl.DataFrame) -> Check:
    """Conversations."""
    have = _share(log.height - log["session"].null_count(), log.height)
    sizes = log.drop_nulls("session").group_by("session").agg(n=pl.col("request_id").n_unique())
    turns = float(sizes["n"].mean() or 0.0)  # type: ignore[arg-type]
    later = log.select(pl.col("messages").str.contains(r'"role"\s*:\s*"assistant"').sum()).item() or 0
    multi = _share(int(later), log.height)
    numbers = {"share": have, "sessions": sizes.height, "requests_a_session": turns, "multi_turn": multi}
    if not sizes.height:
        said = "no row names a session: which requests belong together is not known, and intervals take each for itself"
        return Check("sessions", "missing", said, numbers)
    said = f"{sizes.height:,} sessions of {turns:.1f} requests on average, on {have:.1%} of the rows"
    said += f"; {multi:.1%} of the rows carry earlier turns" if multi else ""
    return Check("sessions", _state(have), said, numbers)


def reliability(log: pl.DataFrame) -> Check:
    """Failures, fallbacks and retries."""
    known = log.drop_nulls("status").filter(pl.col("status") != CACHED)
    failed = _share(known.filter(pl.col("status").is_in(FAILURES)).height, known.height)
    fell = _share(log.height - log["fallback_from"].null_count(), log.height)
    tried = log.drop_nulls("retries")
    retried = _share(tried.filter(pl.col("retries") > 0).height, tried.height)
    numbers = {"status_share": _share(known.height, log.height), "failed": failed, "fallbacks": fell,
               "retries_share": _share(tried.height, log.height), "retried": retried}  # fmt: skip
    if known.is_empty():
        return Check("failures", "missing", "no row has a status: failures are not known", numbers)
    said = f"{failed:.1%} of the calls with a status failed, {fell:.1%} of the rows came after a fallback"
    said += f", {retried:.1%} of those that say so were retried" if tried.height else "; retries are not logged"
    return Check("failures", "good" if tried.height else "partly", said, numbers)


def clock(log: pl.DataFrame, now: datetime) -> Check:
    """Times that cannot be."""
    times = log["time"].drop_nulls()
    future = int((times > now).sum())
    back = int((times.diff().dt.total_microseconds() < 0).sum())
    days = int((times.dt.truncate("1d") == times).sum())
    numbers = {"missing": log["time"].null_count(), "future": future, "backwards": back, "midnight": days}
    wrong = []
    if numbers["missing"]:
        wrong.append(f"{numbers['missing']:,} rows have no time")
    if future:
        wrong.append(f"{future:,} rows are in the future")
    if back:
        wrong.append(f"{back:,} rows are older than the row before them")
    if len(times) and days > 0.5 * len(times):
        wrong.append("most times are midnight: they are days, and the order within a day is not known")
    return Check("clock", "partly" if wrong else "good", "; ".join(wrong) or "times run forwards", numbers)
