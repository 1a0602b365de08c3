"""Which models answer just now: a circuit a model and a provider, opened by outcomes, closed by probes (Nygard 2007).

A closed circuit opens when enough of the calls in a window failed. An open one keeps its model out for a while; then it
is half open: a few requests may try, and what becomes of them closes it or opens it again. A gateway that knows better
sets a circuit itself. Everything here is in memory and takes microseconds; where nothing is open, nothing is looked at.
What becomes of circuits is kept until `take` has it, for other processes; `adopt` takes in what they say.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from router_ml.errors import InputError
from router_ml.shared import Circuit, How

State = Literal["closed", "open", "half-open"]
FAILED = ("error", "timeout", "rate_limited")
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """When circuits open and close. Raises InputError for values out of range.

    A circuit opens when of at least `min_calls` calls in the last `window_seconds` at least `failure_share` failed; a
    provider's only when these were calls of two of its models. After `open_seconds` it lets `probes` requests through,
    and again as many each `open_seconds` in which none of them came back.
    """

    window_seconds: float = 60.0
    min_calls: int = 5
    failure_share: float = 0.5
    open_seconds: float = 30.0
    probes: int = 1

    def __post_init__(self) -> None:
        if self.window_seconds <= 0 or self.open_seconds <= 0 or self.min_calls < 1 or self.probes < 1:
            raise InputError("health needs window_seconds and open_seconds above 0, min_calls and probes of 1 or more")
        if not 0.0 < self.failure_share <= 1.0:
            raise InputError(f"health's failure_share {self.failure_share} has to lie in (0, 1]")


@dataclass(slots=True)
class _Circuit:
    calls: deque[tuple[float, bool, str]] = field(default_factory=deque)  # when, failed, of which model
    failures: Counter[str] = field(default_factory=Counter)  # of the calls, by model
    opened: float | None = None
    why: str = ""
    probes: dict[str, float] = field(default_factory=dict)  # decision id: when it was let through
    forced: bool = False


class Health:
    """The circuits of one process; every method may be called from any thread. `clock` gives monotonic seconds."""

    def __init__(self, settings: HealthSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._circuits: dict[tuple[str, str], _Circuit] = {}
        self._open: set[tuple[str, str]] = set()
        self._untold: dict[tuple[str, str], How] = {}
        self.changed: Callable[[], None] = lambda: None
        """Told, from any thread, that there is something to `take`."""

    def report(self, model: str, provider: str, *, failed: bool, decision_id: str = "") -> None:
        """Takes in how a call of a model ended. A half-open circuit listens to the decisions that it let through."""
        now = self._clock()
        with self._lock:
            for key in (("model", model), ("provider", provider)):
                circuit = self._circuits.setdefault(key, _Circuit())
                if circuit.opened is not None:
                    if not circuit.forced and decision_id in circuit.probes:
                        self._probed(key, circuit, now, failed)
                    continue
                circuit.calls.append((now, failed, model))
                circuit.failures[model] += failed
                while circuit.calls[0][0] < now - self.settings.window_seconds:
                    _, bad, whose = circuit.calls.popleft()
                    circuit.failures[whose] -= bad
                self._judge(key, circuit, now)

    def down(self, providers: Mapping[str, str]) -> Mapping[str, str]:
        """The models to keep out just now, of those in `providers` (model to provider), and why."""
        if not self._open:
            return _NONE
        now = self._clock()
        with self._lock:
            shut = {key: circuit.why for key in self._open if self._blocks(circuit := self._circuits[key], now)}
        return {
            model: shut.get(("model", model)) or shut[("provider", provider)]
            for model, provider in providers.items()
            if ("model", model) in shut or ("provider", provider) in shut
        }

    def chosen(self, model: str, provider: str, decision_id: str) -> None:
        """Says that a decision goes to the model: it probes a circuit that is half open.

        A model whose own circuit is not closed is no probe of its provider: it would keep the others out with it.
        """
        if not self._open:
            return
        now = self._clock()
        with self._lock:
            key = ("model", model) if ("model", model) in self._open else ("provider", provider)
            if key in self._open and not self._blocks(circuit := self._circuits[key], now):
                circuit.probes[decision_id] = now
                self._tell(key, "probe")

    def set(self, model: str, state: Literal["open", "closed", "auto"]) -> None:
        """Opens a model's circuit until further notice, closes it, or leaves it to outcomes again (which closes it)."""
        key = ("model", model)
        with self._lock:
            if state == "open":
                circuit = self._circuits.setdefault(key, _Circuit())
                circuit.opened, circuit.forced, circuit.why = self._clock(), True, "taken out by hand"
                self._open.add(key)
            else:
                self._circuits.pop(key, None)
                self._open.discard(key)
            self._tell(key, "hand")

    def take(self) -> list[Circuit]:
        """The circuits whose change no other process knows of, as they are now; they count as told from then on."""
        now = self._clock()
        with self._lock:
            untold, self._untold = self._untold, {}
            return [self._told(key, how, now) for key, how in untold.items()]

    def give_back(self, circuits: Iterable[Circuit]) -> None:
        """Says that what was taken could not be told."""
        with self._lock:
            for circuit in circuits:
                key = (circuit.of, circuit.name)
                if circuit.how == "hand" or key not in self._untold:
                    self._untold[key] = circuit.how

    def adopt(self, told: Circuit) -> None:
        """Makes a circuit what another process says of it, unless it has changed here meanwhile.

        One that was opened so long ago that it would be half open says nothing of now to who did not see it open.
        """
        key, now = (told.of, told.name), self._clock()
        with self._lock:
            if key in self._untold:
                return
            if told.opened and (told.forced or key in self._open or told.age < self.settings.open_seconds):
                probes = {i: now - age for i, age in told.probes.items()}
                self._circuits[key] = _Circuit(opened=now - told.age, why=told.why, probes=probes, forced=told.forced)
                self._open.add(key)
            elif not told.opened and key in self._open:
                self._circuits[key] = _Circuit()
                self._open.discard(key)

    def states(self) -> dict[tuple[str, str], State]:
        """The state of every circuit that has seen a call, by ("model" or "provider", its name)."""
        now = self._clock()
        with self._lock:
            return {key: self._state(circuit, now) for key, circuit in self._circuits.items()}

    def _state(self, circuit: _Circuit, now: float) -> State:
        if circuit.opened is None:
            return "closed"
        return "open" if circuit.forced or now < circuit.opened + self.settings.open_seconds else "half-open"

    def _blocks(self, circuit: _Circuit, now: float) -> bool:
        if self._state(circuit, now) == "open":
            return True
        lost = [i for i, at in circuit.probes.items() if now >= at + self.settings.open_seconds]  # never reported
        for i in lost:
            del circuit.probes[i]
        return len(circuit.probes) >= self.settings.probes

    def _probed(self, key: tuple[str, str], circuit: _Circuit, now: float, failed: bool) -> None:
        circuit.probes.clear()
        if failed:
            circuit.opened = now
        else:
            self._circuits[key] = _Circuit()
            self._open.discard(key)
        self._tell(key, "opened" if failed else "closed")

    def _judge(self, key: tuple[str, str], circuit: _Circuit, now: float) -> None:
        total, bad = len(circuit.calls), circuit.failures.total()
        enough = total >= self.settings.min_calls and bad >= self.settings.failure_share * total
        if not enough or (key[0] == "provider" and sum(n > 0 for n in circuit.failures.values()) < 2):
            return
        whose = "" if key[0] == "model" else f" of provider {key[1]!r}"
        why = f"circuit open: {bad} of {total} calls{whose} failed in {self.settings.window_seconds:g} s"
        self._circuits[key] = _Circuit(opened=now, why=why)
        self._open.add(key)
        self._tell(key, "opened")

    def _tell(self, key: tuple[str, str], how: How) -> None:
        before = self._untold.get(key)
        if before != "hand" and not (how == "probe" and before):
            self._untold[key] = how
        self.changed()

    def _told(self, key: tuple[str, str], how: How, now: float) -> Circuit:
        circuit = self._circuits.get(key)
        if circuit is None or circuit.opened is None:
            return Circuit(*key, how, False)
        probes = {i: now - at for i, at in circuit.probes.items()}
        return Circuit(*key, how, True, circuit.why, now - circuit.opened, circuit.forced, probes)
