"""The command line: the whole way by its commands, errors that help, and help that is true."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import polars as pl
import pytest
from click.testing import CliRunner, Result
from command_lines import commands, mistakes

from router_ml import __version__, registry
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.logs import read_log
from training.world import SIMULATED_CATALOG

COMMANDS = dict(commands())


def router_ml(*args: str | Path) -> Result:
    """One command, run in this process."""
    return CliRunner().invoke(main, [str(a) for a in args])


def ok(*args: str | Path) -> str:
    done = router_ml(*args)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args: str | Path) -> str:
    """What the command says on stderr as it exits with 2, in words and not as a traceback."""
    done = router_ml(*args)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    return re.sub(r"\s+", " ", done.stderr)


@dataclass(frozen=True)
class Way:
    """A folder that the commands have gone through once: logs, two trainings, two registered versions."""

    folder: Path
    uri: str
    said: tuple[str, str, str]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder = tmp_path_factory.mktemp("way")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    simulated = ok("simulate", "--rows", "600", "--out", folder / "logs")
    options = ["--logs", folder / "logs", "--encoder", "lexical", "--register", "router", "--tracking-uri", uri]
    first = ok("train", *options, "--out", folder / "bundle")
    # The second time in a process of its own, by the installed command: other hash seeds and threads, the same bytes.
    script = shutil.which("router-ml", path=str(Path(sys.executable).parent))
    assert script, "router-ml is not installed beside this Python"
    again = subprocess.run(
        [script, "train", *map(str, options), "--out", "again"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    return Way(folder, uri, (simulated, first, again.stdout))


def test_a_simulated_log_comes_with_its_catalogue_and_its_truth(way: Way) -> None:
    assert way.said[0].startswith("600 rows in ") and "0 set aside" in way.said[0]
    assert len(read_log(way / "logs")) == 600
    assert {p.name for p in (way / "logs").iterdir()} == {"log.json", "part-00000.parquet", "truth"}


def test_the_same_log_gives_the_same_bytes_twice(way: Way) -> None:
    files = {p.name: p.read_bytes() for p in (way / "bundle").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (way / "again").iterdir()}
    assert len(files) >= 6


def test_training_says_what_it_made(way: Way) -> None:
    version = read_bundle(way / "bundle").version
    assert f"bundle {version} in {way / 'bundle'}" in way.said[1]
    metrics = json.loads(way.said[1][way.said[1].index("{") : way.said[1].rindex("}") + 1])
    assert metrics["train_requests"] + metrics["held_out_requests"] == 600
    assert 0 < metrics["held_out"]["brier"] < 0.5
    assert read_bundle(way / "bundle").manifest["metrics"] == metrics


def test_the_first_version_is_the_champion_the_second_its_challenger(way: Way) -> None:
    assert f"registered as router version 1, alias champion ({way.uri})" in way.said[1]
    assert "registered as router version 2, alias challenger" in way.said[2]
    options = ("--encoder", "lexical", "--register", "router", "--tracking-uri", way.uri, "--alias", "champion")
    said = refused("train", "--logs", way / "logs", "--out", way / "third", *options)
    assert "router has a champion, version 1" in said and "router-ml promote router" in said
    assert not (way / "third").exists() and len(registry.versions(way.uri, "router")) == 2
    assert "nothing to judge by" in refused("promote", "router", "2", "--tracking-uri", way.uri)
    assert "is the champion already" in refused("promote", "router", "1", "--tracking-uri", way.uri)
    aliases = {alias: registry.resolve(way.uri, "router", alias).version for alias in ("champion", "challenger")}
    assert aliases == {"champion": "1", "challenger": "2"}


def test_route_prints_the_decision_as_json(way: Way) -> None:
    decision = json.loads(ok("route", "What is 2 + 2?", "--bundle", way / "bundle", "--tier", "economy"))
    assert decision["model"] == decision["candidates"][0]["model"]
    assert {c["model"] for c in decision["candidates"]} == set(SIMULATED_CATALOG.ids)
    assert decision["min_probability"] == 0.5 and decision["propensity"] == 1.0
    assert decision["model_version"] == read_bundle(way / "bundle").version
    dear = max(c["expected_cost_usd"] for c in decision["candidates"])
    limited = json.loads(ok("route", "What is 2 + 2?", "--bundle", way / "bundle", "--max-cost-usd", str(0.9 * dear)))
    assert "expected cost is above" in "".join(limited["excluded"].values())
    surest = json.loads(ok("route", "What is 2 + 2?", "--bundle", way / "bundle", "--min-probability", "1"))
    assert not surest["meets_threshold"]
    assert surest["candidates"][0]["p_ok"] == max(c["p_ok"] for c in surest["candidates"])
    most = ["--objective", "quality", "--max-cost-usd", str(0.9 * dear), "--quality-threshold", "0.5"]
    within = json.loads(ok("route", "What is 2 + 2?", "--bundle", way / "bundle", *most))
    assert within["candidates"][0]["p_ok"] == max(c["p_ok"] for c in within["candidates"])
    assert within["quality_threshold"] == 0.5 and "most probable candidate within" in within["reason"]
    assert all(c["expected_total_cost_usd"] > c["expected_cost_usd"] for c in within["candidates"])


def test_route_says_what_a_threshold_or_an_objective_lacks(way: Way) -> None:
    command = ["route", "hi", "--bundle", way / "bundle"]
    assert "quality_threshold 0.83" in refused(*command, "--quality-threshold", "0.83")
    assert "give 'max_cost_usd', too" in refused(*command, "--objective", "quality")


def test_route_under_a_policy_file(way: Way, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rules]]\nmodel = "summit-pro"\n')
    decision = json.loads(ok("route", "hello", "--bundle", way / "bundle", "--policy", policy))
    assert decision["model"] == "summit-pro" and decision["reason"] == "a rule pins this model"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outcome matrix of 40 prompts and two models, with its catalogue beside it."""
    folder = tmp_path_factory.mktemp("matrix")
    cards = [
        {"id": m, "provider": "acme", "tier": "hosted-open", "input_usd_per_mtok": 1, "output_usd_per_mtok": 1,
         "context_window": 4096}
        for m in ("small", "large")
    ]  # fmt: skip
    (folder / "catalog.json").write_text(json.dumps({"models": cards}))
    frame = pl.DataFrame(
        {
            "prompt": [f"question number {i}" for i in range(40)],
            "split": ["train", "test"] * 20,
            "correct/small": [i % 2 for i in range(40)],
            "correct/large": [1] * 40,
        }
    )
    frame.write_parquet(folder / "outcomes.parquet")
    return folder / "outcomes.parquet"


def test_import_outcomes_under_each_logging_policy(matrix: Path, tmp_path: Path) -> None:
    catalog = matrix.with_name("catalog.json")
    for logging, rows in {"full": 80, "uniform": 40, "mostly-best": 40}.items():
        out = tmp_path / logging
        said = ok("import", "outcomes", matrix, "--catalog", catalog, "--logging", logging, "--out", out)
        assert said.startswith(f"{rows} rows in {out}, 0 set aside")
    only = tmp_path / "train"
    ok(
        "import",
        "outcomes",
        matrix,
        "--catalog",
        catalog,
        "--split",
        "train",
        "--out",
        only,
        "--preamble-tokens",
        "100",
    )
    log = read_log(only)
    assert len(log) == 40 and log["input_tokens"].min() > 100  # type: ignore[operator]


def test_an_unknown_model_in_the_matrix(matrix: Path, tmp_path: Path) -> None:
    cards = Catalog.load(matrix.with_name("catalog.json")).subset(["small"])
    (tmp_path / "catalog.json").write_text(json.dumps(cards.to_json()))
    said = refused("import", "outcomes", matrix, "--catalog", tmp_path / "catalog.json", "--out", tmp_path / "logs")
    assert "models that the catalogue does not list: large; add their cards to the catalogue, or drop" in said
    assert not (tmp_path / "logs").exists()


def test_too_many_bad_rows_write_nothing_but_the_rejects(matrix: Path, tmp_path: Path) -> None:
    bad = pl.read_parquet(matrix).with_columns(
        pl.when(pl.int_range(pl.len()) < 8).then(7).otherwise(pl.col("correct/small")).alias("correct/small")
    )
    bad.write_csv(tmp_path / "bad.csv")
    command = ["import", "outcomes", tmp_path / "bad.csv", "--catalog", matrix.with_name("catalog.json")]
    said = refused(*command, "--out", tmp_path / "logs")
    assert "8 of 40" in said and "correct/small is not 0 or 1" in said and "logs.rejects.parquet" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "logs.rejects.parquet"]
    assert pl.read_parquet(tmp_path / "logs.rejects.parquet")["row"].to_list() == list(range(1, 9))
    # With leave to do so the rest is kept, and what was set aside is said.
    said = ok(*command, "--out", tmp_path / "logs", "--max-reject-share", "0.5")
    assert "64 rows" in said and "8 set aside" in said and "8 x correct/small is not 0 or 1" in said


def test_an_existing_log_is_replaced_only_when_asked(matrix: Path, tmp_path: Path) -> None:
    command = ["import", "outcomes", matrix, "--catalog", matrix.with_name("catalog.json"), "--out", tmp_path / "logs"]
    ok(*command)
    assert "exists already: choose another --out, or replace it with --overwrite" in refused(*command)
    ok(*command, "--overwrite")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    assert "is not a log" in refused("simulate", "--rows", "10", "--out", mine, "--overwrite")
    assert (mine / "notes").read_text() == "mine"


def test_no_catalogue(way: Way, matrix: Path, tmp_path: Path) -> None:
    gone = tmp_path / "none.json"
    assert f"'{gone}' does not exist" in refused(
        "import", "outcomes", matrix, "--catalog", gone, "--out", tmp_path / "l"
    )
    part = way / "logs" / "part-00000.parquet"
    said = refused("train", "--logs", part, "--out", tmp_path / "bundle")
    assert "is a single file, which has no catalogue in it: give --catalog FILE" in said
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"models": [{"id": "a", "provider": "p"}]}')
    said = refused("train", "--logs", part, "--catalog", wrong, "--out", tmp_path / "bundle")
    assert f"{wrong}, model 'a': 'tier' is missing" in said


def test_a_log_file_with_its_catalogue_trains_as_the_directory_does(way: Way, tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text(json.dumps(SIMULATED_CATALOG.to_json()))
    part, catalog = way / "logs" / "part-00000.parquet", tmp_path / "catalog.json"
    ok("train", "--logs", part, "--catalog", catalog, "--encoder", "lexical", "--out", tmp_path / "bundle")
    assert read_bundle(tmp_path / "bundle").version == read_bundle(way / "bundle").version


BAD_POLICIES = {
    'default_tier = "platinum"': "default_tier 'platinum' is not one of the tiers economy, standard, premium",
    "exploration_rate = 2": "exploration_rate has to be a number in [0, 1], not 2",
    "[tiers]\nstandard = 7": "tier 'standard' has to be a number in [0, 1]",
    "[tiers]\nstandard = { min_probability = 0.7, quality_threshold = 0.83 }": (
        "tier 'standard': quality_threshold 0.83 is not one that the bundle was trained for, which are 0.5"
    ),
    'colour = "blue"': "unknown setting 'colour'; known are",
    "tiers = ": "is not readable TOML",
    '[[rules]]\nmodel = "gpt-9"': "the policy names model 'gpt-9', which the catalogue does not list",
}


@pytest.mark.parametrize("text", BAD_POLICIES, ids=lambda text: text.splitlines()[-1])
def test_a_bad_policy(text: str, way: Way, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(text)
    for command in (["route", "hi"], ["serve", "--store", tmp_path / "store.db"]):
        assert BAD_POLICIES[text] in refused(*command, "--bundle", way / "bundle", "--policy", policy)


@pytest.mark.parametrize(
    "name",
    ["booster.txt", "encoder.npz", "tokens.json", "outcomes.npz", "neighbours.npz", "manifest.json", "manifest.sha256"],
)
def test_an_altered_bundle_is_refused_by_the_name_of_the_file(name: str, way: Way, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(way / "bundle", bundle)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    for command in (["route", "hi"], ["serve", "--store", tmp_path / "store.db"]):
        said = refused(*command, "--bundle", bundle)
        assert name in said and str(bundle) in said and "altered" in said and "train a new one" in said
    (bundle / name).unlink()
    assert f"{bundle / name} is missing" in refused("route", "hi", "--bundle", bundle)


REFUSALS: dict[str, tuple[Callable[[Way], list[str | Path]], str]] = {
    "no bundle": (lambda w: ["route", "hi", "--bundle", w / "none"], "make one with 'router-ml train --out"),
    "unknown tier": (
        lambda w: ["route", "hi", "--bundle", w / "bundle", "--tier", "gold"],
        "unknown tier 'gold': choose one of economy, standard, premium",
    ),
    "two dials": (
        lambda w: ["route", "hi", "--bundle", w / "bundle", "--tier", "economy", "--min-probability", "0.5"],
        "give 'tier' or 'min_probability', not both",
    ),
    "no model left": (
        lambda w: ["route", "hi", "--bundle", w / "bundle", "--max-cost-usd", "0"],
        "relax one of them, or clear a model for it aurora-4: expected cost is above 0 USD summit-pro:",
    ),
    "not a log": (lambda w: ["train", "--logs", w / "bundle", "--out", w / "x"], "it has no log.json"),
    "no such log": (lambda w: ["train", "--logs", w / "none", "--out", w / "x"], "does not exist"),
    "unknown encoder": (
        lambda w: ["train", "--logs", w / "logs", "--out", w / "x", "--encoder", "bert"],
        "unknown encoder 'bert': choose one of static, lexical, transformer",
    ),
    "no MiniLM there": (
        lambda w: ["train", "--logs", w / "logs", "--out", w / "x", "--encoder-model", str(w / "none")],
        "--encoder lexical",
    ),
    "holdout": (lambda w: ["train", "--logs", w / "logs", "--out", w / "x", "--holdout", "1"], "has to lie in [0, 1)"),
    "threshold": (
        lambda w: ["train", "--logs", w / "logs", "--out", w / "x", "--quality-threshold", "0"],
        "--quality-threshold 0.0 has to lie in (0, 1]",
    ),
    "no rows": (lambda w: ["simulate", "--rows", "0", "--out", w / "x"], "ask for at least 1"),
    "no registry": (
        lambda w: ["promote", "router", "1", "--tracking-uri", "sqlite:///none/none.db"],
        "register a bundle",
    ),
    "no such version": (
        lambda w: ["promote", "router", "7", "--tracking-uri", w.uri],
        "has no version '7' (it has: 1, 2): name one it has",
    ),
    "no such router": (lambda w: ["promote", "rooter", "1", "--tracking-uri", w.uri], "(registered: router)"),
    "no such alias": (
        lambda w: ["serve", "--model", "router@shadow", "--tracking-uri", w.uri, "--cache", w / "cache"],
        "has no alias 'shadow'",
    ),
    "bundle or model": (lambda w: ["serve"], "give either --bundle DIRECTORY or --model NAME@ALIAS"),
    "bundle and model": (lambda w: ["serve", "--bundle", w / "bundle", "--model", "router"], "give either --bundle"),
    "open to all": (
        lambda w: ["serve", "--bundle", w / "bundle", "--host", "0.0.0.0"],
        "no API keys are configured",
    ),
    "keys that are none": (
        lambda w: ["serve", "--bundle", w / "bundle", "--api-keys", w / "bundle" / "tokens.json"],
        "the file of API keys",
    ),
    "store": (lambda w: ["serve", "--bundle", w / "bundle", "--store", str(w / "logs")], "cannot be opened"),
    "messages": (
        lambda w: ["serve", "--bundle", w / "bundle", "--max-messages", "0"],
        "max_messages and max_candidates",
    ),
    "port": (lambda w: ["serve", "--bundle", w / "bundle", "--port", "70000"], "port 70000 has to lie in 0..65535"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_what_to_do(case: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(way.folder)
    monkeypatch.delenv("ROUTER_ML_API_KEYS", raising=False)
    before = {p.name for p in way.folder.iterdir()}
    args, text = REFUSALS[case]
    assert text in refused(*args(way))
    assert {p.name for p in way.folder.iterdir()} == before, "a refused command left something behind"


@pytest.mark.skipif(sys.platform != "linux", reason="how a library is missing differs by system")
def test_without_openmp_the_message_says_what_to_install(way: Way, tmp_path: Path) -> None:
    (tmp_path / "libgomp.so.1").touch()  # found first, and no library
    done = subprocess.run(
        [sys.executable, "-m", "router_ml.cli", "train", "--logs", str(way / "logs"), "--out", str(tmp_path / "new")],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "apt-get install libgomp1" in done.stderr and "Traceback" not in done.stderr


# Each long command, told to write beside what is there: (its words, the pattern of progress at which it is ended).
LONG: dict[str, tuple[Callable[[Way], list[str | Path]], str]] = {
    "simulate": (lambda w: ["simulate", "--rows", "300000", "--out", "new"], "requests"),
    "import": (lambda w: ["import", "table", "calls.csv", "--out", "new"], r"[1-9]\d*/\?"),
    "import outcomes": (
        lambda w: ["import", "outcomes", "calls.csv", "--catalog", "catalog.json", "--out", "new"], "rows"
    ),
    "train": (lambda w: ["train", "--logs", w / "logs", "--encoder", "lexical", "--out", "new"], "network"),
    "evaluate": (
        lambda w: ["evaluate", w / "again", "--champion", w / "bundle", "--logs", w / "logs", "--html", "new.html",
                   "--json", "new.json"],
        "routing anew",
    ),
    "promote": (lambda w: ["promote", "router", "2", "--logs", w / "logs", "--tracking-uri", w.uri], "routing anew"),
    "tradeoff": (
        lambda w: ["tradeoff", "--bundle", w / "bundle", "--logs", w / "logs", "--out", "new.json"], "settings, by rows"
    ),
    "tune": (
        lambda w: ["tune", "--bundle", w / "bundle", "--logs", w / "logs", "--min-quality", ".5", "--json", "new.json"],
        "testing settings",
    ),
    "advise": (lambda w: ["advise", w / "logs", "--csv", "new.csv", "--plot", "new.png"], "judging segments"),
    "doctor": (lambda w: ["doctor", w / "logs", "--json", "new.json"], "examining"),
    "demo": (lambda w: ["demo", "--encoder", "lexical", "--rows", "200000"], "simulate"),
}  # fmt: skip


def interrupted(folder: Path, args: list[str | Path], when: str) -> tuple[int, str]:
    """(exit code, what it said) of a command at a terminal, ended as by Ctrl-C once it shows the pattern `when`."""
    ours, theirs = pty.openpty()
    (folder.parent / "scratch").mkdir(exist_ok=True)
    started = subprocess.Popen(
        [sys.executable, "-m", "router_ml.cli", *map(str, args)],
        cwd=folder,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "TMPDIR": str(folder.parent / "scratch")},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said, sent = "", False
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as screen:  # Linux ends it with an error
        while chunk := screen.read(4096):
            said += chunk.decode(errors="replace")
            if not sent and re.search(when, said):
                os.killpg(started.pid, signal.SIGINT)
                sent = True
    return started.wait(60), said


@pytest.mark.parametrize("name", LONG)
def test_long_work_shows_progress_and_an_interruption_does_no_harm(name: str, way: Way, tmp_path: Path) -> None:
    args, when = LONG[name]
    folder = tmp_path / "here"
    folder.mkdir()
    cards = [{"id": m, "provider": "acme", "tier": "hosted-open", "input_usd_per_mtok": 1, "output_usd_per_mtok": 1,
              "context_window": 4096} for m in ("small", "large")]  # fmt: skip
    (folder / "catalog.json").write_text(json.dumps({"models": cards}))
    n = 250_000 if name.startswith("import") else 1
    start = pl.lit("2026-01-01").str.to_datetime(time_zone="UTC")
    calls = pl.select(request_id=pl.format("r{}", pl.int_range(n)), time=start + pl.duration(seconds=pl.int_range(n)))
    calls = calls.with_columns(model=pl.lit("small"), prompt=pl.format("question {}", "request_id"))
    calls.with_columns(**{"correct/small": 1, "correct/large": 1}).write_csv(folder / "calls.csv")
    before = {p.name for p in folder.iterdir()}
    for _ in range(5):  # a short one may be done before the signal gets there
        code, said = interrupted(folder, args(way), when)
        if code == 130:
            break
        for path in folder.glob("new*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert code == 130, said[-2000:]
    assert "router-ml: interrupted: nothing is left half-written" in said and "Traceback" not in said
    left = {p.name for p in folder.iterdir()} - before
    assert left <= ({"new"} if name == "import" else {"demo"} if name == "demo" else set())
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == []
    if name == "import":  # it goes on where it was, and readers have seen none of it, or all
        assert not (folder / "new" / "log.json").exists() or len(read_log(folder / "new")) == n
        assert f"{n} rows" in ok("import", "table", folder / "calls.csv", "--out", folder / "new")
    assert registry.resolve(way.uri, "router", "champion").version == "1"


def test_help_fits_a_screen() -> None:
    lines = ok("--help").splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 80
    assert ok("-h") == ok("--help")
    assert ok("--version").strip() == f"router-ml, version {__version__}"
    for name in main.commands:
        assert re.search(rf"^  {name} ", ok("--help"), re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_an_example_that_would_run(name: str) -> None:
    said = re.sub(r"\s+", " ", ok(*name.split(), "--help").partition("Options:")[0])
    example = re.search(r"Example: (router-ml .+)$", said.strip())
    assert example, said
    assert example[1].startswith(f"router-ml {name} ")
    assert mistakes(example[1]) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    silent = [p.name for p in COMMANDS[name].params if isinstance(p, click.Option) and not p.help]
    assert silent == []


@pytest.mark.parametrize(
    "line",
    [
        "router-ml trian --logs logs",
        "router-ml train --log logs --out bundle",
        "router-ml train --out bundle",
        "router-ml promote",
        "router-ml promote router 1 2",
        "router-ml simulate --rows many --out logs",
        "router-ml import outcomes x.csv --catalog c.json --out logs --logging partial",
        "python -m benchmarks.quality --only mnist",
        "make tests",
        "make demo DAT=x.csv",
    ],
)
def test_a_command_line_that_is_wrong_is_seen_to_be(line: str) -> None:
    assert len(mistakes(line)) == 1
