"""Means with intervals, and figures of one curve, against values worked out by hand."""

from __future__ import annotations

import pytest

from kpsvd_tune.comparison.statistics import estimate, steps_to, variation


def test_an_interval_by_hand() -> None:
    # Mean 2, deviation 1, t of two degrees of freedom 4.303: 2 +- 4.303 / sqrt(3).
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.n) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2 - 2.4843, abs=1e-3)
    assert found.high == pytest.approx(2 + 2.4843, abs=1e-3)


def test_one_seed_has_no_interval() -> None:
    found = estimate([1.5])
    assert (found.mean, found.deviation, found.low, found.high, found.n) == (
        1.5,
        None,
        None,
        None,
        1,
    )


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(30, 2.0452), (32, 2.0395), (40, 2.0227), (62, 1.9996), (122, 1.9798)]
)
def test_intervals_of_many_seeds_are_of_students_t_too(seeds: int, quantile: float) -> None:
    found = estimate([0.0, 1.0] * (seeds // 2))
    assert found.deviation is not None
    assert found.high is not None
    half = quantile * found.deviation / seeds**0.5
    assert found.high - 0.5 == pytest.approx(half, rel=2e-4)


def test_variation_leaves_the_warm_up_out() -> None:
    assert variation([100.0, 1.0, 3.0], 1) == pytest.approx(2**0.5 / 2)
    assert variation([1.0, 2.0], 1) == 0.0
    assert variation([], 0) == 0.0


@pytest.mark.parametrize(
    ("loss", "step"), [(2.5, 0.0), (2.0, 0.0), (1.5, 5.0), (1.0, 10.0), (0.9, 15.0), (0.5, None)]
)
def test_steps_are_read_off_straight_lines(loss: float, step: float | None) -> None:
    assert steps_to([(0, 2.0), (10, 1.0), (20, 0.8)], loss) == pytest.approx(step)


def test_a_curve_of_one_point() -> None:
    assert steps_to([(4, 1.0)], 1.0) == 4.0
    assert steps_to([(4, 1.0)], 0.9) is None
    assert steps_to([], 1.0) is None
