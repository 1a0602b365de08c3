"""The plugin in the real LiteLLM, its SDK's Router and its proxy, between our service and a provider that can fail."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from litellm_proxy import QUIET, proxy_process
from live_service import ROOT, Running, free_port, running, wait_for
from openai_upstream import Upstream, openai_upstream
from relay import Relay, relay_to

from serving.health import HealthSettings

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the comet operator is bounded."
SECRET = "river cloud engine my-secret-prompt-4711"
MODELS = ("frontier", "mid", "hosted", "local")
# One JSON object a line in, one out. The loop stays free while it waits: outcomes are reported in it.
SDK = """
import asyncio, json, sys
import litellm
from serving.client import AsyncRouterClient
from serving.litellm_plugin import PluginSettings, RouterML

async def main():
    setup = json.loads(sys.argv[1])
    plugins = {}
    router = litellm.Router(**setup["router"])
    while line := await asyncio.to_thread(sys.stdin.readline):
        call = json.loads(line)
        settings = {"url": setup["url"], "deadline_s": 5.0, **call.pop("settings", {})}
        declared = call.pop("declared", None)
        if call.get("caching"):
            litellm.cache = litellm.cache or litellm.Cache(type="local")
        make = declared and (lambda: AsyncRouterClient(settings["url"], default_for=lambda request: declared))
        plugin = plugins.setdefault(json.dumps([settings, declared]), RouterML(PluginSettings(**settings), make))
        try:
            answer = await plugin.acompletion(router, **call)
            if call.get("stream"):
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
            else:
                text = answer.choices[0].message.content
            said = {"text": text}
        except Exception as error:
            said = {"error": type(error).__name__, "detail": str(error)}
        print(json.dumps(said), flush=True)
    for plugin in plugins.values():
        await plugin.close()

asyncio.run(main())
"""

# Keys as the proxy's database would know them: one is bound by its own metadata, and one by its team's.
KEYS = """
from litellm.proxy._types import UserAPIKeyAuth

async def caller(request, api_key):
    own = {"sk-own": {"router_ml": {"data_class": "confidential"}}}.get(api_key, {})
    team = {"sk-team": {"router_ml": {"region": "us"}}}.get(api_key, {})
    return UserAPIKeyAuth(api_key=api_key, metadata=own, team_metadata=team)
"""


@dataclass(frozen=True)
class World:
    """Our service, the way to it that can be cut, and the provider."""

    live: Running
    way: Relay
    upstream: Upstream

    def row(self) -> dict[str, Any]:
        """The newest decision with its outcome, once that has arrived."""
        rows: list[dict[str, Any]] = []

        def arrived() -> bool:
            assert self.live.service.store.flush()
            rows[:] = sorted(self.live.service.store.iter_log_rows(), key=lambda row: row["time"])
            return bool(rows) and rows[-1]["status"] is not None

        wait_for(arrived, 20)
        return rows[-1]

    def decided(self) -> int:
        return len(self.live.decisions())


@pytest.fixture(scope="module")
def world(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store = tmp_path_factory.mktemp("store") / "router.db"
    with (
        # These tests make models fail again and again: circuits, which have tests of their own, would leave them out.
        running(tiny_bundle, store, health=HealthSettings(min_calls=10_000)) as live,
        openai_upstream() as upstream,
        relay_to(int(live.http.base_url.port or 0)) as way,
    ):
        yield World(live, way, upstream)


def router_settings(upstream: Upstream) -> dict[str, Any]:
    """Every model under its name, the group's own order, and fallbacks that must never widen the router's order."""

    def deployment(name: str, model: str) -> dict[str, Any]:
        price = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}
        return {
            "model_name": name,
            "litellm_params": {"model": f"openai/{model}", "api_base": upstream.url, "api_key": "x"} | price,
        }

    names = [(name, name) for name in (*MODELS, "decoy", "second", "other")]
    return {
        "model_list": [deployment(*pair) for pair in [*names, ("router-ml", "own")]],
        "num_retries": 1,
        "retry_after": 0,
        "disable_cooldowns": True,
        "fallbacks": [{"router-ml": ["second"]}, *({name: ["decoy"]} for name in MODELS)],
        "context_window_fallbacks": [{name: ["decoy"]} for name in MODELS],
        "default_fallbacks": ["decoy"],
    }


class Sdk:
    """The SDK's Router in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def __call__(self, prompt: str = EASY, *, model: str = "router-ml", **request: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **request}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return dict(json.loads(line))


@pytest.fixture(scope="module")
def sdk(litellm_bin: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdk]:
    folder = tmp_path_factory.mktemp("sdk")
    setup = json.dumps({"router": router_settings(world.upstream), "url": world.way.url})
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(litellm_bin / "python"), "-c", SDK, setup],
            cwd=folder,
            env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Sdk(process, folder / "log")
            assert process.stdin
            process.stdin.close()
            assert process.wait(60) == 0, (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Proxy:
    """The proxy, and what it has logged."""

    http: httpx.Client
    log: Path

    def __call__(self, prompt: str = EASY, *, model: str = "router-ml", **request: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **request}
        said = self.http.post("/v1/chat/completions", json=body)
        if said.status_code != 200:
            return {"error": said.status_code, "detail": said.text}
        if request.get("stream"):
            events = [line.removeprefix("data: ") for line in said.text.splitlines() if line.startswith("data: {")]
            choices = [choice for event in events for choice in json.loads(event)["choices"]]
            return {"text": "".join(choice["delta"].get("content") or "" for choice in choices)}
        return {"text": said.json()["choices"][0]["message"]["content"]}


def readme_yaml() -> dict[str, Any]:
    readme = (ROOT / "docs" / "gateway-engineer.md").read_text(encoding="utf-8")
    return dict(yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0]))


@pytest.fixture(scope="module")
def proxy(litellm_bin: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    settings = router_settings(world.upstream)
    config = readme_yaml() | {"model_list": settings.pop("model_list"), "router_settings": settings}
    config["general_settings"]["custom_auth"] = "keys.caller"
    (folder / "keys.py").write_text(KEYS)
    with proxy_process(litellm_bin, folder, config, {"ROUTER_ML_URL": world.way.url}) as http:
        yield Proxy(http, folder / "log")


@pytest.fixture(params=["sdk", "proxy"])
def ask(request: pytest.FixtureRequest, world: World) -> Iterator[Sdk | Proxy]:
    world.upstream.reset()
    yield request.getfixturevalue(request.param)
    world.upstream.reset()


def test_a_request_for_the_group_goes_to_the_chosen_model(ask: Sdk | Proxy, world: World) -> None:
    assert ask(EASY) == {"text": "local says so"} and world.upstream.asked == ["local"]
    easy = world.row()
    assert (easy["model"], easy["status"], easy["input_tokens"], easy["output_tokens"]) == ("local", "ok", 11, 7)
    assert easy["cost_usd"] == pytest.approx(25e-6) and easy["latency_ms"] > 0 and easy["retries"] == 0
    assert set(easy["candidates"]) == set(MODELS) and easy["fallback_from"] is None
    world.upstream.reset()
    ask(HARD, metadata={"router_ml": {"tier": "premium", "session": "s-1", "candidates": ["mid", "frontier"]}})
    hard = world.row()
    assert world.upstream.asked == [hard["model"]] and set(hard["candidates"]) == {"mid", "frontier"}
    assert hard["session"] == "s-1"


def test_the_upstream_gets_the_request_as_it_was(ask: Sdk | Proxy, world: World) -> None:
    ask(EASY, temperature=0.3, max_tokens=9, metadata={"router_ml": {"tier": "economy"}})
    (body,) = world.upstream.bodies
    assert body.pop("messages") == [{"role": "user", "content": EASY}]
    assert body == {"model": "local", "temperature": 0.3, "max_tokens": 9}


def test_other_models_pass_untouched(ask: Sdk | Proxy, world: World) -> None:
    before = world.decided()
    assert ask(EASY, model="other", metadata={"router_ml": {"nonsense": 1}}) == {"text": "other says so"}
    assert world.upstream.asked == ["other"] and world.decided() == before


def test_fallbacks_go_in_the_routers_order_and_the_outcome_says_who_served(ask: Sdk | Proxy, world: World) -> None:
    world.upstream.reset(local=500)
    order = [c["model"] for c in world.live.http.post("/route/preview", json={"prompt": EASY}).json()["candidates"]]
    said = ask(EASY)
    assert order[0] == "local" and world.upstream.asked == ["local", "local", order[1]]
    assert said == {"text": f"{order[1]} says so"}
    row = world.row()
    assert (row["model"], row["fallback_from"], row["status"], row["retries"]) == (order[1], "local", "ok", 2)


def test_when_all_fail_the_outcome_says_how(ask: Sdk | Proxy, world: World) -> None:
    world.upstream.reset(**dict.fromkeys(MODELS, 429))
    said = ask(EASY, num_retries=0)
    assert said["error"] in ("RateLimitError", 429)
    assert set(world.upstream.asked) == set(MODELS) and "decoy" not in world.upstream.asked
    row = world.row()
    assert (row["status"], row["output_tokens"], row["retries"]) == (
        "rate_limited",
        None,
        len(world.upstream.asked) - 1,
    )


@pytest.mark.parametrize("status", [500, 400])
def test_no_fallback_of_litellm_or_the_caller_widens_what_a_constraint_allows(
    ask: Sdk | Proxy, world: World, status: int
) -> None:
    world.upstream.reset(local=status)
    confidential = {"router_ml": {"data_class": "confidential"}}
    said = ask(EASY, metadata=confidential, fallbacks=["decoy"], context_window_fallbacks=[{"local": ["decoy"]}])
    assert "error" in said and set(world.upstream.asked) == {"local"}
    world.upstream.reset(mid=status, frontier=status)
    ask(HARD, metadata={"router_ml": {"region": "us"}})
    assert set(world.upstream.asked) == {"mid", "frontier"}


def test_a_stream_is_routed_and_reported(ask: Sdk | Proxy, world: World) -> None:
    world.upstream.reset(local=500)
    assert ask(EASY, stream=True) == {"text": "so"}
    row = world.row()
    assert row["model"] == world.upstream.asked[-1] != "local"
    assert (row["status"], row["fallback_from"], row["output_tokens"]) == ("ok", "local", 7)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"data_class": "secret"}, "not cleared"), ({"tier": "gold"}, "gold"), ({"dataclass": "public"}, "dataclass"),
     ("economy", "object")],
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused_with_its_reason(
    ask: Sdk | Proxy, world: World, fields: Any, says: str
) -> None:
    said = ask(SECRET, metadata={"router_ml": fields})
    assert said["error"] in ("BadRequestError", 400) and says in said["detail"] and SECRET not in said["detail"]
    assert world.upstream.asked == []


def test_while_the_router_is_away_litellms_own_order_serves(ask: Sdk | Proxy, world: World) -> None:
    ask(EASY)
    with world.way.cut():
        world.upstream.reset()
        assert ask(EASY, metadata={"router_ml": {"tier": "economy"}}) == {"text": "own says so"}
        world.upstream.reset(own=500)
        assert ask(EASY) == {"text": "second says so"}
        world.upstream.reset()
        said = ask(EASY, metadata={"router_ml": {"data_class": "internal"}})
        assert said["error"] in ("ServiceUnavailableError", 503) and "data_class" in said["detail"]
        assert world.upstream.asked == []
    wait_for(lambda: ask(EASY) == {"text": "local says so"}, 20)


def test_what_litellms_cache_answers_is_no_call_and_costs_nothing(sdk: Sdk, world: World) -> None:
    for status, asked in (("ok", ["local"]), ("cached", [])):
        world.upstream.reset()
        assert sdk(EASY, caching=True) == {"text": "local says so"} and world.upstream.asked == asked
        row = world.row()
        assert (row["status"], row["model"], row["output_tokens"]) == (status, "local", 7)
        assert (row["cost_usd"] == 0.0) == (row["latency_ms"] is None) == (status == "cached")


def test_an_own_order_that_is_declared_safe_and_a_default_for_the_request(sdk: Sdk, world: World) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    bound = {"metadata": {"router_ml": {"data_class": "internal"}}}
    assert sdk(EASY, settings={"url": away, "own_order_is_safe": True}, **bound) == {"text": "own says so"}
    world.upstream.reset(hosted=500)
    assert sdk(EASY, settings={"url": away}, declared=["hosted", "mid"], **bound) == {"text": "mid says so"}


def test_a_service_that_refuses_the_key_is_away(sdk: Sdk, tiny_bundle: Path, tmp_path: Path, world: World) -> None:
    with running(tiny_bundle, tmp_path / "store.db", api_keys={"gateway": "0" * 64}) as guarded:
        assert sdk(EASY, settings={"url": str(guarded.http.base_url)}) == {"text": "own says so"}
    world.upstream.reset()


def test_a_spent_budget_is_not_got_round(sdk: Sdk, tiny_bundle: Path, tmp_path: Path, world: World) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[budget]]\ntenant = "acme"\nusd = 1.0\nper = "month"\nhard = true\n')
    bound = {"metadata": {"router_ml": {"tenant": "acme"}}}
    with running(tiny_bundle, tmp_path / "store.db", policy=policy) as service:
        settings = {"url": str(service.http.base_url)}
        decided = service.http.post("/route", json={"prompt": EASY, "tenant": "acme"}).json()["decision_id"]
        assert service.http.post("/outcomes", json={"decision_id": decided, "cost_usd": 2.0}).status_code == 200
        world.upstream.reset()
        said = sdk(EASY, settings=settings, **bound)
        assert said["error"] == "BadRequestError" and "has spent its 1 USD" in said["detail"]
        assert world.upstream.asked == []
        assert "text" in sdk(EASY, settings=settings)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": EASY}), ("/v1/messages", {"messages": [{"role": "user", "content": EASY}]})],
)
def test_the_proxy_routes_text_completions_and_anthropics_messages_too(
    proxy: Proxy, world: World, path: str, body: dict[str, Any]
) -> None:
    world.upstream.reset()
    said = proxy.http.post(path, json={"model": "router-ml", "max_tokens": 20} | body)
    assert said.status_code == 200 and "local says so" in said.text
    assert (world.row()["model"], world.row()["output_tokens"]) == ("local", 7)


@pytest.mark.parametrize(("key", "cleared"), [("sk-own", {"local"}), ("sk-team", {"mid", "frontier"})])
def test_what_a_key_or_its_team_is_bound_to_no_request_undoes(
    proxy: Proxy, world: World, key: str, cleared: set[str]
) -> None:
    world.upstream.reset(**dict.fromkeys(MODELS, 500))
    fields = {"data_class": "public", "region": "eu"} if key == "sk-team" else {"data_class": "public"}
    body = {"model": "router-ml", "messages": [{"role": "user", "content": EASY}], "num_retries": 0}
    headers = {"authorization": f"Bearer {key}"}
    said = proxy.http.post("/v1/chat/completions", headers=headers, json=body | {"metadata": {"router_ml": fields}})
    assert said.status_code == 500 and set(world.upstream.asked) == cleared
    world.upstream.reset()


def test_no_prompt_reaches_the_proxys_log(proxy: Proxy, sdk: Sdk, world: World) -> None:
    world.upstream.reset()
    for ask in (proxy, sdk):
        ask(SECRET)
        ask(SECRET, metadata={"router_ml": {"data_class": "secret"}})
        with world.way.cut():
            ask(SECRET)
        world.upstream.reset(local=500)
        ask(SECRET)
        assert "4711" not in ask.log.read_text()


def test_the_readmes_yaml_is_complete() -> None:
    shown = readme_yaml()
    assert shown["litellm_settings"] == {"callbacks": ["serving.litellm_plugin.router_ml"]}
    assert "router-ml" in [entry["model_name"] for entry in shown["model_list"]]
