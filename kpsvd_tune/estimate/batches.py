"""The forward passes that a run consists of, by the lengths of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kpsvd_tune.data import StatelessSampler
from kpsvd_tune.data.rows.store import StoredRows
from kpsvd_tune.estimate.trace import MicroStep
from kpsvd_tune.recipe import TrainRecipe

# Forward passes that are looked at one by one; a longer run is judged by the first ones, and by
# the longest rows there are.
_LOOKED_AT = 20_000


@dataclass(frozen=True)
class RunBatches:
    """The forward passes of one process."""

    largest: MicroStep  # the most tokens, and the most supervised ones, of any
    mean_size: float  # tokens that a forward pass computes, padding included
    tokens_per_step: float  # of an optimiser step over all processes, without padding
    # Tokens with padding that a process computes in each of the first optimiser steps.
    step_sizes: tuple[float, ...]
    is_uneven: bool  # whether forward passes differ in size

    def size_until(self, step: int) -> float:
        """Tokens with padding that a process computes up to a step, that step included."""
        known = self.step_sizes[:step]
        mean = sum(self.step_sizes) / len(self.step_sizes)
        return sum(known) + mean * (step - len(known))


def batches_of(
    rows: StoredRows,
    train: TrainRecipe,
    num_steps: int,
    *,
    num_processes: int = 1,
    multiple: int = 1,
    max_length: int | None = None,
) -> RunBatches:
    """Look at the forward passes as the sampler makes them.

    Args:
        rows: The training rows.
        train: The recipe's section.
        num_steps: Optimiser steps of the run.
        num_processes: Processes that share a step.
        multiple: Rows are padded to a multiple of so many tokens.
        max_length: Longer rows count as cut to that length.
    """
    lengths = [min(each, max_length or each) for each in rows.lengths.tolist()]
    supervised = [
        min(each, own) for each, own in zip(rows.num_supervised.tolist(), lengths, strict=True)
    ]
    sampler = StatelessSampler(
        len(rows),
        train.batch_size,
        num_processes,
        train.gradient_accumulation,
        train.seed,
        rows.lengths.tolist() if train.group_by_length else None,
    )
    passes_per_step = num_processes * train.gradient_accumulation
    looked_at = max(1, min(num_steps, _LOOKED_AT // passes_per_step))
    found = [
        sampler.batch(step, micro_step, process)
        for step in range(looked_at)
        for micro_step in range(train.gradient_accumulation)
        for process in range(num_processes)
    ]
    packed = train.packing and train.batch_size > 1
    sizes = [_size([lengths[row] for row in each], multiple, packed) for each in found]
    learnt = [sum(supervised[row] for row in each) for each in found]
    real = sum(lengths[row] for each in found for row in each)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    most = max(learnt)
    if looked_at < num_steps:
        longest = sorted(lengths)[-train.batch_size :]
        largest = _size(longest, multiple, packed)
        most = sum(sorted(supervised)[-train.batch_size :])
    return RunBatches(
        MicroStep(*largest, most),
        sum(height * width for height, width in sizes) / len(sizes),
        real / looked_at,
        tuple(
            sum(height * width for height, width in sizes[first : first + passes_per_step])
            / num_processes
            for first in range(0, len(sizes), passes_per_step)
        ),
        len(set(sizes)) > 1,
    )


def validation_size(
    rows: StoredRows, train: TrainRecipe, *, num_processes: int = 1, multiple: int = 1
) -> float:
    """Tokens with padding that a process computes when the held-out rows are looked at."""
    lengths = sorted(rows.lengths.tolist(), reverse=True)
    packed = train.packing and train.batch_size > 1
    sizes = [
        _size(lengths[first : first + train.batch_size], multiple, packed)
        for first in range(0, len(lengths), train.batch_size)
    ]
    return sum(height * width for height, width in sizes) / num_processes


def full_batches(train: TrainRecipe, max_length: int, num_processes: int = 1) -> RunBatches:
    """Rows of the greatest length, all of it learnt: where the rows are not known."""
    size = train.batch_size * max_length
    packed = train.packing and train.batch_size > 1
    step = MicroStep(*((1, size) if packed else (train.batch_size, max_length)), size)
    of_process = float(size * train.gradient_accumulation)
    return RunBatches(step, step.size, of_process * num_processes, (of_process,), is_uneven=True)


def _size(lengths: Sequence[int], multiple: int, packed: bool) -> tuple[int, int]:
    """Rows and tokens of each, of a batch of rows with these lengths."""
    if packed:
        return 1, sum(lengths)
    longest = max(lengths)
    return len(lengths), -(-longest // multiple) * multiple
