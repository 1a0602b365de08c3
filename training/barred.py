"""Which models a log's requests may go to by what is declared of both, and what it is that bars the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError

BoolArray = npt.NDArray[np.bool_]
Declared = Mapping[str, str]
"""What holds of some requests, by "task=NAME", "tenant=NAME" or "*" (all); later entries override earlier ones."""


@dataclass(frozen=True, eq=False)
class Bars:
    """What bars a model from a request, bool [n, m] each: its data class or region, what it can do, the candidates.

    `data_class` is what is known of each request, null where nothing is.
    """

    catalog: Catalog
    data_class: pl.Series
    residency: BoolArray
    capability: BoolArray
    listed: BoolArray

    @property
    def may(self) -> BoolArray:
        """Whether a request may go to a model, bool [n, m]."""
        return ~(self.residency | self.capability | ~self.listed)

    def why(self, rows: npt.NDArray[np.int64], model: int) -> tuple[str, str]:
        """(kind, sentence) of what bars most of these requests from a model; kinds are those of `advice.Keeps`.

        Where candidates alone bar it, the kind is what all models that they do allow have and this one has not.
        """
        card, share = self.catalog.cards[model], f"{1.0 - self.may[rows, model].mean():.0%} of the requests may not go:"
        counts = Counter(
            {
                "residency": int(self.residency[rows, model].sum()),
                "capability": int((self.capability & ~self.residency)[rows, model].sum()),
                "allow-list": int((~self.listed & ~self.residency & ~self.capability)[rows, model].sum()),
            }
        )
        kind = counts.most_common(1)[0][0]
        if kind == "residency":
            classes = self.data_class.gather(rows).drop_nulls().unique().sort().to_list()
            outside = [name for name in classes if name not in card.data_classes]
            if outside:
                return kind, f"{share} it is not cleared for data class {outside[0]!r}"
            return kind, f"{share} it is not in their region (it is in {', '.join(sorted(card.regions)) or 'none'})"
        if kind == "capability":
            return kind, f"{share} they need tools or a window that it does not have"
        shut = rows[~self.listed[rows, model]]
        others = [self.catalog.cards[j] for j in np.flatnonzero(self.listed[shut].any(axis=0))]
        for name, field in (("residency", "regions"), ("residency", "data_classes"), ("capability", "capabilities")):
            common = frozenset.intersection(*(getattr(other, field) for other in others)) if others else frozenset()
            lacks = common - getattr(card, field)
            if lacks and not (field == "regions" and common & card.regions):
                what = {"regions": "in", "data_classes": "cleared for"}.get(field, "able to do")
                return name, f"{share} it is not {what} {', '.join(sorted(lacks))}, as all of their candidates are"
        return "allow-list", f"{share} it is not among their candidates"


def bars_of(
    log: pl.DataFrame, catalog: Catalog, *, data_classes: Declared | None = None, regions: Declared | None = None
) -> Bars:
    """What bars each model of the catalogue from each request of a log (one row a request).

    A log's `candidates` bind wherever there are any; its columns `data_class` and `region`, where a frame has them, and
    what is declared of tasks and tenants bind beside them, as cards say what models are cleared for. Tools in a
    request need the capability, and input and output have to fit the window. Raises InputError for a declaration that
    is not of the form "task=NAME", "tenant=NAME" or "*".
    """
    data_class, region = _known(log, "data_class", data_classes), _known(log, "region", regions)
    tools = log.select((pl.col("tools").str.len_chars() > 2).fill_null(False)).to_series().to_numpy()
    size = log.select(pl.sum_horizontal(pl.col("input_tokens", "output_tokens").fill_null(0))).to_series().to_numpy()
    lists = log["candidates"]
    shape = len(log), len(catalog)
    residency, capability, listed = np.zeros(shape, bool), np.zeros(shape, bool), np.ones(shape, bool)
    for j, card in enumerate(catalog):
        for known, cleared in ((data_class, card.data_classes), (region, card.regions)):
            residency[:, j] |= (known.is_not_null() & ~known.is_in(sorted(cleared))).fill_null(False).to_numpy()
        capability[:, j] = size > card.context_window
        if "tools" not in card.capabilities:
            capability[:, j] |= tools
        listed[:, j] = lists.list.contains(card.id).fill_null(True).to_numpy()
    return Bars(catalog, data_class, residency, capability, listed)


def _known(log: pl.DataFrame, column: str, declared: Declared | None) -> pl.Series:
    value = pl.col(column).cast(pl.String) if column in log.columns else pl.lit(None, pl.String)
    for of, said in (declared or {}).items():
        name, equals, wanted = of.partition("=")
        if of != "*" and (not equals or name not in ("task", "tenant")):
            raise InputError(f"{column.replace('_', ' ')} of {of!r}: write task=NAME, tenant=NAME or *")
        value = pl.lit(said) if of == "*" else pl.when(pl.col(name) == wanted).then(pl.lit(said)).otherwise(value)
    return log.select(pl.lit(None, pl.String).alias("nothing"), value.alias("known"), "request_id")["known"]
