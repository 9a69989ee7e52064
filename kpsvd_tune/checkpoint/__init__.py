"""The run directory: what a run writes, committed so that a crash at any moment loses nothing.

`durable` holds the disk operations; `commit` makes a folder whole or absent; `listing` names
checkpoints; `state` turns a training's state into safetensors and JSON and back; `identity` tells
two runs apart; `lock` keeps a second run out of a folder; `run` owns the layout. No pickle is
written or read.
"""

from __future__ import annotations

from kpsvd_tune.checkpoint.commit import (
    MANIFEST,
    check_sealed,
    commit,
    manifest,
    read_committed,
)
from kpsvd_tune.checkpoint.durable import replace_file, to_json
from kpsvd_tune.checkpoint.listing import checkpoint_name
from kpsvd_tune.checkpoint.run import RunDirectory, Start
from kpsvd_tune.checkpoint.state import (
    TrainingState,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
)

__all__ = [
    "MANIFEST",
    "RunDirectory",
    "Start",
    "TrainingState",
    "check_sealed",
    "checkpoint_name",
    "commit",
    "load_optimizer_state",
    "load_random_state",
    "manifest",
    "optimizer_state",
    "random_state",
    "read_committed",
    "replace_file",
    "to_json",
]
