"""The policy: hard constraints first, then the cheapest candidate that is likely to be good enough.

Pure functions over numpy arrays on the catalogue's model axis; nothing here learns, logs or waits.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.types import FloatArray, RouteRequest

BoolArray = npt.NDArray[np.bool_]
DEFAULT_TIERS: Mapping[str, float] = {"economy": 0.5, "standard": 0.7, "premium": 0.85}


@dataclass(frozen=True, slots=True)
class Rule:
    """Pins a model: requests whose `task` and `tenant` match (None matches all) go to `model` without the learner."""

    model: str
    task: str | None = None
    tenant: str | None = None

    def matches(self, request: RouteRequest) -> bool:
        """Whether the rule applies to this request."""
        return self.task in (None, request.task) and self.tenant in (None, request.tenant)


@dataclass(frozen=True)
class Policy:
    """What a product owner sets. `tiers` maps a tier's name to the least probability of an acceptable answer.

    `keys` maps a key to the models it may use (a key that is not listed may use all). `unmet` says what happens when
    no candidate meets the dial: the most probable one, or `default_model`. `exploration_rate` is the share of requests
    that go to a uniformly drawn eligible candidate, so that the log can tell what the others would have done.
    """

    tiers: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_TIERS))
    default_tier: str = "standard"
    default_model: str | None = None
    default_data_class: str = "public"
    exploration_rate: float = 0.0
    unmet: Literal["most-probable", "default"] = "most-probable"
    rules: tuple[Rule, ...] = ()
    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    version: str = ""

    def __post_init__(self) -> None:
        _check(self)
        if not self.version:
            digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "version", digest[:12])

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON, without its version (which is the hash of this)."""
        return {
            "tiers": dict(self.tiers),
            "default_tier": self.default_tier,
            "default_model": self.default_model,
            "default_data_class": self.default_data_class,
            "exploration_rate": self.exploration_rate,
            "unmet": self.unmet,
            "rules": [{"model": r.model, "task": r.task, "tenant": r.tenant} for r in self.rules],
            "keys": {key: {"models": sorted(models)} for key, models in self.keys.items()},
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "policy") -> Policy:
        """Builds a policy from parsed TOML or JSON. Raises InputError that names the field."""
        if not isinstance(data, Mapping):
            raise InputError(f"{source}: expected a table of settings")
        known = set(cls.__dataclass_fields__) - {"version"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"{source}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
        values = dict(data)
        try:
            if "rules" in values:
                values["rules"] = tuple(_rule(rule) for rule in _array("rules", values["rules"]))
            if "keys" in values:
                values["keys"] = {str(k): _key_models(str(k), v) for k, v in _table("keys", values["keys"]).items()}
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads a policy from a TOML file. Raises InputError."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"no policy file at {path}: write one or leave --policy out") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is not readable TOML: {error}") from None
        return cls.from_json(data, str(path))

    def check_models(self, catalog: Catalog) -> Policy:
        """Returns itself when every model it names is in the catalogue; raises InputError otherwise."""
        named = [rule.model for rule in self.rules] + sorted(set().union(*self.keys.values()) if self.keys else ())
        for model in [*named, *([self.default_model] if self.default_model else [])]:
            if model not in catalog:
                raise InputError(f"the policy names model {model!r}, which the catalogue does not list")
        return self

    def min_probability(self, request: RouteRequest) -> float:
        """The dial of this request; 0 where only a willingness to pay is given, which then decides alone.

        Raises InputError for an unknown tier, a probability outside [0, 1], or both of them at once.
        """
        if request.willingness_to_pay_usd is not None and request.tier is None and request.min_probability is None:
            return 0.0
        if request.min_probability is not None:
            if request.tier is not None:
                raise InputError("give 'tier' or 'min_probability', not both")
            if not 0.0 <= request.min_probability <= 1.0:
                raise InputError(f"min_probability {request.min_probability} has to lie in [0, 1]")
            return request.min_probability
        tier = request.tier or self.default_tier
        if tier not in self.tiers:
            raise InputError(f"unknown tier {tier!r}: choose one of {', '.join(self.tiers)}")
        return self.tiers[tier]

    def with_changes(self, **changes: Any) -> Policy:
        """A changed copy with a version of its own."""
        return replace(self, version="", **changes)


_ALL: BoolArray = np.ones(0, dtype=bool)
"""Stands for a mask that allows every model, so that the common case costs no vector operation."""


@dataclass(frozen=True)
class Constraints:
    """The catalogue's clearances as arrays [m], compiled once so that a request costs a few vector operations."""

    catalog: Catalog
    context_window: npt.NDArray[np.int64]
    capability: Mapping[str, BoolArray]
    data_class: Mapping[str, BoolArray]
    region: Mapping[str, BoolArray]
    key: Mapping[str, BoolArray]
    least_window: int
    every: BoolArray

    @classmethod
    def compile(cls, catalog: Catalog, policy: Policy) -> Constraints:
        """Builds the arrays. What no card lists has no entry, and is refused for every model."""

        def masks(values: Sequence[frozenset[str]]) -> dict[str, BoolArray]:
            names = sorted(frozenset().union(*values))
            return {name: mask([name in v for v in values]) for name in names}

        def mask(values: list[bool]) -> BoolArray:
            return _ALL if all(values) else np.array(values)

        return cls(
            catalog=catalog,
            context_window=np.array([c.context_window for c in catalog], dtype=np.int64),
            capability=masks([c.capabilities for c in catalog]),
            data_class=masks([c.data_classes for c in catalog]),
            region=masks([c.regions for c in catalog]),
            key={k: mask([c.id in models for c in catalog]) for k, models in policy.keys.items()},
            least_window=min(c.context_window for c in catalog),
            every=np.ones(len(catalog), dtype=bool),
        )

    def eligible(
        self, request: RouteRequest, policy: Policy, cost_usd: FloatArray, input_tokens: float
    ) -> tuple[BoolArray, dict[str, str]]:
        """Which models may serve the request, bool [m], and why each of the others may not."""
        mask = self.every
        excluded: dict[str, str] = {}

        def require(allowed: BoolArray | None, reason: str) -> None:
            nonlocal mask
            if allowed is None:
                allowed = np.zeros_like(mask)
            elif allowed is _ALL:
                return
            for i in np.flatnonzero(mask & ~allowed):
                excluded[self.catalog.ids[i]] = reason
            mask = mask & allowed

        if request.candidates is not None:
            wanted = set(request.candidates)
            require(np.array([model in wanted for model in self.catalog.ids]), "not among the request's candidates")
            for model in request.candidates:
                if model not in self.catalog:
                    excluded[model] = "not in the catalogue"
        if request.key is not None and request.key in self.key:
            require(self.key[request.key], "not on the key's allow-list")
        data_class = policy.default_data_class if request.data_class is None else request.data_class
        require(self.data_class.get(data_class), f"not cleared for data class {data_class!r}")
        if request.region is not None:
            require(self.region.get(request.region), f"not in region {request.region!r}")
        for need in sorted(request.needs):
            require(self.capability.get(need), f"does not support {need}")
        tokens = math.ceil(input_tokens) + (request.max_tokens or 0)
        if tokens > self.least_window:
            require(self.context_window >= tokens, f"context window is smaller than the estimated {tokens} tokens")
        if request.max_cost_usd is not None:
            require(cost_usd <= request.max_cost_usd, f"expected cost is above {request.max_cost_usd:g} USD")
        return mask, excluded


@dataclass(frozen=True, slots=True)
class Choice:
    """What the policy chose: positions on the model axis, best first, and why."""

    order: tuple[int, ...]
    propensity: float
    explored: bool
    meets_threshold: bool
    reason: str


def choose(
    p_ok: FloatArray,
    cost_usd: FloatArray,
    eligible: BoolArray,
    min_probability: float,
    *,
    willingness_to_pay_usd: float | None = None,
    pinned: int | None = None,
    default: int | None = None,
    unmet: str = "most-probable",
    exploration_rate: float = 0.0,
    draw: tuple[float, float] = (1.0, 0.0),
) -> Choice:
    """The cheapest eligible candidate whose probability meets the dial; else the most probable; else the default.

    With a willingness to pay (USD that an acceptable answer is worth; RouterBench, arXiv 2403.12031) the choice among
    those that meet the dial is the largest of worth * probability - cost instead of the cheapest: as a dial over many
    requests it gets more quality for the same money, because what a dearer model costs is weighed against what it adds.

    `p_ok` and `cost_usd` are float32 [m], `eligible` is bool [m] with at least one True. A NaN probability never meets
    a dial, a NaN cost is the highest. `draw` holds two uniform numbers in [0, 1): the first decides whether to
    explore, the second where to.
    The propensity is (1 - rate) * [greedy] + rate / eligible, exact for every candidate; a pinned model has 1.
    """
    # Lists, not arrays: for a dozen candidates plain Python is several times faster than numpy.
    at = [i for i, allowed in enumerate(eligible.tolist()) if allowed]
    every_p, every_cost = p_ok.tolist(), cost_usd.tolist()
    p = [every_p[i] for i in at]
    cost = [c if c == c else math.inf for c in (every_cost[i] for i in at)]
    size = len(p)

    # What meets the dial comes first, by cost or value; then the rest by probability, unknown ones last.
    worth = willingness_to_pay_usd or 0.0
    meeting = sorted([(cost[i] - worth * v, -v, i) for i, v in enumerate(p) if v >= min_probability])
    rest = sorted([(-v if v == v else 1.0, cost[i], i) for i, v in enumerate(p) if not v >= min_probability])
    order = [i for _, _, i in meeting] + [i for _, _, i in rest]
    greedy = order[0]
    meets = p[greedy] >= min_probability
    if pinned is not None and eligible[pinned]:
        first = at.index(pinned)
        chosen = (first, *(i for i in order if i != first))
        return Choice(tuple(at[i] for i in chosen), 1.0, False, p[first] >= min_probability, "a rule pins this model")
    if meets:
        reason = f"cheapest candidate with probability at least {min_probability:g}"
        if willingness_to_pay_usd is not None:
            reason = f"best value at {willingness_to_pay_usd:g} USD for an acceptable answer"
    else:
        reason = f"no candidate reaches {min_probability:g}: the most probable"
        known = any(v == v for v in p)
        if (unmet == "default" or not known) and default is not None and eligible[default]:
            greedy = at.index(default)
            reason = f"no candidate reaches {min_probability:g}: the configured default"
        elif not known:
            greedy = min(range(size), key=cost.__getitem__)
            reason = "no estimate for any candidate and no default that is allowed: the cheapest"
    first, explored = greedy, False
    if exploration_rate > 0.0 and draw[0] < exploration_rate:
        first, explored = min(int(draw[1] * size), size - 1), True
        reason = "exploration: drawn uniformly from the eligible candidates"
    propensity = (1.0 - exploration_rate) * (first == greedy) + exploration_rate / size
    chosen = (first, *(i for i in order if i != first))
    return Choice(tuple(at[i] for i in chosen), propensity, explored, p[first] >= min_probability, reason)


def _check(policy: Policy) -> None:
    def probability(value: Any, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise InputError(f"{name} has to be a number in [0, 1], not {value!r}")

    for name in _table("tiers", policy.tiers) or [""]:
        if not name or not isinstance(name, str):
            raise InputError("'tiers' has to name at least one tier, such as standard = 0.7")
        probability(policy.tiers[name], f"tier {name!r}")
    probability(policy.exploration_rate, "exploration_rate")
    if not isinstance(policy.default_tier, str) or policy.default_tier not in policy.tiers:
        raise InputError(f"default_tier {policy.default_tier!r} is not one of the tiers {', '.join(policy.tiers)}")
    if not isinstance(policy.default_data_class, str) or not policy.default_data_class:
        raise InputError("default_data_class has to be the name of a data class")
    if policy.default_model is not None and not isinstance(policy.default_model, str):
        raise InputError("default_model has to be a model's id")
    if policy.unmet not in ("most-probable", "default"):
        raise InputError('\'unmet\' has to be "most-probable" or "default"')
    if policy.unmet == "default" and not policy.default_model:
        raise InputError("unmet = \"default\" needs a 'default_model'")


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name!r} has to be a table")
    return value


def _array(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name!r} has to be an array")
    return value


def _rule(value: Any) -> Rule:
    known = Rule.__dataclass_fields__
    if not isinstance(value, Mapping) or "model" not in value or not set(value) <= set(known):
        raise InputError(f"every rule has to be a table with a model and, of {', '.join(known)}, nothing else")
    if not isinstance(value["model"], str) or not all(v is None or isinstance(v, str) for v in value.values()):
        raise InputError("a rule's model, task and tenant have to be strings")
    return Rule(**value)


def _key_models(key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, Mapping) or set(value) != {"models"}:
        raise InputError(f"key {key!r} has to be a table with an array 'models' and nothing else")
    models = _array("models", value["models"])
    if not all(isinstance(model, str) for model in models):
        raise InputError(f"the models of key {key!r} have to be strings")
    return frozenset(models)
