"""Checkpoints of a training: taking one, going on from one, going back to one."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from kpsvd_tune.errors import CheckpointError, NonFiniteError
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.directory import RunDirectory, checkpoint_name
from kpsvd_tune.runs.state import TrainingState, load_random_state, random_state
from kpsvd_tune.training.fallback import is_good
from kpsvd_tune.training.optim import knows_state
from kpsvd_tune.training.progress import Progress, retry_or_refuse
from kpsvd_tune.training.step import Stepper
from kpsvd_tune.watch.telling import fallback

_log = logging.getLogger(__name__)


class Saving:
    """Commits checkpoints of one training and puts it back to one; the main process writes."""

    def __init__(
        self, stepper: Stepper, run: RunDirectory, accelerator: Accelerator, recipe: TrainRecipe
    ) -> None:
        self._stepper, self._run = stepper, run
        self._accelerator, self._recipe = accelerator, recipe
        self._newest: str | None = None
        self.saved_step: int | None = None  # of the newest checkpoint

    def start(self, checkpoint: Path | None) -> Progress:
        """Seed all generators, or put everything back to a checkpoint."""
        if checkpoint is not None:
            return self._restore(checkpoint, None)
        _seed_everything(self._recipe.seed, self._accelerator.process_index, 0)
        return Progress()

    def save(self, progress: Progress) -> None:
        """Commit a checkpoint of this step, unless there is one; all processes must ask.

        One whose validation is to come (`progress.pending`) does not stand in for the finished.
        """
        is_pending = progress.pending is not None
        name = checkpoint_name(progress.step, is_pending)
        if name == self._newest:
            return
        generators = gather_object([random_state(self._stepper.devices())])
        parts = self._stepper.state()

        def commit() -> None:
            state = TrainingState(
                step=progress.step, random=generators, progress=asdict(progress), **parts
            )
            keep, best = self._recipe.keep_checkpoints, progress.best_step
            # The start is always good to go back to.
            keeps_first = "lower_rate" in self._recipe.fallback
            self._run.save(state, keep, best, is_pending=is_pending, keep_first=keeps_first)

        on_main_process(commit)
        self._newest, self.saved_step = name, progress.step

    def go_back(self, progress: Progress, error: NonFiniteError) -> tuple[Progress, Event]:
        """Return to a checkpoint with a lower learning rate, and give what to tell of it.

        With `train.on_nonfinite: retry` that is the newest one, with `train.fallback` the newest of
        when the run was well. Raises `error` where the retries are used up.
        """
        num_retries, rate_factor = retry_or_refuse(error, progress, self._recipe)
        accept = partial(is_good, now=progress) if self._recipe.fallback else None
        checkpoint = on_main_process(lambda: self._run.rewind(accept))
        told = fallback(
            "lower_rate",
            f"{error}. Going back to {checkpoint.name} with {rate_factor:g} times the learning "
            f"rate (retry {num_retries} of {self._recipe.nonfinite.max_retries})",
            "Start the next run with a lower train.learning_rate.",
            progress.step,
            checkpoint=checkpoint.name,
            rate_factor=rate_factor,
            retry=num_retries,
        )
        restored = self._restore(checkpoint, rate_factor)
        restored.num_retries, restored.rate_factor = num_retries, rate_factor
        # There is no more memory after going back than before.
        restored.micro_batch_size = progress.micro_batch_size
        restored.num_halvings = progress.num_halvings
        return restored, told

    def take_weights(self, step: int) -> None:
        """Give the model the trained weights of an earlier step; all processes must ask."""
        try:
            state = self._run.load(self._run.checkpoints / checkpoint_name(step))
        except CheckpointError as error:
            raise CheckpointError(
                f"train.keep is best, and the checkpoint of the best step cannot be used: {error}. "
                "The last step is saved: train.keep=last --allow-change train.keep makes the "
                "adapter of that one"
            ) from error
        self._stepper.load_weights(state.offsets)

    def _restore(self, checkpoint: Path, rate_factor: float | None) -> Progress:
        state = self._run.load(checkpoint)
        progress = Progress(**state.progress)
        factor = progress.rate_factor if rate_factor is None else rate_factor
        optimizer: dict[str, Any] | None = state.optimizer
        num_dims = {name: len(shape) for name, shape in self._stepper.shapes.items()}
        if not knows_state(self._recipe, state.optimizer["state"], num_dims):
            optimizer = None
            if self._accelerator.is_main_process:
                _log.warning(
                    "the optimiser state of %s does not fit train.optimizer: %s with its present "
                    "arguments, so the optimiser starts with a fresh state",
                    checkpoint.name,
                    self._recipe.optimizer,
                )
        self._stepper.load_state(state.offsets, optimizer, state.scheduler, factor)
        self._newest, self.saved_step = checkpoint.name, state.step
        index = self._accelerator.process_index
        if len(state.random) == self._accelerator.num_processes:
            load_random_state(state.random[index])
        else:
            # Another number of processes was allowed: none of the saved states fits.
            _seed_everything(self._recipe.seed, index, state.step)
        return progress


def _seed_everything(seed: int, process_index: int, step: int) -> None:
    """Seed every generator, each process apart, for they should not drop out the same units."""
    digest = hashlib.sha256(f"train {seed} {process_index} {step}".encode()).digest()
    number = int.from_bytes(digest[:4], "big")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
