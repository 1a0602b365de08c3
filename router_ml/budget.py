"""What a tenant or a key may spend in a day or a month, and how a request's dial gives way when that runs out."""

from __future__ import annotations

import calendar
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from router_ml.errors import InputError
from router_ml.types import Pressure

NEARLY = 0.9
"""From this share of a budget on the dial moves, however far the period is."""


class Period(NamedTuple):
    """A day or a month in UTC: its name ("2026-11-26", "2026-11"), and the share of it that has gone by."""

    name: str
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a `tenant` or a `key` (one of the two) may spend `per` day or month, in USD.

    It is paced: where the share that is spent is more than `ahead` before the share of the period that has gone by, or
    above `NEARLY`, the least probability of an acceptable answer moves towards `floor`, and reaches it when all is
    spent. With `hard` nothing is decided then. Raises InputError for values that are not possible.
    """

    usd: float
    per: Literal["day", "month"]
    tenant: str | None = None
    key: str | None = None
    floor: float = 0.0
    ahead: float = 0.1
    hard: bool = False

    def __post_init__(self) -> None:
        if (self.tenant is None) == (self.key is None):
            raise InputError("every [[budget]] is of a tenant or of a key: name one of the two")
        if not all(name is None or (isinstance(name, str) and name) for name in (self.tenant, self.key)):
            raise InputError("the tenant or key of a [[budget]] has to be its name")
        if self.per not in ("day", "month"):
            raise InputError(f'{self.name}: per has to be "day" or "month"')
        for name, least, most in (("usd", 1e-6, 1e9), ("floor", 0.0, 1.0), ("ahead", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise InputError(f"{self.name}: {name} has to be a number from {least:g} to {most:g}")
        if not isinstance(self.hard, bool):
            raise InputError(f"{self.name}: hard has to be true or false")

    @classmethod
    def from_table(cls, table: Any) -> Budget:
        """A budget from parsed TOML or JSON. Raises InputError."""
        known = cls.__dataclass_fields__
        if not isinstance(table, Mapping) or not {"usd", "per"} <= set(table) <= set(known):
            raise InputError(
                f"every [[budget]] has to be a table with usd, per and, of {', '.join(known)}, nothing else"
            )
        return cls(**table)

    def to_json(self) -> dict[str, Any]:
        """The table that `from_table` reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def name(self) -> str:
        """Whose it is and for how long: its sums are kept under this name, whatever the amount."""
        return f"the budget of {self.whose} a {self.per}"

    @property
    def whose(self) -> str:
        """The tenant or key, in words."""
        return f"key {self.key!r}" if self.tenant is None else f"tenant {self.tenant!r}"

    def period(self, now: datetime) -> Period:
        """The period that a time with a zone lies in."""
        now = now.astimezone(UTC)
        start = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if self.per == "day":
            return Period(f"{start:%Y-%m-%d}", (now - start) / timedelta(days=1))
        start = start.replace(day=1)
        days = calendar.monthrange(start.year, start.month)[1]
        return Period(f"{start:%Y-%m}", (now - start) / timedelta(days=days))

    def pressure(self, spent_usd: float, elapsed: float) -> Pressure | None:
        """What it asks of the dial when so much is spent and this share of the period has gone by; None: nothing."""
        share = spent_usd / self.usd
        start = min(elapsed + self.ahead, NEARLY)
        if share <= start:
            return None
        spent = f"{share:.0%} of the {self.usd:g} USD a {self.per} of {self.whose} is spent"
        return Pressure(
            min((share - start) / (1.0 - start), 1.0), self.floor, f"{spent}, {elapsed:.0%} of the {self.per} gone"
        )


def moved(min_probability: float, pressure: Pressure) -> float:
    """The least probability under a pressure: never below its floor, and never above what was asked."""
    return min_probability - pressure.moved * max(min_probability - pressure.floor, 0.0)


def pressed(pressure: Pressure, min_probability: float) -> str:
    """What a decision's reason says of it."""
    return f"the dial moved to {min_probability:.3g}: {pressure.why}"
