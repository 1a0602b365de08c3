"""The gate: each condition by its number, and promotions that only pass by it, or on the record."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Contest

from router_ml import registry
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.rollout import history
from router_ml.router import Router
from router_ml.store import Store
from router_ml.types import Estimate as Expected
from router_ml.types import RouteRequest
from training.challenge import Challenge, Contender, challenge
from training.gate import Limits, Verdict, golden_rows, judge
from training.latency import latency_ratio
from training.policy_value import Estimate, PolicyValue
from training.tracking import register_bundle

WIDE = Limits(quality=0.5, slice=1.0, calibration=0.5, latency=5.0, rows=100)


@pytest.fixture(scope="module")
def both(contest: Contest) -> tuple[Contender, Contender]:
    return Contender.load(contest.champion), Contender.load(contest.challenger)


@pytest.fixture(scope="module")
def found(contest: Contest, both: tuple[Contender, Contender]) -> Challenge:
    return challenge(*both, contest.log, most_rows=1500)


def verdict(
    found: Challenge, both: tuple[Contender, Contender], contest: Contest, limits: Limits = WIDE, **options: object
) -> Verdict:
    now = options.pop("now", found.newest + timedelta(days=1))
    return judge(
        found, both[0].router, both[1].router, bundle=options.pop("bundle", contest.challenger), limits=limits,  # type: ignore[arg-type]
        now=now, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def at(value: PolicyValue, low: float, middle: float, high: float) -> PolicyValue:
    """The same, with this estimate."""
    return replace(value, estimates={"dr": Estimate(middle, low, high, (high - low) / 4)})


def failed(of: Verdict) -> list[str]:
    return [condition.name for condition in of.failed]


def test_all_hold_within_wide_margins(found: Challenge, both: tuple[Contender, Contender], contest: Contest) -> None:
    passed = verdict(found, both, contest)
    assert passed.passed and not failed(passed)
    names = passed.to_frame()["name"].to_list()
    assert names == [
        "outcomes", "clusters", "fresh log", "quality", "slices", "calibration", "models' calibration", "latency",
        "golden rows",
    ]  # fmt: skip
    assert passed.to_json()["conditions"]["outcomes"] == {"holds": True, "value": found.outcomes}
    assert 700 < found.outcomes < found.n == 1500


def test_quality_is_held_by_its_lower_bound(
    found: Challenge, both: tuple[Contender, Contender], contest: Contest
) -> None:
    limits = replace(WIDE, quality=0.02)
    for low, holds in ((-0.0201, False), (-0.0199, True)):
        of = verdict(replace(found, quality=at(found.quality, low, 0.0, 0.02)), both, contest, limits)
        assert failed(of) == ([] if holds else ["quality"])
    (condition,) = verdict(replace(found, quality=at(found.quality, -0.05, 0.0, 0.05)), both, contest, limits).failed
    assert "-0.0500 to +0.0500" in condition.says and condition.value == -0.05 and condition.limit == -0.02
    needed = re.search(r"some ([\d,]+) such requests", condition.says)
    assert needed and int(needed[1].replace(",", "")) == pytest.approx(1500 * (0.05 * 1.4294 / 0.02) ** 2, rel=0.05)
    hopeless = verdict(replace(found, quality=at(found.quality, -0.1, -0.05, 0.0)), both, contest, limits).failed
    assert "estimated below that" in hopeless[0].says
    some = replace(found.quality, support=replace(found.quality.support, unsupported_mass=0.009))
    beyond = replace(found, quality=at(some, -0.015, 0.0, 0.02))
    assert failed(verdict(beyond, both, contest, limits)) == ["quality"], "what is guessed may be worth 1 less"
    mute = replace(found.quality, identifiable=False, estimates={}, why="not identifiable: nothing was drawn")
    (said,) = verdict(replace(found, quality=mute), both, contest, limits).failed
    assert said.name == "quality" and said.value is None and "nothing was drawn" in said.says


def test_no_slice_may_be_worse_than_its_own_margin(
    found: Challenge, both: tuple[Contender, Contender], contest: Contest
) -> None:
    (key, large), *_ = sorted(found.slices.values.items(), key=lambda item: -item[1].n)
    name = "=".join(key)

    def with_slice(low: float, high: float, n: int) -> Challenge:
        value = replace(at(large, low, (low + high) / 2, high), n=n)
        return replace(found, slices=replace(found.slices, values={key: value}))

    limits = replace(WIDE, slice=0.1)
    assert failed(verdict(with_slice(-0.11, 0.05, 900), both, contest, limits)) == ["slices"]
    assert not failed(verdict(with_slice(-0.09, 0.05, 900), both, contest, limits))
    assert not failed(verdict(with_slice(-0.5, 0.05, 90), both, contest, limits)), "a small one cannot show more"
    named = replace(limits, slices={name: 0.1})
    assert failed(verdict(with_slice(-0.5, 0.05, 90), both, contest, named)) == ["slices"], "but a named one has to"
    absent = verdict(with_slice(0.0, 0.05, 900), both, contest, replace(limits, slices={f"{key[0]}=none such": 0.1}))
    assert failed(absent) == ["slices"] and "too few judged requests" in absent.failed[0].says
    with pytest.raises(InputError, match="there is no slice 'tsak=code'"):
        verdict(found, both, contest, replace(limits, slices={"tsak=code": 0.0}))
    small = verdict(with_slice(-0.5, -0.11, 90), both, contest, limits)
    assert failed(small) == ["slices"] and name in small.failed[0].says and "upper bound" in small.failed[0].says
    own = replace(limits, slices={name: 0.02})
    assert failed(verdict(with_slice(-0.05, 0.05, 900), both, contest, own)) == ["slices"]
    assert not failed(verdict(with_slice(-0.15, 0.05, 900), both, contest, replace(limits, slices={key[0]: 0.2})))
    blind = replace(large, identifiable=False, estimates={}, why="not identifiable here", n=900)
    mute = replace(found, slices=replace(found.slices, values={key: blind}))
    assert "not identifiable here" in verdict(mute, both, contest, limits).failed[0].says
    none = replace(found, slices=replace(found.slices, values={}))
    assert not failed(verdict(none, both, contest, limits))


def test_calibration_has_to_hold(found: Challenge, both: tuple[Contender, Contender], contest: Contest) -> None:
    limits = replace(WIDE, calibration=0.05)
    narrow = at(found.promise["challenger"], -0.01, 0.0, 0.01)
    kept = replace(found, promise=found.promise | {"challenger": narrow})
    assert not failed(verdict(kept, both, contest, limits))
    short = at(found.promise["challenger"], -0.051, -0.03, 0.0)
    broken = verdict(replace(found, promise=found.promise | {"challenger": short}), both, contest, limits)
    assert failed(broken) == ["calibration"]
    assert not failed(verdict(replace(kept, promise=kept.promise | {"champion": short}), both, contest, limits))
    table = kept.calibration.with_columns(high=kept.calibration["high"] - 0.3, low=kept.calibration["low"] - 0.3)
    one = verdict(replace(kept, calibration=table), both, contest, limits)
    assert failed(one) == ["models' calibration"] and "is promised of it" in one.failed[0].says
    nothing = verdict(replace(kept, calibration=table.clear()), both, contest, limits)
    assert failed(nothing) == ["models' calibration"]


def test_cost_rows_age_and_history(found: Challenge, both: tuple[Contender, Contender], contest: Contest) -> None:

    def costs(old: float, new: float, error: float) -> Challenge:
        values = found.policies["cost_usd"]
        priced = {
            name: replace(values[name], estimates={"dr": Estimate(v, v - 2 * error, v + 2 * error, error)})
            for name, v in (("champion", old), ("challenger", new))
        }
        change = replace(
            found.cost_usd, estimates={"dr": Estimate(new - old, new - old - 2 * error, new - old + 2 * error, error)}
        )
        return replace(found, cost_usd=change, policies=dict(found.policies) | {"cost_usd": dict(values) | priced})

    assert failed(verdict(costs(1.0, 1.05, 0.04), both, contest, replace(WIDE, cost=0.1))) == ["cost"]
    assert not failed(verdict(costs(1.0, 1.05, 0.01), both, contest, replace(WIDE, cost=0.1)))
    assert not failed(verdict(costs(1.0, 9.0, 0.04), both, contest)), "no limit was given"
    free = verdict(costs(0.0, 0.01, 0.001), both, contest, replace(WIDE, cost=0.1))
    assert failed(free) == ["cost"] and "USD a request and may" in free.failed[0].says
    assert failed(verdict(costs(-0.0001, 0.01, 0.001), both, contest, replace(WIDE, cost=0.1))) == ["cost"]
    assert not failed(verdict(costs(1.0, 0.5, 0.01), both, contest, replace(WIDE, cost=-0.4))), "a promised saving"
    assert failed(verdict(found, both, contest, replace(WIDE, rows=found.outcomes + 1))) == ["outcomes"]
    few = replace(found, quality=replace(found.quality, clusters=39))
    assert failed(verdict(few, both, contest)) == ["clusters"]
    future = verdict(found, both, contest, now=found.newest - timedelta(days=2))
    assert failed(future) == ["fresh log"] and "is to come" in future.failed[0].says
    old = verdict(found, both, contest, now=found.newest + timedelta(days=31))
    assert failed(old) == ["fresh log"] and "31.0 days old, 30 are allowed" in old.failed[0].says
    back = verdict(found, both, contest, rolled_back="answers got worse")
    assert failed(back) == ["not rolled back"] and "answers got worse" in back.failed[0].says


@pytest.mark.parametrize(
    "wrong",
    [
        {"quality": -0.1},
        {"slice": 2.0},
        {"calibration": -1.0},
        {"slices": {"task": 3.0}},
        {"latency": 0.0},
        {"rows": 0},
    ],
)
def test_limits_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"ha(ve|s) to"):
        Limits(**wrong)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Slowly:
    """A learner that takes its time."""

    of: object
    seconds: float

    def estimate(self, request: RouteRequest) -> Expected:
        begun = time.perf_counter()
        while time.perf_counter() - begun < self.seconds:
            pass
        return self.of.estimate(request)  # type: ignore[attr-defined, no-any-return]


def test_latency_is_the_ratio_here_and_now(
    both: tuple[Contender, Contender], contest: Contest, found: Challenge
) -> None:
    router = both[0].router
    assert 0.6 < latency_ratio(router, router) < 1.6
    slow: Router = replace(router, estimator=Slowly(router.estimator, 0.002))
    deaf = router.with_policy(Policy(default_data_class="secret"))
    refused = judge(found, deaf, router, bundle=contest.challenger, limits=WIDE, now=found.newest)
    assert failed(refused) == ["latency"] and "no request to measure it with" in refused.failed[0].says
    assert latency_ratio(router, slow) > 3 and latency_ratio(slow, router) < 0.33
    of = judge(found, router, slow, bundle=contest.challenger, limits=WIDE, now=found.newest)
    assert failed(of) == ["latency"] and "times as long" in of.failed[0].says


def test_golden_rows_have_to_answer(
    found: Challenge, both: tuple[Contender, Contender], contest: Contest, tmp_path: Path
) -> None:
    assert golden_rows(contest.challenger).value == pytest.approx(0.0, abs=1e-6)
    broken = shutil.copytree(contest.challenger, tmp_path / "broken")
    (broken / "golden.json").write_text("{}")
    of = verdict(found, both, contest, bundle=broken)
    assert failed(of) == ["golden rows"] and "golden.json" in of.failed[0].says


def test_a_worse_challenger_is_refused(contest: Contest, both: tuple[Contender, Contender]) -> None:
    policy = Policy(tiers={"low": 0.0}, default_tier="low")
    cheap = replace(both[1], router=both[1].router.with_policy(policy))
    found = challenge(both[0], cheap, contest.log)
    of = judge(found, both[0].router, cheap.router, bundle=contest.challenger, now=found.newest)
    assert "quality" in failed(of) and of.to_frame().filter(name="quality")["value"][0] < -0.02


# The command line, on a registry with both.


@dataclass(frozen=True)
class Place:
    uri: str
    folder: Path
    contest: Contest

    def run(self, *args: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [*args, "--tracking-uri", self.uri])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, re.sub(r"[ \n]+", " ", done.output)

    @property
    def aliases(self) -> dict[str, str]:
        return {alias: v.version for v in registry.versions(self.uri, "router") for alias in v.aliases}


@pytest.fixture
def place(contest: Contest, tmp_path: Path) -> Iterator[Place]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for bundle, alias in ((contest.champion, "champion"), (contest.challenger, "challenger")):
        register_bundle(bundle, tracking_uri=uri, name="router", params={}, metrics={}, alias=alias)
    yield Place(uri, tmp_path, contest)


LOOSE = (
    "--margin", "0.5", "--slice-margin", "1", "--calibration-margin", "0.5", "--max-latency-ratio", "9",
    "--fresh-days", "100000",
)  # fmt: skip


def test_evaluate_and_promote(place: Place) -> None:
    logs = ["--logs", str(place.contest.folder / "logs")]
    page, data = place.folder / "out" / "report.html", place.folder / "report.json"
    code, said = place.run("evaluate", "router", *logs, "--html", str(page), "--json", str(data), "--confidence", "0.9")
    assert code == 0 and "90% intervals" in said and "kept with router version 2" in said
    assert page.read_text().startswith("<!doctype html>")
    verdict = json.loads(data.read_text())["verdict"]
    assert not verdict["passed"] and "FAILS fresh log" in said
    assert place.aliases == {"champion": "1", "challenger": "2"}

    code, said = place.run("promote", "router", *logs, "--slice-margin", "task=code:0.3", "--json")
    assert code == 1 and "router version 2 is not promoted: fresh log" in said and "days old" in said
    stages, result = said.split('{"result": ')
    assert '"stage": "reading the log"' in stages and '"moving": true' not in stages
    assert '"moved": false' in result and '{"name": "fresh log", "holds": false' in result
    assert place.aliases["champion"] == "1"

    code, said = place.run("promote", "router", "2", *logs, *LOOSE)
    assert code == 0 and "router version 2 is now champion; version 1 was it before" in said
    assert place.aliases == {"champion": "2", "previous": "1", "challenger": "2"}
    latest = next(past for past in history(place.uri, "router") if past.version == "2")
    assert latest.promoted is not None and not latest.forced
    code, said = place.run("promote", "router", "2", *logs, *LOOSE)
    assert code == 2 and "is the champion already" in said


def test_force_is_on_the_record(place: Place) -> None:
    store = place.folder / "router-ml.db"
    Store(f"sqlite:///{store}").close()
    assert place.run("promote", "router", "2")[0] == 2
    code, said = place.run("promote", "router", "2", "--force")
    assert code == 2 and "--force needs --reason" in said
    code, said = place.run("promote", "router", "2", "--force", "--reason", " ", "--store", str(store))
    assert code == 2 and "--force needs --reason" in said
    assert place.aliases["champion"] == "1"
    why = "the old one sends everything to a model that is gone"
    code, said = place.run("promote", "router", "2", "--force", "--reason", why, "--store", str(store))
    assert code == 0 and "(forced)" in said and place.aliases["champion"] == "2"
    noted = [change for change in Store(f"sqlite:///{store}").changes() if change["kind"] == "registry"]
    assert len(noted) == 1 and noted[0]["after"]["reason"] == why and noted[0]["after"]["forced"]

    code, said = place.run("rollback", "router", "--reason", "it was wrong")
    assert code == 0 and place.aliases["champion"] == "1"
    code, said = place.run("promote", "router", "2", "--logs", str(place.contest.folder / "logs"), *LOOSE)
    assert code == 1 and "it was rolled back before: it was wrong" in said and place.aliases["champion"] == "1"


def test_addresses(place: Place) -> None:
    logs = ["--logs", str(place.contest.folder / "logs"), "--since", str(place.contest.log["time"][3400])[:19]]
    code, said = place.run("evaluate", str(place.contest.challenger), *logs)
    assert code == 2 and "give --champion" in said
    code, said = place.run("evaluate", str(place.contest.challenger), "--champion", "router/1", *logs)
    assert code == 0 and "kept with" not in said
    for address, problem in (
        ("router/7", "has no version '7' (it has: 1, 2)"), ("router@shadow", "no alias 'shadow'"),
        ("no/where", "there is no bundle at no/where"), ("rooter", "no model 'rooter'"),
    ):  # fmt: skip
        code, said = place.run("evaluate", address, *logs)
        assert code == 2 and problem in said, said
    code, said = place.run("promote", "router", "2")
    assert code == 2 and "nothing to judge by" in said
    code, said = place.run("promote", "router", "2", *logs, "--slice-margin", "task:much")
    assert code == 2 and "give a number" in said
