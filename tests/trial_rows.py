"""Trials of a comparison made by hand, shared by its tests."""

from __future__ import annotations

from typing import Any

from kpsvd_tune.report.comparison import TrialRow


def row(
    method: str = "lora",
    budget: int = 100,
    rate: float = 1e-3,
    seed: int = 0,
    loss: float | None = 1.0,
    **changes: Any,
) -> TrialRow:
    values: dict[str, Any] = {
        "method": method,
        "budget": budget,
        "learning_rate": rate,
        "seed": seed,
        "rank": "2",
        "trainable_parameters": budget,
        "stored_parameters": budget,
        "validation_loss": loss,
        "validation_losses": ((0, 2.0), (10, 1.0 if loss is None else loss)),
        "test_loss": None if loss is None else loss + 0.1,
        "forgetting": 0.01,
        "losses": (2.0, 1.5, 1.2, 1.0),
        "grad_norms": (9.0, 2.0, 1.0, 0.5),
        "seconds_per_step": 2.0,
        "init_seconds": 4.0,
        "wall_seconds": 8.0,
        "peak_memory_bytes": 1000,
    }
    return TrialRow(**(values | changes))
