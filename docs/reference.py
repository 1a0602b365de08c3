"""Writes docs/api.md from the service's OpenAPI and docs/cli.md from the command line's own help: `make docs`.

What they say is said in the code, so a page that drifts is a test that fails (tests/test_reference.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from fastapi import FastAPI

from router_ml import __version__
from router_ml.cli import main as program
from serving import endpoints
from serving.problems import TITLES
from serving.schemas import SCHEMA_VERSION

HERE = Path(__file__).parent
Schema = Mapping[str, Any]
_WIDTH = 110
_UNITS = (
    (r"_usd$", "USD"), (r"_ms$", "ms"), (r"^time_us$", "µs since 1970, UTC"), (r"_tokens$", "tokens"),
    (r"^(p_\w+|propensity|min_probability)$", "probability"), (r"^(quality|quality_threshold)$", "0 to 1"),
)  # fmt: skip
_API = """# The API

Written by `make docs` from the service's OpenAPI, which `GET /openapi.json` answers; change the code, not this
page. A path through it is in [gateway-engineer.md](gateway-engineer.md), the words are in
[glossary.md](glossary.md).

Bodies and answers are JSON (`content-type: application/json`); units stand beside the fields. Where the service has
API keys, one goes with every request but the probes, as `x-api-key: KEY` or `Authorization: Bearer KEY`; the scope
that an endpoint names has to be among the key's (`route`, `outcomes`, `health`, `admin`, `read`); where it names
none, any key will do. Fields are only ever added: `schema_version` is {version}.
"""
_ERRORS = """## Errors

An error is a problem detail of RFC 9457, `application/problem+json`: `type`, `title`, `status`, and `detail`, which
says what to change. `errors` lists a body's mistakes as `field` and `problem`, `excluded` says per model why it may
not serve. None quotes a prompt. Branch on `type`, `urn:router-ml:problem:` and one of these:

"""
_CLI = """# The command line

Written by `make docs` from the commands' own help; change the code, not this page. `router-ml --help` lists the
commands, and each command's own `--help` prints what stands here.

Results go to stdout, progress and errors to stderr. A command exits with 0 where all is well; with 1 where its
answer is no (a condition of the gate fails, no setting is good enough, a log cannot be learnt from, residency is
not proven); with 2 where something has to be changed first, which one sentence says; with 130 where it was
interrupted, which leaves no half-written result.
"""


def openapi() -> dict[str, Any]:
    """The OpenAPI of the documented endpoints, as the service answers it: what it serves does not change it."""
    app = FastAPI(title="router-ml", version=__version__)
    app.include_router(endpoints.api)
    app.include_router(endpoints.health)
    return app.openapi()


def api() -> str:
    """docs/api.md."""
    found = openapi()
    schemas: Mapping[str, Schema] = found["components"]["schemas"]
    parts = [_API.format(version=SCHEMA_VERSION)]
    shown: dict[str, None] = {}  # schemas in the order in which they are first met
    operations = {f"{method.upper()} {path}": of for path, ms in found["paths"].items() for method, of in ms.items()}
    common = set(_statuses(next(iter(operations.values()))).items())
    for name, operation in operations.items():
        parts.append("\n".join(_endpoint(name, operation, shown, common)))
    parts.append(
        _ERRORS + "\n".join(_table(("type", "title"), ((f"`{kind}`", title) for kind, title in TITLES.items())))
    )
    parts.append("Statuses that an endpoint with a key may answer, where its own table does not say otherwise:\n")
    parts[-1] += "\n" + "\n".join(_table(("status", "when"), sorted(common)))
    parts.append("# Bodies and answers")
    done: set[str] = set()
    while left := [name for name in shown if name not in done]:  # a schema's fields may name further ones
        for name in left:
            done.add(name)
            parts.append("\n".join(_schema(name, schemas[name], shown)))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _statuses(operation: Schema) -> dict[str, str]:
    return {code: of["description"] for code, of in operation["responses"].items() if code != "200"}


def _endpoint(name: str, operation: Schema, shown: dict[str, None], common: set[tuple[str, str]]) -> Iterator[str]:
    yield from (f"## {name}", "", f"{operation['summary']}. {_prose(operation.get('description', ''))}", "")
    keyed = "security" in operation
    scope = operation.get("x-scope")
    needs = f"a key of the scope `{scope}`" if scope else "any key" if keyed else "no key"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = operation["responses"]["200"].get("content", {})
    answer = next((_kind(of["schema"], shown) for of in answers.values() if of.get("schema")), "nothing")
    kind = next(iter(answers), "")
    takes = f"**Body** {_kind(body, shown)}. " if body else ""
    yield f"{takes}**Answer** {answer}{'' if kind == 'application/json' else f' as `{kind}`'}. **Needs** {needs}."
    yield ""
    if parameters := operation.get("parameters"):
        yield from _table(
            ("parameter", "in", "type", "what"),
            (
                (
                    f"`{one['name']}`", one["in"] + (", required" if one.get("required") else ""),
                    _kind(one["schema"], shown), _cell(one.get("description", "")),
                )
                for one in parameters
            ),
        )  # fmt: skip
        yield ""
    own = sorted(set(_statuses(operation).items()) - common)
    if own:
        yield from _table(("status", "when"), own)


def _schema(name: str, schema: Schema, shown: dict[str, None]) -> Iterator[str]:
    yield from (f"## {name}", "", _prose(schema.get("description", "")), "")
    if "properties" not in schema:
        return
    required = set(schema.get("required", ()))
    body = name.endswith(("Body", "Request"))
    rows = []
    for field, of in schema["properties"].items():
        unit = next((unit for pattern, unit in _UNITS if re.search(pattern, field)), "")
        said = "always" if field in required else "where there is one"
        if body:
            said = "required" if field in required else f"`{json.dumps(of.get('default'))}`"
        rows.append((f"`{field}`", _kind(of, shown), unit, said, _cell(of.get("description", ""))))
    yield from _table(("field", "type", "unit", "default" if body else "there", "what"), rows)


def _kind(schema: Schema, shown: dict[str, None]) -> str:
    """A schema in words, with its bounds; what it refers to is noted in `shown`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        shown.setdefault(name)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [_kind(one, shown) for one in schema["anyOf"]]
        return " or ".join(kinds)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list of {_kind(schema.get('items', {}), shown)}{most}"
    if kind == "object":
        of = schema.get("additionalProperties")
        return f"object of {_kind(of, shown)}" if isinstance(of, Mapping) and of else "object"
    bounds = []
    if "maxLength" in schema:
        bounds.append(f"{schema.get('minLength', 0)} to {schema['maxLength']} characters")
    if "minimum" in schema:
        top = schema.get("maximum")
        bounds.append(f"{schema['minimum']:g} to {top:g}" if top is not None else f"{schema['minimum']:g} or more")
    return f"{kind} ({', '.join(bounds)})" if bounds else str(kind)


def _prose(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def cli() -> str:
    """docs/cli.md."""
    parts = [_CLI.strip("\n")]
    for path, command, context in _commands(program, click.Context(program, info_name="router-ml", **_width())):
        level = "#" * min(len(path) + 1, 3)
        parts.append(f"{level} {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def _width() -> dict[str, Any]:
    return dict(program.context_settings) | {"terminal_width": _WIDTH, "max_content_width": _WIDTH}


def _commands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[list[str], click.Command, click.Context]]:
    """Every command and group with its path and the context in which its help is written, by name."""
    yield context.command_path.split(), command, context
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            below = command.commands[name]
            yield from _commands(below, click.Context(below, parent=context, info_name=name, **_width()))


PAGES = {"api.md": api, "cli.md": cli}


def write() -> None:
    """Writes both pages."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write()
