"""What a self-hosted model really costs: replicas for the traffic's own shape, idle hours and operations included.

A replica's work is additive: so many input tokens and so many output tokens of its time at the rates that it reaches
within the target latency. The traffic is a series of hours that repeats itself; a month has 730 hours.

Such a rate is measured under an even load, by clients that wait for their answers. Requests that come on their own
clump, and at that rate their queue has no end (M/M/c; Kingman: the wait grows with u / (1 - u)). So no more than
`max_utilisation` of the rates is planned for: with 32 places in a replica's batch one request in six has to wait at
0.8, two in three at 0.95 (Erlang C). `Traffic.peak_to_mean` is something else, the bursts that are more than such
chance. Rates that were measured under independent arrivals have the wait in them, and batch work may wait:
`max_utilisation = 1`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router_ml.errors import InputError
from router_ml.traffic_shape import MONTH_HOURS, Traffic
from router_ml.types import ModelCard

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
_SCALES = np.geomspace(1e-4, 1e4, 1842)  # volumes tried for the break-even, 1 % apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on GPUs of one's own. Rates are tokens a second of one replica at the target latency.

    The busiest minutes may take `max_utilisation` of them (see above); what is past that counts as overflow.

    At least `min_replicas` run, for redundancy, and at most `max_replicas` (None: as many as it takes). Without
    `autoscaling` as many run as the busiest hour needs; with it as many as each hour needs, and each replica that is
    started is paid for `start_hours` before it serves. Of them `existing_replicas` are on a cluster that is there
    already and whose idle time others use: they are paid by the busy hour, at `usd_per_existing_gpu_hour`; all others
    are paid while they run, at `usd_per_gpu_hour`. Raises InputError for values that are not possible.
    """

    gpus_per_replica: float
    usd_per_gpu_hour: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    min_replicas: int = 2
    max_replicas: int | None = None
    ops_usd_per_month: float = 0.0
    autoscaling: bool = False
    start_hours: float = 0.25
    existing_replicas: int = 0
    usd_per_existing_gpu_hour: float = 0.0
    max_utilisation: float = 0.8

    def __post_init__(self) -> None:
        for name in ("gpus_per_replica", "input_tokens_per_second", "output_tokens_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"a deployment's {name} has to be a number above 0")
        for name in ("usd_per_gpu_hour", "ops_usd_per_month", "start_hours", "usd_per_existing_gpu_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"a deployment's {name} has to be a number of 0 or more")
        if not 0.0 < self.max_utilisation <= 1.0:
            raise InputError("a deployment's max_utilisation is a share of its rates: a number above 0, at most 1")
        most = math.inf if self.max_replicas is None else self.max_replicas
        if not 0 <= self.min_replicas <= most or most < 1 or self.existing_replicas < 0:
            raise InputError("a deployment needs 0 <= min_replicas <= max_replicas and existing_replicas of 0 or more")

    @classmethod
    def from_table(cls, table: Any) -> Deployment:
        """A deployment from parsed TOML or JSON. Raises InputError that names the field."""
        if not isinstance(table, Mapping):
            raise InputError("'deployment' has to be a table")
        known = {field.name: str(field.type) for field in fields(cls)}
        if unknown := sorted(set(table) - set(known)):
            raise InputError(f"deployment: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
        for name in ("gpus_per_replica", "usd_per_gpu_hour", "input_tokens_per_second", "output_tokens_per_second"):
            if name not in table:
                raise InputError(f"deployment: {name!r} is missing")
        for name, value in table.items():
            kinds: tuple[type, ...] = (bool,) if known[name] == "bool" else (int,)
            kinds += (float,) if known[name] == "float" else ()
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"deployment: {name!r} has to be of the kind {known[name]}, not {value!r}")
        return cls(**table)

    def load(self, traffic: Traffic) -> tuple[Array, Array]:
        """(replicas that input keeps busy, those that output does) in each hour, on average; float64 [n] each."""
        return (
            traffic.input_tokens / (3600.0 * self.input_tokens_per_second),
            traffic.output_tokens / (3600.0 * self.output_tokens_per_second),
        )


@dataclass(frozen=True)
class Hosting:
    """What a deployment costs with some traffic. `replicas` and `busy` (replicas' worth of work) are float64 [n], an
    hour each.

    `usd_per_month` has `gpu_usd` and the operations in it. `input_usd_per_mtok` and `output_usd_per_mtok` share it out
    by the time that input and output take, so that the served tokens at these prices cost exactly that: the effective
    prices. `utilisation` is work by paid capacity; `overflow` the share of the work for which there is no replica.
    """

    deployment: Deployment
    traffic: Traffic
    replicas: Array
    busy: Array
    usd_per_month: float
    gpu_usd: float
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    utilisation: float
    overflow: float

    @property
    def tokens_per_second(self) -> float:
        """Input and output tokens a second of the replicas that run at most, for this mix of the two."""
        work = sum(float(part.sum()) for part in self.deployment.load(self.traffic)) * 3600.0
        tokens = float(self.traffic.input_tokens.sum() + self.traffic.output_tokens.sum())
        return float(self.replicas.max()) * tokens / work

    def card(self, card: ModelCard) -> ModelCard:
        """The model's card with the effective prices, and what the deployment can take at most."""
        return replace(
            card,
            input_usd_per_mtok=float(f"{self.input_usd_per_mtok:.6g}"),
            output_usd_per_mtok=float(f"{self.output_usd_per_mtok:.6g}"),
            cached_input_usd_per_mtok=None,
            batch_input_usd_per_mtok=None,
            batch_output_usd_per_mtok=None,
            batch_cached_input_usd_per_mtok=None,
            reasoning_usd_per_mtok=None,
            long_context=(),
            max_tokens_per_second=float(f"{self.tokens_per_second:.6g}"),
            price_source=(
                f"self-hosted: {self.usd_per_month:,.0f} USD a month for {self.traffic.mtok_per_month:,.0f} million "
                f"tokens, {self.utilisation:.0%} utilised"
            ),
        )

    def to_frame(self) -> pl.DataFrame:
        """A row an hour: hour, input_tokens, output_tokens, busy, replicas."""
        import polars as pl

        of = self.traffic
        hours = np.arange(len(self.replicas))
        columns = {"input_tokens": of.input_tokens, "output_tokens": of.output_tokens, "busy": self.busy}
        return pl.DataFrame({"hour": hours, **columns, "replicas": self.replicas})

    def plot(self) -> Figure:
        """Replicas that run, and how many of them the work keeps busy, hour by hour."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        axes.step(range(len(self.replicas)), self.replicas, where="mid", label="running")
        axes.fill_between(range(len(self.busy)), self.busy, step="mid", alpha=0.4, label="busy")
        axes.set_xlabel("hour")
        axes.set_ylabel("replicas")
        axes.legend()
        return figure


@dataclass(frozen=True)
class Volumes:
    """A deployment and others by volume: USD a month, float64 [k] each, for `mtok_per_month` [k] of the same traffic.

    `others` are billed by the token; what overflows the deployment is not in `self_usd`, and `overflow` is its share.
    `against` has where hosting begins to pay, and whether it does at `today`, the traffic's own volume.
    """

    mtok_per_month: Array
    self_usd: Array
    overflow: Array
    others: Mapping[str, Array]
    against: tuple[Against, ...]
    today: float

    def to_frame(self) -> pl.DataFrame:
        """A row a volume: mtok_per_month, self_hosted, overflow, and a column a model."""
        import polars as pl

        columns = {"mtok_per_month": self.mtok_per_month, "self_hosted": self.self_usd, "overflow": self.overflow}
        return pl.DataFrame({**columns, **self.others})

    def against_frame(self) -> pl.DataFrame:
        """A row a model: model, usd_per_month, self_usd_per_month, break_even_mtok, until_mtok, pays."""
        import polars as pl

        rows = [asdict(one) | {"pays": one.pays} for one in self.against]
        schema = {"model": pl.String, **dict.fromkeys([f.name for f in fields(Against)][1:], pl.Float64)}
        return pl.DataFrame(rows, schema={**schema, "pays": pl.Boolean})

    def plot(self) -> Figure:
        """Cost a month by volume: where a model's line crosses the deployment's, hosting begins to pay."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.mtok_per_month, self.self_usd, color="black", linewidth=2, label="self-hosted")
        for model, usd in self.others.items():
            axes.plot(self.mtok_per_month, usd, label=model)
        axes.axvline(self.today, color="tab:gray", linestyle=":", label="this traffic")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("million tokens a month")
        axes.set_ylabel("USD a month")
        axes.legend(fontsize=8)
        return figure


def by_volume(hosting: Hosting, cards: Sequence[ModelCard], scales: Sequence[float] | None = None) -> Volumes:
    """What hosting and the models of `cards` cost a month if the traffic were `scales` times what it is.

    By default from a hundredth to the hundredfold; mix and shape of the traffic stay.
    """
    deployment, traffic = hosting.deployment, hosting.traffic
    times = np.geomspace(0.01, 100.0, 81) if scales is None else np.asarray(scales, dtype=np.float64)
    work = sum(deployment.load(traffic)) * times[:, None]
    running, busy = _sized(deployment, traffic, work)
    own = _gpu_usd(deployment, running, busy) * MONTH_HOURS / work.shape[1] + deployment.ops_usd_per_month
    others = {card.id: traffic.usd_per_month(*traffic.prices_of(card)) * times for card in cards}
    overflow = 1.0 - busy.sum(axis=1) / work.sum(axis=1)
    each = tuple(against(hosting, card) for card in cards)
    return Volumes(times * traffic.mtok_per_month, own, overflow, others, each, traffic.mtok_per_month)


def host(deployment: Deployment, traffic: Traffic) -> Hosting:
    """Sizes the deployment for the traffic and says what it costs a month."""
    parts = deployment.load(traffic)
    work = parts[0] + parts[1]
    running, busy = _sized(deployment, traffic, work)
    gpu_usd = float(_gpu_usd(deployment, running, busy)) * MONTH_HOURS / len(work)
    usd = gpu_usd + deployment.ops_usd_per_month
    served = busy / np.where(work > 0.0, work, 1.0)
    done = [float((part * served).sum()) for part in parts]
    months = MONTH_HOURS / len(work) / 1e6
    mtok = [float((tokens * served).sum()) * months for tokens in (traffic.input_tokens, traffic.output_tokens)]
    shares = zip(done, mtok, strict=True)
    price_in, price_out = (usd * time / sum(done) / tokens if tokens else 0.0 for time, tokens in shares)
    paid = busy.sum() + _idle(deployment, running, busy).sum()
    return Hosting(
        deployment, traffic, running, busy, usd, gpu_usd, price_in, price_out,
        utilisation=float(busy.sum() / paid), overflow=float(1.0 - busy.sum() / work.sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class Against:
    """A self-hosted model beside one that is billed by the token.

    `usd_per_month` is the other's price for the traffic, `self_usd_per_month` the deployment's, with what overflows it
    served by the other. Self-hosting is no dearer from `break_even_mtok` (million tokens a month, same mix and shape)
    on, None where it never is between a 10,000th and the 10,000-fold of the traffic; and again dearer from `until_mtok`
    on, where more volume needs GPUs of another price, None where it stays cheaper.
    """

    model: str
    usd_per_month: float
    self_usd_per_month: float
    break_even_mtok: float | None
    until_mtok: float | None

    @property
    def pays(self) -> bool:
        """Whether self-hosting costs less at this volume."""
        return self.self_usd_per_month < self.usd_per_month


def against(hosting: Hosting, card: ModelCard) -> Against:
    """Self-hosting beside the model of a card, at the card's prices for this traffic (`Traffic.prices_of`)."""
    deployment, traffic = hosting.deployment, hosting.traffic
    other = traffic.usd_per_month(*traffic.prices_of(card))
    totals = _totals(deployment, traffic, other, _SCALES)
    cheaper = totals <= other * _SCALES
    begins = np.flatnonzero(cheaper)[:1]
    ends = begins + np.flatnonzero(~cheaper[begins[0] :])[:1] if begins.size else begins
    even, until = (float(_SCALES[at[0]]) * traffic.mtok_per_month if at.size else None for at in (begins, ends))
    here = float(_totals(deployment, traffic, other, np.ones(1))[0])
    return Against(card.id, other, here, even, until)


def _totals(deployment: Deployment, traffic: Traffic, other_usd: float, scales: Array) -> Array:
    """USD a month of self-hosting the traffic times each of `scales`, overflow at the other's price; float64 [k]."""
    into, out = deployment.load(traffic)
    work = (into + out) * scales[:, None]
    running, busy = _sized(deployment, traffic, work)
    overflow = 1.0 - busy.sum(axis=1) / work.sum(axis=1)
    gpus = _gpu_usd(deployment, running, busy) * MONTH_HOURS / work.shape[1]
    total: Array = gpus + deployment.ops_usd_per_month + overflow * other_usd * scales
    return total


def _sized(deployment: Deployment, traffic: Traffic, work: Array) -> tuple[Array, Array]:
    """(replicas that run, work that they do) in each hour of `work`, replicas' worth [..., n]."""
    above = traffic.peak_to_mean / deployment.max_utilisation
    need = np.ceil(work * above - 1e-9)
    most = math.inf if deployment.max_replicas is None else deployment.max_replicas
    running = np.clip(need, deployment.min_replicas, most)
    if not deployment.autoscaling:
        running = np.broadcast_to(running.max(axis=-1, keepdims=True), work.shape)
    return running, np.minimum(work, running / above)


def _idle(deployment: Deployment, running: Array, busy: Array) -> Array:
    """Hours of replicas that are paid and do nothing, [..., n]: those of an existing cluster are not."""
    return np.maximum(running - np.maximum(busy, deployment.existing_replicas), 0.0)


def _gpu_usd(deployment: Deployment, running: Array, busy: Array) -> Array:
    """USD for the GPUs of all the hours, [...]."""
    existing = np.minimum(busy, deployment.existing_replicas).sum(axis=-1)
    rented = np.maximum(running - deployment.existing_replicas, 0.0)
    started = np.maximum(rented - np.roll(rented, 1, axis=-1), 0.0).sum(axis=-1)
    hours = rented.sum(axis=-1) + started * deployment.start_hours
    usd: Array = deployment.gpus_per_replica * (
        existing * deployment.usd_per_existing_gpu_hour + hours * deployment.usd_per_gpu_hour
    )
    return usd
