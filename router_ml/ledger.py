"""What one call cost, and what another model would have cost in its place, in whole nano-dollars. Needs no polars."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.prices import Usage, price_call
from router_ml.types import CACHED

BILLED = (
    *("reported", "priced", "open", "input_tokens", "output_tokens", "cost_nano", "open_expected_nano"),
    *("open_reserve_nano", "compared", "compared_cost_nano", "baseline_nano", "savings_nano"),
)
_NANO = Decimal(1_000_000_000)


class Ledger:
    """Bills calls by the cards of `catalog`, beside what `baseline` (None: nothing) would have cost."""

    def __init__(self, catalog: Catalog, baseline: str | None = None) -> None:
        self.catalog, self.baseline = catalog, baseline
        self._priced = lru_cache(maxsize=100_000)(self._price)

    def bill(
        self,
        model: str,
        into: int | None,
        out: int | None,
        usd: float | None,
        expected: float | None,
        elsewhere: float | None,
        reserve: float | None,
        status: str | None = None,
    ) -> tuple[int, ...]:
        """A call as the numbers `BILLED`, see `accounting.Accounts`.

        `into` and `out` are its tokens, `usd` what an outcome reported; of the decision, `expected` and `reserve` of
        the chosen model and `elsewhere` of the baseline. What the gateway's cache answered (`status`) would have cost
        nothing with the baseline either. Raises InputError for tokens that nothing prices.
        """
        if status == CACHED:
            usd, elsewhere = usd or 0.0, 0.0
        tokens = None if into is None or out is None else (into, out)
        cost = _nano(Decimal(repr(usd))) if usd is not None else self._priced(model, *tokens) if tokens else None
        other: int | None = None
        if self.baseline is not None and cost is not None:
            if tokens and status != CACHED:
                other = self._priced(self.baseline, *tokens)
            elif elsewhere is not None:
                other = _nano(Decimal(repr(elsewhere)))
        is_open = cost is None
        return (
            *(int(usd is not None), int(usd is None and tokens is not None), int(is_open), into or 0, out or 0),
            *(cost or 0, *((_nano(Decimal(repr(v))) if is_open and v is not None else 0) for v in (expected, reserve))),
            *((1, cost, other, other - cost) if cost is not None and other is not None else (0, 0, 0, 0)),
        )

    def _price(self, model: str, into: int, out: int) -> int:
        if model not in self.catalog:
            raise InputError(
                f"calls of model {model!r} have tokens and no cost, and the catalogue has no price for it: add it with "
                f"`router-ml catalog import --model {model} --out catalog.json`, and give that with --catalog"
            )
        return _nano(price_call(self.catalog[model], Usage(input_tokens=into, output_tokens=out)))


def _nano(usd: Decimal) -> int:
    if not math.isfinite(usd):
        raise InputError("a cost in the log is not a number: set such rows aside with `router-ml import`")
    return int((usd * _NANO).quantize(Decimal(1), ROUND_HALF_EVEN))
