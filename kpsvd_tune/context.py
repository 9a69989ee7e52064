"""What the stages of a training share, instead of long lists of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.evaluation.sandbox.run import NO_CODE, CodePermission
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.phase import Phase
from kpsvd_tune.recipe import DatasetRecipe, Recipe
from kpsvd_tune.runs.directory import RunDirectory, Start


@dataclass(frozen=True)
class RunOptions:
    """What was typed for one start of a run, beside its recipe.

    Attributes:
        resume: auto, never, or the path of a checkpoint.
        allow_change: Recipe keys that may differ from those the run began with.
        allow_other_base: Go on from an adapter (`adapter.from`) of another base model.
        permission: To run programs, which an evaluation on mbpp needs.
    """

    resume: str = "auto"
    allow_change: Sequence[str] = ()
    allow_other_base: bool = False
    permission: CodePermission = NO_CODE


@dataclass(frozen=True)
class Context:
    """One training in this process.

    Attributes:
        recipe: The recipe.
        run: The run's folder; the main process holds its lock.
        accelerator: The processes and their devices.
        events: Told of stages, notes and progress.
        phase: What the command does now, for messages.
        options: What was typed.
    """

    recipe: Recipe
    run: RunDirectory
    accelerator: Accelerator
    events: Events
    phase: Phase
    options: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class RunInput:
    """What a run is made of.

    Attributes:
        source: The base model.
        base_files: Hashes of its files.
        tokenizer: The base's, with the chat template that the rows were written with.
        dataset: The recipe's section, with the template that the rows turned out to take.
        train: Rows to learn from.
        validation: Held-out rows; may be empty.
        pad_token_id: Fills short rows.
        num_steps: Optimiser steps of the whole run.
        adapter: The folder of the adapter to go on from; None to decompose the base.
        start: Where the run begins or goes on.
    """

    source: ModelSource
    base_files: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase
    dataset: DatasetRecipe
    train: Sequence[TokenizedRow]
    validation: Sequence[TokenizedRow]
    pad_token_id: int
    num_steps: int
    adapter: Path | None
    start: Start
