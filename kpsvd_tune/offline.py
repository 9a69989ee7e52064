"""Whether the network may be used: one setting, which the libraries read at their import."""

from __future__ import annotations

import os

# As huggingface_hub reads its own variable.
_TRUE = ("1", "ON", "YES", "TRUE")


def go_offline() -> None:
    """Forbid network calls to this process and those it starts, before the libraries are there."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"


def is_offline(*variables: str) -> bool:
    """Whether one of the variables, by default HF_HUB_OFFLINE, forbids the network.

    `datasets` has a variable of its own.
    """
    names = variables or ("HF_HUB_OFFLINE",)
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)
