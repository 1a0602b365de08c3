"""Sums over all stored calls, in a process of their own: decisions are made on this one's interpreter meanwhile.

`main` reads what is asked for from stdin, which may hold a password, and prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import sqlalchemy as sa

from router_ml.audit import catalogs
from router_ml.audit import changes as noted
from router_ml.catalog import Catalog
from router_ml.draining import module_command
from router_ml.errors import InputError, RouterError
from router_ml.intervals import bootstrap_interval
from router_ml.ledger import BILLED, Ledger
from router_ml.stored import spend_rows, told_decisions
from router_ml.tables import open_database
from serving.problems import ProblemError

KEEP_SECONDS = 30.0
LEAST_OUTCOMES = 30
LEAST_OF_A_KIND = 5
SECONDS = 300.0
_FAILED = ("error", "timeout", "rate_limited", "cancelled")
log = logging.getLogger(__name__)
_kept: OrderedDict[str, tuple[float, dict[str, Any]]] = OrderedDict()
_one = asyncio.Semaphore(1)


async def added(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `sums` gives, from a child process; what is at most `KEEP_SECONDS` old is given again.

    Raises ProblemError where the store cannot be read or takes longer than `SECONDS`.
    """
    key = json.dumps(asked, sort_keys=True)
    async with _one:  # who looks twice, or with a friend, waits for one and the same
        if key in _kept and _kept[key][0] > time.monotonic():
            return _kept[key][1]
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *module_command("serving.console.adding"), stdin=pipe, stdout=pipe, stderr=pipe,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            out, said = await asyncio.wait_for(child.communicate(key.encode()), SECONDS)
        except TimeoutError:
            raise ProblemError(
                503, "unavailable", f"adding up took longer than {SECONDS:g} s: ask for fewer days"
            ) from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            log.error("adding up failed with code %s: %s", child.returncode, _last(said))
            detail = said.decode(errors="replace").strip() if child.returncode == 2 else "see the service's log"
            raise ProblemError(503, "unavailable", f"the calls could not be added up: {detail}")
        found: dict[str, Any] = json.loads(out)
        _kept[key] = (time.monotonic() + KEEP_SECONDS, found)
        while len(_kept) > 8:
            _kept.popitem(last=False)
    return found


def _last(said: bytes) -> str:
    """The kind of the child's error; the rest of a traceback may quote what is stored."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].partition(":")[0] if lines else "it said nothing"


def sums(url: str, since_us: int, baseline: str, model_version: str, threshold: float) -> dict[str, Any]:
    """Calls from `since_us` on by day, tenant, task and model in the numbers of `ledger.BILLED`, and `promises`.

    `promises` has a row a model that served as chosen: `n` outcomes of the bundle's own decisions, mean `p_ok`, share
    `ok` of answers of at least `threshold`, and `residual`, their difference, as (value, low, high) of all, of the
    `older` and the `newer` half: drift is where these differ. Null below 30 outcomes, or 5 of either kind: an interval
    around what always came out the same says too much. Sessions are drawn whole.
    """
    engine = open_database(url)
    cards = {
        card.id: replace(card, sibling=None) for of in catalogs(noted(engine)).values() for each in of for card in each
    }
    ledger = Ledger(Catalog(tuple(cards.values())), baseline if baseline in cards else None)
    cube: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * (len(BILLED) + 1))
    for row in spend_rows(engine, baseline, since_us):
        billed = ledger.bill(
            row["model"], row["input_tokens"], row["output_tokens"], row["cost_usd"], row["expected_cost_usd"],
            row["baseline_expected_usd"], row["reserve_usd"], row["status"],
        )  # fmt: skip
        into = cube[f"{row['time']:%Y-%m-%d}", row["tenant"], row["task"], row["model"]]
        for at, value in enumerate((1, *billed)):
            into[at] += value
    return {
        "made_us": time.time_ns() // 1000, "since_us": since_us, "baseline": ledger.baseline,
        "columns": ["day", "tenant", "task", "model", "calls", *BILLED],
        "rows": [[*key, *values] for key, values in cube.items()],
        "promises": _promises(engine, model_version, threshold, since_us), "threshold": threshold,
    }  # fmt: skip


def _promises(engine: sa.Engine, model_version: str, threshold: float, since_us: int) -> list[dict[str, Any]]:
    told: defaultdict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row in told_decisions(engine, model_version, since_us):
        if row["quality"] is None or row["p_ok"] is None or row["served"] != row["model"] or row["status"] in _FAILED:
            continue
        group = row["session"] or row["decision_id"]
        limit = threshold if row["quality_threshold"] is None else row["quality_threshold"]
        told[row["model"]].append((row["p_ok"], float(row["quality"] >= limit), group))
    made = []
    for model, rows in sorted(told.items()):
        half = len(rows) // 2
        made.append(
            {
                "model": model, "n": len(rows), "p_ok": float(np.mean([p for p, _, _ in rows])),
                "ok": float(np.mean([ok for _, ok, _ in rows])),
                "residual": _residual(rows), "older": _residual(rows[:half]), "newer": _residual(rows[half:]),
            }
        )  # fmt: skip
    return made


def _residual(rows: list[tuple[float, float, str]]) -> list[float] | None:
    good = sum(ok for _, ok, _ in rows)
    if len(rows) < LEAST_OUTCOMES or min(good, len(rows) - good) < LEAST_OF_A_KIND:
        return None
    values = np.array([[ok - p] for p, ok, _ in rows])
    _, cluster = np.unique([group for _, _, group in rows], return_inverse=True)
    mean, low, high, _ = bootstrap_interval(values, cluster.astype(np.int64))
    found = [float(mean[0]), float(low[0]), float(high[0])]
    return found if np.isfinite(found).all() else None


def main() -> None:
    """The child's part."""
    os.nice(10)
    try:
        json.dump(sums(**json.loads(sys.stdin.read())), sys.stdout, allow_nan=False)
    except (InputError, RouterError) as error:
        sys.stderr.write(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
