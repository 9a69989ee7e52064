"""The training loop: what happens around each optimiser step, in which order, and where it goes on.

The order is fixed, and each part leaves a state from which the rest can be done again: take the
step, validate if it is time, log the line, commit a checkpoint if it is time, stop for a signal.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn

from kpsvd_tune.data import StatelessSampler, TokenizedRow, row_lengths
from kpsvd_tune.errors import NonFiniteError, StoppedBySignal
from kpsvd_tune.processes import gather_numbers, is_lost_process, peak_memory_bytes
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event, StepMetrics, TrainResult
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.signals import StopSignals
from kpsvd_tune.training.batches import MicroBatch, first_tokens, make_micro_batch, stream_steps
from kpsvd_tune.training.fallback import Diverged, choose, diverged, used_up
from kpsvd_tune.training.loss import validation_loss
from kpsvd_tune.training.packing import attend_by_rows, prove_packing
from kpsvd_tune.training.progress import (
    CURE,
    MicroStepOutOfMemory,
    check_skips,
    count_skip,
    give_memory_back,
    halve,
    memory_refused,
    rows_at_once,
)
from kpsvd_tune.training.saving import Saving
from kpsvd_tune.training.step import Stepper
from kpsvd_tune.training.tracking import Tracking
from kpsvd_tune.training.watching import Tell, Watching, log_event, log_idle, memory_of_process
from kpsvd_tune.units import counted, duration
from kpsvd_tune.watch.telling import fallback

# Steps whose mean time tells how long the running one takes.
_RECENT_STEPS = 10


class Training:
    """One training run: give it everything, iterate over `steps()`, then read `result()`.

    Making the object seeds python, numpy and torch, moves the model to the accelerator's device
    and, with a checkpoint, puts everything back to where that was taken. The loss of a step is
    the sum over the supervised tokens of its whole global batch (all micro steps, all processes)
    divided by their number.

    Raises:
        AdapterError: Nothing is trainable.
        CheckpointError: The checkpoint is damaged or does not fit the model.
        RecipeError: The recipe asks for what cannot be done with sharded weights (fsdp).
    """

    def __init__(
        self,
        model: nn.Module,  # a causal language model, usually a PEFT model
        train_rows: Sequence[TokenizedRow],
        validation_rows: Sequence[TokenizedRow],  # may be empty
        recipe: TrainRecipe,
        accelerator: Accelerator,  # from `make_accelerator`, with the same section
        run: RunDirectory,  # the main process writes there
        *,
        pad_token_id: int,  # any id will do, since padding is masked
        checkpoint: Path | None = None,  # as `RunDirectory.begin` said; None: from the first step
        settings: Mapping[str, Any] | None = None,  # for trackers; None: they get nothing
        rate_factors: Mapping[str, float] | None = None,  # of learning rates, by parameter; else 1
        loss_before: float | None = None,  # of the validation rows, where it is known already
        # Of warnings and fallbacks, by the main process; None, on all processes: nobody watches.
        tell: Tell | None = None,
    ) -> None:
        self._recipe, self._accelerator, self._run = recipe, accelerator, run
        self._train_rows, self._validation_rows = train_rows, validation_rows
        self._sampler = StatelessSampler(
            len(train_rows),
            recipe.batch_size,
            accelerator.num_processes,
            recipe.gradient_accumulation,
            recipe.seed,
            row_lengths(train_rows) if recipe.group_by_length else None,
        )
        # Optimiser steps of the whole run.
        self.num_steps = recipe.max_steps or self._sampler.num_steps(recipe.epochs)
        # A row alone is left as it is, so that any model will do.
        self._is_packed = recipe.packing and recipe.batch_size > 1
        self._make_batch = partial(
            make_micro_batch,
            pad_token_id=pad_token_id,
            pad_to_multiple_of=None if accelerator.device.type == "cpu" else 8,
            packing=self._is_packed,
        )
        if self._is_packed:
            attend_by_rows(model)
        example = self._make_batch([first_tokens(train_rows[0])]) if train_rows else None
        self._stepper = Stepper(model, recipe, accelerator, self.num_steps, rate_factors, example)
        self._signals = StopSignals(self._outlook, self._loss)
        self._signal = 0
        self._doing, self._doing_since = "", 0.0
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._saving = Saving(self._stepper, run, accelerator, recipe)
        self.progress = self._saving.start(checkpoint)
        if loss_before is not None and self.progress.step == 0:
            self.progress.validation_loss_before = self.progress.validation_loss = loss_before
        # Of earlier calls of this run.
        self.seconds_before = self.progress.seconds
        self._began = time.monotonic() - self.progress.seconds
        self._tracking = Tracking(accelerator, settings)
        self._tell = tell or log_event
        self._is_watched = tell is not None
        self._watching: Watching | None = None
        if self._is_watched and accelerator.is_main_process:
            self._watching = Watching(
                model,
                recipe,
                run,
                self._say,
                holds_weights=self._stepper.holds_weights,
            )

    def steps(self) -> Generator[StepMetrics, None, None]:
        """Train, giving the metrics of each step once the step is done, logged and saved.

        With `train.keep: best` the model has the weights of the best step when the last step was
        given, and those of the last step lie in its checkpoint.

        Raises:
            CheckpointError: A checkpoint to go back to, or that of the best step, cannot be read.
            NonFiniteError: A loss or gradient is infinite or NaN, and the recipe wants no skip or
                retry, or no more of them; the step was not taken.
            RecipeError: The rows are to be packed and this model cannot keep them apart.
            StoppedBySignal: SIGINT or SIGTERM came; the state was saved.
            ResourceError: The disk refused a checkpoint or a line of metrics.
        """
        with self._signals:
            try:
                yield from self._steps()
            except RuntimeError as error:
                # Another process may have been ended by the signal before it could handle it.
                if self._signals.requested and is_lost_process(error):
                    raise StoppedBySignal(self._signals.requested) from error
                raise
            finally:
                self._tracking.end()

    def result(self) -> TrainResult:
        """How the run ended; every process must ask, for the largest memory is looked up."""
        peak = gather_numbers(self._accelerator, [self._peak_memory_bytes()])
        progress = self.progress
        kept, kept_loss = progress.step, progress.validation_loss
        if self._keeps_best and progress.best_step is not None:
            kept, kept_loss = progress.best_step, progress.best_step_loss
        return TrainResult(
            train_loss=progress.train_loss,
            validation_loss=progress.validation_loss,
            validation_loss_before=progress.validation_loss_before,
            steps=progress.step,
            trainable_parameters=sum(map(math.prod, self._stepper.shapes.values())),
            wall_seconds=progress.seconds,
            peak_memory_bytes=int(max(each for (each,) in peak)),
            best_step=progress.best_step,
            best_validation_loss=progress.best_step_loss,
            train_loss_steps=len(progress.recent),
            adapter_step=kept,
            adapter_validation_loss=kept_loss,
        )

    def validate(self) -> float | None:
        """The validation loss of the model as it is now; None without rows. All must ask."""
        return self._measure() if self._validation_rows else None

    def halvings(self) -> dict[str, int]:
        """What `train.on_oom: halve` did, for results.json; empty where it did nothing."""
        if not self.progress.num_halvings:
            return {}
        return {
            "num_halvings": self.progress.num_halvings,
            "micro_batch_size": self._rows_at_once,
        }

    def mark(self, event: Event) -> None:
        """Mark a warning or a fallback in the trackers, at its step."""
        step = self.progress.step if event.step is None else event.step
        self._tracking.log({f"events/{event.code}": 1}, step)

    def fallbacks(self) -> dict[str, Any]:
        """How often what was done by itself, for results.json; empty where nothing was."""
        progress = self.progress
        counts = {
            "skip_batch": progress.num_skipped,
            "lower_rate": progress.num_retries,
            "keep_best": int(progress.keeps_best),
        }
        found = {way: count for way, count in counts.items() if count}
        return {"fallbacks": found} if found else {}

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained tensor by its name in the model, whole; all processes must ask."""
        return self._stepper.trained_weights()

    def free(self) -> None:
        """Give back the model's memory once all is saved; all processes must call it."""
        self._stepper.free()

    @property
    def _is_over(self) -> bool:
        return self.progress.is_stopped_early or self.progress.step >= self.num_steps

    @property
    def _keeps_best(self) -> bool:
        return self._recipe.keep == "best" or self.progress.keeps_best

    def _steps(self) -> Generator[StepMetrics, None, None]:
        progress = self.progress
        if self._is_packed and not self._is_over:
            indices = self._sampler.batch(progress.step, 0, self._accelerator.process_index)
            rows = [self._train_rows[index] for index in indices]
            prove_packing(self._stepper.token_loss, rows, self._accelerator)
        self._stepper.token_loss.train()
        if self._validation_rows and progress.step == 0 and progress.validation_loss_before is None:
            progress.validation_loss_before = progress.validation_loss = self._validate()
            self._stop_if_signalled()
        may_go_back = self._recipe.on_nonfinite == "retry" or "lower_rate" in self._recipe.fallback
        if may_go_back and progress.step == 0:
            # One of the first steps may fail, and needs a checkpoint to return to.
            self._save()
        batches, size = self._batches(), self._rows_at_once
        while True:
            if size != self._rows_at_once:
                # Outside the except block, whose traceback keeps the tensors of the failed pass.
                give_memory_back()
                batches.close()
                batches, size = self._batches(), self._rows_at_once
            try:
                # A signal may have come between a step and its validation, which is done now.
                pending = self.progress.pending_metrics()
                if pending is None and self._is_over:
                    break
                metrics = self._complete(pending or self._take_step(next(batches)))
            except NonFiniteError as error:
                self._recover(error)
                batches.close()
                batches = self._batches()
            except MicroStepOutOfMemory as error:
                self._say(halve(error, self._recipe, self.progress))
            else:
                yield metrics
        # A signal may have come while the last checkpoint was written.
        self._agree_on_signal()
        self._stop_if_signalled()
        best = self.progress.best_step
        if self._keeps_best and best is not None and best != self.progress.step:
            self._saving.take_weights(best)

    def _batches(self) -> Generator[list[MicroBatch], None, None]:
        """This process's batches from the next step on."""
        return stream_steps(
            self._train_rows,
            self._sampler,
            range(self.progress.step, self.num_steps),
            self._accelerator.process_index,
            self._make_batch,
            self._recipe.num_workers,
            self._rows_at_once,
        )

    @property
    def _rows_at_once(self) -> int:
        return rows_at_once(self._recipe, self.progress)

    def _take_step(self, batches: list[MicroBatch]) -> StepMetrics:
        began = time.monotonic()
        step = self.progress.step + 1
        self._begin("step")
        sums = self._stepper.take(
            step, batches, partial(self._rows_of, step), lambda: self._signals.requested
        )
        self._signal = sums.signal
        if sums.fault is not None:
            self._skip_or_raise(sums.fault, step)
        if self._watching is not None:
            self._watching.idle(sums.idle)
        elif sums.idle:
            log_idle(sums.idle, self._stepper.token_loss.model)
        now = time.monotonic()
        metrics = StepMetrics(
            step=step,
            epoch=self._sampler.epoch(step),
            loss=sums.loss / max(1.0, sums.num_supervised),
            learning_rate=sums.learning_rate,
            grad_norm=sums.grad_norm,
            tokens=sums.num_tokens,
            tokens_per_second=sums.num_tokens / max(now - began, 1e-9),
            seconds=now - self._began,
            skipped=sums.fault,
            micro_batch_size=self.progress.micro_batch_size,
            memory_bytes=self._peak_memory_bytes(),
        )
        self._step_seconds.append(now - began)
        self.progress.count_step(sums.loss, sums.num_supervised, metrics)
        return metrics

    def _peak_memory_bytes(self) -> int:
        """The most that this process has held; earlier sessions of the run count as well."""
        own = peak_memory_bytes(self._accelerator.device)
        return max(own, self.progress.peak_memory_bytes)

    def _complete(self, metrics: StepMetrics) -> StepMetrics:
        """Do all that follows a step; a signal leaves the validation to the resumed run."""
        recipe, progress, step = self._recipe, self.progress, metrics.step
        is_due = step == self.num_steps or _divides(recipe.eval_every, step)
        if is_due and self._validation_rows:
            loss = None if self._signal else self._validate()
            if loss is None:
                self._save()
                self._stop_if_signalled()
            else:
                progress.count_validation(loss, recipe.early_stopping)
                metrics = replace(metrics, validation_loss=loss)
        self._judge()
        progress.pending = None
        is_worth_a_line = metrics.validation_loss is not None or metrics.skipped is not None
        if self._is_over or is_worth_a_line or _divides(recipe.log_every, step):
            self._log(metrics)
        is_best = metrics.validation_loss is not None and progress.best_step == step
        is_saved = self._is_over or is_best or _divides(recipe.save_every, step)
        self._watch(metrics, is_checked=is_saved or metrics.validation_loss is not None)
        if is_saved or self._signal:
            self._save()
        progress.seconds = time.monotonic() - self._began
        self._stop_if_signalled()
        self._begin("end" if self._is_over else "step")
        return metrics

    def _watch(self, metrics: StepMetrics, *, is_checked: bool) -> None:
        """Show the step to the detectors; every process sends the memory that it has left."""
        memory = None
        if self._is_watched and is_checked:
            memory = gather_object([memory_of_process(self._accelerator.device)])
        if self._watching is not None:
            self._watching.step(metrics, memory)

    def _skip_or_raise(self, fault: str, step: int) -> None:
        """Count a step that is left out for `fault`, or raise NonFiniteError."""
        recipe, progress = self._recipe, self.progress
        way = choose(recipe, progress, is_divergence=False)
        if recipe.on_nonfinite != "skip" and way != "skip_batch":
            raise NonFiniteError(f"{fault}. {CURE}")
        count_skip(progress)
        check_skips(fault, progress, recipe)
        self._say(
            fallback(
                "skip_batch",
                f"{fault}; the step was skipped ({progress.skip_streak} in a row, "
                f"{progress.num_skipped} in all)",
                "Look at the rows that are named; if it happens again lower train.learning_rate.",
                step,
                in_a_row=progress.skip_streak,
                in_all=progress.num_skipped,
            )
        )

    def _judge(self) -> None:
        """Tell of a run that diverges, and do what `train.fallback` says of it."""
        recipe, progress = self._recipe, self.progress
        if not recipe.fallback and self._watching is None:
            return
        # The end of the run and early stopping leave nothing to decide.
        found = diverged(progress)
        if found is None:
            return
        self._say(found)
        way = None if self._is_over else choose(recipe, progress, is_divergence=True)
        if way == "lower_rate":
            raise Diverged(f"step {progress.step}: {found.text.rstrip('.')}")
        if way == "keep_best":
            self._end_with_best(found.text)

    def _recover(self, error: NonFiniteError) -> None:
        """Go back to a checkpoint or end with the best step; raise where nothing is left."""
        recipe, progress = self._recipe, self.progress
        way = "lower_rate" if recipe.on_nonfinite == "retry" else None
        if recipe.fallback:
            way = choose(recipe, progress, is_divergence=isinstance(error, Diverged))
            if way is None:
                raise NonFiniteError(f"{error}. {used_up(recipe, progress)}") from error
        if way is None:
            raise error
        if way == "keep_best":
            progress.pending = None
            self._end_with_best(f"{error}")
            self._save()
            return
        self.progress, told = self._saving.go_back(progress, error)
        self._say(told)
        if self._watching is not None:
            self._watching.start_again()

    def _end_with_best(self, why: str) -> None:
        progress = self.progress
        progress.is_stopped_early = progress.keeps_best = True
        self._say(
            fallback(
                "keep_best",
                f"{why.rstrip('.')}. The run ends here with the adapter of step "
                f"{progress.best_step}, the best one",
                "Start the next run with a lower train.learning_rate, or with fewer steps.",
                progress.step,
                best_step=progress.best_step or 0,
                best_validation_loss=progress.best_step_loss or 0.0,
            )
        )

    def _say(self, event: Event) -> None:
        """Tell an event, on the main process alone, and mark its step in the trackers."""
        if self._accelerator.is_main_process:
            self._tell(event)

    def _validate(self) -> float | None:
        """The validation loss; None where a signal ended the validation."""
        self._begin("validation")
        loss = self._measure()
        if loss is None:
            self._agree_on_signal()
        elif not math.isfinite(loss):
            raise NonFiniteError(
                f"step {self.progress.step}: the validation loss is {loss} while the training loss "
                "is finite. No checkpoint of this step was written. Try a lower "
                "train.learning_rate, or train.precision: no"
            )
        return loss

    def _measure(self) -> float | None:
        """The validation loss, with fewer rows at a time where memory runs out and may."""
        while True:
            try:
                with memory_refused(self._recipe, "measuring the validation loss"):
                    return validation_loss(
                        self._stepper.token_loss,
                        self._validation_rows,
                        self._rows_at_once,
                        self._accelerator,
                        self._make_batch,
                        lambda: bool(self._signals.requested),
                    )
            except MicroStepOutOfMemory as error:
                self._say(halve(error, self._recipe, self.progress))
            give_memory_back()

    def _agree_on_signal(self) -> None:
        own = [float(self._signals.requested)]
        self._signal = int(max(each for (each,) in gather_numbers(self._accelerator, own)))

    def _begin(self, what: str) -> None:
        self._doing, self._doing_since = what, time.monotonic()

    def _outlook(self) -> str:
        """What a signal leads to now; asked by another thread."""
        if self._doing == "validation":
            return "stopping this validation; the resumed run does it again"
        if self._doing != "step":
            return f"saving step {self.progress.step}"
        if not self._step_seconds:
            return f"finishing step {self.progress.step + 1}, the first one here, and saving"
        whole = sum(self._step_seconds) / len(self._step_seconds)
        left = max(1.0, whole - (time.monotonic() - self._doing_since))
        return f"finishing step {self.progress.step + 1}, about {duration(left)}, and saving"

    def _loss(self) -> str:
        """What a second signal loses."""
        saved = self._saving.saved_step
        lost = self.progress.step - (saved or 0)
        steps = counted(lost, "finished step")
        if saved is None:
            return f"{steps} and the running one are lost, for there is no checkpoint yet"
        return f"{steps} since the checkpoint of step {saved}, and the running one, are lost"

    def _stop_if_signalled(self) -> None:
        if self._signal:
            raise StoppedBySignal(self._signal)

    def _log(self, metrics: StepMetrics) -> None:
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        if self._accelerator.is_main_process:
            # JSON has no infinity, which a loss scaler's skipped step may show as its norm.
            self._run.log(
                {
                    name: None if isinstance(value, float) and not math.isfinite(value) else value
                    for name, value in values.items()
                }
            )
        self._tracking.log(values, values.pop("step"))

    def _save(self) -> None:
        self._begin("saving")
        self.progress.seconds = time.monotonic() - self._began
        self._saving.save(self.progress)

    def _rows_of(self, step: int, process: int) -> list[int]:
        """Row numbers, in their source, of a step (from 1) on one process."""
        return [
            self._train_rows[index].row
            for micro_step in range(self._recipe.gradient_accumulation)
            for index in self._sampler.batch(step - 1, micro_step, process)
        ]


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
