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


def test_many_seeds_use_the_normal_quantile() -> None:
    found = estimate([0.0, 1.0] * 20)
    assert found.deviation is not None
    assert found.high is not None
    assert found.high - 0.5 == pytest.approx(1.96 * found.deviation / 40**0.5)


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
