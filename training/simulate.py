"""A request log with known truth: traffic, candidates, a logging policy, failures and feedback, all under one seed.

Beside the log lie the true probabilities of success (`OUT/truth`), so that an estimate from the log can be checked.
The log is generated, validated and written chunk by chunk; its size on disk is the only one that grows with the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.log_writer import LogSummary, LogWriter
from training import world
from training.outcomes import LOGGINGS, Logging, draw_models, logging_propensities
from training.traffic import FAMILIES, LEVELS, draw_follow_ups, draw_prompts
from training.world import SIMULATED_CATALOG

__all__ = ["SIMULATED_CATALOG", "simulate", "true_quality"]

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

_STATUSES = ("ok", *world.FAILURES, "cancelled")
_INPUT_PRICE = np.array([card.input_usd_per_mtok for card in SIMULATED_CATALOG]) * 1e-6
_OUTPUT_PRICE = np.array([card.output_usd_per_mtok for card in SIMULATED_CATALOG]) * 1e-6
_FAMILY_NAMES = pl.Series([family.name for family in FAMILIES])
_TASKS = pl.Series([*_FAMILY_NAMES, None], dtype=pl.String)
_TOOLS = pl.Series([*world.TOOL_SETS, None], dtype=pl.String)
_KEY_NAMES = pl.Series([f"{tenant}-{at}" for tenant in world.TENANTS for at in range(world.KEYS)])
# Which models a request may go to, [without or with tools, tenant, m].
_ALLOWED = np.array(
    [
        [[region in card.regions and ("tools" in card.capabilities or not tools) for card in SIMULATED_CATALOG]]
        for tools in (False, True)
        for region in world.REGION
    ]
).reshape(2, len(world.TENANTS), len(SIMULATED_CATALOG))
START = datetime(2025, 1, 6, tzinfo=UTC)
SPAN_S = 28 * 86_400
_CHUNK = 100_000


@dataclass(frozen=True, slots=True)
class _Requests:
    """One chunk's requests in order of time: the columns that no model decides, and what decides the outcomes."""

    columns: pl.DataFrame
    family: Index
    falls_back: npt.NDArray[np.bool_]
    allowed: npt.NDArray[np.bool_]  # [n, m]
    p_ok: Array  # [n, m]
    output_tokens: Array  # expected, [n, m]


def simulate(
    rows: int,
    out: str | Path,
    *,
    seed: int = 0,
    logging: Logging = "uniform",
    feedback_rate: float = 0.6,
    bad_feedback_ratio: float = 1.5,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LogSummary:
    """Writes a simulated log of `rows` requests at `out`, and its truth in `out/truth`; deterministic under `seed`.

    Under `uniform` and `mostly-best` a request is one row, under `full` one row for each of its candidates. An
    acceptable answer gets feedback with probability `feedback_rate`, an unacceptable one with `bad_feedback_ratio`
    times that (at most 1): missing feedback is a second selection. `quality` is 0 or 1; it is null without feedback and
    where no answer came. `progress` is called with the number of requests done. Raises InputError for impossible
    options and as `LogWriter` does.
    """
    if rows < 1:
        raise InputError(f"{rows} rows cannot be simulated: ask for at least 1")
    if logging not in LOGGINGS:
        raise InputError(f"unknown logging policy {logging!r}: choose one of {', '.join(LOGGINGS)}")
    if not (0 <= feedback_rate <= 1 and bad_feedback_ratio >= 0 and math.isfinite(bad_feedback_ratio)):
        raise InputError("the feedback rate has to lie in [0, 1] and the ratio for bad answers has to be 0 or more")
    meta = {
        "simulated": True,
        "seed": seed,
        "requests": rows,
        "feedback_rate": feedback_rate,
        "bad_feedback_ratio": bad_feedback_ratio,
    }
    with LogWriter(out, catalog=SIMULATED_CATALOG, logging=logging, meta=meta, overwrite=overwrite) as writer:
        (writer.tmp / "truth").mkdir()
        for chunk, at in enumerate(range(0, rows, _CHUNK)):
            rng = np.random.default_rng([seed, chunk])
            requests = _requests(at, min(_CHUNK, rows - at), rows, seed, rng)
            writer.write(_attempts(requests, logging, feedback_rate, bad_feedback_ratio, rng))
            writer.write_file(_truth(requests), f"truth/part-{chunk:05d}.parquet")
            if progress is not None:
                progress(min(at + _CHUNK, rows))
    assert writer.summary is not None
    return writer.summary


def true_quality(log: str | Path, request_ids: Sequence[str] | pl.Series | None = None) -> pl.DataFrame:
    """The truth behind a simulated log: a row per request, in its order, or per given id, in the ids' order.

    Columns: request_id, family, `p/<model>` (probability that the model's answer, if it gives one, is acceptable) and
    `cost_usd/<model>` (expected cost of one attempt), for every model of the catalogue, candidate or not. Raises
    InputError when the log is not a simulated one or does not hold an id.
    """
    folder = Path(log) / "truth"
    if not folder.is_dir():
        raise InputError(f"{log} has no truth beside it: only a log made by `router-ml simulate` does")
    frame = pl.scan_parquet(sorted(folder.glob("part-*.parquet")))
    if request_ids is None:
        return frame.collect()
    wanted = pl.DataFrame({"request_id": request_ids}, schema={"request_id": pl.String})
    known = frame.join(wanted.lazy(), on="request_id", how="semi").collect()
    found = wanted.join(known, on="request_id", how="left", maintain_order="left")
    if found["family"].null_count():
        missing = found.filter(pl.col("family").is_null())["request_id"][0]
        raise InputError(f"{log} holds no request {missing!r}: give ids of that log")
    return found


def _requests(first: int, n: int, total: int, seed: int, rng: np.random.Generator) -> _Requests:
    # Sessions first: the requests of one share tenant, family and difficulty.
    turns = rng.choice(len(world.TURNS), n, p=world.TURNS) + 1
    sessions = int(np.searchsorted(np.cumsum(turns), n)) + 1
    turns = turns[:sessions]
    turns[-1] -= turns.sum() - n
    starts = np.cumsum(turns) - turns
    session = np.repeat(np.arange(sessions), turns)
    turn = np.arange(n) - starts[session]

    tenant = rng.choice(len(world.TENANTS), sessions, p=world.TENANT_SHARE)
    key = rng.integers(0, world.KEYS, sessions)
    family = draw_models(world.MIX[tenant], rng)
    level = rng.choice(LEVELS, sessions, p=world.LEVEL_SHARE)
    prompts, fullness = draw_prompts(family, level, rng)
    difficulty = level - world.LEVEL_SHARE @ np.arange(LEVELS) + fullness - 0.5
    with_tools = rng.random(sessions) < world.TOOLS_SHARE[tenant]
    allowed = _ALLOWED[with_tools.astype(np.int64), tenant]

    window_s = SPAN_S * n / total
    longest_s = min(3600.0, 0.02 * window_s)
    since = np.cumsum(np.where(turn > 0, rng.exponential(world.PAUSE_S, n), 0.0))
    began = SPAN_S * first / total + rng.random(sessions) * (window_s - longest_s)
    second = began[session] + np.minimum(since - since[starts][session], longest_s)

    shape = (n, len(SIMULATED_CATALOG))
    logit = world.STRENGTH[family[session]] - world.SLOPE * difficulty[session, None]
    logit += rng.normal(0.0, world.HIDDEN_SD, (n, 1)) + rng.normal(0.0, world.MODEL_SD, shape)
    tokens = world.OUTPUT_TOKENS[family] * (1.0 + world.TOKENS_PER_LEVEL * level)
    tokens = tokens[session] * np.where(turn > 0, world.FOLLOW_UP_LENGTH, 1.0)

    prompt, messages = _conversations(prompts, turns, starts, rng)
    order = np.argsort(second, kind="stable")
    session, turn, second = session[order], turn[order], second[order]
    of = family[session]
    number = pl.int_range(first, first + n, eager=True)
    columns = pl.DataFrame(
        {
            "request_id": pl.select(
                pl.format("sim-{}-{}", pl.lit(seed), number.cast(pl.String).str.zfill(9))
            ).to_series(),
            "time": pl.Series(np.floor(second * 1e6).astype(np.int64)).cast(pl.Duration("us")),
            "session": pl.Series(first + starts[session]),
            "tenant": pl.Series(world.TENANTS).gather(tenant[session]),
            "key": _KEY_NAMES.gather((tenant * world.KEYS + key)[session]),
            "task": _TASKS.gather(np.where(world.TAGS[tenant[session]], of, len(FAMILIES))),
            "prompt": prompt.gather(order),
            "messages": messages.gather(order),
            "tools": _TOOLS.gather(np.where(with_tools, tenant // 3, len(world.TOOL_SETS))[session]),
            "candidates": _candidates(allowed[session]),
        }
    ).with_columns(
        time=pl.lit(START, LOG_SCHEMA["time"]) + pl.col("time"),
        session=pl.format("sim-{}-s{}", pl.lit(seed), "session"),
        input_tokens=(
            pl.coalesce("messages", "prompt").str.len_chars().cast(pl.Int64)
            + pl.col("tools").str.len_chars().cast(pl.Int64).fill_null(0)
            + 3
        )
        // 4,
    )
    return _Requests(
        columns=columns,
        family=of,
        falls_back=world.FALLS_BACK[tenant[session]],
        allowed=allowed[session],
        p_ok=(1.0 / (1.0 + np.exp(-logit)))[order],
        output_tokens=tokens[order, None] * world.VERBOSITY,
    )


def _conversations(
    prompts: pl.Series, turns: Index, starts: Index, rng: np.random.Generator
) -> tuple[pl.Series, pl.Series]:
    """(last user turn, the conversation so far as JSON, null on a first turn) of every request in session order."""
    text_at = np.repeat(np.arange(len(turns)), turns)
    talk_at = np.full(len(text_at), -1)
    texts, talks = [prompts], [pl.Series([None], dtype=pl.String)]
    live = np.flatnonzero(turns > 1)
    # The prompts hold neither quotes nor backslashes: a line break is all that JSON wants escaped.
    talk = _joined('{"role":"user","content":"', prompts.gather(live).str.replace_all("\n", "\\n", literal=True), '"}')
    for turn in range(1, len(world.TURNS)):
        reply, ask = draw_follow_ups(len(live), rng)
        talk = _joined(talk, ',{"role":"assistant","content":"', reply, '"},{"role":"user","content":"', ask, '"}')
        rows = starts[live] + turn
        text_at[rows] = sum(map(len, texts)) + np.arange(len(live))
        talk_at[rows] = sum(map(len, talks)) + np.arange(len(live))
        texts.append(ask)
        talks.append(_joined("[", talk, "]"))
        goes_on = turns[live] > turn + 1
        live, talk = live[goes_on], talk.filter(pl.Series(goes_on))
    return pl.concat(texts).gather(text_at), pl.concat(talks).gather(np.maximum(talk_at, 0))


def _joined(*pieces: pl.Series | str) -> pl.Series:
    return pl.select(pl.concat_str([pl.lit(piece) for piece in pieces]).alias("text")).to_series()


def _candidates(allowed: npt.NDArray[np.bool_]) -> pl.Series:
    bits, which = np.unique(allowed @ (1 << np.arange(allowed.shape[1])), return_inverse=True)
    names = np.array(SIMULATED_CATALOG.ids)
    lists = [names[(code >> np.arange(len(names))) & 1 == 1].tolist() for code in bits]
    return pl.Series(lists, dtype=pl.List(pl.String)).gather(which)


def _attempts(
    requests: _Requests, logging: Logging, feedback_rate: float, bad_feedback_ratio: float, rng: np.random.Generator
) -> pl.DataFrame:
    """What the gateway would have logged under the policy: the chosen models, and what became of the requests."""
    propensities = logging_propensities(
        np.where(requests.allowed, requests.p_ok, np.nan), logging, best=SIMULATED_CATALOG.index[world.BEST]
    )
    if logging == "full":
        rows, chosen = np.nonzero(propensities)
    else:
        rows, chosen = np.arange(len(propensities)), draw_models(propensities, rng)
    n = len(rows)
    outage = rng.random(n) < world.OUTAGE[chosen]
    luck = rng.random(n)
    retries = np.where(outage, world.MAX_RETRIES, (luck < world.GLITCH[chosen]) + (luck < world.GLITCH[chosen] ** 2))
    served = chosen.copy()
    if logging != "full":
        falls = outage & requests.falls_back[rows]
        for model in reversed(world.FALLBACK_ORDER):
            served = np.where(falls & requests.allowed[rows, model] & (chosen != model), model, served)
    fell = served != chosen
    failed = outage & ~fell
    cancelled = ~failed & (rng.random(n) < world.CANCELLED)
    answered = ~failed & ~cancelled
    status = np.where(cancelled, _STATUSES.index("cancelled"), 0)
    status[failed] = 1 + draw_models(world.FAILURE_SHARE[chosen[failed]], rng)

    good = rng.random(n) < requests.p_ok[rows, served]
    heard = rng.random(n) < feedback_rate * np.where(good, 1.0, bad_feedback_ratio)
    quality = np.where(answered & heard, good.astype(np.float64), np.nan)
    spread = rng.lognormal(-0.5 * world.TOKENS_SD**2, world.TOKENS_SD, n)
    tokens = np.maximum(np.round(requests.output_tokens[rows, served] * spread * np.where(cancelled, 0.3, 1.0)), 1.0)
    tokens[failed] = 0.0
    log = requests.columns[rows] if logging == "full" else requests.columns
    sent = log["input_tokens"].to_numpy()
    # A failed attempt is billed for its input at the price of the model that failed.
    cost = retries * sent * _INPUT_PRICE[chosen]
    cost += np.where(failed, 0.0, sent * _INPUT_PRICE[served] + tokens * _OUTPUT_PRICE[served])
    latency = world.FIRST_TOKEN_MS[served] + 1e3 * tokens / world.TOKENS_PER_S[served] + retries * world.FAILED_MS
    latency *= rng.lognormal(0.0, 0.25, n)
    ids = pl.Series(SIMULATED_CATALOG.ids)
    return log.with_columns(
        model=ids.gather(served),
        provider=pl.Series([card.provider for card in SIMULATED_CATALOG]).gather(served),
        propensity=pl.Series(propensities[rows, chosen]),
        policy_version=pl.lit(f"simulated-{logging}"),
        output_tokens=pl.Series(tokens.astype(np.int64)),
        cost_usd=pl.Series(cost),
        latency_ms=pl.Series(latency),
        status=pl.Series(_STATUSES).gather(status),
        retries=pl.Series(retries.astype(np.int64)),
        fallback_from=pl.select(pl.when(pl.Series(fell)).then(ids.gather(chosen))).to_series(),
        quality=pl.Series(quality).fill_nan(None),
        quality_source=pl.select(
            pl.when(pl.Series(~np.isnan(quality))).then(pl.Series(world.SOURCES).gather(requests.family[rows]))
        ).to_series(),
    )


def _truth(requests: _Requests) -> pl.DataFrame:
    sent = requests.columns["input_tokens"].to_numpy()[:, None]
    cost = sent * _INPUT_PRICE + requests.output_tokens * _OUTPUT_PRICE
    columns = [requests.columns["request_id"], _FAMILY_NAMES.gather(requests.family).alias("family")]
    for name, values in (("p", requests.p_ok), ("cost_usd", cost)):
        columns += [
            pl.Series(f"{name}/{model}", np.ascontiguousarray(values[:, at]), dtype=pl.Float32)
            for at, model in enumerate(SIMULATED_CATALOG.ids)
        ]
    return pl.DataFrame(columns)
