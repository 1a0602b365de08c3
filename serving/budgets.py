"""What budgets have spent: this process's decisions as they are made and settled, and what the other processes say.

A decision counts at its expected cost until an outcome reports what it cost. Sums are whole nano-dollars, one a budget,
period and process; the processes on one database add them up, a round of `serving.shared` late. A second outcome with
a cost that reaches another process than the first counts once more: a budget is a brake; accounts come from the store.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from router_ml.budget import Budget
from router_ml.policy import Policy
from router_ml.types import Pressure, RouteDecision, RouteRequest
from serving.problems import ProblemError

_AWAITED = 50_000  # decisions whose outcomes can still settle them here
Account = tuple[str, str]
"""A budget's name and a period's."""


class _Charged(NamedTuple):
    nano: int
    key: str | None
    accounts: tuple[Account, ...]


class Budgets:
    """The accounts of one process; every method may be called from any thread. `now` gives a time with a zone."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._own: defaultdict[Account, int] = defaultdict(int)
        self._others: Mapping[Account, int] = {}
        self._told: dict[Account, int] = {}
        self._awaited: OrderedDict[str, _Charged] = OrderedDict()
        self._budgets: tuple[Budget, ...] = ()
        self._of: dict[tuple[str, str], list[Budget]] = {}

    @property
    def active(self) -> bool:
        """Whether there are budgets, or were."""
        return bool(self._budgets or self._own)

    def follow(self, policy: Policy) -> None:
        """Takes up a policy's budgets; requests and decisions bring theirs by themselves."""
        if policy.budget is not self._budgets:
            of: defaultdict[tuple[str, str], list[Budget]] = defaultdict(list)
            for budget in policy.budget:
                of["tenant" if budget.key is None else "key", str(budget.tenant or budget.key)].append(budget)
            with self._lock:
                self._budgets, self._of = policy.budget, dict(of)

    def pressed(self, asked: RouteRequest, policy: Policy) -> RouteRequest:
        """The request under what its budgets ask of its dial, the strongest of them.

        Raises ProblemError (402) where a hard one is spent.
        """
        if not policy.budget:
            return asked
        now, strongest = self._now(), None
        for budget in self._matching(policy, asked.tenant, asked.key):
            name, elapsed = budget.period(now)
            spent = self.spent_usd(budget.name, name)
            if budget.hard and spent >= budget.usd:
                raise ProblemError(
                    402, "budget-spent",
                    f"{budget.whose} has spent its {budget.usd:g} USD of this {budget.per}: raise the budget in the "
                    f"policy, or wait for the next {budget.per} (UTC)",
                )  # fmt: skip
            pressure = budget.pressure(spent, elapsed)
            if pressure is not None and (strongest is None or _asks(pressure) > _asks(strongest)):
                strongest = pressure
        return asked if strongest is None else replace(asked, pressure=strongest)

    def spent_usd(self, budget: str, period: str) -> float:
        """What a budget has spent in a period as far as it is known here, USD."""
        account = (budget, period)
        with self._lock:
            return (self._own.get(account, 0) + self._others.get(account, 0)) * 1e-9

    def decided(self, policy: Policy, request: RouteRequest, decision: RouteDecision) -> None:
        """Charges a decision, at its expected cost, to the budgets that it is paid from."""
        if not policy.budget:
            return
        cost = decision.candidates[0].expected_cost_usd
        budgets = self._matching(policy, request.tenant, request.key)
        if not budgets:
            return
        if not math.isfinite(cost):  # nobody knows it: its outcome charges it
            cost = 0.0
        now = self._now()
        accounts = tuple([(budget.name, budget.period(now).name) for budget in budgets])
        with self._lock:
            self._awaited[decision.decision_id] = _Charged(self._charge(accounts, cost, 0), request.key, accounts)
            if len(self._awaited) > _AWAITED:
                self._awaited.popitem(last=False)

    def settled(self, decision_id: str, cost_usd: float, key: str | None) -> None:
        """Puts what a call of this process's decision has cost in the place of what it was charged; its key says so."""
        with self._lock:
            charged = self._awaited.get(decision_id)
            if charged is not None and charged.key == key:
                nano = self._charge(charged.accounts, cost_usd, charged.nano)
                self._awaited[decision_id] = charged._replace(nano=nano)

    def settled_elsewhere(self, row: Mapping[str, Any], cost_usd: float) -> None:
        """The same for another process's decision: its `key`, `tenant`, `time_us` and `expected_cost_usd`."""
        when = datetime.fromtimestamp(row["time_us"] / 1e6, UTC)
        with self._lock:
            found = self._look_up(row["tenant"], row["key"])
            accounts = tuple([(budget.name, budget.period(when).name) for budget in found])
            self._charge(accounts, cost_usd, round((row["expected_cost_usd"] or 0.0) * 1e9))

    def untold(self) -> dict[Account, int]:
        """The sums, nano-dollars, that have changed since `told`."""
        with self._lock:
            return {account: nano for account, nano in self._own.items() if self._told.get(account) != nano}

    def told(self, sums: Mapping[Account, int], others: Mapping[Account, int]) -> None:
        """Says that the others know these sums, and what theirs are."""
        with self._lock:
            self._told.update(sums)
            self._others = others

    def states(self) -> list[tuple[Budget, float]]:
        """Each budget of the policy that was last asked for, and what it has spent in the period of now, USD."""
        now = self._now()
        return [(budget, self.spent_usd(budget.name, budget.period(now).name)) for budget in self._budgets]

    def _charge(self, accounts: Sequence[Account], cost_usd: float, instead_of: int) -> int:
        nano = round(cost_usd * 1e9)
        for account in accounts:
            self._own[account] += nano - instead_of
        return nano

    def _matching(self, policy: Policy, tenant: str | None, key: str | None) -> list[Budget]:
        self.follow(policy)
        return self._look_up(tenant, key)

    def _look_up(self, tenant: str | None, key: str | None) -> list[Budget]:
        of = self._of
        return [*of.get(("tenant", tenant or ""), ()), *of.get(("key", key or ""), ())]


def _asks(pressure: Pressure) -> tuple[float, float]:
    return pressure.moved, -pressure.floor
