"""How long one router takes for a decision as a multiple of another, on this machine now."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from features import golden
from router_ml.errors import NoEligibleModelError
from router_ml.router import Router
from router_ml.types import Message, RouteRequest

BLOCKS, REQUESTS = 15, 60


def latency_ratio(champion: Router, challenger: Router, requests: Sequence[RouteRequest] | None = None) -> float:
    """The challenger's median time for a decision by the champion's, on this machine now.

    Both decide the same requests in turns, block by block, and the median of the blocks' ratios is taken: what slows
    the machine down slows both. NaN where there is no request that both may decide.
    """
    asked = list(requests or ())[:REQUESTS]
    if not asked:
        asked = [RouteRequest(messages=tuple(Message(*turn) for turn in turns)) for turns in golden.CONVERSATIONS]
    asked = [request for request in asked if _decides(champion, request) and _decides(challenger, request)]
    if not asked:
        return float("nan")
    ratios = []
    for block in range(BLOCKS):
        order = (champion, challenger) if block % 2 else (challenger, champion)
        took = {id(router): _median_ns(router, asked) for router in order}
        ratios.append(took[id(challenger)] / took[id(champion)])
    return float(np.median(ratios))


def _decides(router: Router, request: RouteRequest) -> bool:
    try:
        router.decide(request)
    except NoEligibleModelError:
        return False
    return True


def _median_ns(router: Router, requests: Sequence[RouteRequest]) -> float:
    took = []
    for request in requests:
        begun = time.perf_counter_ns()
        router.decide(request)
        took.append(time.perf_counter_ns() - begun)
    return float(np.median(took))
