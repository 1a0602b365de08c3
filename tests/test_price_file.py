"""LiteLLM's own price file into a catalogue, and what other prices change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_demo import Demo, small_demo

from features.load import load_router
from router_ml.bundle import read_bundle, write_bundle
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import BundleError, InputError
from router_ml.logs import read_log
from router_ml.price_file import aligned, changes, import_prices, read_prices
from router_ml.prices import Usage, price_call
from training.flips import flips
from training.logged import requests_of
from training.onboard import onboard_bundle

ROOT = Path(__file__).resolve().parents[1]
PIN = next(
    line for line in (ROOT / "tests" / "litellm-requirements.txt").read_text().splitlines() if "litellm==" in line
)
ENTRY: dict[str, Any] = {
    "litellm_provider": "acme",
    "mode": "chat",
    "max_input_tokens": 8192,
    "max_output_tokens": 1024,
    "input_cost_per_token": 1.5e-07,
    "output_cost_per_token": 6e-07,
}


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real LiteLLM of the tests' pin, without what it needs to run: only its file is read."""
    folder = tmp_path_factory.mktemp("litellm")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        "--no-deps",
    ]
    done = subprocess.run([*pip, "--target", str(folder), PIN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def _import(litellm: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(litellm)])
    return subprocess.run(
        [sys.executable, "-m", "router_ml.cli", "catalog", "import", *options],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_cards_come_from_the_file_in_the_wheel(litellm: Path, tmp_path: Path) -> None:
    out = tmp_path / "catalog.json"
    first = _import(litellm, "--model", "gpt-4o-mini", "--model", "big=gemini/gemini-2.5-pro", "--out", str(out))
    assert first.returncode == 0, first.stderr
    made = Catalog.load(out)
    raw = json.loads((litellm / "litellm" / "model_prices_and_context_window_backup.json").read_text())
    assert made.ids == ("gpt-4o-mini", "big")
    for card, name in ((made["gpt-4o-mini"], "gpt-4o-mini"), (made["big"], "gemini/gemini-2.5-pro")):
        entry = raw[name]
        assert card.input_usd_per_mtok == pytest.approx(entry["input_cost_per_token"] * 1e6)
        assert card.output_usd_per_mtok == pytest.approx(entry["output_cost_per_token"] * 1e6)
        assert card.cached_input_usd_per_mtok == pytest.approx(entry["cache_read_input_token_cost"] * 1e6)
        assert card.batch_output_usd_per_mtok == pytest.approx(entry["output_cost_per_token_batches"] * 1e6)
        assert card.context_window == entry["max_input_tokens"] and card.provider == entry["litellm_provider"]
        assert card.guessed == {"tier"} and card.price_source == f"litellm {PIN.partition('==')[2]}"
    (step,) = made["big"].long_context
    entry = raw["gemini/gemini-2.5-pro"]
    assert step.above_tokens == 200_000
    assert step.input_usd_per_mtok == pytest.approx(entry["input_cost_per_token_above_200k_tokens"] * 1e6)
    assert step.output_usd_per_mtok == pytest.approx(entry["output_cost_per_token_above_200k_tokens"] * 1e6)
    assert "guessed tier" in first.stdout
    # Without --model the cards that are there are priced again; nothing has changed.
    again = _import(litellm, "--out", str(out))
    assert again.returncode == 0 and "big skipped" in again.stderr  # its name is not one of the file's
    assert Catalog.load(out) == made and "1 models priced" in again.stdout


def test_most_of_the_file_can_be_imported_and_the_rest_says_why(litellm: Path) -> None:
    entries = read_prices(litellm / "litellm" / "model_prices_and_context_window_backup.json")
    chat = [name for name, entry in entries.items() if entry.get("mode") == "chat" and "=" not in name]
    good, why = [], []
    for name in chat:
        try:
            good.append(import_prices(entries, "the file", [name]).catalog[name])
        except InputError as error:
            why.append(str(error))
    assert len(good) > 0.8 * len(chat) > 2000
    assert all(card.input_usd_per_mtok > 0 and card.output_usd_per_mtok > 0 for card in good)
    assert all("by hand" in said for said in why), [said for said in why if "by hand" not in said][:3]
    tiered = [c for c in good if len(c.long_context) > 1]
    assert tiered and all(c.long_context[0].input_usd_per_mtok >= c.input_usd_per_mtok for c in tiered)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"input_cost_per_token": None}, "the file has no input_cost_per_token"),
        ({"output_cost_per_token": 0}, "the file gives 0 as output_cost_per_token"),
        ({"input_cost_per_token": "1e-7"}, "is not a price of a token"),
        ({"input_cost_per_token": 2.0}, "is not a price of a token"),
        ({"max_input_tokens": None}, "states no max_input_tokens"),
        ({"mode": "embedding"}, "it is a model for embedding"),
        ({"tiered_pricing": [{"range": [5, 10], **ENTRY}]}, "does not begin at 0"),
        ({"tiered_pricing": "x"}, "not of the form"),
    ],
)
def test_an_unknown_price_is_an_error_not_zero(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match="'new'") as error:
        import_prices({"new": ENTRY | entry}, "file", ["new"])
    assert says in str(error.value)


def test_steps_of_input_or_output_in_thousands_or_millions() -> None:
    entry = ENTRY | {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_input_tokens": 2_000_000}
    entry |= {"output_cost_per_token_above_200k_tokens": 4e-6, "input_cost_per_token_above_1m_tokens": 3e-6}
    card = import_prices({"new": entry}, "file", ["new"]).catalog["new"]
    steps = [(s.above_tokens, s.input_usd_per_mtok, s.output_usd_per_mtok) for s in card.long_context]
    assert steps == [(200_000, 1.0, 4.0), (1_000_000, 3.0, 4.0)]
    assert price_call(card, Usage(input_tokens=300_000, output_tokens=1_000_000)) == Decimal("4.3")


def test_a_price_of_zero_is_taken_where_it_is_said_to_be_one() -> None:
    made = import_prices({"new": ENTRY | {"output_cost_per_token": 0}}, "file", ["new"], free=True)
    assert made.catalog["new"].output_usd_per_mtok == 0.0


def test_a_name_that_is_not_there_is_answered_with_the_like(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="no model 'new': did it mean acme/new-1"):
        import_prices({"acme/new-1": ENTRY}, "file", ["new"])
    with pytest.raises(InputError, match="--model NAME"):
        import_prices({"acme/new-1": ENTRY}, "file")


def test_a_card_that_is_there_keeps_what_the_file_does_not_say(catalog: Catalog) -> None:
    entries = {"mid": ENTRY | {"cache_read_input_token_cost": 1e-8}}
    made = import_prices(entries, "litellm 1", [], catalog)
    assert made.priced == ("mid",) and set(made.skipped) == {"frontier", "hosted", "local"}
    card, before = made.catalog["mid"], catalog["mid"]
    assert (card.tier, card.regions, card.data_classes) == (before.tier, before.regions, before.data_classes)
    assert (card.capabilities, card.provider, card.guessed) == (before.capabilities, "acme", frozenset())
    assert (card.input_usd_per_mtok, card.cached_input_usd_per_mtok) == (0.15, 0.01)
    # A price that an earlier file gave goes with it; one that was written by hand stays.
    later = import_prices({"mid": ENTRY}, "litellm 2", [], made.catalog).catalog["mid"]
    assert later.cached_input_usd_per_mtok is None
    by_hand = Catalog.from_json(
        {"models": [{**m, "batch_input_usd_per_mtok": 0.1} for m in catalog.to_json()["models"]]}
    )
    assert import_prices({"mid": ENTRY}, "litellm 2", [], by_hand).catalog["mid"].batch_input_usd_per_mtok == 0.1


def test_changes_name_the_field_and_both_values(catalog: Catalog) -> None:
    raw = catalog.to_json()["models"]
    raw[0]["output_usd_per_mtok"] = 30.0
    other = Catalog.from_json({"models": raw[:3]})
    assert [(c.model, c.field, c.old, c.new) for c in changes(catalog, other)] == [
        ("frontier", "output_usd_per_mtok", 15.0, 30.0),
        ("local", "model", "local", None),
    ]
    assert changes(catalog, catalog) == []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory)


def test_decisions_that_flip_are_those_of_the_router(demo: Demo, tmp_path: Path) -> None:
    router, log = load_router(demo.out / "bundle"), read_log(demo.out / "log")
    old = router.catalog
    raw = old.to_json()["models"]
    for card in raw:
        if card["id"] in ("pocket-8b", "aurora-4-mini"):
            card["input_usd_per_mtok"], card["output_usd_per_mtok"] = 60.0, 60.0
    new = Catalog.from_json({"models": raw[::-1]})  # its order need not be the bundle's
    same = flips(router, old, old, log, sample=200)
    assert same.share == 0.0 and same.rows.height + same.refused == 200
    assert same.rows["old_usd"].to_list() == same.rows["stay_usd"].to_list() == same.rows["new_usd"].to_list()
    found = flips(router, old, new, log, sample=300)
    assert found.share > 0.1
    assert not found.flipped.filter(found.flipped["new_model"].is_in(["pocket-8b", "aurora-4-mini"])).height
    moved = found.flipped.filter(found.flipped["stay_usd"].is_not_null())
    assert (moved["new_usd"] < moved["stay_usd"]).all()
    assert found.to_frame()["requests"].sum() == found.rows.height
    assert found.plot().axes[0].get_xlabel().startswith("requests")
    with pytest.raises(InputError, match="the new catalogue has no model"):
        flips(router, old, old.subset(["aurora-4"]), log, sample=5)
    assert aligned(new, old, "new").ids == old.ids

    for name, catalog in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(catalog.to_json()))
    run = ["catalog", "diff", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    run += ["--bundle", str(demo.out / "bundle"), "--logs", str(demo.out / "log"), "--sample", "300"]
    ran = CliRunner().invoke(main, run)
    assert ran.exit_code == 0, ran.output
    assert "pocket-8b: input_usd_per_mtok 0.05 to 60.0 (+119900.0%)" in ran.output
    assert f"{found.flipped.height} of {found.rows.height} decisions flip" in ran.output
    as_json = CliRunner().invoke(main, [*run, "--json"])
    assert json.loads(as_json.output)["flips"]["share"] == pytest.approx(found.share)


def test_new_prices_reach_a_bundle_without_training(demo: Demo, tmp_path: Path) -> None:
    old, uri = load_router(demo.out / "bundle"), f"sqlite:///{tmp_path}/mlflow.db"
    raw = old.catalog.to_json()["models"]
    raw[0]["output_usd_per_mtok"], raw[0]["data_classes"] = 1000.0, []
    (tmp_path / "new.json").write_text(json.dumps({"models": raw[::-1]}))
    run = ["catalog", "apply", str(tmp_path / "new.json"), "--bundle", str(demo.out / "bundle")]
    ran = CliRunner().invoke(main, [*run, "--out", str(tmp_path / "b"), "--register", "r", "--tracking-uri", uri])
    assert ran.exit_code == 0, ran.output
    model = raw[0]["id"]
    assert f"{model}: output_usd_per_mtok" in ran.output and "registered as r version 1, alias champion" in ran.output
    new = load_router(tmp_path / "b")
    assert new.catalog[model].output_usd_per_mtok == 1000.0 and new.model_version != old.model_version
    assert new.catalog[model].data_classes == old.catalog[model].data_classes, "clearances are the bundle's"
    requests = requests_of(read_log(demo.out / "log").head(50))
    for request in requests:
        before, after = old.estimator.estimate(request), new.estimator.estimate(request)
        assert np.array_equal(before.p_ok, after.p_ok), "prices are among the learner's features: it keeps its own"
        ratio = new.expected_cost(request, after) / old.expected_cost(request, before)
        assert ratio[0] > 2 and (ratio[1:] == 1).all()

    # A model that joins later, and prices that come once more.
    card = replace(new.catalog.cards[1], id="fresh", sibling=None)
    onboard_bundle(tmp_path / "b", card, out=tmp_path / "c", sibling=new.catalog.ids[1])
    wider = load_router(tmp_path / "c")
    assert wider.catalog.ids == (*old.catalog.ids, "fresh") and wider.catalog.cards[0].output_usd_per_mtok == 1000.0
    assert np.array_equal(
        wider.estimator.estimate(requests[0]).p_ok[..., :-1], old.estimator.estimate(requests[0]).p_ok
    )
    raw = wider.catalog.to_json()["models"]
    raw[-1]["input_usd_per_mtok"] = 7.0
    (tmp_path / "new.json").write_text(json.dumps({"models": raw}))
    again = [
        "catalog",
        "apply",
        str(tmp_path / "new.json"),
        "--bundle",
        str(tmp_path / "c"),
        "--out",
        str(tmp_path / "c"),
    ]
    assert CliRunner().invoke(main, again).exit_code == 0
    assert load_router(tmp_path / "c").catalog["fresh"].input_usd_per_mtok == 7.0
    assert load_router(tmp_path / "c").estimator.estimate(requests[0]).p_ok.tolist() == (
        wider.estimator.estimate(requests[0]).p_ok.tolist()
    )
    same = CliRunner().invoke(main, again)
    assert same.exit_code == 2 and "has these prices already" in same.output

    manifest = read_bundle(tmp_path / "c").manifest
    short = {**manifest["prices"], "catalog": {"models": raw[1:]}}
    write_bundle(tmp_path / "d", {**manifest, "prices": short}, read_bundle(tmp_path / "c").files)
    with pytest.raises(BundleError, match="of other models"):
        load_router(tmp_path / "d")


def test_a_file_of_ones_own_and_where_it_is_wrong(tmp_path: Path) -> None:
    file, out = tmp_path / "prices.json", tmp_path / "catalog.json"
    file.write_text(json.dumps({"sample_spec": {"input_cost_per_token": 0.0}, "new": ENTRY}))
    run = ["catalog", "import", "--from", str(file), "--out", str(out)]
    assert CliRunner().invoke(main, [*run, "--model", "new"]).exit_code == 0
    assert Catalog.load(out)["new"].price_source == f"price file {file}"
    sample = CliRunner().invoke(main, [*run, "--model", "sample_spec"])
    assert sample.exit_code == 2 and "has no model 'sample_spec'" in sample.output
    assert Catalog.load(out).ids == ("new",), "nothing is written after an error"
    file.write_text("[]")
    broken = CliRunner().invoke(main, [*run, "--model", "new"])
    assert broken.exit_code == 2 and "is not a price file" in broken.output
