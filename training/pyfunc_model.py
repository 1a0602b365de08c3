"""The bundle as an `mlflow.pyfunc` model, logged from code. For data scientists; serving never goes this way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from features.load import load_router
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.registry import BUNDLE
from router_ml.router import Router
from router_ml.types import Message, RouteRequest

_TEXTS = (
    "tier",
    "objective",
    "task",
    "tenant",
    "key",
    "session",
    "previous_model",
    "request_id",
    "data_class",
    "region",
)
_NUMBERS = ("min_probability", "quality_threshold", "willingness_to_pay_usd", "max_cost_usd")
_INTEGERS = ("max_tokens", "tools", "tools_chars")
_LISTS = ("needs", "candidates")
_KNOWN = ("prompt", *_TEXTS, *_NUMBERS, *_INTEGERS, *_LISTS)


class RouterModel(PythonModel):
    """Routes every row of a frame under the default policy, which does not explore: a frame gives one answer."""

    router: Router

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the bundle, checked against its hashes."""
        self.router = load_router(context.artifacts[BUNDLE])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row per row of `model_input`, a pandas or polars frame with the column `prompt`.

        Optional columns are the dial (`tier` or `min_probability`, `max_cost_usd`) and the other fields of a
        RouteRequest; an empty cell leaves its field out. The answer has `model`, `p_ok`, `expected_cost_usd`,
        `expected_total_cost_usd`, `meets_threshold` and `reason` of the choice (where no model is eligible: None, NaN,
        NaN, NaN, False and why), then one column `p_ok/<model>` per model of the catalogue, in its
        order. Raises InputError for a missing or unknown column and for a bad value.
        """
        frame = _frame(model_input)
        rows = [self._row(position, row) for position, row in enumerate(frame.to_dict("records"))]
        columns = ["model", "p_ok", "expected_cost_usd", "expected_total_cost_usd", "meets_threshold", "reason"]
        columns += [f"p_ok/{model}" for model in self.router.catalog.ids]
        return pd.DataFrame.from_records(rows, columns=columns, index=frame.index)

    def _row(self, position: int, row: dict[str, Any]) -> tuple[Any, ...]:
        try:
            request = _request(row)
            decision, estimate = self.router.decide_with_estimate(request)
        except NoEligibleModelError as error:
            why = "; ".join(f"{model}: {reason}" for model, reason in error.excluded.items())
            return (None, np.nan, np.nan, np.nan, False, why, *self.router.estimator.estimate(request).p_ok.tolist())
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"row {position}: {error}") from None
        chosen = decision.chosen
        return (
            chosen.model,
            chosen.p_ok,
            chosen.expected_cost_usd,
            chosen.expected_total_cost_usd,
            decision.meets_threshold,
            decision.reason,
            *estimate.p_ok.tolist(),
        )


def _frame(data: Any) -> pd.DataFrame:
    if not isinstance(data, pd.DataFrame):
        to_pandas = getattr(data, "to_pandas", None)
        data = to_pandas() if to_pandas else pd.DataFrame(data)
    if "prompt" not in data.columns:
        raise InputError("the frame has no column 'prompt': it holds the text of each request")
    unknown = [str(name) for name in data.columns if name not in _KNOWN]
    if unknown:
        raise InputError(
            f"the frame has a column {unknown[0]!r} that is not a request's: known are {', '.join(_KNOWN)}"
        )
    return data


def _request(row: dict[str, Any]) -> RouteRequest:
    given = {name: value for name, value in row.items() if not _empty(value)}
    if not isinstance(given.get("prompt"), str):
        raise InputError("'prompt' has to be a text")
    fields: dict[str, Any] = {name: str(given[name]) for name in _TEXTS if name in given}
    fields |= {name: float(given[name]) for name in _NUMBERS if name in given}
    fields |= {name: int(given[name]) for name in _INTEGERS if name in given}
    for name in _LISTS:
        if name in given:
            if isinstance(given[name], str):
                raise InputError(f"{name!r} has to be a list of names, not one text")
            fields[name] = tuple(given[name])
    if "needs" in fields:
        fields["needs"] = frozenset(fields["needs"])
    return RouteRequest(messages=(Message("user", given["prompt"]),), **fields)


def _empty(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and bool(np.isnan(value)))


set_model(RouterModel())
