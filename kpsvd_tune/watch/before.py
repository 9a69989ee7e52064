"""What looks wrong before the first step: rows, modules trained whole, the length of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kpsvd_tune.report.results import Event, PreflightReport
from kpsvd_tune.units import counted
from kpsvd_tune.watch.telling import warning

# A few long rows in a hundred are cut or left out in most data sets, and change nothing.
TRUNCATED_SHARE = 0.1
DROPPED_SHARE = 0.1
# A rate that rises in more than half of the steps is no warm-up any more; usual are 0 to 0.1.
WARMUP_SHARE = 0.5
# One step cannot learn, whatever its rate.
FEWEST_STEPS = 2
# The beginnings of sentences of the preflight that these warnings stand for.
_CUT, _DROPPED, _SHARED = "cut to dataset.max_length", "dropped: ", "LEFT OUT OF TRAINING"


def row_warnings(report: PreflightReport) -> Iterator[Event]:
    """The warnings of rows that were cut, dropped, or held out too."""
    cut = report.num_truncated / max(1, report.num_rows)
    if cut > TRUNCATED_SHARE:
        yield warning(
            "truncated_rows",
            f"{report.num_truncated:,} of {report.num_rows:,} training rows are cut, and learn no "
            "end.",
            "Raise dataset.max_length, or leave such rows out with dataset.too_long: drop.",
            rows=report.num_truncated,
            share=cut,
            limit=TRUNCATED_SHARE,
            found=_sentences(report, _CUT),
        )
    dropped = report.num_dropped / max(1, report.num_rows + report.num_dropped)
    if dropped > DROPPED_SHARE:
        yield warning(
            "dropped_rows",
            f"{report.num_dropped:,} of {report.num_rows + report.num_dropped:,} training rows are "
            "left out.",
            "Look at the rows that the evidence names, and at dataset.max_length and "
            "dataset.columns.",
            rows=report.num_dropped,
            share=dropped,
            limit=DROPPED_SHARE,
            found=_sentences(report, _DROPPED),
        )
    if found := _sentences(report, _SHARED):
        yield warning(
            "shared_rows",
            "Some rows are both to be trained and held out; they are not trained.",
            "Hold out rows that are in no training file, so that the validation loss is one of new "
            "rows and nothing is lost.",
            found=found,
        )


def module_warnings(modules_to_save: Sequence[str], dtype: str) -> Iterator[Event]:
    """The warning of modules that are trained whole in the 16 bits of the base.

    Args:
        modules_to_save: Those of the recipe, or of the adapter that it goes on from.
        dtype: The base's: float32 or bfloat16; `train` refuses such modules in float16.
    """
    if modules_to_save and dtype != "float32":
        yield warning(
            "rounded_modules",
            f"The modules of adapter.modules_to_save are trained in the base's {dtype}: of a step, "
            "what is below 2^-9 of a weight is lost.",
            "Set model.dtype: float32, or leave them out of adapter.modules_to_save; the factors "
            "are trained in float32 in any case.",
            modules=", ".join(modules_to_save),
        )


def unrestrained_warnings(names: Sequence[str], cure: str) -> Iterator[Event]:
    """The warning of a restrained run that trains more than its factors.

    Args:
        names: What else is trained: modules, or rows of one.
        cure: How to train without them, as the second half of a sentence.
    """
    if names:
        yield warning(
            "unrestrained_modules",
            f"`restrain` cuts the factors alone; what is learnt by {', '.join(names)} stays as "
            "it is trained, so that the limit may not be met, and cut factors may fit them worse.",
            f"If the limit matters more than they do, {cure}; or lower train.learning_rate.",
            modules=", ".join(names),
        )


def without(report: PreflightReport, told: list[Event]) -> tuple[str, ...]:
    """The preflight's own warnings that none of the events stands for."""
    marks = {"truncated_rows": _CUT, "dropped_rows": _DROPPED, "shared_rows": _SHARED}
    stood_for = [marks[event.code] for event in told]
    return tuple(
        each
        for each in report.warnings
        if each.startswith("validation: ") or not any(mark in each for mark in stood_for)
    )


def _sentences(report: PreflightReport, mark: str) -> str:
    return "; ".join(
        each for each in report.warnings if mark in each and not each.startswith("validation: ")
    )


def schedule_warnings(
    num_steps: int, num_warmup: int, num_effective: int, highest: float
) -> Iterator[Event]:
    """The warnings of a run that is too short for its schedule, or for anything.

    Args:
        num_steps: Optimiser steps of the run.
        num_warmup: Steps in which the rate rises.
        num_effective: Steps whose rate is large enough to move a weight.
        highest: Largest rate of any step over `train.learning_rate`.
    """
    if num_effective < FEWEST_STEPS:
        yield warning(
            "few_steps",
            f"The run has {counted(num_steps, 'step')}, of which "
            f"{num_effective} can change a weight.",
            "Train longer (train.epochs or train.max_steps), take fewer rows a step "
            "(train.batch_size, train.gradient_accumulation), or look at train.scheduler_args and "
            "train.learning_rate: usual rates are 1e-4 to 1e-2.",
            num_steps=num_steps,
            num_effective=num_effective,
        )
    elif highest < 0.999 or num_warmup > WARMUP_SHARE * num_steps:
        reached = (
            f"never reaches train.learning_rate in this run, only {highest:.3g} times it"
            if highest < 0.999
            else f"rises in {num_warmup:,} of the {num_steps:,} steps"
        )
        yield warning(
            "warmup_too_long",
            f"The rate {reached}.",
            "Shorten the warm-up (train.warmup_ratio, train.warmup_steps), look at "
            "train.scheduler_args, or train longer.",
            num_steps=num_steps,
            num_warmup=num_warmup,
            highest=highest,
        )
