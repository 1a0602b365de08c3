"""What sessions cost when prompts are cached: sticky for ever, no session logic, and the router's own rule.

    python -m benchmarks.sessions --sessions 400 --seeds 5 --json benchmarks/results/sessions.json

Conversations of people and loops of agents are simulated, with list prices of autumn 2025 and a cache as providers
document theirs: a prompt's beginning that the same model was sent within the last five minutes is read at the cached
price, from 1,024 tokens on. Each turn has a difficulty: that of its session, until the subject changes. The router sees
it with noise of its own for each model and turn. All rules route the same turns.

`cost` is what the calls cost, `with escalation` adds the strongest model's call for the share of answers that are not
acceptable; both in USD per 100 turns. `acceptable` is the true probability of an acceptable answer, `short` the share
of turns on which that of the chosen model is below the dial although another model's is not. `moves` are changes of
model per 100 turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from benchmarks.results import open_console, summarise, write_results
from router_ml.catalog import Catalog
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.session import Prefix, Session, SessionPolicy
from router_ml.types import Estimate, FloatArray, Message, ModelCard, RouteRequest

DIAL = 0.7
CACHE_SECONDS, CACHE_TOKENS = 300.0, 1024
CATALOG = Catalog(
    tuple(
        ModelCard(
            id=name, provider=provider, tier="mid-closed", input_usd_per_mtok=price, output_usd_per_mtok=output,
            cached_input_usd_per_mtok=cached, context_window=1_000_000,
        )
        for name, provider, price, cached, output in (
            ("claude-sonnet-4-5", "anthropic", 3.0, 0.3, 15.0),
            ("gpt-4.1", "openai", 2.0, 0.5, 8.0),
            ("claude-haiku-4-5", "anthropic", 1.0, 0.1, 5.0),
            ("gpt-4.1-mini", "openai", 0.4, 0.1, 1.6),
            ("gemini-2.5-flash", "google", 0.3, 0.03, 2.5),
        )
    )
)  # fmt: skip
STRENGTH = np.array([2.6, 2.3, 2.0, 1.6, 1.5])  # log odds of an acceptable answer at average difficulty
SLOPE = np.array([0.6, 0.7, 0.9, 1.1, 1.1])  # log odds lost per unit of difficulty
NOISE, CAUTION = 0.25, 0.25  # of the estimate's log odds; how far a claim is below it
CHARS = 4  # a token


@dataclass(frozen=True)
class Turn:
    """One request of a session: when, the prompt so far, the answer's tokens, P(ok) as it is and as it seems, [m]."""

    second: float
    messages: tuple[Message, ...]
    output: float
    p_ok: FloatArray
    seen: FloatArray
    expected_output: float


def sessions(n: int, rng: np.random.Generator, agents: float = 0.3) -> Iterator[list[Turn]]:
    """`n` sessions, the share `agents` of them loops of an agent with its tools, the others people who chat."""
    for _ in range(n):
        agent = rng.random() < agents
        length = int(rng.integers(8, 50)) if agent else min(int(rng.geometric(0.25)), 30)
        messages = [_message("system", rng.uniform(3000, 9000) if agent else rng.uniform(300, 3000))]
        second, difficulty = 0.0, rng.normal()
        turns = []
        for turn in range(length):
            follows = agent and turn > 0
            messages.append(
                _message("tool", rng.lognormal(6.3, 1.0)) if follows else _message("user", rng.lognormal(4.5, 1))
            )
            if rng.random() < (0.05 if agent else 0.15):
                difficulty = rng.normal()
            odds = STRENGTH - SLOPE * (difficulty + 0.2 * rng.normal())
            mean = 150.0 if agent else 350.0
            output = mean * rng.lognormal(0.0, 0.5)
            turns.append(
                Turn(
                    second, tuple(messages), output, _share(odds), _share(odds + NOISE * rng.normal(size=len(odds))),
                    output * rng.lognormal(0.0, 0.3),
                )
            )  # fmt: skip
            messages.append(_message("assistant", output))
            second += rng.exponential(8.0) if agent else rng.exponential(60.0) * (20 if rng.random() < 0.1 else 1)
        yield turns


def _message(role: str, tokens: float) -> Message:
    return Message(role, "x" * (CHARS * max(1, int(tokens))))


def _share(odds: np.ndarray) -> FloatArray:
    return (1.0 / (1.0 + np.exp(-odds))).astype(np.float32)


@dataclass
class Seen:
    """The learner's part: what it makes of the turn that is being routed."""

    turn: Turn | None = None

    def estimate(self, request: RouteRequest) -> Estimate:
        """The turn's estimate."""
        assert self.turn is not None
        seen, m = self.turn.seen, len(CATALOG)
        claim = _share(np.log(seen / (1 - seen)) - CAUTION)
        tokens = sum(len(message.text) for message in request.messages) / CHARS
        return Estimate(seen, np.full(m, self.turn.expected_output, np.float32), tokens, None, claim, seen, claim)


Rule = Callable[[Router, RouteRequest, Session | None], str]


def routed(router: Router, request: RouteRequest, session: Session | None) -> str:
    """The router's own rule."""
    return router.decide_with_estimate(request, session=session)[0].model


def sticky(router: Router, request: RouteRequest, session: Session | None) -> str:
    """The model of the first turn for ever."""
    return session.model if session else router.decide(request).model


def memoryless(router: Router, request: RouteRequest, session: Session | None) -> str:
    """Each turn as if it were the first."""
    return router.decide(request).model


def run(talks: list[list[Turn]], rule: Rule, settings: SessionPolicy) -> dict[str, float]:
    """What the sessions come to under a rule."""
    learner = Seen()
    router = Router(CATALOG, learner, Policy(tiers={"standard": DIAL}, session=settings), "simulated")
    strongest = 0
    costs, escalated, good, short, moves, turns = 0.0, 0.0, 0.0, 0, 0, 0
    for talk in talks:
        session: Session | None = None
        sent: list[Prefix] = []  # with the second instead of the age
        for turn in talk:
            learner.turn = turn
            request = RouteRequest(messages=turn.messages)
            if session is not None:
                session = Session(session.model, tuple(p._replace(age=turn.second - p.age) for p in sent[-4:]))
            model = rule(router, request, session)
            at = CATALOG.index[model]
            costs += (cost := _billed(turn, at, sent))
            strong = cost if at == strongest else _billed(turn, strongest, sent)
            escalated += cost + (1.0 - float(turn.p_ok[at])) * strong
            good += float(turn.p_ok[at])
            short += turn.p_ok[at] < DIAL <= turn.p_ok.max()
            moves += session is not None and session.model != model
            turns += 1
            chars = sum(len(message.text) for message in turn.messages)
            sent.append(Prefix(model, len(turn.messages), chars, turn.second))
            session = Session(model)
    return {
        "cost": 100 * costs / turns,
        "with escalation": 100 * escalated / turns,
        "acceptable": good / turns,
        "short": short / turns,
        "moves": 100 * moves / turns,
    }


def _billed(turn: Turn, at: int, sent: list[Prefix]) -> float:
    """USD of the turn's call: what the model was sent within the cache's life is read from it."""
    card = CATALOG.cards[at]
    tokens = sum(len(message.text) for message in turn.messages) / CHARS
    warm = [p.chars / CHARS for p in sent if p.model == card.id and turn.second - p.age <= CACHE_SECONDS]
    cached = max((t for t in warm if t >= CACHE_TOKENS), default=0.0)
    assert card.cached_input_usd_per_mtok is not None
    read = cached * card.cached_input_usd_per_mtok + (tokens - cached) * card.input_usd_per_mtok
    return 1e-6 * (read + turn.output * card.output_usd_per_mtok)


def compare(n: int, seed: int, agents: float) -> dict[str, dict[str, float]]:
    """Every rule on the same sessions."""
    talks = list(sessions(n, np.random.default_rng(seed), agents))
    ours = SessionPolicy()
    found = {
        "sticky for ever": run(talks, sticky, ours),
        "no session logic": run(talks, memoryless, ours),
        "router-ml": run(talks, routed, ours),
    }
    for gain in (0.0, 0.05, 0.2, 0.3):
        found[f"router-ml, min_gain {gain:g}"] = run(talks, routed, replace(ours, min_gain=gain))
    return found


@click.command()
@click.option("--sessions", "n", default=400, show_default=True, help="Sessions a seed.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the figures are written to.")
def main(n: int, seeds: int, out: Path | None) -> None:
    """Cost and quality of sessions with prompt caches, under three rules."""
    console = open_console()
    results = {}
    for kind, agents in (("people", 0.0), ("agents", 1.0)):
        results[kind] = summarise([compare(n, seed, agents) for seed in range(seeds)])
        columns = [c for c in next(iter(results[kind].values())) if not c.endswith("_sd")]
        table = Table("rule", *columns, title=f"{kind}, {seeds} seeds of {n} sessions")
        for rule, figures in results[kind].items():
            table.add_row(rule, *(f"{figures[c]:.3f} ± {figures[c + '_sd']:.3f}" for c in columns))
        console.print(table)
    if out is not None:
        write_results(console, out, {"dial": DIAL, "sessions": n, "seeds": seeds, "results": results})


if __name__ == "__main__":
    main()
