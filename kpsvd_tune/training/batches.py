"""Micro batches: made from rows, and streamed step after step; workers can make them ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kpsvd_tune.data import IGNORED, StatelessSampler, TokenizedRow, collate, pack
from kpsvd_tune.signals import ignore_signals, signals_held

_EXAMPLE_TOKENS = 16


class MicroBatch(NamedTuple):
    """One forward pass of one process."""

    inputs: dict[str, Tensor]  # what `SummedTokenLoss` takes
    num_tokens: int  # without padding, supervised or not

    @property
    def num_supervised(self) -> int:
        """K, the tokens that the loss sums over."""
        return self.inputs["targets"].numel()

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs on a device."""
        return {name: each.to(device, non_blocking=True) for name, each in self.inputs.items()}


def make_micro_batch(
    rows: Sequence[TokenizedRow],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    packing: bool = False,
) -> MicroBatch:
    """Pad or pack rows and find the positions whose next token has a label, and that token."""
    batch = pack(rows) if packing else collate(rows, pad_token_id, pad_to_multiple_of)
    next_labels = batch.pop("labels").roll(-1, dims=1)
    next_labels[:, -1] = IGNORED
    positions = (next_labels.flatten() != IGNORED).nonzero().squeeze(1)
    inputs = batch | {"positions": positions, "targets": next_labels.flatten()[positions]}
    return MicroBatch(inputs, sum(len(row.input_ids) for row in rows))


def first_tokens(row: TokenizedRow) -> TokenizedRow:
    """The start of a row, enough to reach all layers that any text reaches."""
    ids = row.input_ids[:_EXAMPLE_TOKENS]
    return TokenizedRow(ids, [IGNORED, *ids[1:]], row.row)


def stream_steps(
    rows: Sequence[TokenizedRow],
    sampler: StatelessSampler,
    steps: range,
    process_index: int,
    make_batch: Callable[[Sequence[TokenizedRow]], MicroBatch],
    num_workers: int = 0,
    rows_at_once: int | None = None,
) -> Generator[list[MicroBatch], None, None]:
    """Give the micro batches of each step for one process, at most `rows_at_once` rows in each.

    No position must be saved and no global random number is drawn, so a resumed run has the same.
    """
    size = rows_at_once or sampler.batch_size
    firsts = range(0, sampler.batch_size, size)
    num_micro_steps = sampler.gradient_accumulation * len(firsts)
    indices = (
        rows_of_batch[first : first + size]
        for step in steps
        for micro_step in range(sampler.gradient_accumulation)
        for rows_of_batch in [sampler.batch(step, micro_step, process_index)]
        for first in firsts
    )
    loader: DataLoader[MicroBatch] = DataLoader(
        rows,  # type: ignore[arg-type]  # any sequence will do
        batch_sampler=indices,
        collate_fn=make_batch,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        # The loader draws a seed for its workers: from a generator of its own, so that the model's
        # dropout draws the same numbers with and without workers.
        generator=torch.Generator(),
    )
    with signals_held():
        batches: Iterator[MicroBatch] = iter(loader)
    for _ in steps:
        yield list(islice(batches, num_micro_steps))
