"""LiteLLM's real proxy on loopback, whose spend log is really written into a Postgres: what the importer reads.

Prisma, by which LiteLLM writes, needs an engine that is downloaded as a binary and that no package holds. So its last
step alone is another one: LiteLLM's own callbacks, its own `update_database` and its own `get_logging_payload` run in
its own proxy, the table is made by its own migrations (`litellm-proxy-extras`), and the row they make is inserted by
psycopg where Prisma would insert it.

    python tests/litellm_spend.py VENV POSTGRES_URL tests/fixtures/litellm

writes the fixture again: VENV has tests/litellm-requirements.txt.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
from litellm_proxy import proxy_process
from openai_upstream import Upstream, openai_upstream
from psycopg import sql

MODELS = ("small", "large", "flaky", "spare", "silent")
TABLE = sql.Identifier("LiteLLM_SpendLogs")

RECORDER = """
import os
import psycopg
from psycopg import sql
from psycopg.types.json import Json
import json
from fastapi import HTTPException
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.db.db_spend_update_writer import DBSpendUpdateWriter
from litellm.proxy.hooks.proxy_track_cost_callback import ProxyDBLogger

with psycopg.connect(os.environ["SPEND_URL"]) as _db:
    _names = {name: kind for name, kind in _db.execute(
        "select column_name, data_type from information_schema.columns where table_name = 'LiteLLM_SpendLogs'"
    ).fetchall()}


async def insert(self, payload, prisma_client=None, spend_logs_url=None, llm_router=None):
    row = {k: v for k, v in payload.items() if k in _names}
    for name, value in row.items():
        if _names[name] == "jsonb":
            row[name] = Json(json.loads(value) if isinstance(value, str) else value)
    query = sql.SQL("insert into {} ({}) values ({}) on conflict do nothing").format(
        sql.Identifier("LiteLLM_SpendLogs"),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join([sql.Placeholder()] * len(row)),
    )
    async with await psycopg.AsyncConnection.connect(os.environ["SPEND_URL"], autocommit=True) as db:
        await db.execute("set timezone = 'UTC'")
        await db.execute(query, list(row.values()))


DBSpendUpdateWriter._insert_spend_log_to_db = insert
ledger = ProxyDBLogger()


async def caller(request, api_key):
    if api_key == "sk-nobody":
        raise HTTPException(status_code=401, detail="no such key")
    return UserAPIKeyAuth(api_key=api_key, team_id="team-blue", org_id="org-1", user_id="u-1", key_alias="blue-key")
"""


@contextlib.contextmanager
def litellm_proxy(
    bin: Path, folder: Path, upstream: Upstream, url: str, *, prompts: bool, router: str | None = None
) -> Iterator[httpx.Client]:
    """The proxy, with models that may fail, one fallback, one retry and a cache; `prompts`: whether it keeps them.

    With the URL of a `router` our plugin is in it, too, with its group and the models of the tests' catalogue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    price = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}
    config = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{name}-2026", "api_base": upstream.url, "api_key": "x"}
                | (price if name != "silent" else {}),
            }
            for name in (*MODELS, *(("router-ml", "frontier", "mid", "hosted", "local") if router else ()))
        ],
        "router_settings": {
            "num_retries": 1, "retry_after": 0, "disable_cooldowns": True, "fallbacks": [{"flaky": ["spare"]}],
        },
        "litellm_settings": {
            "callbacks": ["recorder.ledger", *(["serving.litellm_plugin.router_ml"] if router else [])],
            "cache": True,
            "cache_params": {"type": "local", "mode": "default_off"},
        },
        "general_settings": {"custom_auth": "recorder.caller", "store_prompts_in_spend_logs": prompts},
    }  # fmt: skip
    (folder / "recorder.py").write_text(RECORDER)
    environment = {"SPEND_URL": libpq(url), "ROUTER_ML_URL": router or ""}
    with proxy_process(bin, folder, config, environment) as http:
        yield http


def libpq(url: str) -> str:
    """An SQLAlchemy URL as libpq takes it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


def make_table(url: str, bin: Path) -> None:
    """Makes the spend log's table by LiteLLM's own migrations; those that other tables fail in are not ours to mend."""
    (folder,) = bin.parent.glob("lib/python*/site-packages/litellm_proxy_extras/migrations")
    with psycopg.connect(libpq(url), autocommit=True) as db:
        for file in sorted(folder.glob("*/migration.sql")):
            db.execute(file.read_text(encoding="utf-8"))  # type: ignore[arg-type]


def talk(http: httpx.Client, upstream: Upstream) -> int:
    """Asks for every kind of row that the spend log has; returns how many rows that are to be."""
    upstream.reset()
    upstream.silent = {"silent-2026"}

    def ask(model: str, text: str = "What is 2 + 2?", path: str = "chat/completions", **body: Any) -> httpx.Response:
        return http.post(f"/v1/{path}", json={"model": model, "messages": [{"role": "user", "content": text}]} | body)

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    decision = {"router_ml": {"propensity": 0.25, "policy_version": "p-1", "candidates": ["small", "large"]}}
    assert ask("small", user="end-7", metadata={"tags": ["task:sums"]}, litellm_session_id="s-1").is_success
    assert ask("large", "Prove it.", tools=[tool], metadata={"spend_logs_metadata": decision}).is_success
    assert ask("small", stream=True).is_success
    assert ask("silent", stream=True).is_success
    upstream.fails = {"flaky-2026": 500}
    assert ask("flaky", "Fall back.").is_success
    upstream.fails = {"large-2026": 500}
    assert ask("large", "Fail.").status_code == 500
    upstream.fails = {"large-2026": 429}
    assert ask("large", "Too many.").status_code == 429
    upstream.fails = {"large-2026": 408}
    assert ask("large", "Too slow.").status_code == 408
    upstream.fails = {"large-2026": 400}
    assert ask("large", "Too long.").status_code == 400
    upstream.fails = {}
    for _ in range(3):
        assert ask("small", "Again?", cache={"use-cache": True}).is_success
    assert http.post("/v1/completions", json={"model": "small", "prompt": "Once upon"}).is_success
    said = http.post("/v1/responses", json={"model": "small", "input": "Say so."})
    assert said.is_success, said.text
    wrong = {"authorization": "Bearer sk-nobody"}
    assert http.post("/v1/chat/completions", json={"model": "small", "messages": []}, headers=wrong).status_code == 401
    assert ask("no-such-model").status_code in (400, 404)
    return 16


def rows_of(url: str) -> list[dict[str, Any]]:
    """The table's rows in the order of their time, with Postgres's own JSON of each."""
    query = sql.SQL('select to_jsonb(t) from {} t order by "startTime", request_id').format(TABLE)
    with psycopg.connect(libpq(url), autocommit=True) as db:
        return [row for (row,) in db.execute(query).fetchall()]


def record(bin: Path, folder: Path, url: str) -> list[dict[str, Any]]:
    """Runs it all, with prompts and without; returns the table's rows."""
    make_table(url, bin)
    with openai_upstream() as upstream:
        for prompts in (True, False):
            with litellm_proxy(bin, folder / str(prompts), upstream, url, prompts=prompts) as http:
                before = len(rows_of(url))
                wanted = talk(http, upstream)
                deadline = time.monotonic() + 20
                while len(rows_of(url)) < before + wanted and time.monotonic() < deadline:
                    time.sleep(0.2)
    return rows_of(url)


def _shorter(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what makes two thirds of it: nulls within nested objects, and the tracebacks of failures."""

    def lean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: "" if k == "traceback" else lean(v) for k, v in value.items() if v is not None}
        return [lean(v) for v in value] if isinstance(value, list) else value

    nested = ("metadata", "proxy_server_request", "response")
    inner = {name: {k: lean(v) for k, v in row[name].items()} for name in nested if isinstance(row[name], dict)}
    return row | inner


def main(venv: str, url: str, out: str) -> None:
    """Writes `spend_logs.sql`, the table, and `spend_logs.jsonl`, its rows as Postgres makes JSON of them."""
    import tempfile

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        rows = record(Path(venv) / "bin", Path(work), url)
    lines = "".join(json.dumps(_shorter(row), ensure_ascii=False) + "\n" for row in rows)
    (folder / "spend_logs.jsonl").write_text(lines, encoding="utf-8")
    dump = ["pg_dump", "--schema-only", "--no-owner", "--table", '"LiteLLM_SpendLogs"', libpq(url)]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    kept = [line for line in text.splitlines() if line and not line.startswith(("--", "SET", "SELECT", "\\"))]
    (folder / "spend_logs.sql").write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
