"""Model cards from LiteLLM's price file, and what changes between two catalogues."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from router_ml.bundle import Bundle, write_bundle
from router_ml.catalog import CARD_PRICES, STEP_PRICES, Catalog, card_from_json, card_to_json
from router_ml.errors import InputError
from router_ml.types import ModelCard, Tier

FILE = "model_prices_and_context_window_backup.json"
_MODES = ("chat", "responses", "completion")
# The card's names of prices, and those of the file: "{}" is where it says from how many thousand input tokens on.
_NAMES = {
    "input_usd_per_mtok": "input_cost_per_token{}",
    "output_usd_per_mtok": "output_cost_per_token{}",
    "cached_input_usd_per_mtok": "cache_read_input_token_cost{}",
    "batch_input_usd_per_mtok": "input_cost_per_token{}_batches",
    "batch_output_usd_per_mtok": "output_cost_per_token{}_batches",
    "batch_cached_input_usd_per_mtok": "cache_read_input_token_cost{}_batches",
}
_STEP = re.compile(r"(?:input|output)_cost_per_token(_above_(\d+)([km])_tokens)")
_THOUSANDS = {"k": 1, "m": 1000}
_CAPABILITIES = {
    "tools": "supports_function_calling",
    "vision": "supports_vision",
    "json": "supports_response_schema",
}
_OPEN = re.compile(
    r"llama|qwen|qwq|mi[sx]tral|gemma|deepseek|gpt-oss|phi-|glm|kimi|yi-|falcon|olmo|granite|dbrx|nemotron|minimax"
)
_CLOSED = re.compile(r"gpt-|chatgpt|claude|gemini|grok|nova-|command|^o\d|/o\d|jamba|sonar|palm")
_SELF_HOSTED = ("ollama", "ollama_chat", "hosted_vllm", "vllm", "lemonade", "llamafile", "xinference", "lm_studio")
_IMPORTED = ("litellm ", "price file ")
FRONTIER_USD = 8.0  # output price, USD per million tokens, from which a closed model is taken to be a frontier one


@dataclass(frozen=True)
class Imported:
    """A catalogue with prices from a file. `skipped` says of models why the file could not price them."""

    catalog: Catalog
    priced: tuple[str, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """A card's field that differs between two catalogues, as JSON would show it; None: not there."""

    model: str
    field: str
    old: Any
    new: Any


def litellm_prices() -> tuple[dict[str, Any], str]:
    """The price file in the installed LiteLLM, and its name and version; LiteLLM itself is not imported.

    Raises InputError where it is not installed.
    """
    found = importlib.util.find_spec("litellm")
    if found is None or found.origin is None:
        raise InputError("LiteLLM is not installed here: pip install litellm, or give its price file with --from FILE")
    return read_prices(Path(found.origin).parent / FILE), f"litellm {importlib.metadata.version('litellm')}"


def read_prices(path: Path) -> dict[str, Any]:
    """The entries of a price file by model. Raises InputError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no price file at {path}: correct --from") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path} is not a price file: it has to be an object with an object per model")
    entries.pop("sample_spec", None)
    return entries


def import_prices(
    entries: Mapping[str, Any],
    source: str,
    models: Sequence[str] = (),
    catalog: Catalog | None = None,
    *,
    free: bool = False,
) -> Imported:
    """The `catalog` with the prices of `models` (default: all of its own), which join it where they are new.

    A model is named as the file names it, or as `ID=NAME` where the catalogue has it under another id. A card that is
    there keeps its tier, sibling and clearances; its prices become the file's, and those that the file does not state
    stay only where they did not come from a file. A price of 0 counts as unknown unless `free`. Raises InputError
    for a named model without a price; one that was not named is skipped with its reason.
    """
    named = dict(_named(model) for model in models)
    if not named and catalog is None:
        raise InputError(
            f"say which of the {len(entries):,} models of {source} to take: --model NAME, as often as needed"
        )
    wanted = named or {model: model for model in (catalog.ids if catalog else ())}
    cards = {card.id: card for card in catalog or ()}
    priced, skipped = [], {}
    for identity, name in wanted.items():
        try:
            cards[identity] = _card(identity, name, entries, source, cards.get(identity), free=free)
            priced.append(identity)
        except InputError as error:
            if named:
                raise
            skipped[identity] = str(error)
    return Imported(Catalog(tuple(cards.values())), tuple(priced), skipped)


def changes(old: Catalog, new: Catalog) -> list[Change]:
    """What differs in prices and limits, model by model; `field` "model" is one that came or went."""
    found = []
    for model in dict.fromkeys((*old.ids, *new.ids)):
        if model not in new or model not in old:
            found.append(Change(model, "model", model if model in old else None, model if model in new else None))
            continue
        before, after = card_to_json(old[model]), card_to_json(new[model])
        for field in (*CARD_PRICES, "long_context", "context_window", "max_output_tokens"):
            if before.get(field) != after.get(field):
                found.append(Change(model, field, before.get(field), after.get(field)))
    return found


def _named(model: str) -> tuple[str, str]:
    identity, given, name = model.partition("=")
    if not identity or (given and not name):
        raise InputError(f"--model {model!r} has to be a name of the price file, or ID=NAME")
    return identity, name or identity


def _card(
    identity: str, name: str, entries: Mapping[str, Any], source: str, known: ModelCard | None, *, free: bool
) -> ModelCard:
    entry, where = entries.get(name), f"{source}, model {name!r}"
    if entry is None:
        like = sorted(other for other in entries if name.rpartition("/")[2].lower() in other.lower())[:3]
        raise InputError(f"{source} has no model {name!r}{': did it mean ' + ', '.join(like) if like else ''}")
    if entry.get("mode") not in (*_MODES, None):
        raise InputError(f"{where}: it is a model for {entry['mode']}, not for chat")
    prices = _prices(entry, where, free=free)
    if known is not None:
        kept = {} if (known.price_source or "").startswith(_IMPORTED) else card_to_json(known)
        base = {k: v for k, v in card_to_json(known).items() if k not in (*CARD_PRICES, "long_context")}
        base |= {k: kept[k] for k in (*CARD_PRICES, "long_context") if k in kept}
        if base.get("cached_input_usd_per_mtok", 0.0) > prices["input_usd_per_mtok"]:
            del base["cached_input_usd_per_mtok"]  # a discount on another price
    else:
        base = _first(identity, entry, name, prices["output_usd_per_mtok"])
    for field, tokens in (
        ("context_window", entry.get("max_input_tokens")),
        ("max_output_tokens", entry.get("max_output_tokens")),
    ):
        if isinstance(tokens, int | float) and tokens >= 1 and tokens == int(tokens):
            base[field] = int(tokens)
    if "context_window" not in base:
        raise InputError(f"{where}: the file states no max_input_tokens: write the card's context_window by hand first")
    return card_from_json({**base, **prices, "price_source": source}, source)


def _first(identity: str, entry: Mapping[str, Any], name: str, output_usd: float) -> dict[str, Any]:
    """What a card that is new says beside its prices; the tier is always a guess, since the file has none."""
    provider = entry.get("litellm_provider")
    guessed = ["tier"] if provider else ["provider", "tier"]
    provider = provider or name.partition("/")[0]
    closed: Tier = "frontier-closed" if output_usd >= FRONTIER_USD else "mid-closed"
    tier: Tier = "hosted-open"
    if provider in _SELF_HOSTED:
        tier = "self-hosted-open"
    elif not _OPEN.search(name.lower()) and _CLOSED.search(name.lower()):
        tier = closed
    has = [capability for capability, said in _CAPABILITIES.items() if entry.get(said) is True]
    return {"id": identity, "provider": provider, "tier": tier, "capabilities": has, "guessed": guessed}


def _prices(entry: Mapping[str, Any], where: str, *, free: bool) -> dict[str, Any]:
    """The entry's prices under the card's names, USD per million tokens."""
    tiers = entry.get("tiered_pricing")
    if tiers is not None:
        return _tiered(tiers, where, free=free)
    prices = {field: usd for field, name in _NAMES.items() if (usd := _usd(entry, name.format(""), where)) is not None}
    _check(prices, where, free=free)
    prices |= _reasoning(entry, prices, where)
    steps: list[dict[str, Any]] = []
    lengths = {int(of[2]) * _THOUSANDS[of[3]]: of[1] for key in entry if (of := _STEP.fullmatch(key))}
    for thousands, above in sorted(lengths.items()):
        step = {field: usd for field, n in _NAMES.items() if (usd := _usd(entry, n.format(above), where)) is not None}
        # What a step leaves out of the two ordinary prices stays as it was: so LiteLLM bills it.
        before = steps[-1] if steps else prices
        ordinary = {name: before[name] for name in STEP_PRICES[:2]}
        steps.append({"above_tokens": thousands * 1000, **ordinary, **step})
    return prices | ({"long_context": steps} if steps else {})


def _tiered(tiers: Any, where: str, *, free: bool) -> dict[str, Any]:
    """Prices by ranges of input tokens, of which the first is the ordinary one."""
    steps = []
    try:
        for tier in sorted(tiers, key=lambda tier: tier["range"][0]):
            step = {f: usd for f, name in _NAMES.items() if (usd := _usd(tier, name.format(""), where)) is not None}
            _check(step, where, free=free)
            steps.append((int(tier["range"][0]), step, tier))
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: its tiered_pricing is not of the form it has to be") from None
    if not steps or steps[0][0] != 0:
        raise InputError(f"{where}: its tiered_pricing does not begin at 0 tokens")
    _, first, tier = steps[0]
    return {
        **first,
        **_reasoning(tier, first, where),
        **({"long_context": [{"above_tokens": above, **step} for above, step, _ in steps[1:]]} if steps[1:] else {}),
    }


def _reasoning(entry: Mapping[str, Any], prices: Mapping[str, float], where: str) -> dict[str, float]:
    usd = _usd(entry, "output_cost_per_reasoning_token", where)
    return {} if usd is None or usd == prices["output_usd_per_mtok"] else {"reasoning_usd_per_mtok": usd}


def _check(prices: Mapping[str, float], where: str, *, free: bool) -> None:
    for name in STEP_PRICES[:2]:
        if name not in prices:
            raise InputError(
                f"{where}: the file has no {_NAMES[name].format('')}: write the price into its card by hand"
            )
        if prices[name] == 0.0 and not free:
            raise InputError(
                f"{where}: the file gives 0 as {_NAMES[name].format('')}, which mostly means that it is not known: "
                "write it into its card by hand, or say --free where it is free"
            )


def _usd(entry: Mapping[str, Any], name: str, where: str) -> float | None:
    usd = entry.get(name)
    if usd is None:
        return None
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not 0 <= usd < 1:
        raise InputError(f"{where}: {name} {usd!r} is not a price of a token in USD")
    return float(Decimal(repr(usd)) * 1_000_000)


def aligned(catalog: Catalog, like: Catalog, side: Literal["old", "new"]) -> Catalog:
    """The cards of `catalog` that `like` has, in its order; clearances and siblings are those of `like`.

    Raises InputError for a model of `like` without a card.
    """
    cards = []
    for card in like:
        if card.id not in catalog:
            raise InputError(f"the {side} catalogue has no model {card.id!r}, which the bundle routes to: add its card")
        of = catalog[card.id]
        prices = {
            name: getattr(of, name) for name in (*CARD_PRICES, "long_context", "max_output_tokens", "context_window")
        }
        cards.append(replace(card, **prices))
    return Catalog(tuple(cards))


def repriced(bundle: Bundle, catalog: Catalog, out: str | Path) -> str:
    """Writes to `out` the bundle with the prices and token limits of `catalog`; returns its version.

    The learner stays as it is, so what it says of each model does, too: what changes is what decisions cost.
    Clearances stay the bundle's. Raises InputError for a model of the bundle without a card there, for prices that the
    bundle has already, and where `out` is something else.
    """
    cards = aligned(catalog, bundle.catalog, "new")
    if cards == bundle.catalog:
        raise InputError("the bundle has these prices already: there is nothing to write")
    kept = {name: value for name, value in bundle.manifest.items() if name not in ("files", "format")}
    return write_bundle(out, {**kept, "prices": {"catalog": cards.to_json(), "onto": bundle.version}}, bundle.files)
