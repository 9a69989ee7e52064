"""The folder of a run: its checkpoints, and what makes it that run.

`directory` owns the layout; `listing` names checkpoints; `state` turns a training's state into
safetensors and JSON and back; `identity` tells two runs apart; `ownership` says whose a folder is.
"""

from __future__ import annotations

from kpsvd_tune.runs.directory import RunDirectory, Start
from kpsvd_tune.runs.listing import checkpoint_name
from kpsvd_tune.runs.state import (
    TrainingState,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
)

__all__ = [
    "RunDirectory",
    "Start",
    "TrainingState",
    "checkpoint_name",
    "load_optimizer_state",
    "load_random_state",
    "optimizer_state",
    "random_state",
]
