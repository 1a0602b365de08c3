"""Every command and all Python of the README and the pages runs, in its order, on what a small demo leaves."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path

import polars as pl
import pytest
from pages import Block, blocks, reader
from small_demo import Demo, small_demo
from test_readme import DOCUMENTS, ROOT, shown_commands

from training.world import SIMULATED_CATALOG

FIXTURES = ROOT / "tests" / "fixtures"
PAGES = [path for path in DOCUMENTS if any(block.language == "console" for block in blocks(path.read_text("utf-8")))]
# Commands that answer no on a demo of 1,500 requests of the past, which is an answer and exits with 1.
ANSWERS_NO = {
    "router-ml promote router --logs": "the gate wants 500 outcomes, the newest of the last 30 days",
    "router-ml tune": "300 rows show little for certain",
}
# What pages leave behind for whoever went through them.
LEAVES = {
    "README.md": ("bundle/manifest.json", "tradeoff.json"),
    "docs/data-scientist.md": (
        "bundle/manifest.json", "report.html", "examination.json", "outcomes.png", "advice.csv", "explore.toml",
        "wider/manifest.json", "hosted.json", "priced.json", "repriced/manifest.json", "log-of-the-service/log.json",
    ),
    "docs/importing.md": ("logs/log.json",),
    "docs/formats.md": ("logs/log.json",),
}  # fmt: skip
# Commands that no test runs as they stand, and why. Each has to be in a document, so that the list stays true.
NOT_RUN = {
    r"make (demo|test|setup|fuzz|lint|docs|notebooks)\b": "this is make test; test_demo.py, test_notebooks.py run them",
    r"python -m benchmarks\.\w+": "hours, on published data; test_benchmarks.py runs the benchmarks on little of it",
    r"router-ml (import outcomes|train) .*(mmlu_pro|--logs log )": "published data that a clone lacks, minutes",
    r"docker (build|run) ": "needs a container engine and a registry",
    r"kubectl create secret ": "needs a cluster",
    r"router-ml import litellm postgresql://": "needs LiteLLM's database; test_litellm_import.py makes one",
    r"bash \.ci/run": "runs this suite",
}


def _not_run(text: str) -> list[str]:
    """The command lines of a document that stand in no console block."""
    rest = re.sub(r"^```console\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    plain = [line.strip() for line in rest.splitlines() if re.match(r" {4}bash ", line)]
    shell = [line for block in blocks(rest) if block.language == "sh" for line in block.body.splitlines()]
    return [*shown_commands(rest), *plain, *(line for line in shell if line and not line.startswith(" "))]


def test_what_is_not_run_is_listed_with_its_reason() -> None:
    lines = [line for path in DOCUMENTS for line in _not_run(path.read_text(encoding="utf-8"))]
    unlisted = [line for line in lines if not any(re.match(pattern, line) for pattern in NOT_RUN)]
    assert unlisted == [], "put them into a console block, or say in NOT_RUN why they are not run"
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
    run = [command for path in PAGES for block in blocks(path.read_text("utf-8")) for command in block.commands]
    assert [begin for begin in ANSWERS_NO if not any(command.startswith(begin) for command in run)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_are_of_a_known_kind(path: Path) -> None:
    found = blocks(path.read_text(encoding="utf-8"))
    assert {block.language for block in found} <= {"console", "sh", "python", "json", "toml", "yaml", "csv", "text"}
    assert [block.body for block in found if block.language == "console" and not block.body.startswith("$ ")] == []
    assert path.read_text(encoding="utf-8").count("\n```") + path.read_text("utf-8").startswith("```") == 2 * len(found)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory)


def _lay_out(folder: Path, demo: Demo) -> None:
    """What a page's reader has: the demo's folder, and the files of their own that pages name."""
    shutil.copytree(demo.out, folder / "demo")
    # The registry names its artifacts by their path: this copy's versions lie in this copy.
    with sqlite3.connect(folder / "demo" / "mlflow.db") as registry:
        for table, column in (
            ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"),
            ("model_versions", "storage_location"),
        ):  # fmt: skip
            registry.execute(
                f"update {table} set {column} = replace({column}, ?, ?)", (str(demo.out), str(folder / "demo"))
            )
    shutil.copy(folder / "demo" / "decisions.db", folder / "router-ml.db")
    for name, source in {
        "export": "langfuse", "traces.jsonl": "otel/otlp.jsonl", "logs.jsonl": "portkey/logs.jsonl",
        "requests.jsonl": "helicone/requests.jsonl", "spend_logs.jsonl": "litellm/spend_logs.jsonl",
    }.items():  # fmt: skip
        copy = shutil.copytree if (FIXTURES / source).is_dir() else shutil.copy
        copy(FIXTURES / source, folder / name)
    calls = pl.DataFrame(
        {"id": ["a", "b"], "ts": [1_760_000_000, 1_760_000_060], "model": ["gpt-large", "llama-small"],
         "prompt": ["Hello", "What is 2 + 2?"], "cost_usd": [2.0, 0.1]}
    )  # fmt: skip
    calls.write_csv(folder / "calls.csv")
    calls.with_columns(ts=pl.col("ts") * 1000).write_parquet(folder / "calls.parquet")
    (folder / "thumbs.csv").write_text("request_id,source,value\na,thumbs,1\nb,thumbs,0\n")
    formats = blocks((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"))
    for block in formats:
        if block.file:
            (folder / block.file).write_text(block.body)
    cards = SIMULATED_CATALOG.to_json()
    card = cards["models"][0] | {"id": "aurora-5"}
    (folder / "demo-catalog.json").write_text(json.dumps(cards))
    cards["models"][0]["output_usd_per_mtok"] *= 0.8
    (folder / "demo-prices.json").write_text(json.dumps(cards))
    (folder / "card.json").write_text(json.dumps(card))
    price = {"input_cost_per_token": 1.5e-7, "output_cost_per_token": 6e-7, "max_input_tokens": 128_000}
    entry = price | {"litellm_provider": "openai", "mode": "chat", "max_output_tokens": 16_384}
    (folder / "prices.json").write_text(json.dumps({"gpt-4o-mini": entry}))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run(path: Path, demo: Demo, tmp_path: Path) -> None:
    _lay_out(tmp_path, demo)
    with reader(tmp_path) as one:
        one.go_through(path.read_text(encoding="utf-8"), ANSWERS_NO)
    left = LEAVES.get(path.relative_to(ROOT).as_posix(), ())
    assert [name for name in left if not (tmp_path / name).is_file()] == []


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    with reader(tmp_path) as one:
        for wrong in ("router-ml doctor none", "router-ml trian", "false", "cat none"):
            with pytest.raises(AssertionError):
                one.run(wrong, {0})
        assert one.run('export A="x y"', {0}) == "" and one.run('printf %s "$A"', {0}) == "x y"
    assert Block("console", "", "$ a \\\n  b\n$ c 'd\n  e'\n").commands == ["a \\\n  b", "c 'd\n  e'"]
