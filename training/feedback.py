"""Feedback to quality: rules that are declared, a join that never multiplies, one number in [0, 1] a row.

What a source says is mapped to q in [0, 1] by its kind. Of several signals of one source on one answer the newest
counts; several sources give

    quality = sum(w q) / sum(w),   w = weight x (2 reliability - 1) x the signal's own weight

where `reliability` is the probability that the source agrees with the truth. 2r - 1 is what remains of a difference
in truth after such noise (a source that agrees half the time is a coin and counts nothing). It weights; it does not
correct: the unbiased correction (q - (1 - r)) / (2r - 1) (Natarajan et al., Learning with noisy labels, NeurIPS 2013)
leaves [0, 1] for every single answer, and clipped it is no correction. So a lone source's word stands as it is,
whatever its reliability, and where a good and a poor source disagree, the good one prevails.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import translate
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from router_ml.errors import InputError
from router_ml.types import CACHED

RuleKind = Literal["thumbs", "stars", "score", "labels", "regeneration", "copy"]
Spread = Literal["last", "only", "every"]
KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
SPREADS: tuple[Spread, ...] = get_args(Spread)
_UP = ("up", "thumbs_up", "thumbs-up", "thumb_up", "like", "liked", "positive", "good", "+1", "👍", "true", "yes")
_DOWN = ("down", "thumbs_down", "thumbs-down", "thumb_down", "dislike", "disliked", "negative", "bad", "-1", "👎",
         "false", "no")  # fmt: skip
_NOT = ("false", "no", "none", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the signals of one source mean. `source` is their name, in which `*` stands for anything.

    `thumbs`: above 0 or a word of approval is 1, otherwise 0. `stars`: `min`..`max`, 1..5 unless said. `score`:
    `min`..`max`, 0..1 unless said; a `min` above `max` is a score of which less is better. `labels`: a quality for each
    word, by `labels`, whatever its case. `regeneration`, `copy`: that it happened is `quality`, 0 and 1 unless said;
    that it did not says nothing.

    `trace` says which answer of a trace a signal is about that names the trace alone: its `last` one, its `only` one
    (none where there are several), or `every` one, its weight divided among them.
    """

    source: str
    kind: RuleKind
    weight: float = 1.0
    reliability: float = 1.0
    min: float | None = None
    max: float | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    quality: float | None = None
    trace: Spread = "last"

    def __post_init__(self) -> None:
        where = f"the feedback rule of {self.source!r}"
        if self.kind not in KINDS:
            raise InputError(f"{where} has the kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.trace not in SPREADS:
            raise InputError(f"{where} has trace = {self.trace!r}: choose one of {', '.join(SPREADS)}")
        if not 0 < self.weight < float("inf"):
            raise InputError(f"{where} has weight {self.weight}: it has to be above 0")
        if not 0.5 < self.reliability <= 1:
            raise InputError(f"{where} has reliability {self.reliability}: it has to be above 0.5 (a coin), at most 1")
        if self.kind == "labels" and not self.labels:
            raise InputError(f"{where} has no labels: give a quality for each word")
        for value in (*self.labels.values(), *([] if self.quality is None else [self.quality])):
            if not 0 <= value <= 1:
                raise InputError(f"{where} gives the quality {value}: it has to be in [0, 1]")
        if self.kind in ("stars", "score") and self.low == self.high:
            raise InputError(f"{where} has min = max: a scale needs two ends")

    @property
    def low(self) -> float:
        """The end of the scale that means 0."""
        return (1.0 if self.kind == "stars" else 0.0) if self.min is None else self.min

    @property
    def high(self) -> float:
        """The end of the scale that means 1."""
        return (5.0 if self.kind == "stars" else 1.0) if self.max is None else self.max

    def expression(self) -> pl.Expr:
        """q of a frame's signals (`value`, `label`); null where it cannot be read or says nothing."""
        value = pl.col("value")
        word = pl.col("label").str.strip_chars().str.to_lowercase()
        if self.kind == "thumbs":
            by_value = pl.when(value.is_not_null()).then((value > 0).cast(pl.Float64))
            return pl.coalesce(
                by_value, pl.when(word.is_in(list(_UP))).then(1.0).when(word.is_in(list(_DOWN))).then(0.0)
            )
        if self.kind in ("stars", "score"):
            number = pl.coalesce(value, word.cast(pl.Float64, strict=False))
            scaled = (number - self.low) / (self.high - self.low)
            return pl.when(scaled.is_between(0, 1)).then(scaled)
        if self.kind == "labels":
            known = {key.strip().lower(): q for key, q in self.labels.items()}
            as_word = pl.when(value == value.round()).then(value.cast(pl.Int64, strict=False).cast(pl.String))
            named = pl.coalesce(word, as_word, value.cast(pl.String))
            return named.replace_strict(known, default=None, return_dtype=pl.Float64)
        happened = pl.coalesce(value != 0, ~word.is_in(list(_NOT)), pl.lit(True))
        given = (1.0 if self.kind == "copy" else 0.0) if self.quality is None else self.quality
        return pl.when(happened).then(pl.lit(given))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without what is not said."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def load_rules(file: str | Path) -> list[Rule]:
    """The `[[source]]` tables of a TOML file as rules. Raises InputError for what it does not understand."""
    try:
        said = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file} is not readable TOML: {error}") from None
    if unknown := sorted(set(said) - {"source"}):
        raise InputError(f"{file} has {unknown[0]!r}: it takes [[source]] tables only")
    tables = said.get("source", [])
    if not isinstance(tables, list) or not tables:
        raise InputError(f"{file} has no [[source]] table: give one for each source of feedback")
    return [rule_of({"source" if k == "name" else k: v for k, v in table.items()}, str(file)) for table in tables]


def rule_of(said: Mapping[str, Any], where: str) -> Rule:
    """A rule from plain values. Raises InputError, which begins with `where`."""
    if unknown := sorted(set(said) - {f.name for f in fields(Rule)}):
        raise InputError(f"{where}: a feedback rule has no {unknown[0]!r}")
    if missing := [name for name in ("source", "kind") if not isinstance(said.get(name), str)]:
        raise InputError(f"{where}: a feedback rule needs {'name' if missing[0] == 'source' else missing[0]!r}")
    made = dict(said)
    for name in ("weight", "reliability", "min", "max", "quality"):
        if name in made:
            made[name] = _number(made[name], name, where)
    labels = made.get("labels", {})
    if not isinstance(labels, Mapping):
        raise InputError(f"{where}: labels have to be a table of words and qualities")
    return Rule(**made | {"labels": {str(k): _number(v, f"labels.{k}", where) for k, v in labels.items()}})


def parse_rule(text: str) -> Rule:
    """A rule as `NAME=KIND` with options behind commas: `judge=score,min=1,max=10,weight=2,reliability=0.8`.

    An option of `labels` that is none of a rule's is a word: `verdict=labels,pass=1,fail=0`. Raises InputError.
    """
    name, _, rest = text.partition("=")
    kind, *options = rest.split(",")
    said: dict[str, Any] = {"source": name.strip(), "kind": kind.strip()}
    known = {f.name for f in fields(Rule)} - {"source", "kind", "labels"}
    for option in options:
        key, is_pair, value = (part.strip() for part in option.partition("="))
        if not is_pair:
            raise InputError(f"--rule {text}: {option!r} is not KEY=VALUE")
        if said["kind"] == "labels" and key not in known:
            said.setdefault("labels", {})[key] = value
        else:
            said[key] = value
    if not said["source"] or not said["kind"]:
        raise InputError(
            f"--rule {text}: write it as NAME=KIND, for instance thumbs=thumbs or judge=score,min=1,max=10"
        )
    return rule_of(said, f"--rule {text}")


def _number(value: Any, name: str, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {name} has to be a number, it is {value!r}") from None


def apply_rules(signals: pl.DataFrame, rules: Sequence[Rule]) -> pl.DataFrame:
    """Signals with `q` [0, 1] or null, `w` their weight and `trace_rule`; those of a source without a rule have no `w`.

    The first rule whose `source` matches is a signal's.
    """
    finite = [pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in ("value", "weight")]
    signals = signals.with_columns(finite)
    rule = pl.lit(None, pl.Int64)
    for at, one in reversed(list(enumerate(rules))):
        # fnmatch's translation ends in \z or \Z, by Python's version: the regex of polars has \z alone.
        pattern = translate(one.source).replace("\\Z", "\\z").replace("(?>", "(?:")
        rule = pl.when(pl.col("source").str.contains(f"^{pattern}")).then(pl.lit(at, pl.Int64)).otherwise(rule)
    signals = signals.with_columns(_rule=rule)
    q, w, trace = pl.lit(None, pl.Float64), pl.lit(None, pl.Float64), pl.lit(None, pl.String)
    for at, one in enumerate(rules):
        mine = pl.col("_rule") == at
        strength = one.weight * (2 * one.reliability - 1)
        q = pl.when(mine).then(one.expression()).otherwise(q)
        w = pl.when(mine).then(strength * pl.col("weight").fill_null(1.0)).otherwise(w)
        trace = pl.when(mine).then(pl.lit(one.trace)).otherwise(trace)
    return signals.with_columns(q=q, w=w, trace_rule=trace).drop("_rule")


def qualities(
    rows: pl.DataFrame, signals: pl.DataFrame, own: pl.DataFrame
) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
    """The quality of rows from signals: ((`row`, `quality`, `quality_source`), the `_signal`s that found an answer,
    those that could be of several).

    `rows`, `signals` and `own` as in `by_source`. Rows that no signal is about are left out. `quality_source` is the
    sources' names in the order of the alphabet, joined by "+".
    """
    newest, about, ambiguous = by_source(rows, signals, own)
    mean = ((pl.col("q") * pl.col("w")).sum() / pl.col("w").sum()).clip(0, 1)
    named = pl.col("source").unique(maintain_order=True).str.join("+")
    said = newest.group_by("row", maintain_order=True).agg(quality=mean, quality_source=named)
    return said, about, ambiguous


def by_source(
    rows: pl.DataFrame, signals: pl.DataFrame, own: pl.DataFrame
) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
    """What each source says last of each row that signals are about: ((`row`, `source`, `q`, `w`), and as `qualities`).

    `rows` has `row` (a number), `time`, `request_id`, `trace_id`, `response_id`, `model`, `status`; `signals` has
    `_signal` (a number) and what `apply_rules` adds, no null in it; `own` (`row`, `source`, `q`, `w`) is what rows said
    of themselves, as if it were the oldest signal. A signal that names an answer goes to it, by its request_id first;
    of a request that was sent to several models to the one that its response_id, trace_id or model names, otherwise to
    none. One that names a trace alone goes as its rule says, and never to a call that failed where another succeeded.
    """
    wanted = ["row", "source", "time", "_signal", "q", "w"]
    of_request, ambiguous = _of_request(rows, signals.filter(_names("request_id", ())))
    of_response = signals.filter(_names("response_id", ("request_id",)))
    found = [of_request.select(wanted)]
    found.append(of_response.join(rows.select("row", "response_id"), on="response_id", how="inner").select(wanted))
    of_trace = signals.filter(_names("trace_id", ("request_id", "response_id")))
    traces = rows.filter(pl.col("trace_id").is_in(of_trace["trace_id"].unique().implode())).sort("time", "row")
    failed = (~pl.col("status").is_in(["ok", CACHED])).fill_null(False)
    traces = traces.filter(~failed | failed.all().over("trace_id"))
    traces = traces.select("trace_id", "row", _n=pl.len().over("trace_id"), _at=pl.int_range(pl.len()).over("trace_id"))
    gets = {"last": pl.col("_at") == pl.col("_n") - 1, "only": pl.col("_n") == 1, "every": pl.lit(True)}
    kinds = pl.any_horizontal((pl.col("trace_rule") == name) & one for name, one in gets.items())
    share = pl.when(pl.col("trace_rule") == "every").then(pl.col("_n")).otherwise(1)
    spread = of_trace.join(traces, on="trace_id", how="inner").filter(kinds)
    found.append(spread.with_columns(w=pl.col("w") / share).select(wanted))
    about = pl.concat(found)
    itself = own.filter(pl.col("row").is_in(about["row"].unique().implode())).with_columns(
        time=pl.lit(None, about.schema["time"]), _signal=pl.lit(None, about.schema["_signal"])
    )
    newest = (
        pl.concat([itself.select(wanted), about])
        .sort("time", "_signal", nulls_last=False, maintain_order=True)
        .group_by("row", "source", maintain_order=True)
        .last()
        .sort("row", "source")
    )
    return newest.select("row", "source", "q", "w"), about["_signal"].unique(), ambiguous


def _of_request(rows: pl.DataFrame, signals: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series]:
    """The signals with the one `row` of their request that they can be about, and those with several such rows."""
    other = ("response_id", "trace_id", "model")
    found = signals.join(rows.select("row", "request_id", *other), on="request_id", how="inner", suffix="_of")
    several = pl.len().over("_signal") > 1
    for name in other:
        # What a signal does not say, or says of no row, tells none apart.
        fits = (pl.col(name) == pl.col(f"{name}_of")).fill_null(False)
        found = found.filter(~several | fits | ~fits.any().over("_signal"))
    return found.filter(~several), found.filter(several)["_signal"].unique()


def _names(key: str, before: Sequence[str]) -> pl.Expr:
    return pl.col(key).is_not_null() & pl.all_horizontal(pl.lit(True), *(pl.col(name).is_null() for name in before))
