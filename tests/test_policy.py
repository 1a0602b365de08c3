"""The policy: the dial of a request, and a policy file whose mistakes are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Dial, Exploration, Policy, Rule
from router_ml.types import RouteRequest


def request_at(**dial: object) -> RouteRequest:
    return RouteRequest(messages=(), **dial)  # type: ignore[arg-type]


def test_tiers_are_probabilities() -> None:
    policy = Policy(tiers={"low": 0.1, "high": 0.9}, default_tier="high")

    def dial(**fields: object) -> float:
        return policy.dial(request_at(**fields)).min_probability

    assert (dial(), dial(tier="low"), dial(min_probability=0.0)) == (0.9, 0.1, 0.0)
    assert dial(willingness_to_pay_usd=1.0) == 0.0 and dial(willingness_to_pay_usd=1.0, tier="low") == 0.1
    with pytest.raises(InputError, match="unknown tier 'standard': choose one of low, high"):
        dial(tier="standard")
    with pytest.raises(InputError, match="not both"):
        dial(tier="low", min_probability=0.5)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="min_probability"):
            dial(min_probability=wrong)


def test_a_dial_is_the_tier_and_what_the_request_says_beside_it() -> None:
    tier = Dial(0.7, 0.8, "quality", 0.01)
    policy = Policy(tiers={"plain": 0.6, "graded": tier}, default_tier="plain")
    assert policy.dial(request_at()) == Dial(0.6) and policy.dial(request_at(tier="graded")) is tier
    assert policy.dial(request_at(quality_threshold=0.9)) == Dial(0.6, 0.9)
    assert policy.dial(request_at(tier="graded", objective="cost", max_cost_usd=0.1)) == Dial(0.7, 0.8, "cost", 0.01)
    assert policy.dial(request_at(tier="graded", max_cost_usd=0.0)).max_cost_usd == 0.0
    assert policy.dial(request_at(min_probability=0.2, max_cost_usd=0.5)) == Dial(0.2, None, "cost", 0.5)
    with pytest.raises(InputError, match="not both"):
        policy.dial(request_at(tier="graded", willingness_to_pay_usd=1.0))


@pytest.mark.parametrize(
    ("rule", "task", "tenant", "applies"),
    [
        (Rule("m"), None, None, True),
        (Rule("m", task="code"), "code", "acme", True),
        (Rule("m", task="code"), "chat", None, False),
        (Rule("m", task="code"), None, None, False),
        (Rule("m", task="code", tenant="acme"), "code", "other", False),
        (Rule("m", tenant="acme"), "code", "acme", True),
    ],
)
def test_a_rule_applies_to_its_task_and_tenant(rule: Rule, task: str | None, tenant: str | None, applies: bool) -> None:
    assert rule.matches(request_at(task=task, tenant=tenant)) is applies


POLICY = """
default_tier = "fast"
default_model = "mid"
default_data_class = "internal"
exploration_rate = 0.05
escalation_rate = 0.5
unmet = "default"
[tiers]
fast = 0.4
good = { min_probability = 0.9, quality_threshold = 0.8 }
best = { min_probability = 0.5, objective = "quality", max_cost_usd = 0.01 }
[[rules]]
model = "local"
task = "code"
[keys.gateway]
models = ["mid", "local"]
[[explore]]
models = ["mid", "frontier"]
rate = 0.2
task = "code"
tenant = "acme"
[[explore]]
models = ["hosted", "frontier"]
rate = 0.1
"""


def test_a_policy_file_says_it_all(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    policy = Policy.load(path).check_models(catalog)
    assert policy.rules == (Rule("local", "code"),) and policy.keys == {"gateway": frozenset({"mid", "local"})}
    assert (policy.default_tier, policy.exploration_rate, policy.unmet) == ("fast", 0.05, "default")
    assert policy.tiers == {"fast": 0.4, "good": Dial(0.9, 0.8), "best": Dial(0.5, None, "quality", 0.01)}
    assert policy.escalation_rate == 0.5 and policy.check_thresholds((0.5, 0.8)) is policy
    with pytest.raises(InputError, match=r"tier 'good': quality_threshold 0\.8 .* which are 0\.5: choose"):
        policy.check_thresholds((0.5,))
    again = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert again == policy and len(policy.version) == 12
    first, second = policy.explore
    assert first == Exploration(("mid", "frontier"), 0.2, "code", "acme")
    assert policy.exploration("code", "acme") is first and policy.exploration("code", None) is second
    with pytest.raises(InputError, match="names model 'frontier'"):
        policy.check_models(catalog.subset(["mid", "local", "hosted"]))
    assert "explore" not in Policy().to_json(), "the versions of other policies stay as they were"
    changed = policy.with_changes(exploration_rate=0.06)
    assert changed.version != policy.version and changed.rules == policy.rules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tiers = 3", "'tiers' has to be a table"),
        ("[tiers]", "at least one tier"),
        ("[tiers]\nstandard = 1.5", "tier 'standard' has to be a number in"),
        ("[tiers]\nstandard = nan", "tier 'standard' has to be a number in"),
        ("[tiers]\nstandard = true", "tier 'standard' has to be a number in"),
        ("[tiers]\nstandard = {}", "tier 'standard' has to be a number, or a table with min_probability"),
        ("[tiers]\nstandard = {min_probability = 0.5, color = 1}", "nothing else"),
        ("[tiers]\nstandard = {min_probability = 2}", "tier 'standard': min_probability has to be a number in"),
        ("[tiers]\nstandard = {min_probability = 0.5, quality_threshold = 'high'}", "quality_threshold has to be"),
        ("[tiers]\nstandard = {min_probability = 0.5, max_cost_usd = -1}", "max_cost_usd has to be"),
        ("[tiers]\nstandard = {min_probability = 0.5, objective = 'speed'}", "objective has to be one of cost"),
        ("[tiers]\nstandard = {min_probability = 0.5, objective = 'quality'}", "needs a budget, max_cost_usd"),
        ("default_tier = 'gold'", "default_tier 'gold' is not one of the tiers economy"),
        ("default_tier = ['gold']", "is not one of the tiers"),
        ("default_data_class = 7", "default_data_class"),
        ("default_model = 7", "default_model"),
        ("exploration_rate = 'often'", "exploration_rate"),
        ("exploration_rate = -0.1", "exploration_rate"),
        ("escalation_rate = 1.1", "escalation_rate"),
        ("escalation_rate = 'always'", "escalation_rate"),
        ("unmet = 'cry'", "'unmet'"),
        ("unmet = 'default'", "needs a 'default_model'"),
        ("rules = 'code'", "'rules' has to be an array"),
        ("rules = ['code']", "every rule has to be a table"),
        ("[[rules]]\ntask = 'code'", "every rule has to be a table with a model"),
        ("[[rules]]\nmodel = 'm'\ntopic = 'code'", "nothing else"),
        ("[[rules]]\nmodel = 3", "have to be strings"),
        ("explore = 1", "'explore' has to be an array"),
        ("[[explore]]\nrate = 0.1", "every .* has to be a table with models, a rate"),
        ("[[explore]]\nmodels = ['a', 'b']\nrate = 2", "rate of .* has to be a number in"),
        ("[[explore]]\nmodels = ['a', 'a']\nrate = 0.1", "two or more different"),
        ("[[explore]]\nmodels = [['a'], 3]\nrate = 0.1", "two or more different"),
        ("[[explore]]\nmodels = ['a', 'b']\nrate = 0.1\ntask = 3", "have to be strings"),
        ("keys = []", "'keys' has to be a table"),
        ("[keys]\na = 'm'", "key 'a' has to be a table"),
        ("[keys.a]\nmodels = 'm'", "'models' has to be an array"),
        ("[keys.a]\nmodels = [3]", "models of key 'a'"),
        ("[keys.a]\nmodel = ['m']", "key 'a' has to be a table"),
        ("teirs = {}", "unknown setting 'teirs'; known are"),
        ("version = 'mine'", "unknown setting 'version'"),
        ("not toml", "not readable TOML"),
    ],
)
def test_a_policy_files_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


def test_a_policy_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no policy file at"):
        Policy.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not readable TOML"):
        Policy.load(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "policy",
    [
        Policy(default_model="gone"),
        Policy(rules=(Rule("gone"),)),
        Policy(keys={"k": frozenset({"mid", "gone"})}),
    ],
)
def test_a_model_that_the_catalogue_does_not_list_is_named(catalog: Catalog, policy: Policy) -> None:
    with pytest.raises(InputError, match="'gone'"):
        policy.check_models(catalog)
