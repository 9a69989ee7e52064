"""Figures of a run or a plan under names and in units for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.units import duration, size

_NAMES = {
    "validation_loss": "validation loss",
    "validation_loss_before": "the same before training",
    "best_step": "lowest at step",
    "train_loss": "training loss, last steps",
    "steps": "steps",
    "trainable_parameters": "trainable parameters",
    "wall_seconds": "time",
    "peak_memory_bytes": "peak memory",
}


def result_figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of results.json, those that a reader looks for first in front.

    A loss that repeats one above it is left out, and so is what a run was not: worse.
    """
    order = [key for key in _NAMES if key in results]
    shown: dict[str, Any] = {}
    for key in (*order, *results):
        value = results[key]
        is_repeated = key.endswith("_validation_loss") and value in shown.values()
        is_known = key == "adapter_step" and value == results.get("steps")
        if not (is_repeated or is_known or (key.startswith("worse_than_") and not value)):
            shown[key] = value
    return figures(shown)


def figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values to show, in the order given, without mappings and nulls."""
    return [
        (_NAMES.get(key, key.removesuffix("_bytes").replace("_", " ")), _text(key, value))
        for key, value in values.items()
        if value is not None and not isinstance(value, Mapping)
    ]


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.endswith("_bytes"):
            return size(value)
        if key.endswith("_seconds"):
            return duration(value)
        return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
