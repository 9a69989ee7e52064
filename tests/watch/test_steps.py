"""Clipping, pace, and all detectors of steps together."""

from __future__ import annotations

import math

from kpsvd_tune.report.results import StepMetrics
from kpsvd_tune.watch.gradient import WINDOW, Clipping
from kpsvd_tune.watch.speed import Slow
from kpsvd_tune.watch.watch import Watch


def metrics(step: int, norm: float = 1.0, pace: float = 100.0, tokens: int = 500) -> StepMetrics:
    return StepMetrics(step, 0.1, 2.0, 1e-3, norm, tokens, pace, 1.0)


def test_a_norm_far_above_the_limit_in_most_steps_is_told():
    detector = Clipping(1.0)
    found = [detector.step(metrics(step, 25.0)) for step in range(1, WINDOW + 1)]
    assert found[:-1] == [None] * (WINDOW - 1)
    told = found[-1]
    assert told is not None
    assert told.code == "clipping"
    assert "clipped in 100 % of the last 50 steps: its norm is usually 25" in told.text
    assert "Raise train.max_grad_norm to about 5e+01" in told.cure


def test_norms_near_the_limit_and_runs_without_one_are_not_told():
    near, often, none = Clipping(1.0), Clipping(1.0), Clipping(None)
    for step in range(1, 200):
        assert near.step(metrics(step, 5.0)) is None
        # In four of five steps.
        assert often.step(metrics(step, 0.5 if step % 5 == 0 else 50.0)) is None
        assert none.step(metrics(step, 1e6)) is None
    assert near.step(metrics(200, math.inf)) is None


def test_a_pace_that_collapses_for_long_is_told():
    detector = Slow()
    for step in range(1, 30):
        assert detector.step(metrics(step)) is None
    found = [detector.step(metrics(step, pace=10.0)) for step in range(30, 40)]
    told = next(each for each in found if each is not None)
    assert told.code == "slow"
    assert "fell to 10 tokens a second, from 100" in told.text


def test_short_pauses_and_single_slow_steps_are_not_told():
    detector = Slow()
    for step in range(1, 100):
        pace = 5.0 if step % 3 == 0 else 100.0
        assert detector.step(metrics(step, pace=pace)) is None
    # Steps of milliseconds, ten times slower than before: less than a second is lost.
    quick = Slow()
    for step in range(1, 100):
        assert quick.step(metrics(step, pace=1e5 if step < 50 else 1e4, tokens=500)) is None


def test_steps_of_before_count_and_are_not_told_again():
    before = [metrics(step, 25.0) for step in range(1, WINDOW)]
    assert [event.code for event in Watch(1.0, before).step(metrics(WINDOW, 25.0))] == ["clipping"]
    assert list(Watch(1.0).step(metrics(1, 25.0))) == []
