"""Usage and savings from a log or a store, in whole nano-dollars: sums over any grouping are exactly the log's.

A row's cost is rounded once, half to even, and from then on everything is a sum of integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any

import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.ledger import BILLED, Ledger
from router_ml.log_schema import LOG_SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPINGS = ("tenant", "key", "task", "model", "day")
_NANO = Decimal(1_000_000_000)
_SPEND = ("expected_cost_usd", "baseline_expected_usd", "reserve_usd")
"""What a store's rows have beside the log's columns: of the chosen model, of the baseline (NaN-free, or null)."""
SPEND_SCHEMA = pl.Schema(
    {name: LOG_SCHEMA[name] for name in ("request_id", "time", "tenant", "key", "task", "model", "status")}
    | {name: LOG_SCHEMA[name] for name in ("input_tokens", "output_tokens", "cost_usd")}
    | dict.fromkeys(_SPEND, pl.Float64())
)
_MONEY = ("cost", "open_expected", "open_reserve", "compared_cost", "baseline", "savings")


@dataclass(frozen=True)
class Accounts:
    """Usage by `by`, a row a group, in whole numbers; the money in nano-dollars.

    `calls`, and of them `reported` (an outcome says what they cost), `priced` (from their tokens, by their card) and
    `open` (nothing is known of what they cost, yet); `input_tokens` and `output_tokens` as far as they are known;
    `cost_nano` of the reported and priced. Of the open ones a store knows `open_expected_nano` and
    `open_reserve_nano`. `compared` calls have a cost and a baseline's price: `compared_cost_nano` is theirs,
    `baseline_nano` what the `baseline` would have cost, `savings_nano` the difference.
    """

    frame: pl.DataFrame
    by: tuple[str, ...]
    baseline: str | None

    def total(self, column: str) -> int:
        """The sum of a column over all groups."""
        return int(self.frame[column].sum())

    def to_frame(self) -> pl.DataFrame:
        """The same with money as decimals in USD, nine digits after the point."""
        dollars = [
            (pl.col(f"{name}_nano").cast(pl.Decimal(38, 9)) / pl.lit(_NANO, pl.Decimal(38, 0))).alias(f"{name}_usd")
            for name in _MONEY
        ]
        return self.frame.with_columns(dollars).drop([f"{name}_nano" for name in _MONEY])

    def plot(self) -> Figure:
        """Cost and baseline of the twenty dearest groups."""
        from matplotlib.figure import Figure

        top = self.frame.sort("cost_nano", descending=True).head(20).reverse()
        names = [" / ".join("none" if part is None else str(part) for part in row) for row in top[self.by].iter_rows()]
        figure = Figure(figsize=(8, 0.4 * len(names) + 1.5), layout="constrained")
        axes = figure.subplots()
        for at, (column, label) in enumerate((("compared_cost_nano", "cost"), ("baseline_nano", f"{self.baseline}"))):
            if at == 0 or self.baseline is not None:
                where = [i + 0.2 - 0.4 * at for i in range(len(names))]
                values = top["cost_nano" if self.baseline is None else column].to_numpy() * 1e-9
                axes.barh(where, values, 0.4, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("USD")
        axes.legend()
        return figure


def accounts(rows: pl.DataFrame, catalog: Catalog, *, by: Sequence[str] = (), baseline: str | None = None) -> Accounts:
    """Adds up a log (`LOG_SCHEMA`) or a store's rows (`SPEND_SCHEMA`), by any of `GROUPINGS`; days are UTC.

    A call's cost is what was reported, or its known tokens at its card's ordinary prices. The baseline's cost is those
    same tokens at the baseline's prices: it is taken to answer at the same length. Where a store's row has no tokens
    but a reported cost, it is what the router expected of the baseline for that very request. Calls of which either
    side is not known are not compared.

    Raises InputError for an unknown grouping or baseline, and for a call whose tokens are known, but neither its cost
    nor its model's prices: what is unknown is not 0.
    """
    for name in by:
        if name not in GROUPINGS:
            raise InputError(f"usage cannot be given by {name!r}: choose of {', '.join(GROUPINGS)}")
    if baseline is not None and baseline not in catalog:
        raise InputError(f"the baseline {baseline!r} is not in the catalogue: it has {', '.join(catalog.ids)}")

    bill = Ledger(catalog, baseline).bill
    columns = ["model", "input_tokens", "output_tokens", "cost_usd"]
    extra = [name if name in rows.columns else pl.lit(None, pl.Float64).alias(name) for name in _SPEND]
    made = [bill(*row) for row in rows.select(*columns, *extra, "status").iter_rows()]
    sums = pl.DataFrame(made, schema=dict.fromkeys(BILLED, pl.Int64), orient="row")
    groups = [pl.col("time").dt.date().alias("day") if name == "day" else pl.col(name) for name in by]
    keyed = pl.concat([rows.select(groups), sums], how="horizontal") if by else sums
    adds = [pl.len().cast(pl.Int64).alias("calls"), *(pl.col(name).sum() for name in BILLED)]
    frame = keyed.group_by(by).agg(adds).sort(by, nulls_last=True) if by else keyed.select(adds)
    return Accounts(frame, tuple(by), baseline)


def spend_frame(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """The rows of `stored.spend_rows` as a frame of `SPEND_SCHEMA`."""
    kept = ([row[name] for name in SPEND_SCHEMA] for row in rows)
    return pl.DataFrame(list(kept), schema=SPEND_SCHEMA, orient="row")


def cents(nano: int) -> Decimal:
    """Nano-dollars as dollars and whole cents."""
    return (Decimal(nano) / _NANO).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
