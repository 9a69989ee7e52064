"""The micro batches of one process, step after step; workers can make them ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice

import torch
from torch.utils.data import DataLoader

from kpsvd_tune.data import StatelessSampler, TokenizedRow
from kpsvd_tune.training.loss import MicroBatch
from kpsvd_tune.training.signals import ignore_signals, signals_held


def stream_steps(
    rows: Sequence[TokenizedRow],
    sampler: StatelessSampler,
    steps: range,
    process_index: int,
    make_batch: Callable[[Sequence[TokenizedRow]], MicroBatch],
    num_workers: int = 0,
) -> Generator[list[MicroBatch], None, None]:
    """Give the micro batches of each step of `steps` for one process.

    Nothing of it has a position that would have to be saved, and no global random number is
    drawn, so the batches of a step are the same however a run got there.
    """
    num_micro_steps = sampler.gradient_accumulation
    indices = (
        sampler.batch(step, micro_step, process_index)
        for step in steps
        for micro_step in range(num_micro_steps)
    )
    loader: DataLoader[MicroBatch] = DataLoader(
        rows,  # type: ignore[arg-type]  # any sequence will do
        batch_sampler=indices,
        collate_fn=make_batch,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        # Of its own: the loader draws a seed for its workers, and the model's dropout must not
        # notice.
        generator=torch.Generator(),
    )
    with signals_held():
        batches: Iterator[MicroBatch] = iter(loader)
    for _ in steps:
        yield list(islice(batches, num_micro_steps))
