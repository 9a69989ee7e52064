"""Which rows go into which step: a pure function of seed and position, so nothing is to be saved.

A sampler that keeps a position has to be saved and restored, and a resumed run goes wrong when
either is off by one. Here the order of an epoch is f(seed, epoch) and a step's rows are
f(step): resuming is asking for the next step.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from kpsvd_tune.data.rows.grouping import group_by_length


class StatelessSampler:
    """An endless stream of shuffled epochs, cut into equal global batches.

    Step s takes stream positions [s*G, (s+1)*G) with G = batch_size * num_processes *
    gradient_accumulation: a step may reach over the end of an epoch, and no batch is ever
    partial. Equal G means equal rows a step, however G is factored.

    With `lengths` the rows of a step are of similar length, by `group_by_length`, and a step's
    rows are dealt out in order of length, so that each micro batch spans as little as it can. Then
    the order of an epoch is f(seed, epoch, lengths, G).

    Args:
        num_rows: Rows in the data set, at least 1.
        batch_size: Rows per process and micro step, at least 1.
        num_processes: Processes that share a step, at least 1.
        gradient_accumulation: Micro steps per step, at least 1.
        seed: Seed of the orders.
        lengths: Tokens of every row, to group rows by; None: grouped by chance alone.

    Raises:
        ValueError: A size below 1, or not one length a row.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        num_processes: int,
        gradient_accumulation: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        sizes = {
            "num_rows": num_rows,
            "batch_size": batch_size,
            "num_processes": num_processes,
            "gradient_accumulation": gradient_accumulation,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if lengths is not None and len(lengths) != num_rows:
            raise ValueError(
                f"got {len(lengths)} lengths; expected one for each of {num_rows} rows"
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.gradient_accumulation = gradient_accumulation
        self.seed = seed
        self._lengths = lengths
        self._orders: OrderedDict[int, Sequence[int]] = OrderedDict()

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all processes and micro steps."""
        return self.batch_size * self.num_processes * self.gradient_accumulation

    def batch(self, step: int, micro_step: int, process_index: int) -> list[int]:
        """Rows of one micro step on one process.

        Args:
            step: Optimiser step, from 0.
            micro_step: In [0, gradient_accumulation).
            process_index: In [0, num_processes).

        Returns:
            `batch_size` row indices in [0, num_rows).

        Raises:
            IndexError: An argument is out of its range.
        """
        for name, value, end in (
            ("step", step, math.inf),
            ("micro_step", micro_step, self.gradient_accumulation),
            ("process_index", process_index, self.num_processes),
        ):
            if not 0 <= value < end:
                raise IndexError(f"{name} is {value}; expected at least 0 and below {end}")
        slot = micro_step * self.num_processes + process_index
        start = slot * self.batch_size
        if self._lengths is None:
            start += step * self.global_batch_size
            return [self._row(position) for position in range(start, start + self.batch_size)]
        first = step * self.global_batch_size
        rows = [self._row(position) for position in range(first, first + self.global_batch_size)]
        rows.sort(key=self._lengths.__getitem__, reverse=True)
        return rows[start : start + self.batch_size]

    def epoch(self, step: int) -> float:
        """Passes over the rows once `step` steps are done."""
        return step * self.global_batch_size / self.num_rows

    def num_steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take: ceil(epochs * num_rows / G), at least 1."""
        # Rounded first: 0.1 * 30 is a little more than 3 in floating point, and not a step more.
        rows = round(epochs * self.num_rows, 6)
        return max(1, math.ceil(rows / self.global_batch_size))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        return self._order(epoch)[offset]

    def _order(self, epoch: int) -> Sequence[int]:
        if epoch not in self._orders:
            key = f"epoch {self.seed} {epoch}"
            order: Sequence[int] = permutation(self.num_rows, key)
            if self._lengths is not None:
                size = self.global_batch_size
                num_head = -epoch * self.num_rows % size
                order = group_by_length(order, self._lengths, size, num_head, f"batches of {key}")
            self._orders[epoch] = order
            # A batch touches neighbouring epochs only: two orders are enough.
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]


def permutation(num_rows: int, key: str) -> array[int]:
    """A shuffled [0, num_rows), the same for the same key on every machine and version.

    The standard library's generator and shuffle give the same numbers across Python versions and
    platforms, which torch and numpy do not promise of theirs.
    """
    order = array("q", range(num_rows))  # a fifth of a list's memory
    random.Random(key).shuffle(order)
    return order
