"""What a training run shows: plots, and its place in the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from router_ml import registry
from router_ml.bundle import read_bundle
from router_ml.errors import InputError, NoAliasError, NotRegisteredError
from router_ml.registry import ModelVersion
from training.evaluate import Frontier
from training.tracking import register_bundle
from training.train import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def publish(made: Training, bundle: Path, *, tracking_uri: str, name: str, alias: str | None = None) -> ModelVersion:
    """Registers a trained bundle in MLflow with its parameters, metrics and plots.

    Without an `alias` the first version becomes the champion and each later one the challenger; which it is, is decided
    once it is registered, so that a registry that fails meanwhile makes no champion. With the alias `champion` the same
    holds, and InputError is raised where there is one already (`check_alias`). Raises RegistryError.
    """
    check_alias(tracking_uri, name, alias)
    with tempfile.TemporaryDirectory() as folder:
        plots = [plot_calibration(made, Path(folder) / "calibration.png")]
        if made.frontier is not None:
            plots.append(plot_frontier(made.frontier, made.held_out.catalog.ids, Path(folder) / "frontier.png"))
        made_version = register_bundle(
            bundle,
            tracking_uri=tracking_uri,
            name=name,
            params=made.params,
            metrics=made.metrics,
            plots=plots,
            alias=None if alias == registry.CHAMPION else alias,
        )
    return _entered(made_version, tracking_uri, name, alias)


def publish_bundle(bundle: Path, *, tracking_uri: str, name: str, alias: str | None = None) -> ModelVersion:
    """Registers a bundle as it lies there, one that was onboarded or repriced, say, as `publish` does a trained one.

    The metrics are those of the training that it comes from. Raises BundleError, InputError and RegistryError.
    """
    check_alias(tracking_uri, name, alias)
    manifest = read_bundle(bundle).manifest
    made = register_bundle(
        bundle,
        tracking_uri=tracking_uri,
        name=name,
        params={"trained_until": manifest.get("trained_until")},
        metrics=manifest.get("metrics", {}),
        alias=None if alias == registry.CHAMPION else alias,
    )
    return _entered(made, tracking_uri, name, alias)


def _entered(made: ModelVersion, tracking_uri: str, name: str, alias: str | None) -> ModelVersion:
    if alias is None or alias == registry.CHAMPION:
        return registry.enter(tracking_uri, name, made.version)
    return made


def check_alias(tracking_uri: str, name: str, alias: str | None) -> None:
    """Raises InputError for the alias `champion` where there is one, which only the gate replaces; RegistryError."""
    registry.ensure_store(tracking_uri)
    if alias != registry.CHAMPION:
        return
    try:
        there = registry.resolve(tracking_uri, name, registry.CHAMPION)
    except (NoAliasError, NotRegisteredError):
        return
    raise InputError(
        f"{name} has a champion, version {there.version}, which a new version replaces only through the gate: train "
        f"without --alias champion, then router-ml promote {name}"
    )


def plot_frontier(front: Frontier, models: tuple[str, ...], to: Path) -> Path:
    """Quality against mean cost a request: the router's settings and each single model, by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(front.cost_usd)
    axes.plot(front.cost_usd[order] * 1000, front.quality[order], label="router, by willingness to pay")
    axes.plot(front.single_cost * 1000, front.single_quality, "o", color="tab:gray", label="single models")
    for x, y, model in zip(front.single_cost * 1000, front.single_quality, models, strict=True):
        axes.annotate(model, (float(x), float(y)), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("mean cost, USD per 1,000 requests")
    axes.set_ylabel("share of acceptable answers")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(to, dpi=120)
    return to


def plot_calibration(made: Training, to: Path) -> Path:
    """`calibration_figure` in a file."""
    calibration_figure(made).savefig(to, dpi=120)
    return to


def calibration_figure(made: Training) -> Figure:
    """Promised against realised probability in ten equal-mass bins per model, on held-out rows (else out of fold)."""
    from matplotlib.figure import Figure

    p_ok, labels = made.judged
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=1)
    for j, model in enumerate(made.held_out.catalog.ids):
        known = np.flatnonzero(~np.isnan(labels[:, j]))
        if len(known) < 20:
            continue
        bins = np.array_split(known[np.argsort(p_ok[known, j], kind="stable")], 10)
        axes.plot([p_ok[b, j].mean() for b in bins], [labels[b, j].mean() for b in bins], ".-", label=model)
    axes.set_xlabel("promised probability of an acceptable answer")
    axes.set_ylabel("realised share")
    axes.legend(fontsize=6)
    return figure
