"""How long a run is, in steps and passes over the rows, and what of its settings cannot work then.

The recipe alone does not tell: steps by epochs need the number of rows, and so does all that is
set in steps. So this is asked once the rows are known, before anything long begins.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from kpsvd_tune.data import StatelessSampler
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.training.optim import (
    SHARDABLE,
    check_arguments,
    make_optimizer,
    optimizer_class,
    stand_in,
)
from kpsvd_tune.units import counted
from kpsvd_tune.watch.before import schedule_warnings

# Whole steps make a run a little longer than the epochs asked for; more than this share is told.
_ROUNDING = 0.1
# No entry of an offset moves by much more than the rate in one step of the usual optimisers.
_LOWEST_RATE = 1e-7


@dataclass(frozen=True)
class RunLength:
    """How long a run is, and what of its settings cannot work or is worth a note then."""

    num_steps: int  # optimiser steps
    passes: float  # over the training rows
    faults: tuple[str, ...]  # why it should not begin: key, what it is, what to do
    notes: tuple[str, ...]  # to know before the first step; the first is its length
    warnings: tuple[Event, ...] = ()  # a run too short for its schedule, or for anything


def run_length(
    train: TrainRecipe, num_rows: int, num_validation_rows: int, num_processes: int = 1
) -> RunLength:
    """Work out the length of a run of one or more rows, and compare its settings with it."""
    sampler = StatelessSampler(
        num_rows, train.batch_size, num_processes, train.gradient_accumulation, train.seed
    )
    num_steps = train.max_steps or sampler.num_steps(train.epochs)
    passes = sampler.epoch(num_steps)
    faults = tuple(_faults(train, num_steps, num_rows, num_validation_rows))
    notes = [
        f"{counted(num_steps, 'step')} of {counted(sampler.global_batch_size, 'row')}: "
        f"{passes:.3g} passes over "
        f"{counted(num_rows, 'row')}"
    ]
    notes += _row_notes(train, sampler, passes, num_validation_rows)
    notes += _interval_notes(train, num_steps, num_validation_rows)
    found: tuple[Event, ...] = ()
    if not faults:
        factors = _factors(train, num_steps)
        found = _schedule_warnings(train, factors)
        notes += _rate_notes(train, factors, told={each.code for each in found})
    return RunLength(num_steps, passes, faults, tuple(notes), found)


def _faults(
    train: TrainRecipe, num_steps: int, num_rows: int, num_validation_rows: int
) -> Iterator[str]:
    warmup = 0 if train.scheduler == "constant" else train.warmup_steps or 0
    if warmup and warmup >= num_steps:
        yield (
            f"train.warmup_steps: is {warmup} and the run has {counted(num_steps, 'step')}, so "
            "the warm-up "
            "would take all of it; set it below that, or train.warmup_steps=null for "
            "train.warmup_ratio"
        )
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
            f"warning: one step takes {counted(size, 'row')} and there are {num_rows:,}, so it "
            "takes some "
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
    # Whoever gives the number of steps cuts the run short knowingly; epochs do not show it.
    given = train.model_fields_set if train.max_steps is None else set[str]()
    every = train.eval_every
    if not num_validation_rows:
        if "eval_every" in train.model_fields_set and every:
            yield f"train.eval_every is {every} and no row is held out: nothing is validated"
    elif "eval_every" in given and every > num_steps:
        yield (
            f"train.eval_every is {every} and the run has {counted(num_steps, 'step')}: it is "
            "validated before the first step and at the end only"
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
            f"train.save_every is {train.save_every} and the run has "
            f"{counted(num_steps, 'step')}: it is saved at the end and where Ctrl-C stops it only: "
            "a crash before that costs all of it"
        )
    if "log_every" in given and train.log_every > num_steps:
        yield (
            f"train.log_every is {train.log_every} and the run has {counted(num_steps, 'step')}: "
            "metrics.jsonl gets its last step only"
        )


def _factors(train: TrainRecipe, num_steps: int) -> list[float]:
    """What each step multiplies the learning rate by."""
    scheduler = make_scheduler(train, make_optimizer(train, [stand_in(3)]), num_steps)
    return [float(scheduler.lr_lambdas[0](step)) for step in range(num_steps)]


def _schedule_warnings(train: TrainRecipe, factors: Sequence[float]) -> tuple[Event, ...]:
    num_steps = len(factors)
    return tuple(
        schedule_warnings(
            num_steps,
            num_warmup_steps(train, num_steps),
            sum(factor * train.learning_rate >= _LOWEST_RATE for factor in factors),
            max(factors),
        )
    )


def _rate_notes(train: TrainRecipe, factors: Sequence[float], told: set[str]) -> Iterator[str]:
    if train.scheduler == "constant" and train.warmup_steps:
        yield (
            "warning: train.scheduler: constant has no warm-up, so train.warmup_steps does "
            "nothing; constant_with_warmup has one"
        )
    num_steps = len(factors)
    if (num_idle := sum(factor <= 0 for factor in factors)) and "few_steps" not in told:
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


def make_scheduler(
    recipe: TrainRecipe,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    *,
    starts_at_zero: bool = False,
) -> LambdaLR:
    """Make the schedule of `train.scheduler`, to be stepped once an optimiser step.

    A warm-up of w steps gives step k (from 1) k/w of the rate. Transformers' own starts at rate 0,
    so that the first step changes nothing; `starts_at_zero` is for runs that began with it.
    """
    name, arguments = recipe.scheduler, dict(recipe.scheduler_args)
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    check_arguments("train.scheduler_args", function, name, arguments)
    if name == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & arguments.keys():
        arguments["min_lr_rate"] = 0.1
    if name == "warmup_stable_decay":
        arguments.setdefault("num_decay_steps", math.ceil(0.1 * num_steps))
    num_warmup = num_warmup_steps(recipe, num_steps, starts_at_zero=starts_at_zero)
    try:
        with warnings.catch_warnings():
            # It warns that num_stable_steps overrides the length of the run, as it is meant to.
            warnings.simplefilter("ignore", UserWarning)
            scheduler = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=num_warmup,
                num_training_steps=num_steps,
                scheduler_specific_kwargs=arguments,
            )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.scheduler_args: {name}: {error}") from error
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"{name} is a {type(scheduler).__name__}; expected a LambdaLR")
    if num_warmup and not starts_at_zero:
        scheduler.lr_lambdas = [
            _one_step_ahead(factor, num_warmup) for factor in scheduler.lr_lambdas
        ]
        set_rates(scheduler)
    return scheduler


def set_rates(scheduler: LambdaLR) -> None:
    """Give the optimiser the rates of the step at which the schedule stands."""
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _one_step_ahead(factor: Callable[[int], float], num_warmup: int) -> Callable[[int], float]:
    """The schedule whose warm-up gives each step what `factor` gives the next one."""

    def ahead(step: int) -> float:
        if step < num_warmup - 1:
            return factor(step + 1)
        return 1.0 if step < num_warmup else factor(step)

    return ahead


def num_warmup_steps(recipe: TrainRecipe, num_steps: int, *, starts_at_zero: bool = False) -> int:
    """Steps that the rate rises in, of a run of `num_steps`; by the ratio never all of them."""
    if recipe.scheduler == "constant":
        return 0
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    num_warmup = math.ceil(recipe.warmup_ratio * num_steps)
    return num_warmup if starts_at_zero else min(num_warmup, num_steps - 1)


def check_optimizer(recipe: TrainRecipe, num_processes: int = 1) -> None:
    """Refuse an optimiser, a schedule or arguments of theirs that cannot work, before any work."""
    is_sharded = recipe.parallel == "fsdp" and num_processes > 1
    if is_sharded and optimizer_class(recipe) not in SHARDABLE.values():
        raise RecipeError(
            f"train.optimizer: {recipe.optimizer} has not been shown to work on shards of weights "
            f"(train.parallel: fsdp); expected one of {', '.join(SHARDABLE)}, or train.parallel: "
            "ddp"
        )
    # Of the form of stacked factors. Some classes look at an argument in their first step only.
    optimizer = make_optimizer(recipe, [stand_in(3)])
    num_steps = recipe.max_steps or 100
    scheduler = make_scheduler(recipe, optimizer, num_steps)
    factors = map(scheduler.lr_lambdas[0], range(num_steps + 1))
    trials: dict[str, Callable[[], object]] = {
        "optimizer_args": lambda: optimizer.step(),
        "scheduler_args": lambda: _check_rates(factors),
    }
    for key, try_out in trials.items():
        try:
            try_out()
        except Exception as error:
            raise RecipeError(f"train.{key}: {type(error).__name__}: {error}") from error


def _check_rates(factors: Iterable[float]) -> None:
    for step, factor in enumerate(factors):
        if not 0 <= factor <= 1 + 1e-6:
            raise ValueError(
                f"step {step + 1} would have {factor:g} times train.learning_rate, which is the "
                "highest rate; expected 0 to 1"
            )
