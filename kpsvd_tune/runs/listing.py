"""What checkpoints lie in a folder: their names, and which of them is the newer one.

A signal can stop a run between a step and its validation; the checkpoint is then named
`step-000100-pending`. The run that goes on from it first makes that validation. Where a run without
the signal would have saved the step, it commits `step-000100` beside the pending checkpoint, and
only then deletes that one. So it ends with the checkpoints of a run that was never stopped, and
there is a whole one at every moment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kpsvd_tune.storage import durable

_NAME = re.compile(r"step-(\d{6,})(-pending)?")


class Saved(NamedTuple):
    """One checkpoint, whole or not; the larger one is the newer."""

    step: int  # optimiser steps done
    is_settled: bool  # False for a pending one: its step is not done
    folder: Path


def checkpoint_name(step: int, is_pending: bool = False) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}{'-pending' if is_pending else ''}"


def list_saved(checkpoints: Path) -> list[Saved]:
    """Every checkpoint in a folder, newest first, whole or not."""
    found = []
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if match := _NAME.fullmatch(folder.name):
            found.append(Saved(int(match[1]), match[2] is None, folder))
    return sorted(found, reverse=True)


def clean(checkpoints: Path, newest: Path) -> None:
    """Delete pending checkpoints that a whole newer one replaced, and what kills left behind."""
    for old in list_saved(checkpoints):
        if not old.is_settled and old.folder.name != newest.name:
            durable.remove_folder(old.folder)
    durable.remove_leftovers(checkpoints, is_alone=True)
    for leftover in checkpoints.glob(".removed-*"):
        durable.remove_folder(leftover)


def abandon_newer(checkpoints: Path, chosen: Path) -> None:
    """Move newer checkpoints than `chosen` away: damaged ones, or of a path not taken."""
    saved = [each.folder for each in list_saved(checkpoints)]
    for newer in saved[: saved.index(chosen)]:
        abandoned = newer.with_name(f"abandoned-{newer.name}")
        if abandoned.exists():
            durable.remove_folder(abandoned)
        durable.rename(newer, abandoned)
