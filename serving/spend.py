"""What decisions are expected to cost beside a baseline, and what the calls cost according to their outcomes.

Counted on the event loop's thread alone, in plain numbers without locks: some three microseconds a decision.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from router_ml.errors import InputError
from router_ml.router import Router
from router_ml.types import Candidate, Outcome, RouteDecision, RouteRequest
from serving.budgets import Budgets

UNKNOWN = "unknown"
_AWAITED = 50_000  # decisions whose outcomes can still be told by model
_IF_BASELINE = (
    " had the baseline served the same requests: the setting baseline_model, by default the model with the highest rate"
    " of acceptable answers in the training log; where it may not serve a request, the next best that may"
)
_CHOSEN = (
    ("router_expected_cost_usd", "Expected cost in USD of the calls decided on, retries included"),
    (
        "router_expected_answer_cost_usd",
        "Expected cost in USD of acceptable answers: the calls, and what follows where one fails or is not good enough",
    ),
    ("router_expected_ok", "Expected number of acceptable first answers: the sum of P(ok) of the chosen models"),
)
_BASELINE = (
    ("router_baseline_cost_usd", "Expected cost in USD of the calls"),
    ("router_baseline_answer_cost_usd", "Expected cost in USD of acceptable answers"),
    ("router_baseline_ok", "Expected number of acceptable first answers"),
)
_Sums = defaultdict[tuple[str, str], list[float]]


def _sums() -> _Sums:
    return defaultdict(lambda: [0.0] * len(_CHOSEN))


def baseline_order(router: Router, first: str | None = None) -> tuple[str, ...]:
    """The catalogue's models by their rate of acceptable answers in the training log, the highest first.

    Those with equal rates, and all where the learner does not say, by their output price, the dearest first. `first` is
    put before all others, if the catalogue has it.
    """
    success = getattr(getattr(router.estimator, "featurizer", None), "success", None)
    rates = [0.0] * len(router.catalog) if success is None else [float(rate) for rate in success]
    order = sorted(
        range(len(rates)), key=lambda i: (router.catalog.ids[i] != first, -rates[i], -router.catalog.output_price[i])
    )
    return tuple(router.catalog.ids[i] for i in order)


class Spend:
    """Sums by model and tier, for Prometheus to collect. `baseline_model` None: the first of `baseline_order`.

    Raises InputError when the router's catalogue does not have the baseline. A bundle that is loaded later may lack it:
    then the default is compared with.
    """

    def __init__(self, router: Router, baseline_model: str | None = None, budgets: Budgets | None = None) -> None:
        if baseline_model is not None and baseline_model not in router.catalog:
            raise InputError(
                f"baseline_model {baseline_model!r} is not in the bundle's catalogue: choose one of "
                f"{', '.join(router.catalog.ids)}"
            )
        self._baseline_model = baseline_model
        self._budgets = Budgets() if budgets is None else budgets
        self._rank_for(router)
        self._served: OrderedDict[str, str] = OrderedDict()
        self._chosen, self._baseline = _sums(), _sums()
        self._paid: defaultdict[str, float] = defaultdict(float)
        self._reported: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._quality: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def _rank_for(self, router: Router) -> None:
        order = baseline_order(router, self._baseline_model)
        self._router, self._first, self._rank = router, order[0], {model: i for i, model in enumerate(order)}

    def decided(self, router: Router, decision: RouteDecision, tier: str, request: RouteRequest | None = None) -> None:
        """Adds a decision beside the baseline of `router`, and charges the budgets that its `request` is paid from.

        One whose costs or probability nobody knows is left out on both sides.
        """
        if request is not None:
            self._budgets.decided(router.policy, request, decision)
        if router is not self._router:
            self._rank_for(router)
        chosen, baseline = decision.candidates[0], self._baseline_of(decision)
        self._served[decision.decision_id] = chosen.model
        if len(self._served) > _AWAITED:
            self._served.popitem(last=False)
        _, p, cost, answer, *_ = chosen
        _, p_there, cost_there, answer_there, *_ = baseline
        if not math.isfinite(p + cost + answer + p_there + cost_there + answer_there):
            return
        sums = self._chosen[chosen.model, tier]
        sums[0] += cost
        sums[1] += answer
        sums[2] += p
        sums = self._baseline[baseline.model, tier]
        sums[0] += cost_there
        sums[1] += answer_there
        sums[2] += p_there

    def _baseline_of(self, decision: RouteDecision) -> Candidate:
        for candidate in decision.candidates:
            if candidate.model == self._first:
                return candidate
        return min(decision.candidates, key=lambda c: self._rank.get(c.model, math.inf))

    def reported(self, outcome: Outcome, *, called: bool, key: str | None = None) -> str | None:
        """Adds an outcome, `called` unless it is feedback alone, and returns the model that served, if it is known.

        Where its `key` has asked for the decision, what it cost settles what budgets were charged.
        """
        of, model = outcome.decision_id or "", outcome.served_model
        if model is None:
            model = self._served.get(of)
        elif of in self._served and model in self._rank:
            self._served[of] = model  # feedback that comes later names no model
        ours = model in self._rank or model == self._served.get(of)  # which may be one of a challenger's alone
        name = model if ours and model is not None else UNKNOWN  # a name that a caller invents must not become a series
        if called:
            self._reported[name, outcome.status] += 1
        if outcome.cost_usd is not None:
            self._paid[name] += outcome.cost_usd
            self._budgets.settled(of, outcome.cost_usd, key)
        if outcome.quality is not None:
            quality = self._quality[name]
            quality[0] += 1
            quality[1] += outcome.quality
        return model

    def collect(self) -> Iterator[Metric]:
        """The sums as metrics."""
        yield from _families(_CHOSEN, "model", ".", self._chosen)
        yield from _families(_BASELINE, "baseline", f"{_IF_BASELINE}.", self._baseline)
        paid = CounterMetricFamily(
            "router_cost_usd", "Cost in USD that outcomes report, by the model that served.", labels=["model"]
        )
        for model, usd in self._paid.items():
            paid.add_metric([model], usd)
        yield paid
        reported = CounterMetricFamily(
            "router_outcomes", "Outcomes of calls, by the model that served.", labels=["model", "status"]
        )
        for served, calls in self._reported.items():
            reported.add_metric(served, calls)
        yield reported
        quality = SummaryMetricFamily(
            "router_outcome_quality", "Quality that outcomes report, 0 to 1.", labels=["model"]
        )
        for model, (count, total) in self._quality.items():
            quality.add_metric([model], int(count), total)
        yield quality
        labels = ["budget", "of", "per"]
        amount = GaugeMetricFamily("router_budget_usd", "What the policy lets a tenant or key spend.", labels=labels)
        spent = GaugeMetricFamily(
            "router_budget_spent_usd", "What is spent of it in this period, by every process.", labels=labels
        )
        for budget, usd in self._budgets.states():
            whose = [str(budget.tenant or budget.key), "key" if budget.tenant is None else "tenant", budget.per]
            amount.add_metric(whose, budget.usd)
            spent.add_metric(whose, usd)
        yield amount
        yield spent


def _families(
    names: tuple[tuple[str, str], ...], label: str, end: str, sums: Mapping[tuple[str, str], list[float]]
) -> Iterator[Metric]:
    for i, (name, said) in enumerate(names):
        family = CounterMetricFamily(name, said + end, labels=[label, "tier"])
        for labels, values in sums.items():
            family.add_metric(labels, values[i])
        yield family
