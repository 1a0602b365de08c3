"""The policy: what a product owner sets, and the dial of a request under it. `choice` applies them."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from router_ml.budget import Budget, moved
from router_ml.canary import CanaryPolicy
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.session import SessionPolicy
from router_ml.types import Objective, RouteRequest

DEFAULT_TIERS: Mapping[str, float] = {"economy": 0.5, "standard": 0.7, "premium": 0.85}


class Dial(NamedTuple):
    """What a request asks for: a tier of the policy, and what the request says itself.

    `min_probability` is the least probability of an acceptable answer, one of at least `quality_threshold` (None: the
    bundle's own threshold). `objective` "cost" is the least expected total cost among the candidates that meet it,
    "quality" the most probable one whose call is expected to cost at most `max_cost_usd`, which it needs.
    """

    min_probability: float
    quality_threshold: float | None = None
    objective: Objective = "cost"
    max_cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Pins a model: requests whose `task` and `tenant` match (None matches all) go to `model` without the learner."""

    model: str
    task: str | None = None
    tenant: str | None = None

    def matches(self, request: RouteRequest) -> bool:
        """Whether the rule applies to this request."""
        return self.task in (None, request.task) and self.tenant in (None, request.tenant)


@dataclass(frozen=True, slots=True)
class Exploration:
    """An experiment: of the requests whose `task` and `tenant` match (None matches all) the share `rate` is drawn
    evenly from those of `models` that may serve, in place of the policy's `exploration_rate`.

    It does not apply to a request that fewer than two of them may serve.
    """

    models: tuple[str, ...]
    rate: float
    task: str | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class Policy:
    """What a product owner sets. `tiers` maps a tier's name to the least probability of an acceptable answer, or to a
    `Dial` that says more.

    `escalation_rate` is the share of unacceptable answers that are asked again of a stronger model (`costs`).
    `keys` maps a key to the models it may use (a key that is not listed may use all). `unmet` says what happens when
    no candidate meets the dial: the most probable one, or `default_model`. `exploration_rate` is the share of requests
    that go to a uniformly drawn eligible candidate, so that the log can tell what the others would have done; the first
    of `explore` that matches a request takes its place. `session` says when a conversation leaves its model, `canary`
    how much of the traffic a challenger decides. `budget` holds what tenants and keys may spend; `max_attempts` is how
    often a gateway calls one model for one decision at most, for the decision's `reserve_usd`.
    """

    tiers: Mapping[str, float | Dial] = field(default_factory=lambda: dict(DEFAULT_TIERS))
    default_tier: str = "standard"
    default_model: str | None = None
    default_data_class: str = "public"
    exploration_rate: float = 0.0
    escalation_rate: float = 1.0
    unmet: Literal["most-probable", "default"] = "most-probable"
    rules: tuple[Rule, ...] = ()
    explore: tuple[Exploration, ...] = ()
    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    session: SessionPolicy = field(default_factory=SessionPolicy)
    canary: CanaryPolicy = field(default_factory=CanaryPolicy)
    budget: tuple[Budget, ...] = ()
    max_attempts: int = 1
    version: str = ""

    def __post_init__(self) -> None:
        _check(self)
        if not self.version:
            digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "version", digest[:12])

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON, without its version (which is the hash of this)."""
        return {
            "tiers": {name: _tier_json(tier) for name, tier in self.tiers.items()},
            "default_tier": self.default_tier,
            "default_model": self.default_model,
            "default_data_class": self.default_data_class,
            "exploration_rate": self.exploration_rate,
            "escalation_rate": self.escalation_rate,
            "unmet": self.unmet,
            "rules": [{"model": r.model, "task": r.task, "tenant": r.tenant} for r in self.rules],
            "keys": {key: {"models": sorted(models)} for key, models in self.keys.items()},
            "session": asdict(self.session),
            # Left out while it is the default: versions of policies without one stay, and older programs read them.
            **({} if self.canary == CanaryPolicy() else {"canary": asdict(self.canary)}),
            # Only where there is one, so that the versions of all other policies stay.
            **({"budget": [one.to_json() for one in self.budget]} if self.budget else {}),
            **({"max_attempts": self.max_attempts} if self.max_attempts != 1 else {}),
            **({"explore": [{**asdict(e), "models": list(e.models)} for e in self.explore]} if self.explore else {}),
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
            if "tiers" in values:
                values["tiers"] = {name: _tier(name, tier) for name, tier in _table("tiers", values["tiers"]).items()}
            if "rules" in values:
                values["rules"] = tuple(_rule(rule) for rule in _array("rules", values["rules"]))
            if "explore" in values:
                values["explore"] = tuple(_exploration(one) for one in _array("explore", values["explore"]))
            if "budget" in values:
                values["budget"] = tuple(Budget.from_table(one) for one in _array("budget", values["budget"]))
            if "keys" in values:
                values["keys"] = {str(k): _key_models(str(k), v) for k, v in _table("keys", values["keys"]).items()}
            if "session" in values:
                values["session"] = SessionPolicy.from_table(_table("session", values["session"]))
            if "canary" in values:
                values["canary"] = CanaryPolicy.from_table(_table("canary", values["canary"]))
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
        named = [rule.model for rule in self.rules] + [model for one in self.explore for model in one.models]
        named += sorted(set().union(*self.keys.values()) if self.keys else ())
        for model in [*named, *([self.default_model] if self.default_model else [])]:
            if model not in catalog:
                raise InputError(f"the policy names model {model!r}, which the catalogue does not list")
        return self

    @cached_property
    def dials(self) -> Mapping[str, Dial]:
        """Each tier as a dial."""
        return {name: tier if isinstance(tier, Dial) else Dial(tier) for name, tier in self.tiers.items()}

    def check_thresholds(self, thresholds: Sequence[float]) -> Policy:
        """Returns itself when every tier's quality threshold is among `thresholds`; raises InputError otherwise."""
        for name, dial in self.dials.items():
            if dial.quality_threshold is not None:
                check_threshold(dial.quality_threshold, thresholds, f"tier {name!r}: ")
        return self

    def exploration(self, task: str | None, tenant: str | None) -> Exploration | None:
        """The experiment that takes the place of `exploration_rate` for such requests."""
        matching = (e for e in self.explore if e.task in (None, task) and e.tenant in (None, tenant))
        return next(matching, None)

    def dial(self, request: RouteRequest) -> Dial:
        """The dial of this request: its tier, or its own `min_probability`, and what it says beside them.

        Where only a willingness to pay is given, that decides alone and the least probability is 0. The lower of the
        tier's and the request's `max_cost_usd` holds. Raises InputError for an unknown tier or objective, a probability
        outside [0, 1], two dials at once, and the objective "quality" without a budget.
        """
        if request.min_probability is not None:
            if request.tier is not None:
                raise InputError("give 'tier' or 'min_probability', not both")
            if not 0.0 <= request.min_probability <= 1.0:
                raise InputError(f"min_probability {request.min_probability} has to lie in [0, 1]")
            dial = Dial(request.min_probability)
        elif request.willingness_to_pay_usd is not None and request.tier is None:
            dial = _NO_DIAL
        else:
            tier = request.tier or self.default_tier
            if tier not in self.dials:
                raise InputError(f"unknown tier {tier!r}: choose one of {', '.join(self.tiers)}")
            dial = self.dials[tier]
        threshold, limit, objective = request.quality_threshold, request.max_cost_usd, request.objective
        if threshold is not None or limit is not None or objective is not None:
            dial = Dial(
                dial.min_probability,
                dial.quality_threshold if threshold is None else threshold,
                dial.objective if objective is None else objective,
                min((usd for usd in (limit, dial.max_cost_usd) if usd is not None), default=None),
            )
        if dial.objective != "cost":
            _check_objective(dial, request)
        if request.pressure is not None:  # at the objective "quality" all that is within max_cost_usd would be spent
            return dial._replace(min_probability=moved(dial.min_probability, request.pressure), objective="cost")
        return dial

    def with_changes(self, **changes: Any) -> Policy:
        """A changed copy with a version of its own."""
        return replace(self, version="", **changes)


def check_threshold(threshold: float, thresholds: Sequence[float], where: str = "") -> None:
    """Raises InputError when the learner was not trained for this quality threshold; it names those that it has."""
    if threshold not in thresholds:
        has = ", ".join(f"{t:g}" for t in sorted(thresholds)) or "none"
        raise InputError(
            f"{where}quality_threshold {threshold:g} is not one that the bundle was trained for, which are {has}: "
            "choose one of them, or train again with it"
        )


_NO_DIAL = Dial(0.0)


def _check(policy: Policy) -> None:
    for name in _table("tiers", policy.tiers) or [""]:
        if not name or not isinstance(name, str):
            raise InputError("'tiers' has to name at least one tier, such as standard = 0.7")
        _check_tier(name, policy.tiers[name])
    _share(policy.exploration_rate, "exploration_rate")
    _share(policy.escalation_rate, "escalation_rate")
    if not isinstance(policy.default_tier, str) or policy.default_tier not in policy.tiers:
        raise InputError(f"default_tier {policy.default_tier!r} is not one of the tiers {', '.join(policy.tiers)}")
    if not isinstance(policy.default_data_class, str) or not policy.default_data_class:
        raise InputError("default_data_class has to be the name of a data class")
    if policy.default_model is not None and not isinstance(policy.default_model, str):
        raise InputError("default_model has to be a model's id")
    if isinstance(policy.max_attempts, bool) or not isinstance(policy.max_attempts, int) or policy.max_attempts < 1:
        raise InputError("max_attempts has to be a whole number of 1 or more")
    if len({budget.name for budget in policy.budget}) < len(policy.budget):
        raise InputError("two of the [[budget]] tables are for the same tenant or key and the same period: keep one")
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


def _check_objective(dial: Dial, request: RouteRequest) -> None:
    if dial.objective not in get_args(Objective):
        raise InputError(f"unknown objective {dial.objective!r}: choose one of {', '.join(get_args(Objective))}")
    if dial.max_cost_usd is None:
        raise InputError("objective 'quality' takes the most probable model within a budget: give 'max_cost_usd', too")
    if request.willingness_to_pay_usd is not None:
        raise InputError("give 'willingness_to_pay_usd' or the objective 'quality', not both")


def _tier(name: Any, value: Any) -> float | Dial:
    """A tier of a policy file: a number, or a table of a dial's settings. Numbers are checked with the policy."""
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]
    if "min_probability" not in value or not set(value) <= set(Dial._fields):
        raise InputError(
            f"tier {name!r} has to be a number, or a table with min_probability and, of {', '.join(Dial._fields)}, "
            "nothing else"
        )
    return Dial(**value)


def _check_tier(name: str, tier: Any) -> None:
    """Raises InputError for a tier whose numbers are not possible, or which says half of what it needs."""
    dial = tier if isinstance(tier, Dial) else Dial(tier)
    where = f"tier {name!r}"
    _share(dial.min_probability, where if dial is not tier else f"{where}: min_probability")
    if dial.quality_threshold is not None:
        _share(dial.quality_threshold, f"{where}: quality_threshold")
    limit = dial.max_cost_usd
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < 2**53):
        raise InputError(f"{where}: max_cost_usd has to be a number of 0 or more")
    if dial.objective not in get_args(Objective):
        raise InputError(f"{where}: objective has to be one of {', '.join(get_args(Objective))}")
    if dial.objective == "quality" and limit is None:
        raise InputError(f"{where}: the objective 'quality' needs a budget, max_cost_usd")


def _share(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise InputError(f"{name} has to be a number in [0, 1], not {value!r}")


def _tier_json(tier: float | Dial) -> Any:
    return {k: v for k, v in tier._asdict().items() if v is not None} if isinstance(tier, Dial) else tier


def _rule(value: Any) -> Rule:
    known = Rule.__dataclass_fields__
    if not isinstance(value, Mapping) or "model" not in value or not set(value) <= set(known):
        raise InputError(f"every rule has to be a table with a model and, of {', '.join(known)}, nothing else")
    if not isinstance(value["model"], str) or not all(v is None or isinstance(v, str) for v in value.values()):
        raise InputError("a rule's model, task and tenant have to be strings")
    return Rule(**value)


def _exploration(value: Any) -> Exploration:
    known = Exploration.__dataclass_fields__
    if not isinstance(value, Mapping) or not {"models", "rate"} <= set(value) <= set(known):
        raise InputError("every [[explore]] has to be a table with models, a rate and, where wanted, task and tenant")
    models = _array("models", value["models"])
    if not all(isinstance(model, str) for model in models) or not len(models) == len(set(models)) > 1:
        raise InputError("the models of [[explore]] have to be two or more different models' ids")
    if not all(value.get(name) is None or isinstance(value[name], str) for name in ("task", "tenant")):
        raise InputError("the task and tenant of [[explore]] have to be strings")
    _share(value["rate"], "the rate of [[explore]]")
    return Exploration(**{**value, "models": tuple(models)})


def _key_models(key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, Mapping) or set(value) != {"models"}:
        raise InputError(f"key {key!r} has to be a table with an array 'models' and nothing else")
    models = _array("models", value["models"])
    if not all(isinstance(model, str) for model in models):
        raise InputError(f"the models of key {key!r} have to be strings")
    return frozenset(models)
