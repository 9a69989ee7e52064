"""`train.on_oom: halve`: fewer rows at a time where memory runs out, in the same steps.

A micro batch of B rows is computed in pieces of half as many, one after the other, for the rest of
the run. Sampler, loss and schedule know nothing of it: a step's rows, the loss over them and the
update stay what they were, up to the rounding of sums in another order. Random numbers of dropout
are drawn piece by piece, and so are others.
"""

from __future__ import annotations

import gc
import logging

import torch

from kpsvd_tune.errors import RecipeError, ResourceError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.progress import Progress

_log = logging.getLogger(__name__)


class MicroStepOutOfMemory(ResourceError):
    """Memory ran out in a forward or backward pass; no weight has moved and no gradient is left."""


def check_halving(recipe: TrainRecipe, num_processes: int, is_zero: bool) -> None:
    """Refuse `train.on_oom: halve` where it cannot work.

    Args:
        recipe: The `train` section.
        num_processes: Of the run.
        is_zero: Whether DeepSpeed takes the steps.

    Raises:
        RecipeError: There are several processes, or DeepSpeed's.
    """
    if recipe.on_oom != "halve" or (num_processes == 1 and not is_zero):
        return
    got = "DeepSpeed takes the steps" if is_zero else f"there are {num_processes}"
    raise RecipeError(
        f"train.on_oom: halve works with one plain process, and {got}: when one of several finds "
        "no memory the others already wait for its gradients. Leave it out, and lower "
        "train.batch_size with train.gradient_accumulation raised by as much"
    )


def rows_at_once(recipe: TrainRecipe, progress: Progress) -> int:
    """Rows of a forward pass: `train.batch_size`, or fewer after memory ran out."""
    return min(progress.micro_batch_size or recipe.batch_size, recipe.batch_size)


def halve(error: ResourceError, recipe: TrainRecipe, progress: Progress) -> None:
    """Count another halving and log it.

    Args:
        error: Says what ran out, in its first line.
        recipe: The `train` section.
        progress: Its counters change.

    Raises:
        ResourceError: The passes take one row already.
    """
    now = rows_at_once(recipe, progress)
    if now == 1:
        raise ResourceError(
            f"{error}. One row was computed at a time, after {progress.num_halvings} halvings of "
            f"train.batch_size {recipe.batch_size} (train.on_oom). What helps:\n"
            "  - train.gradient_checkpointing: true, which keeps fewer activations\n"
            "  - a lower dataset.max_length: shorter rows\n"
            "  - model.dtype: bfloat16, or a smaller model.path"
        )
    progress.micro_batch_size = (now + 1) // 2
    progress.num_halvings += 1
    _log.warning(
        "%s. From here on passes take %d of %d rows at a time (train.on_oom: halve); the "
        "rows of a step and its update stay the same, up to rounding",
        error,
        progress.micro_batch_size,
        now,
    )


def give_memory_back() -> None:
    """Free what failed passes left behind, so that the next one finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
