"""What a call costs by a model's card, exactly: cached, batch, long-context and reasoning prices, in decimals."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from router_ml.errors import InputError
from router_ml.types import LongContext, ModelCard

_MTOK = Decimal(1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one call used, in tokens.

    `cached_tokens` is the part of `input_tokens` that was read from the provider's prompt cache, `reasoning_tokens` the
    part of `output_tokens` that nobody sees, as providers report both. `batch` says that the call went through the
    provider's batch interface. Raises InputError for counts that are not possible.
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    batch: bool = False

    def __post_init__(self) -> None:
        if min(self.input_tokens, self.output_tokens, self.cached_tokens, self.reasoning_tokens) < 0:
            raise InputError("a call's token counts have to be 0 or more")
        if self.cached_tokens > self.input_tokens or self.reasoning_tokens > self.output_tokens:
            raise InputError("cached tokens are a part of the input tokens, reasoning tokens a part of the output's")


def price_call(card: ModelCard, usage: Usage) -> Decimal:
    """What one call costs in USD, without rounding.

    The step of `long_context` that the whole input is above prices the whole call. Reasoning tokens are billed as
    output, unless the card has a price of their own. A price that the card does not have and the call needs (cached,
    batch, or both at once) is not taken for another: InputError names the model and what mends it.
    """
    step = long_step(card, usage.input_tokens)
    of: ModelCard | LongContext = card if step is None else step
    where = "" if step is None else f" above {step.above_tokens:,} tokens"
    way = f"{' in a batch' if usage.batch else ''}{where}"
    if usage.batch:
        into = _known(card, of.batch_input_usd_per_mtok, f"price of input{way}")
        out = _known(card, of.batch_output_usd_per_mtok, f"price of output{way}")
        cached = of.batch_cached_input_usd_per_mtok
    else:
        into, out = _decimal(of.input_usd_per_mtok), _decimal(of.output_usd_per_mtok)
        cached = of.cached_input_usd_per_mtok
    thought = out
    if usage.reasoning_tokens and card.reasoning_usd_per_mtok is not None:
        if way:
            raise InputError(
                f"model {card.id!r} has no price of reasoning{way}, which a card cannot state: have the gateway report "
                "such a call's cost_usd with its outcome"
            )
        thought = _decimal(card.reasoning_usd_per_mtok)
    total = (usage.input_tokens - usage.cached_tokens) * into
    if usage.cached_tokens:
        total += usage.cached_tokens * _known(card, cached, f"price of cached input{way}")
    total += (usage.output_tokens - usage.reasoning_tokens) * out + usage.reasoning_tokens * thought
    return total / _MTOK


def long_step(card: ModelCard, input_tokens: float) -> LongContext | None:
    """The step of the card's long-context prices that holds for so long an input; None for its ordinary ones."""
    return next((step for step in reversed(card.long_context) if input_tokens > step.above_tokens), None)


def _decimal(usd_per_mtok: float) -> Decimal:
    return Decimal(repr(usd_per_mtok))  # the number that somebody wrote, not its nearest float


def _known(card: ModelCard, usd_per_mtok: float | None, what: str) -> Decimal:
    if usd_per_mtok is None:
        raise InputError(
            f"model {card.id!r} has no {what}: add it to its card, or take it from a price file with "
            f"`router-ml catalog import --model {card.id} --out catalog.json`"
        )
    return _decimal(usd_per_mtok)
