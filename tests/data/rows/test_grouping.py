"""Grouping by length: every row once an epoch, little padding, and still a random order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpsvd_tune.data.rows.batches import StatelessSampler, group_by_length, permutation

SMALL = st.integers(1, 5)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=60)


def step_rows(sampler: StatelessSampler, step: int) -> list[int]:
    """Rows of a step over all processes and micro steps."""
    return [
        row
        for micro_step in range(sampler.gradient_accumulation)
        for process in range(sampler.num_processes)
        for row in sampler.batch(step, micro_step, process)
    ]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch=SMALL, processes=SMALL, accumulation=SMALL, seed=SMALL)
def test_every_row_comes_once_an_epoch(
    lengths: list[int], batch: int, processes: int, accumulation: int, seed: int
) -> None:
    num_rows = len(lengths)
    sampler = StatelessSampler(num_rows, batch, processes, accumulation, seed, lengths)
    # Steps reach over the ends of epochs, so rows are counted where both end together.
    num_steps, size = num_rows, sampler.global_batch_size
    seen = Counter(row for step in range(num_steps) for row in step_rows(sampler, step))
    assert seen == dict.fromkeys(range(num_rows), size)
    # And an epoch alone: what the whole steps before its end hold comes no more than once.
    first = [row for step in range(num_rows // size) for row in step_rows(sampler, step)]
    assert max(Counter(first).values(), default=1) == 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    factors=st.permutations([1, 2, 3]),
    other=st.permutations([1, 2, 3]),
    step=st.integers(0, 30),
)
def test_equal_global_batches_hold_the_same_rows_in_the_same_order(
    lengths: list[int], factors: list[int], other: list[int], step: int
) -> None:
    left, right = (
        StatelessSampler(len(lengths), a, b, c, 7, lengths) for a, b, c in (factors, other)
    )
    assert step_rows(left, step) == step_rows(right, step)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, step=st.integers(0, 40), batch=SMALL)
def test_resuming_at_a_step_gives_what_the_whole_run_gave(
    lengths: list[int], step: int, batch: int
) -> None:
    whole = StatelessSampler(len(lengths), batch, 1, 2, 0, lengths)
    for earlier in range(step):
        step_rows(whole, earlier)
    resumed = StatelessSampler(len(lengths), batch, 1, 2, 0, lengths)
    assert step_rows(whole, step) == step_rows(resumed, step)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, step=st.integers(0, 20), processes=SMALL, accumulation=SMALL)
def test_a_steps_rows_are_dealt_out_in_order_of_length(
    lengths: list[int], step: int, processes: int, accumulation: int
) -> None:
    sampler = StatelessSampler(len(lengths), 2, processes, accumulation, 0, lengths)
    dealt = [lengths[row] for row in step_rows(sampler, step)]
    assert dealt == sorted(dealt, reverse=True)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_size=SMALL, data=st.data())
def test_an_order_is_rearranged_between_its_shared_ends(
    lengths: list[int], batch_size: int, data: st.DataObject
) -> None:
    order = list(permutation(len(lengths), "order"))
    num_head = data.draw(st.integers(0, batch_size - 1))
    found = group_by_length(order, lengths, batch_size, num_head, "key")
    assert sorted(found) == sorted(order)
    assert found[:num_head] == order[:num_head]
    num_tail = max(0, len(order) - num_head) % batch_size
    assert num_tail == 0 or found[-num_tail:] == order[-num_tail:]


def padding(sampler: StatelessSampler, lengths: list[int], steps: range) -> float:
    """Positions computed to positions filled."""
    batches = [sampler.batch(step, 0, 0) for step in steps]
    filled = sum(lengths[row] for batch in batches for row in batch)
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) / filled


def test_hardly_any_padding_is_left_and_the_order_stays_random() -> None:
    # No whole number of steps an epoch: batches of the second epoch must not be cut apart.
    lengths = [1 + (index * 7919) % 200 for index in range(2001)]
    plain = StatelessSampler(2001, 4, 1, 1, 0)
    grouped = StatelessSampler(2001, 4, 1, 1, 0, lengths)
    assert padding(plain, lengths, range(500)) > 1.5
    for epoch in (range(500), range(501, 1000)):
        assert padding(grouped, lengths, epoch) < 1.03
    means = [sum(lengths[row] for row in grouped.batch(step, 0, 0)) / 4 for step in range(500)]
    # Sorted as a whole, neighbouring steps would be alike.
    steps_apart = sum(abs(a - b) for a, b in zip(means, means[1:], strict=False)) / 499
    assert steps_apart > 50
    epochs = [
        [grouped.batch(step, 0, 0) for step in range(first, first + 500)] for first in (0, 500)
    ]
    assert epochs[0] != epochs[1]
    shared = {tuple(sorted(batch)) for batch in epochs[0]} & {
        tuple(sorted(batch)) for batch in epochs[1]
    }
    assert len(shared) < 50, "rows must not meet in the same batches epoch after epoch"


def test_the_order_is_the_same_on_every_machine() -> None:
    # Written down once: another value here would break the resume of runs already started.
    lengths = [7 * index % 24 + 1 for index in range(24)]
    sampler = StatelessSampler(24, 2, 1, 1, 0, lengths)
    first = [sampler.batch(step, 0, 0) for step in range(6)]
    assert first == [[14, 0], [13, 23], [11, 7], [17, 3], [9, 12], [16, 2]]


def test_lengths_must_be_those_of_the_rows() -> None:
    with pytest.raises(ValueError, match="got 2 lengths; expected one for each of 3 rows"):
        StatelessSampler(3, 1, 1, 1, 0, [4, 4])
