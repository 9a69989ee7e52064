"""The stateless sampler and the split: properties over their whole small domain."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpsvd_tune.data.rows import split
from kpsvd_tune.data.rows.batches import StatelessSampler
from kpsvd_tune.errors import DataError

SMALL = st.integers(1, 5)


def step_rows(sampler: StatelessSampler, step: int) -> list[int]:
    """Rows of a step over all processes and micro steps."""
    return [
        row
        for micro_step in range(sampler.gradient_accumulation)
        for process in range(sampler.num_processes)
        for row in sampler.batch(step, micro_step, process)
    ]


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 23), batch=SMALL, processes=SMALL, accumulation=SMALL, seed=SMALL)
def test_each_epoch_is_a_permutation(
    num_rows: int, batch: int, processes: int, accumulation: int, seed: int
) -> None:
    sampler = StatelessSampler(num_rows, batch, processes, accumulation, seed)
    num_steps = sampler.num_steps(3)
    stream = [row for step in range(num_steps) for row in step_rows(sampler, step)]
    for epoch in range(3):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 23),
    factors=st.permutations([1, 2, 3]),
    other=st.permutations([1, 2, 3]),
    step=st.integers(0, 30),
)
def test_equal_global_batches_hold_the_same_rows(
    num_rows: int, factors: list[int], other: list[int], step: int
) -> None:
    left, right = (StatelessSampler(num_rows, a, b, c, 7) for a, b, c in (factors, other))
    assert Counter(step_rows(left, step)) == Counter(step_rows(right, step))


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, 23), step=st.integers(0, 40), batch=SMALL)
def test_resuming_at_a_step_gives_what_the_whole_run_gave(
    num_rows: int, step: int, batch: int
) -> None:
    whole = StatelessSampler(num_rows, batch, 1, 2, 0)
    for earlier in range(step):
        step_rows(whole, earlier)
    assert step_rows(whole, step) == step_rows(StatelessSampler(num_rows, batch, 1, 2, 0), step)


def test_orders_differ_by_epoch_and_seed() -> None:
    sampler = StatelessSampler(50, 50, 1, 1, 0)
    other = StatelessSampler(50, 50, 1, 1, 1)
    assert sampler.batch(0, 0, 0) != sampler.batch(1, 0, 0)
    assert sampler.batch(0, 0, 0) != other.batch(0, 0, 0)


def test_order_is_the_same_on_every_machine() -> None:
    # Written down once: another value here would break the resume of runs already started.
    assert StatelessSampler(8, 8, 1, 1, 0).batch(0, 0, 0) == [4, 6, 1, 3, 2, 5, 7, 0]


def test_counts() -> None:
    sampler = StatelessSampler(10, 2, 2, 1, 0)
    assert sampler.global_batch_size == 4
    assert [sampler.num_steps(epochs) for epochs in (0.01, 0.4, 0.5, 1, 2)] == [1, 1, 2, 3, 5]
    assert sampler.epoch(5) == 2.0
    assert StatelessSampler(30, 1, 1, 1, 0).num_steps(0.1) == 3


def test_sizes_and_positions_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows is 0; expected at least 1"):
        StatelessSampler(0, 1, 1, 1, 0)
    sampler = StatelessSampler(3, 1, 2, 2, 0)
    with pytest.raises(IndexError, match="micro_step is 2; expected at least 0 and below 2"):
        sampler.batch(0, 2, 0)
    with pytest.raises(IndexError, match="process_index is -1"):
        sampler.batch(0, 0, -1)


def split_rows(num_rows: int, validation: int | float, seed: int) -> tuple[list[int], list[int]]:
    rows, usable = np.arange(num_rows), np.ones(num_rows, dtype=bool)
    train, held_out = split.split_rows(rows, validation, seed, rows, usable)
    return train.tolist(), held_out.tolist()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    validation=st.one_of(st.integers(0, 70), st.floats(0, 0.999)),
    seed=SMALL,
)
def test_split_is_pure_disjoint_and_never_without_training_rows(
    num_rows: int, validation: int | float, seed: int
) -> None:
    if isinstance(validation, int) and validation >= num_rows:
        with pytest.raises(DataError, match=rf"holds out {validation} rows and the dataset has"):
            split_rows(num_rows, validation, seed)
        return
    train, held_out = split_rows(num_rows, validation, seed)
    assert (train, held_out) == split_rows(num_rows, validation, seed)
    assert sorted(train + held_out) == list(range(num_rows))
    assert train
    if isinstance(validation, int):
        assert len(held_out) == validation
    elif validation > 0 and num_rows > 1:
        assert held_out


def test_split_takes_the_share_asked_for_and_follows_the_seed() -> None:
    assert len(split_rows(100, 0.02, 0)[1]) == 2
    assert split_rows(100, 0.1, 0) != split_rows(100, 0.1, 1)


def test_the_turns_of_a_chat_are_never_on_both_sides_of_the_split() -> None:
    groups = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    train, held_out = split.split_rows(groups, 0.3, 0, groups, np.ones(len(groups), dtype=bool))
    assert sorted([*train, *held_out]) == list(range(len(groups)))
    assert not set(groups[train]) & set(groups[held_out])
    # The rows that are held out are those of a set with one place each.
    assert sorted(set(groups[held_out])) == split_rows(30, 0.3, 0)[1]
