"""Outcome matrices: one row a prompt, and beside it every model's outcome."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_schema import convert
from router_ml.log_writer import keep_rejects, too_many_rejects
from router_ml.rawfiles import REASON, REJECT_SCHEMA, ROW, read_frames, rejected
from router_ml.types import FloatArray

CHARS_PER_TOKEN = 4
_OUTCOMES = ("correct", "quality")
_BESIDE = ("cost_usd", "output_tokens", "output_chars")
_TEXTS = ("prompt", "category", "split", "session", "question_id", "id")
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OutcomeMatrix:
    """Outcomes of n prompts on m models, in catalogue order. NaN is an outcome or a number that was not published.

    `rows`: the prompts' 1-based row numbers in the file, int64 [n], for columns that are not read here;
    `quality`, `output_tokens`: float32 [n, m]; `cost_usd`: float64 [n, m], or None where the file has no costs;
    `category`, `session`, `split`: str or None, object [n], or None where the file has no such column; `rejects`: the
    file's rows that were set aside (`REJECT_SCHEMA`).
    """

    rows: npt.NDArray[np.int64]
    ids: list[str]
    prompts: list[str]
    models: tuple[str, ...]
    quality: FloatArray
    output_tokens: FloatArray
    cost_usd: Array | None
    category: npt.NDArray[np.object_] | None
    session: npt.NDArray[np.object_] | None
    split: npt.NDArray[np.object_] | None
    rejects: pl.DataFrame

    def __len__(self) -> int:
        return len(self.prompts)


def read_matrix(
    file: str | Path,
    catalog: Catalog,
    split: str | None = None,
    *,
    max_reject_share: float = 0.05,
    keep_beside: str | Path | None = None,
) -> OutcomeMatrix:
    """Reads an outcome matrix from parquet, csv or jsonl; with `split`, the rows whose `split` column has that value.

    Columns: `prompt`, and per model `correct/<model>` (0 or 1) or `quality/<model>` in [0, 1]; optionally `category`,
    `split`, `session`, `question_id` or `id`, and per model `cost_usd/<model>`, `output_tokens/<model>` or
    `output_chars/<model>`. Others are ignored. Raises InputError for a model that the catalogue does not list, for a
    file without prompts or outcomes, and when more than `max_reject_share` of the rows are bad; the rejects are then
    kept as `KEEP_BESIDE.rejects.parquet`.
    """
    chunks = list(read_frames(file, _dtype))
    names = list(dict.fromkeys(n for c in chunks for n in c.frame.columns if _dtype(n) is not None))
    models = _models(file, names, catalog)
    if split is not None and "split" not in names:
        raise InputError(f"{file} has no column 'split': leave out the split {split!r}, or add the column")
    schema = {name: dtype for name in names if (dtype := _dtype(name)) is not None}
    good: list[pl.DataFrame] = []
    rejects: list[pl.DataFrame] = []
    splits: set[str] = set()
    seen_ids: set[str] = set()
    for chunk in chunks:
        frame = chunk.frame.with_columns(
            pl.col(name).str.to_lowercase().replace({"true": "1", "false": "0"})
            for name, dtype in chunk.frame.schema.items()
            if name.startswith("correct/") and dtype == pl.String
        )
        if split is not None and "split" in frame.columns:
            of_row = convert(frame, {"split": pl.String()})[0]["split"]
            splits |= set(of_row.drop_nulls())
            frame = frame.filter(of_row == split)
        rows, bad_rows = _check(frame, schema, models, seen_ids)
        good.append(rows)
        rejects += [chunk.rejects, bad_rows]
    table = pl.concat(good) if good else pl.DataFrame(schema=pl.Schema(schema))
    aside = pl.concat([pl.DataFrame(schema=REJECT_SCHEMA), *rejects]).sort("row")
    seen = table.height + aside.height
    if aside.height > max_reject_share * seen:
        reasons = Counter(aside["reason"].str.split("; ").explode().to_list())
        kept = keep_rejects(aside, keep_beside) if keep_beside is not None else None
        raise InputError(too_many_rejects(aside.height, seen, max_reject_share, reasons, kept))
    if not table.height:
        found = f"; it has the splits {', '.join(sorted(splits))}" if splits else ""
        raise InputError(f"{file} has no rows{f' of split {split!r}' if split is not None else ''}{found}")
    return _matrix(table, models, aside)


def _dtype(name: str) -> pl.DataType | None:
    if name in _TEXTS:
        return pl.String()
    kind, slash, _ = name.partition("/")
    return pl.Float64() if slash and kind in (*_OUTCOMES, *_BESIDE) else None


def _models(file: str | Path, names: Sequence[str], catalog: Catalog) -> tuple[str, ...]:
    if "prompt" not in names:
        raise InputError(f"{file} has no column 'prompt': an outcome matrix has one row a prompt; rename the column")
    of_kind = {
        kind: [name.partition("/")[2] for name in names if name.startswith(f"{kind}/")]
        for kind in (*_OUTCOMES, *_BESIDE)
    }
    models = set(of_kind["correct"]) | set(of_kind["quality"])
    if not models:
        raise InputError(f"{file} has no outcomes: add a column 'correct/<model>' or 'quality/<model>' for each model")
    if twice := sorted(set(of_kind["correct"]) & set(of_kind["quality"])):
        raise InputError(f"{file} has both 'correct/{twice[0]}' and 'quality/{twice[0]}': keep one of them")
    for kind in _BESIDE:
        if alone := sorted(set(of_kind[kind]) - models):
            raise InputError(
                f"{file}: '{kind}/{alone[0]}' has no 'correct/{alone[0]}' or 'quality/{alone[0]}' beside it"
            )
    if unknown := sorted(models - set(catalog.ids)):
        raise InputError(
            f"{file} has outcomes of models that the catalogue does not list: {', '.join(unknown)}; "
            "add their cards to the catalogue, or drop their columns"
        )
    return tuple(model for model in catalog.ids if model in models)


def _check(
    frame: pl.DataFrame, schema: dict[str, pl.DataType], models: Sequence[str], seen_ids: set[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(good rows cast to `schema`, rejects); `seen_ids` takes up the good rows' ids."""
    rows, lost = convert(frame, schema)
    kept = {name: pl.lit(~lost[name]) if name in lost else pl.lit(True) for name in schema}
    checks = {
        "missing prompt": pl.col("prompt").is_null() & kept["prompt"],
        "empty prompt": pl.col("prompt").str.strip_chars() == "",
    }
    for name in schema:
        kind = name.partition("/")[0]
        if kind == "correct":
            checks[f"{name} is not 0 or 1"] = ~pl.col(name).is_in([0.0, 1.0])
        elif kind == "quality":
            checks[f"{name} outside [0, 1]"] = ~pl.col(name).is_between(0, 1)
        elif kind in _BESIDE:
            checks[f"{name} negative or not finite"] = ~(pl.col(name).is_finite() & (pl.col(name) >= 0))
    outcomes = [name for name in schema if name.partition("/")[0] in _OUTCOMES]
    checks["no outcome"] = pl.all_horizontal(pl.col(name).is_null() & kept[name] for name in outcomes)
    key = _id_column(schema)
    if key is not None:
        checks[f"missing {key}"] = (pl.col(key).is_null() | (pl.col(key) == "")) & kept[key]
    masks = rows.select(check.fill_null(False).alias(reason) for reason, check in checks.items())
    reasons = {reason: masks[reason] for reason in checks}
    reasons |= {f"wrong type: {name}": mask for name, mask in lost.items()}
    known = [frame[REASON].is_not_null()] if REASON in frame.columns else []
    ok = ~reduce(operator.or_, [*reasons.values(), *known])
    rows = rows.with_columns(frame[ROW])
    if key is None:
        rows = rows.with_columns(id=pl.lit("row-") + frame[ROW].cast(pl.String).str.zfill(7))
    else:
        at = rows.select(key, at=pl.int_range(pl.len()), ok=pl.lit(ok))
        first = at.select(pl.col("at").filter("ok").min().over(key)).to_series()
        again = (first < at["at"]) | rows[key].is_in(list(seen_ids))
        reasons[f"duplicate {key}"] = again.fill_null(False)
        ok &= ~reasons[f"duplicate {key}"]
        seen_ids |= set(rows[key].filter(ok))
    return rows.filter(ok), rejected(frame, reasons)


def _id_column(names: Iterable[str]) -> str | None:
    return next((name for name in ("question_id", "id") if name in names), None)


def _matrix(table: pl.DataFrame, models: tuple[str, ...], rejects: pl.DataFrame) -> OutcomeMatrix:
    def numbers(*kinds: str) -> Array:
        result = np.full((table.height, len(models)), np.nan)
        for at, model in enumerate(models):
            have = [
                pl.col(f"{kind}/{model}") / (CHARS_PER_TOKEN if kind == "output_chars" else 1)
                for kind in kinds
                if f"{kind}/{model}" in table.columns
            ]
            if have:
                result[:, at] = table.select(pl.coalesce(*have).fill_null(np.nan)).to_series().to_numpy()
        return result

    def texts(name: str) -> npt.NDArray[np.object_] | None:
        return np.array(table[name].to_list(), dtype=object) if name in table.columns else None

    return OutcomeMatrix(
        rows=table[ROW].to_numpy(),
        ids=table[_id_column(table.columns) or "id"].to_list(),
        prompts=table["prompt"].to_list(),
        models=models,
        quality=numbers("correct", "quality").astype(np.float32),
        output_tokens=numbers("output_tokens", "output_chars").astype(np.float32),
        cost_usd=numbers("cost_usd") if any(name.startswith("cost_usd/") for name in table.columns) else None,
        category=texts("category"),
        session=texts("session"),
        split=texts("split"),
        rejects=rejects,
    )
