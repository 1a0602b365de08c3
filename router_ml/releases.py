"""What the registry holds of every version, looked at whole: its reign, its figures, what the gate said."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_ml.registry import connect, reported
from router_ml.reigns import history

if TYPE_CHECKING:
    from mlflow import MlflowClient

NEWEST = 50
REPORT = "evaluation/report.json"  # as `training.challenge_report` keeps it with a version's run
_JUDGED = (
    *("champion", "challenger", "n", "considered", "outcomes", "oldest", "newest", "confidence", "policies_in_force"),
    *("changed", "notes"),
)


def releases(uri: str, name: str) -> list[dict[str, Any]]:
    """The versions of `name` as JSON values, the newest first: all of `reigns.Past`, times in ISO 8601 (UTC).

    The `NEWEST`, and those that an alias points to, have more: `created_us`, `run_id`, their run's `metrics` by name,
    and `evaluated_us`, when `router-ml evaluate` or `promote` judged them last (microseconds since 1970). With an alias
    there is `evaluation`, too, what these kept: the rows that were judged, and each condition with its number, limit
    and sentence; null where it cannot be read. Raises RegistryError.
    """
    client = connect(uri)
    found = []
    with reported(uri):
        for position, past in enumerate(history(uri, name)):
            row = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in asdict(past).items()}
            if position < NEWEST or past.aliases:
                row |= _whole(client, uri, name, past.version, with_report=bool(past.aliases))
            found.append(row)
    return found


def _whole(client: MlflowClient, uri: str, name: str, version: str, *, with_report: bool) -> dict[str, Any]:
    """What stands beside a version's tags."""
    from mlflow.exceptions import MlflowException

    of = client.get_model_version(name, version)
    row: dict[str, Any] = {"created_us": int(of.creation_timestamp) * 1000, "run_id": of.run_id or None, "metrics": {}}
    if not of.run_id:
        return row
    try:
        row["metrics"] = dict(client.get_run(of.run_id).data.metrics)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return row  # somebody has deleted the run; the version stays
    if "evaluation/passed" in row["metrics"]:
        made = [metric.timestamp for metric in client.get_metric_history(of.run_id, "evaluation/passed")]
        row["evaluated_us"] = max(made, default=0) * 1000
        if with_report:
            row["evaluation"] = _evaluation(uri, of.run_id)
    return row


def _evaluation(uri: str, run_id: str) -> dict[str, Any] | None:
    """The main part of the report that is kept with a run; None for one that cannot be read any more."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="router-ml-") as folder:
        try:
            at = download_artifacts(run_id=run_id, artifact_path=REPORT, dst_path=folder, tracking_uri=uri)
            found = json.loads(Path(at).read_text(encoding="utf-8"))
        except (MlflowException, OSError, ValueError):
            return None
    if not isinstance(found, Mapping) or not isinstance(found.get("verdict"), Mapping):
        return None
    kept: dict[str, Any] = {key: found.get(key) for key in _JUDGED}
    return {**kept, **found["verdict"]}
