"""What the stages of a training share, instead of long lists of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.evaluation.kept_text import KeptText
from kpsvd_tune.evaluation.sandbox.run import Sandbox
from kpsvd_tune.models import ModelSource
from kpsvd_tune.phase import Phase
from kpsvd_tune.recipe import DatasetRecipe, Recipe
from kpsvd_tune.report.live_page import LivePage
from kpsvd_tune.runs.directory import RunDirectory, Start
from kpsvd_tune.runs.record import RunEvents
from kpsvd_tune.usage import Usage


@dataclass(frozen=True)
class RunOptions:
    """What was typed for one start of a run, beside its recipe."""

    resume: str = "auto"  # auto, never, or the path of a checkpoint
    allow_change: Sequence[str] = ()  # recipe keys that may differ from those the run began with
    allow_other_base: bool = False  # go on from an adapter (`adapter.from`) of another base model
    # For programs, which an evaluation on mbpp runs; None: they may not run.
    sandbox: Sandbox | None = None
    began: float | None = None  # when the command began, by `time.monotonic`; None: now


@dataclass(frozen=True)
class Context:
    """One training in this process."""

    recipe: Recipe
    run: RunDirectory  # the run's folder; the main process holds its lock
    accelerator: Accelerator  # the processes and their devices
    events: RunEvents  # told of stages, notes, warnings and progress; keeps them in the run
    phase: Phase  # what the command does now, for messages
    options: RunOptions = field(default_factory=RunOptions)  # what was typed
    usage: Usage = field(default_factory=Usage)  # time and energy since the command began
    going_on: str | None = None  # to be told once the run goes on: what was fitted for that
    about: Mapping[str, Any] = field(default_factory=dict)  # of the machine, for run.json
    page: LivePage = field(init=False)  # the run's report, kept up to date

    def __post_init__(self) -> None:
        """Make the page of the run's folder; the main process writes it."""
        page = LivePage(self.run.path, is_writer=self.accelerator.is_main_process)
        object.__setattr__(self, "page", page)


@dataclass(frozen=True)
class RunInput:
    """What a run is made of."""

    source: ModelSource  # of the base model
    base_files: Mapping[str, str]  # hashes of its files
    # The base's, with the chat template that the rows were written with.
    tokenizer: PreTrainedTokenizerBase
    # The recipe's section, with the template that the rows turned out to take.
    dataset: DatasetRecipe
    train: Sequence[TokenizedRow]  # rows to learn from
    validation: Sequence[TokenizedRow]  # held-out rows; may be empty
    pad_token_id: int  # fills short rows
    num_steps: int  # optimiser steps of the whole run
    adapter: Path | None  # the folder of the adapter to go on from; None to decompose the base
    start: Start  # where the run begins or goes on
    kept_text: KeptText | None  # that of `restrain`
