"""Stages that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kpsvd_tune.adapter import KpsvdConfig, load_factors
from kpsvd_tune.decompose import Progress
from kpsvd_tune.models import ModelSource, load_model, resolve_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import PreflightReport, RankReport, StepMetrics
from kpsvd_tune.units import time_left


class Events(Protocol):
    """What the pipeline tells whoever started it."""

    def stage(self, text: str) -> None:
        """Say what begins now."""

    def note(self, text: str) -> None:
        """Say something in passing."""

    def preflight(self, report: PreflightReport) -> None:
        """Show what will be trained on."""

    def ranks(self, report: RankReport) -> None:
        """Show the totals of the chosen ranks."""

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report one training step."""

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report progress of a phase."""

    def end_progress(self) -> None:
        """Close the bar that is open, if any."""


class SilentEvents:
    """Events that nobody watches."""

    def stage(self, text: str) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def preflight(self, report: PreflightReport) -> None:
        """Do nothing."""

    def ranks(self, report: RankReport) -> None:
        """Do nothing."""

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Do nothing."""

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Do nothing."""

    def end_progress(self) -> None:
        """Do nothing."""


def find_model(recipe: Recipe, offline: bool) -> ModelSource:
    """Resolve `model.path`, fetching it where needed."""
    return resolve_model(recipe.model.path, recipe.model.revision, offline)


def report_decomposition(events: Events) -> Any:
    """A progress callback for the decomposition."""

    def advance(progress: Progress) -> None:
        detail = f"energy so far {100 * progress.energy:.1f} %"
        if left := time_left(progress.seconds_left):
            detail += f", {left}"
        events.advance("decomposing", progress.done, progress.total, detail)

    return advance


def adapt(
    recipe: Recipe,
    source: ModelSource,
    layers: Mapping[str, Mapping[str, Any]],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base_files: Mapping[str, str] | None,
) -> PeftModel:
    """Load the base model and inject the adapter with the factors of the decomposition."""
    base = load_model(source, recipe.model.dtype, recipe.model.attn_implementation)
    adapter = recipe.adapter
    config = KpsvdConfig(
        task_type="CAUSAL_LM",
        target_modules=_plain(adapter.target_modules),
        exclude_modules=_plain(adapter.exclude_modules),
        factor_shape=_plain_shape(adapter.factor_shape),
        rank=adapter.rank.model_dump(exclude={"overrides", "tolerance"}),
        dropout=adapter.dropout,
        modules_to_save=list(adapter.modules_to_save) or None,
        path=adapter.path,
        seed=recipe.train.seed,
        layers={name: dict(layer) for name, layer in layers.items()},
        base_files=dict(base_files) if base_files is not None else None,
    )
    model = get_peft_model(base, config)
    load_factors(model, factors)
    # What a user can load again: the recipe's words, with a local path made independent of
    # the folder the command ran in.
    model.peft_config["default"].base_model_name_or_path = base_name(recipe.model.path)
    return model


def base_name(path: str) -> str:
    """How an adapter names its base: as the recipe does, local paths made absolute."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _plain_shape(shape: Any) -> str | dict[str, int]:
    return shape if isinstance(shape, str) else dict(shape)


def _plain(names: Any) -> Any:
    return list(names) if isinstance(names, (list, tuple)) else names


def device() -> torch.device:
    """Where single-process commands compute: the first GPU, or the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true":
        return torch.device("cuda")
    return torch.device("cpu")
