"""A planned experiment has the power it says, keeps its budget, and its policy draws what the comparison needs."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from scipy.stats import ttest_ind

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, write_log
from router_ml.policy import Exploration, Policy
from router_ml.router import Router
from router_ml.types import Estimate, Message, RouteRequest
from training.compare import compare
from training.experiment import plan_experiment, schedule, write_policy

TRUE = {"frontier": 0.85, "mid": 0.75, "hosted": 0.7, "local": 0.4}
START = datetime(2026, 3, 1, tzinfo=UTC)


def log_of(rows: list[dict[str, object]]) -> pl.DataFrame:
    return pl.DataFrame([dict.fromkeys(LOG_SCHEMA) | row for row in rows], schema=LOG_SCHEMA)


def fixed_log(n: int = 1000, feedback: float = 1.0, **more: object) -> pl.DataFrame:
    """A service that always takes "mid", ten requests a session, over ten days; 100 tokens in and 200 out."""
    rng = np.random.default_rng(1)
    return log_of(
        [
            {
                "request_id": f"r{i}", "time": START + timedelta(days=10 * i / (n - 1)), "model": "mid",
                "propensity": 1.0, "session": f"s{i // 10}", "task": "code" if i % 2 else "chat", "status": "ok",
                "input_tokens": 100, "output_tokens": 200, "cost_usd": 0.001,
                "quality": float(rng.random() < TRUE["mid"]) if rng.random() < feedback else None,
            }
            | more
            for i in range(n)
        ]
    )  # fmt: skip


def test_the_numbers_by_hand(catalog: Catalog) -> None:
    plan = plan_experiment(fixed_log(), catalog, "frontier", "mid")
    # Nothing is known of frontier's spread; 2.8016 = z(0.975) + z(0.8).
    spread = 0.25 + fixed_log()["quality"].var()  # type: ignore[operator]
    assert plan.requests == pytest.approx(2 * (2.8016 / 0.05) ** 2 * spread, rel=1e-3)
    assert plan.power_now == 0.0 and plan.power_after(plan.requests) == pytest.approx(0.8, abs=1e-3)
    assert plan.a.cost_usd == pytest.approx((100 * 5 + 200 * 15) / 1e6) and plan.anyway_each_usd == pytest.approx(0.001)
    assert plan.cost_usd == pytest.approx(plan.requests * (0.0035 + 0.00045) / 2)
    assert plan.per_day == pytest.approx(10), "a hundred sessions in ten days: only their first requests are drawn"
    half = plan_experiment(fixed_log(feedback=0.5), catalog, "frontier", "mid")
    assert half.requests == pytest.approx(2 * plan.requests, rel=0.1), "half of the answers get no feedback"
    assert plan_experiment(fixed_log(), catalog, "frontier", "mid", effect=0.1).requests < plan.requests / 3.9
    bare = fixed_log(input_tokens=None, output_tokens=None, cost_usd=None)
    assert np.isnan(plan_experiment(bare, catalog, "frontier", "mid").cost_usd)
    assert plan.to_frame()["requests"].item() == plan.requests and plan.plot().axes


@pytest.mark.parametrize(("a", "b"), [("frontier", "mid"), ("mid", "hosted")])
def test_the_power_is_the_share_of_experiments_that_see_it(catalog: Catalog, a: str, b: str) -> None:
    log = fixed_log(4000)
    effect = TRUE[a] - TRUE[b]
    known = pl.concat([log, *(_drawn_of(model, 60) for model in (a, b))])
    plan = plan_experiment(known, catalog, a, b, effect=effect)
    assert plan.a.outcomes == plan.b.outcomes == 60
    rng = np.random.default_rng(2)
    n = 60 + plan.requests // 2
    seen = [
        ttest_ind(rng.random(n) < TRUE[a], rng.random(n) < TRUE[b], equal_var=False).pvalue < 0.05 for _ in range(2000)
    ]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.08), "the spread is estimated from the log"
    enough = pl.concat([log, *(_drawn_of(model, 3000) for model in (a, b))])
    done = plan_experiment(enough, catalog, a, b, effect=effect)
    assert done.requests == 0 and "no further request" in done.in_words[1]
    with pytest.raises(InputError, match="nothing to explore"):
        schedule(done)


def _drawn_of(model: str, n: int) -> pl.DataFrame:
    rng = np.random.default_rng(len(model))
    return log_of(
        [
            {
                "request_id": f"{model}{i}", "time": START, "model": model, "propensity": 0.25, "status": "ok",
                "quality": float(rng.random() < TRUE[model]), "task": "chat",
            }
            for i in range(n)
        ]
    )  # fmt: skip


def test_a_schedule_keeps_budget_and_rate(catalog: Catalog) -> None:
    plan = plan_experiment(fixed_log(), catalog, "frontier", "mid", requests_per_day=5000)
    free = schedule(plan, max_rate=0.1)
    assert free.rate == pytest.approx(0.1) and free.days["drawn"][0] == pytest.approx(500)
    tight = schedule(plan, budget_usd_per_day=0.1)
    assert tight.days["extra_usd"].max() <= 0.1 + 1e-9  # type: ignore[operator]
    assert tight.days["drawn"].sum() == pytest.approx(plan.requests)
    assert tight.days["power"][-1] == pytest.approx(0.8, abs=1e-3) and tight.days["power"].is_sorted()
    assert len(tight.days) == int(np.ceil(plan.requests * plan.extra_each_usd / 0.1))
    assert tight.to_frame() is tight.days and tight.plot().axes
    cheaper = plan_experiment(fixed_log(), catalog, "hosted", "local", requests_per_day=5000)
    assert cheaper.extra_each_usd < 0
    unbound = schedule(cheaper, budget_usd_per_day=1e-9, max_rate=1.0)
    assert len(unbound.days) == 1, "what saves money is bound by no budget"
    for wrong in ({"max_rate": 0.0}, {"budget_usd_per_day": -1.0}, {"budget_usd_per_day": 1e-9}):
        with pytest.raises(InputError):
            schedule(plan, **wrong)


def test_what_cannot_be_planned_is_said(catalog: Catalog) -> None:
    log = fixed_log()
    for a, b, says in (("frontier", "gone", "no model 'gone'"), ("mid", "mid", "same model twice")):
        with pytest.raises(InputError, match=says):
            plan_experiment(log, catalog, a, b)
    with pytest.raises(InputError, match="no row of task 'law'; it has chat, code"):
        plan_experiment(log, catalog, "frontier", "mid", task="law")
    with pytest.raises(InputError, match="served by both"):
        plan_experiment(fixed_log(candidates=["mid", "local"]), catalog, "frontier", "mid")
    with pytest.raises(InputError, match="without feedback"):
        plan_experiment(fixed_log(feedback=0.0), catalog, "frontier", "mid")
    for name in ("effect", "power", "confidence"):
        with pytest.raises(InputError, match=f"--{name}"):
            plan_experiment(log, catalog, "frontier", "mid", **{name: 1.5})  # type: ignore[arg-type]


class Same:
    """Every request is the same to it: "mid" is always the choice."""

    def estimate(self, request: RouteRequest) -> Estimate:
        return Estimate(np.array([0.8, 0.8, 0.6, 0.4], np.float32), np.full(4, 200, np.float32), 100.0)


def test_the_planned_policy_settles_the_comparison(catalog: Catalog, tmp_path: Path) -> None:
    before = fixed_log(3000)
    found = compare(before, catalog, "frontier", "mid", task="code", effect=0.1)
    assert found.how == "not identified" and found.quality is None and found.experiment is not None
    assert "0 of 1500 requests had their model drawn" in found.why and found.to_frame().is_empty()
    made = schedule(found.experiment, max_rate=0.5)
    base = tmp_path / "policy.toml"
    base.write_text("[tiers]\nstandard = 0.7\n[keys.a]\nmodels = ['mid', 'frontier']")
    changed = write_policy(made.rule, tmp_path / "new.toml", base=base, catalog=catalog)
    assert changed.explore == (Exploration(("frontier", "mid"), made.rate, "code"),) and changed.keys
    assert Policy.load(tmp_path / "new.toml") == changed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.toml", "policy.toml"]
    rng, draws = np.random.default_rng(5), random.Random(5)
    router = Router(catalog, Same(), changed, "v", draw=draws.random)
    rows, drawn = [], 0
    while drawn < made.experiment.requests:
        decision = router.decide(RouteRequest(messages=(Message("user", "hm"),), task="code"))
        drawn += decision.explored
        rows.append(
            {
                "request_id": f"n{len(rows)}", "time": START + timedelta(days=20, seconds=len(rows)), "task": "code",
                "model": decision.model, "propensity": decision.propensity, "status": "ok",
                "candidates": [c.model for c in decision.candidates], "input_tokens": 100, "output_tokens": 200,
                "quality": float(rng.random() < TRUE[decision.model]),
            }
        )  # fmt: skip
    after = compare(pl.concat([before, log_of(rows)]), catalog, "frontier", "mid", task="code", effect=0.1)
    assert after.how == "randomised" and after.n == len(rows)
    assert after.quality is not None and after.quality.low < 0.1 < after.quality.high
    assert after.quality.high - after.quality.low < 0.2, "power 0.8 for 0.1: an interval of some 2 x 0.07"
    assert after.cost_usd is not None and after.cost_usd.value == pytest.approx(0.0035 - 0.00045, rel=0.05)


def test_a_policy_with_an_experiment_is_not_shadowed(catalog: Catalog, tmp_path: Path) -> None:
    rule = Exploration(("frontier", "mid"), 0.1, "code")
    write_policy(rule, tmp_path / "one.toml", base=None, catalog=catalog)
    with pytest.raises(InputError, match="comes before"):
        write_policy(
            Exploration(("local", "mid"), 0.1, "code"), tmp_path / "two.toml", base=tmp_path / "one.toml",
            catalog=catalog,
        )  # fmt: skip
    with pytest.raises(InputError, match="'other'"):
        write_policy(Exploration(("other", "mid"), 0.1), tmp_path / "two.toml", base=None, catalog=catalog)
    assert [p.name for p in tmp_path.iterdir()] == ["one.toml"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_the_commands_plan_from_a_log(catalog: Catalog, tmp_path: Path) -> None:
    write_log([fixed_log()], tmp_path / "logs", catalog=catalog)
    asked = ("frontier", "mid", "--logs", tmp_path / "logs", "--task", "code")
    said = run("compare", *asked, "--json", tmp_path / "c.json")
    assert said.exit_code == 0, said.output
    assert "not identified" in said.stdout and "more requests, drawn evenly" in said.stdout
    needed = json.loads((tmp_path / "c.json").read_text())["experiment"]["requests"]
    assert f"{needed:,} more requests" in said.stdout
    base = ("explore", *asked)
    now = run(*base)
    assert now.exit_code == 0 and f"{needed:,} more requests" in now.stdout and "day " not in now.stdout
    plan = run(
        *base, "--plan", "--requests-per-day", "1000", "--budget-usd-per-day", "0.05", "--out", tmp_path / "p.toml",
        "--json", tmp_path / "e.json", "--plot", tmp_path / "e.svg",
    )  # fmt: skip
    assert plan.exit_code == 0, plan.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert sum(day["drawn"] for day in found["days"]) == pytest.approx(needed)
    assert Policy.load(tmp_path / "p.toml").explore[0].rate == found["rate"]
    assert "<svg" in (tmp_path / "e.svg").read_text()
    for wrong in ((*base, "--out", tmp_path / "x.toml"), (*base[:3], "--store", tmp_path / "none.db"), base[:3]):
        refused = run(*wrong)
        assert refused.exit_code == 2 and refused.stderr.startswith("router-ml: "), refused.output
