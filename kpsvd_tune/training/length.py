"""How long a run is, in steps and passes over the rows, and what of its settings cannot work then.

The recipe alone does not tell: steps by epochs need the number of rows, and so does all that is
set in steps. So this is asked once the rows are known, before anything long begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kpsvd_tune.data import StatelessSampler
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.optim import schedule_factors

# Whole steps make a run a little longer than the epochs asked for; more than this share is told.
_ROUNDING = 0.1
# No entry of an offset moves by much more than the rate in one step of the usual optimisers.
_LOWEST_RATE = 1e-7


@dataclass(frozen=True)
class RunLength:
    """What a run amounts to.

    Attributes:
        num_steps: Optimiser steps.
        passes: Passes over the training rows.
        faults: Why it should not begin: key, what it is, what to do.
        notes: What a person should know before the first step; the first one is its length.
    """

    num_steps: int
    passes: float
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def run_length(
    train: TrainRecipe, num_rows: int, num_validation_rows: int, num_processes: int = 1
) -> RunLength:
    """Work out the length of a run and hold its settings against it.

    Args:
        train: The `train` section.
        num_rows: Training rows, at least 1.
        num_validation_rows: Held-out rows.
        num_processes: Processes that share a step.
    """
    sampler = StatelessSampler(
        num_rows, train.batch_size, num_processes, train.gradient_accumulation, train.seed
    )
    num_steps = train.max_steps or sampler.num_steps(train.epochs)
    passes = sampler.epoch(num_steps)
    faults = (
        *_warmup_faults(train, num_steps),
        *_validation_faults(train, num_rows, num_validation_rows),
    )
    notes = [
        f"{num_steps:,} steps of {sampler.global_batch_size:,} rows: {passes:.3g} passes over "
        f"{num_rows:,} rows"
    ]
    notes += _row_notes(train, sampler, passes, num_validation_rows)
    notes += _interval_notes(train, num_steps, num_validation_rows)
    if not faults:
        notes += _rate_notes(train, num_steps)
    return RunLength(num_steps, passes, faults, tuple(notes))


def _warmup_faults(train: TrainRecipe, num_steps: int) -> Iterator[str]:
    if train.warmup_steps is None or train.scheduler == "constant":
        return
    if train.warmup_steps and train.warmup_steps >= num_steps:
        yield (
            f"train.warmup_steps: is {train.warmup_steps} and the run has {num_steps} steps, so "
            "the warm-up would take all of it; set it below that, or train.warmup_steps=null for "
            "train.warmup_ratio"
        )


def _validation_faults(
    train: TrainRecipe, num_rows: int, num_validation_rows: int
) -> Iterator[str]:
    if num_validation_rows:
        return
    cure = "set dataset.validation to a number of rows or a file"
    if train.early_stopping is not None:
        yield (
            f"train.early_stopping: no row is held out beside the {num_rows:,} training rows, so "
            f"nothing could stop the run; {cure}, or train.early_stopping=null"
        )
    if train.keep == "best":
        yield (
            f"train.keep: is best, and no row is held out beside the {num_rows:,} training rows "
            f"to tell which step is the best; {cure}, or train.keep=last"
        )


def _row_notes(
    train: TrainRecipe, sampler: StatelessSampler, passes: float, num_validation_rows: int
) -> Iterator[str]:
    size, num_rows = sampler.global_batch_size, sampler.num_rows
    sizes = "train.batch_size, train.gradient_accumulation or the number of processes"
    if size > num_rows:
        yield (
            f"warning: one step takes {size:,} rows and there are {num_rows:,}, so it takes some "
            f"of them more than once; lower {sizes}"
        )
    asked = train.epochs
    if train.max_steps is None and abs(passes - asked) > _ROUNDING * asked:
        yield (
            f"warning: train.epochs asks for {asked:g} passes and whole steps make {passes:.3g}; "
            f"lower {sizes}, or set train.max_steps"
        )
    if num_validation_rows > num_rows:
        yield (
            f"warning: more rows are held out ({num_validation_rows:,}) than trained on "
            f"({num_rows:,}); lower dataset.validation if that is not meant"
        )


def _interval_notes(train: TrainRecipe, num_steps: int, num_validation_rows: int) -> Iterator[str]:
    """Of numbers of steps that the user gave; the defaults are made for longer runs."""
    given = train.model_fields_set
    every = train.eval_every
    if not num_validation_rows:
        if "eval_every" in given and every:
            yield f"train.eval_every is {every} and no row is held out: nothing is validated"
    elif "eval_every" in given and every > num_steps:
        yield (
            f"train.eval_every is {every} and the run has {num_steps:,} steps: it is validated "
            "before the first step and at the end only"
        )
    rule = train.early_stopping
    if rule is not None and every * (rule.patience + 1) > num_steps:
        yield (
            f"warning: train.early_stopping cannot stop this run before its {num_steps:,} steps "
            f"are done: {rule.patience} validations without a gain, {every} steps apart, come "
            "after a first one; lower train.eval_every"
        )
    if train.keep == "best" and every >= num_steps:
        yield (
            f"warning: train.keep is best and only the last of the {num_steps:,} steps is "
            "validated, so that one is kept; lower train.eval_every"
        )
    if "save_every" in given and train.save_every > num_steps:
        yield (
            f"train.save_every is {train.save_every} and the run has {num_steps:,} steps: it is "
            "saved at the end only, and a kill before that costs all of it"
        )
    if "log_every" in given and train.log_every > num_steps:
        yield (
            f"train.log_every is {train.log_every} and the run has {num_steps:,} steps: "
            "metrics.jsonl gets its last step only"
        )


def _rate_notes(train: TrainRecipe, num_steps: int) -> Iterator[str]:
    if train.scheduler == "constant" and train.warmup_steps:
        yield (
            "warning: train.scheduler: constant has no warm-up, so train.warmup_steps does "
            "nothing; constant_with_warmup has one"
        )
    factors = schedule_factors(train, num_steps)
    highest = max(factors)
    if highest < 0.999:
        yield (
            f"warning: the rate never reaches train.learning_rate in this run, only {highest:.3g} "
            "times it; look at train.scheduler_args and the warm-up"
        )
    if num_idle := sum(factor <= 0 for factor in factors):
        yield (
            f"warning: {num_idle:,} of the {num_steps:,} steps have a learning rate of 0 and "
            "train nothing; look at train.scheduler_args"
        )
    is_planned = train.scheduler == "warmup_stable_decay" and train.scheduler_args
    if is_planned and factors[-1] == 1:
        yield (
            "warning: the rate does not fall before the run ends; train.scheduler_args are made "
            f"for more than its {num_steps:,} steps"
        )
    if train.learning_rate * highest < _LOWEST_RATE:
        yield (
            f"warning: train.learning_rate is {train.learning_rate:g}, which hardly moves a "
            "weight; usual rates are 1e-4 to 1e-2"
        )
