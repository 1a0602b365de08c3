"""The catalogue of candidate models. Its order is the model axis of every matrix in the program."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from router_ml.errors import InputError
from router_ml.prices import long_step
from router_ml.types import CAPABILITIES, TIERS, FloatArray, LongContext, ModelCard

_KNOWN = frozenset(ModelCard.__dataclass_fields__)
PRICES = ("input_usd_per_mtok", "output_usd_per_mtok")
STEP_PRICES = (
    *PRICES,
    *("cached_input_usd_per_mtok", "batch_input_usd_per_mtok", "batch_output_usd_per_mtok"),
    "batch_cached_input_usd_per_mtok",
)
"""The prices that a step of `long_context` may have; a card has `reasoning_usd_per_mtok` beside them."""
CARD_PRICES = (*STEP_PRICES, "reasoning_usd_per_mtok")
_UNSAID = ("long_context", "guessed")  # left out of JSON while they are empty, so that such cards stay as they were
_REQUIRED = ("id", "provider", "tier", "input_usd_per_mtok", "output_usd_per_mtok", "context_window")


@dataclass(frozen=True)
class Catalog:
    """Ordered, unique `ModelCard`s."""

    cards: tuple[ModelCard, ...]

    def __post_init__(self) -> None:
        if not self.cards:
            raise InputError("the catalogue lists no models: add at least one to its 'models' array")
        seen = set()
        for card in self.cards:
            if card.id in seen:
                raise InputError(f"the catalogue lists model {card.id!r} twice: remove one of the two")
            seen.add(card.id)
        for card in self.cards:
            if card.sibling == card.id:
                raise InputError(f"model {card.id!r} is its own sibling: name another model, or leave 'sibling' out")
            if card.sibling is not None and card.sibling not in seen:
                raise InputError(
                    f"model {card.id!r} names the sibling {card.sibling!r}, which the catalogue does not list: "
                    "name a model that it does, or leave 'sibling' out"
                )

    def __len__(self) -> int:
        return len(self.cards)

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self.cards)

    def __getitem__(self, model: str) -> ModelCard:
        return self.cards[self.index[model]]

    def __contains__(self, model: object) -> bool:
        return model in self.index

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The model ids in catalogue order."""
        return tuple(card.id for card in self.cards)

    @cached_property
    def index(self) -> dict[str, int]:
        """Model id to its position on the model axis."""
        return {card.id: i for i, card in enumerate(self.cards)}

    @cached_property
    def input_price(self) -> FloatArray:
        """USD per input token, float32 [m]."""
        return np.array([c.input_usd_per_mtok * 1e-6 for c in self.cards], dtype=np.float32)

    @cached_property
    def output_price(self) -> FloatArray:
        """USD per output token, float32 [m]."""
        return np.array([c.output_usd_per_mtok * 1e-6 for c in self.cards], dtype=np.float32)

    @cached_property
    def cache_discount(self) -> FloatArray:
        """USD that an input token costs less when it is read from the prompt cache, float32 [m]; 0 where unknown."""
        cached = [c.input_usd_per_mtok if (p := c.cached_input_usd_per_mtok) is None else p for c in self.cards]
        return np.array(
            [(c.input_usd_per_mtok - p) * 1e-6 for c, p in zip(self.cards, cached, strict=True)], np.float32
        )

    @cached_property
    def bounded(self) -> dict[str, ModelCard]:
        """The models whose capacity is bounded."""
        return {c.id: c for c in self.cards if c.max_concurrency is not None or c.max_tokens_per_second is not None}

    @cached_property
    def price_steps(self) -> tuple[int, ...]:
        """The numbers of input tokens above which a model has other prices, rising."""
        return tuple(sorted({step.above_tokens for card in self.cards for step in card.long_context}))

    def priced_at(self, input_tokens: float) -> Catalog:
        """The catalogue with the prices of calls of so long an input in the place of the ordinary ones."""
        cards = []
        for card in self.cards:
            step = long_step(card, input_tokens)
            cards.append(card if step is None else replace(card, **{n: getattr(step, n) for n in STEP_PRICES}))
        return Catalog(tuple(cards))

    def subset(self, models: list[str]) -> Catalog:
        """The catalogue restricted to `models`, in catalogue order; a sibling that is left out is no longer named.

        Raises InputError for a model that it does not list.
        """
        for model in models:
            if model not in self:
                raise InputError(f"model {model!r} is not in the catalogue: add its card, or leave it out")
        keep = set(models)
        kept = (card for card in self.cards if card.id in keep)
        return Catalog(tuple(replace(c, sibling=c.sibling if c.sibling in keep else None) for c in kept))

    def with_card(self, card: ModelCard) -> Catalog:
        """The catalogue with one more model, in last place. Raises InputError when it is listed, or its sibling not."""
        return Catalog((*self.cards, card))

    def with_prices(self, model: str, input_usd_per_mtok: float, output_usd_per_mtok: float) -> Catalog:
        """The catalogue with other ordinary prices of one model. Raises InputError where it does not list it."""
        if model not in self:
            raise InputError(f"model {model!r} is not in the catalogue: it has {', '.join(self.ids)}")
        priced = replace(self[model], input_usd_per_mtok=input_usd_per_mtok, output_usd_per_mtok=output_usd_per_mtok)
        return Catalog(tuple(priced if card.id == model else card for card in self.cards))

    def to_json(self) -> dict[str, Any]:
        """The catalogue as the JSON object that `from_json` reads."""
        return {"models": [card_to_json(card) for card in self.cards]}

    @classmethod
    def from_json(cls, data: Any, source: str = "catalogue") -> Catalog:
        """Builds a catalogue from parsed JSON. Raises InputError that names the model and the field."""
        if data is None:
            raise InputError(f"{source} has no model cards: give --catalog FILE")
        models = data.get("models") if isinstance(data, Mapping) else None
        if not isinstance(models, list):
            raise InputError(f"{source}: expected an object with an array 'models' of model cards")
        return cls(tuple(card_from_json(entry, source) for entry in models))

    @classmethod
    def load(cls, path: str | Path) -> Catalog:
        """Reads a catalogue from a JSON file. Raises InputError."""
        return cls.from_json(_read_json(Path(path), "catalogue", "--catalog"), str(path))


def written(catalog: Catalog, path: Path) -> None:
    """Writes a catalogue as `Catalog.load` reads it, aside and then in its place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(catalog.to_json(), indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise InputError(f"the catalogue cannot be written to {path}: {error.strerror}") from None


def load_card(path: str | Path) -> ModelCard:
    """Reads one model card from a JSON file. Raises InputError."""
    return card_from_json(_read_json(Path(path), "model card", "--card"), str(path))


def _read_json(path: Path, what: str, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {what} at {path}: write one or correct {option}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None


def card_from_json(entry: Any, source: str) -> ModelCard:
    """One model card from parsed JSON, as an entry of a catalogue's `models`. Raises InputError that names the field.

    That its sibling exists is for the catalogue to say.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{source}: a model card has to be an object, not {type(entry).__name__}")
    where = f"{source}, model {entry.get('id', '?')!r}"
    for name in _REQUIRED:
        if name not in entry:
            raise InputError(f"{where}: {name!r} is missing")
    unknown = sorted(set(entry) - _KNOWN)
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}")
    for name in ("id", "provider"):
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise InputError(f"{where}: {name!r} has to be a non-empty string")
    if entry["tier"] not in TIERS:
        raise InputError(f"{where}: tier {entry['tier']!r} is not one of {', '.join(TIERS)}")
    prices = _prices(entry, CARD_PRICES, where)
    for name in ("context_window", "max_output_tokens", "max_concurrency"):
        if entry.get(name) is not None or name in _REQUIRED:
            _count(entry[name], name, where)
    rate = entry.get("max_tokens_per_second")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf):
        raise InputError(f"{where}: 'max_tokens_per_second' has to be a number above 0")
    sets: dict[str, Any] = {}
    for name in ("capabilities", "regions", "data_classes", "guessed"):
        if name in entry:
            values = entry[name]
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise InputError(f"{where}: {name!r} has to be an array of strings")
            sets[name] = frozenset(values)
    wrong = sorted(sets.get("capabilities", frozenset()) - set(CAPABILITIES))
    if wrong:
        raise InputError(f"{where}: capability {wrong[0]!r} is not one of {', '.join(CAPABILITIES)}")
    sibling = entry.get("sibling")
    if sibling is not None and not isinstance(sibling, str):
        raise InputError(f"{where}: 'sibling' has to be the id of another model")
    source_of = entry.get("price_source")
    if source_of is not None and not isinstance(source_of, str):
        raise InputError(f"{where}: 'price_source' has to be a string")
    return ModelCard(
        id=entry["id"],
        provider=entry["provider"],
        tier=entry["tier"],
        context_window=entry["context_window"],
        sibling=sibling,
        long_context=_long_context(entry.get("long_context", []), where),
        max_output_tokens=entry.get("max_output_tokens"),
        max_concurrency=entry.get("max_concurrency"),
        max_tokens_per_second=None if rate is None else float(rate),
        price_source=source_of,
        **prices,
        **sets,
    )


def card_to_json(card: ModelCard) -> dict[str, Any]:
    """A card as the JSON object that `card_from_json` reads; what is not known is left out."""
    shown: dict[str, Any] = {}
    for name in ModelCard.__dataclass_fields__:
        value = getattr(card, name)
        if value is None or (name in _UNSAID and not value):
            continue
        if name == "long_context":
            value = [{k: v for k, v in asdict(step).items() if v is not None} for step in value]
        shown[name] = sorted(value) if isinstance(value, frozenset) else value
    return shown


def _prices(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    """The prices that an entry has. Raises InputError for one that is not possible."""
    found: dict[str, Any] = {}
    for name in names:
        price = entry.get(name)
        if price is None and name not in PRICES:
            continue
        if isinstance(price, bool) or not isinstance(price, int | float) or not math.isfinite(price) or price < 0:
            raise InputError(f"{where}: {name!r} has to be a price of 0 or more USD per million tokens")
        found[name] = float(price)
    if found.get("cached_input_usd_per_mtok", 0.0) > found["input_usd_per_mtok"]:
        raise InputError(f"{where}: 'cached_input_usd_per_mtok' is above 'input_usd_per_mtok': leave it out")
    return found


def _long_context(value: Any, where: str) -> tuple[LongContext, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: 'long_context' has to be an array of prices from a number of tokens on")
    steps = []
    for at, step in enumerate(value):
        here = f"{where}, long_context {at + 1}"
        known = LongContext.__dataclass_fields__
        if not isinstance(step, Mapping) or not {"above_tokens", *PRICES} <= set(step) <= set(known):
            raise InputError(
                f"{here}: needs above_tokens, {', '.join(PRICES)} and, of {', '.join(known)}, nothing else"
            )
        above = _count(step["above_tokens"], "above_tokens", here)
        steps.append(LongContext(above_tokens=above, **_prices(step, STEP_PRICES, here)))
    if any(a.above_tokens >= b.above_tokens for a, b in itertools.pairwise(steps)):
        raise InputError(f"{where}: the steps of 'long_context' have to rise in 'above_tokens'")
    return tuple(steps)


def _count(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"{where}: {name!r} has to be a positive whole number")
    return value
