"""The catalogue of candidate models. Its order is the model axis of every matrix in the program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from router_ml.errors import InputError
from router_ml.types import CAPABILITIES, TIERS, FloatArray, ModelCard

_KNOWN = frozenset(ModelCard.__dataclass_fields__)
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

    def to_json(self) -> dict[str, Any]:
        """The catalogue as the JSON object that `from_json` reads."""
        return {
            "models": [
                {
                    name: sorted(value) if isinstance(value, frozenset) else value
                    for name, value in ((n, getattr(card, n)) for n in ModelCard.__dataclass_fields__)
                    if value is not None
                }
                for card in self.cards
            ]
        }

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
    cached = entry.get("cached_input_usd_per_mtok")
    for name in (
        "input_usd_per_mtok",
        "output_usd_per_mtok",
        *(["cached_input_usd_per_mtok"] if cached is not None else ()),
    ):
        price = entry[name]
        if isinstance(price, bool) or not isinstance(price, int | float) or not math.isfinite(price) or price < 0:
            raise InputError(f"{where}: {name!r} has to be a price of 0 or more USD per million tokens")
    if cached is not None and cached > entry["input_usd_per_mtok"]:
        raise InputError(f"{where}: 'cached_input_usd_per_mtok' is above 'input_usd_per_mtok': leave it out")
    window = entry["context_window"]
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise InputError(f"{where}: 'context_window' has to be a positive whole number of tokens")
    sets: dict[str, frozenset[str]] = {}
    for name in ("capabilities", "regions", "data_classes"):
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
    return ModelCard(
        id=entry["id"],
        provider=entry["provider"],
        tier=entry["tier"],
        input_usd_per_mtok=float(entry["input_usd_per_mtok"]),
        output_usd_per_mtok=float(entry["output_usd_per_mtok"]),
        context_window=window,
        sibling=sibling,
        cached_input_usd_per_mtok=None if cached is None else float(cached),
        **sets,
    )
