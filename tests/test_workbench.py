"""The notebooks' workbench: a log of one's own, bundles made once, a registry left alone, and moves in a copy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pytest

from router_ml import registry
from router_ml.catalog import Catalog, card_to_json, written
from router_ml.errors import InputError, MovedError, RegistryError
from router_ml.logs import write_log
from router_ml.store import Store
from training.gate import Condition, Verdict
from training.replay import replay
from training.report import calibration_figure
from training.shadowed import shadowed
from training.train import train
from training.workbench import Workbench, workbench

PASSED = Verdict((Condition("quality", True, 0.0, -0.02, "it holds"),))
FAILED = Verdict((Condition("quality", True, 0.0, -0.02, "it holds"), Condition("cost", False, 1.0, 0.0, "it is dear")))


@pytest.fixture(scope="module")
def bench(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """On a log of one's own, with a registry of the notebooks' own."""
    folder = tmp_path_factory.mktemp("bench")
    write_log([tiny_log], folder / "mine", catalog=catalog)
    return workbench(folder / "mine", encoder="lexical", folder=folder / "work")


def test_a_log_of_ones_own_is_taken_as_it_is(bench: Workbench, tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    assert len(bench.log) == len(tiny_log) and bench.catalog == catalog and bench.imported is None
    assert (bench.truth, bench.now, bench.holdout, bench.own) == (None, None, 0.2, True)


def test_champion_challenger_and_moves_in_a_copy(bench: Workbench) -> None:
    champion, challenger = bench.champion(), bench.challenger()
    assert (champion.version, challenger.version) == ("1", "2")
    assert champion.contender.manifest["trained_until"] < challenger.contender.manifest["trained_until"]
    stamp = (bench.bundle / "manifest.json").stat().st_mtime_ns
    assert bench.router().version == challenger.contender.version == bench.challenger().contender.version
    assert (bench.bundle / "manifest.json").stat().st_mtime_ns == stamp, "what is there is not trained again"
    before = bench.history()
    stage = bench.stage()
    refused = stage.promote(FAILED, champion, challenger)
    assert refused.promotion is None and refused.says == "version 2 is not promoted: cost"
    assert stage.rollback(reason="none").promotion is None
    assert (
        stage.promote(PASSED, champion, challenger, reason="better").says
        == "version 2 is champion; version 1 was it before"
    )
    assert stage.history().filter(pl.col("version") == "2")["reason"].to_list() == ["better"]
    assert stage.rollback(reason="worse").says == "version 1 is champion again; version 2 is rolled back"
    assert stage.rolled_back(challenger) is not None and bench.rolled_back(challenger) is None
    assert bench.history().equals(before), "the registry itself is as it was"
    assert bench.stage(rehearse=False) is bench
    again = bench.stage().promote(PASSED, champion, challenger)
    assert again.promotion is not None, "a new rehearsal begins from the registry"
    with pytest.raises(MovedError, match="was judged: judge them again"):
        bench.stage().promote(PASSED, challenger, champion)


def test_what_is_trained_becomes_a_version(bench: Workbench) -> None:
    made = train(bench.log, bench.catalog, out=bench.bundle, encoder=bench.encoder, holdout=bench.holdout)
    version = bench.register(made)
    assert version.alias == "challenger" and bench.challenger().version == version.version
    axes = calibration_figure(made).axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(bench.catalog.ids)


def test_a_registry_that_is_not_the_notebooks_own_is_not_filled(bench: Workbench, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/theirs.db"
    log = bench.folder.parents[1] / "mine"
    theirs = workbench(log, encoder="lexical", folder=tmp_path / "work", registry=uri)
    with pytest.raises(RegistryError):
        theirs.champion()
    made = train(theirs.log, theirs.catalog, out=theirs.bundle, encoder="lexical")
    assert theirs.register(made).alias == "champion", "the first of a registry"
    with pytest.raises(RegistryError, match="challenger"):
        theirs.challenger()
    assert theirs.register(made).alias == "challenger"
    assert theirs.stage().promote(PASSED, theirs.champion(), theirs.challenger()).promotion is not None
    assert registry.resolve(uri, "router").version == "1"


def test_a_newcomer_is_one_that_the_bundle_has_not_seen(bench: Workbench, tmp_path: Path) -> None:
    card, bundle = bench.newcomer(model="mid")
    assert card == bench.catalog["mid"]
    assert "mid" not in bench.router(bundle).router.catalog
    new = tmp_path / "card.json"
    new.write_text(json.dumps({**card_to_json(card), "id": "just out"}))
    named, whole = bench.newcomer(new)
    assert (named.id, whole) == ("just out", bench.bundle)
    new.write_text(json.dumps(card_to_json(card)))
    assert bench.newcomer(new)[1] == bundle, "a model of the log is left out"
    with pytest.raises(InputError, match="no model 'other'"):
        bench.newcomer(model="other")


def test_an_export_is_imported_and_what_cannot_be_read_says_so(
    tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path
) -> None:
    tiny_log.rename({"model": "llm"}).write_parquet(tmp_path / "calls.parquet")
    written(catalog, tmp_path / "catalog.json")
    options = {"kind": "table", "settings": {"columns": {"model": "llm"}}, "folder": tmp_path / "work"}
    made = workbench(tmp_path / "calls.parquet", catalog=tmp_path / "catalog.json", **options)
    assert made.imported is not None and made.imported.added == len(tiny_log) == len(made.log)
    again = workbench(tmp_path / "calls.parquet", **options)
    assert again.imported is not None and again.imported.added == 0 and again.folder == made.folder
    tiny_log.write_parquet(tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="name a file of cards"):
        workbench(tmp_path / "bare.parquet", folder=tmp_path / "work")


def test_newest_requests_are_replayed_through_the_real_service(bench: Workbench, tmp_path: Path) -> None:
    """On a log of which every outcome is known: each decision has one, and it is the log's."""
    champion, challenger = bench.champion(), bench.challenger()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    store = replay(bench.log, champion.bundle, challenger.bundle, tmp_path / "shadow", requests=30)
    rows = pl.DataFrame(list(Store(store).iter_log_rows()), infer_schema_length=None)
    asked = {row["decision_id"]: row["request_id"] for row in Store(store).decisions()}
    known = {(r, m): q for r, m, q in bench.log.select("request_id", "model", "quality").iter_rows()}
    assert len(rows) == 30
    for row in rows.iter_rows(named=True):
        assert row["quality"] == known[asked[row["request_id"]], row["model"]]
        assert row["propensity"] < 1.0
    newest = bench.log["request_id"].unique(maintain_order=True).tail(30).to_list()
    assert set(asked.values()) == set(newest)
    found = shadowed(store)
    assert found.n >= 15 and found.outcomes == found.n
    assert found.challenger == challenger.contender.version
    with pytest.raises(InputError, match="newer rows"):
        replay(bench.log.head(400), champion.bundle, challenger.bundle, tmp_path / "shadow")
