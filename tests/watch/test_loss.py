"""A loss that jumps or does not come back."""

from __future__ import annotations

import random

import pytest

from kpsvd_tune.report.results import StepMetrics
from kpsvd_tune.watch.loss import RISING_CHECKS, SPIKE_LEAST, LossSpike, divergence


def metrics(step: int, loss: float, skipped: str | None = None) -> StepMetrics:
    return StepMetrics(step, 0.1, loss, 1e-3, 1.0, 10, 100.0, 1.0, skipped=skipped)


def spikes(losses: list[float]) -> list[int]:
    detector = LossSpike()
    steps = enumerate(losses, start=1)
    return [step for step, loss in steps if detector.step(metrics(step, loss)) is not None]


def test_a_jump_is_found_at_its_step_with_what_it_was_held_against():
    detector = LossSpike()
    losses = [2.0 + 0.1 * (step % 3) for step in range(20)]
    for step, loss in enumerate(losses, start=1):
        assert detector.step(metrics(step, loss)) is None
    found = detector.step(metrics(21, 6.0))
    assert found is not None
    assert (found.code, found.step) == ("loss_spike", 21)
    assert found.text == (
        "The training loss jumped to 6, where the median of the 20 steps before is 2.1."
    )
    assert found.evidence["limit"] == pytest.approx(2.1 + 10 * 1.4826 * 0.1, rel=1e-4)


def test_batches_of_one_row_vary_by_much_and_are_no_spikes():
    for seed in range(20):
        draw = random.Random(seed)
        # Losses of single rows, falling over the run: a log-normal spread of a factor of two.
        losses = [(0.5 + 2 * 0.99**step) * draw.lognormvariate(0, 0.35) for step in range(300)]
        assert spikes(losses) == []


def test_a_loss_near_zero_may_double_and_early_steps_are_not_judged():
    assert spikes([0.01] * 30 + [0.3]) == []
    assert spikes([2.0] * (SPIKE_LEAST - 1) + [20.0]) == []
    assert spikes([2.0] * SPIKE_LEAST + [20.0]) == [SPIKE_LEAST + 1]


def test_a_skipped_step_has_no_loss_to_judge():
    detector = LossSpike()
    for step in range(1, 20):
        detector.step(metrics(step, 2.0))
    assert detector.step(metrics(20, float("nan"), skipped="step 20: the loss is nan")) is None
    assert detector.step(metrics(21, 9.0)) is not None


def checks(*losses: float) -> list[list[float]]:
    return [[10.0 * place, loss] for place, loss in enumerate(losses)]


def test_validations_that_rise_in_a_row_are_divergence():
    losses = [2.0, 2.1, 2.2, 2.3]
    assert len(losses) == RISING_CHECKS + 1
    found = divergence(30, checks(*losses), [2.5] * 10, 2.0, 2.1)
    assert found is not None
    assert found.text == ("The validation loss rose in 3 checks in a row, from 2 at step 0 to 2.3.")
    assert "Lower train.learning_rate" in found.cure
    overfit = divergence(30, checks(*losses), [0.4] * 10, 2.0, 2.1)
    assert overfit is not None
    assert "learnt by heart" in overfit.cure
    assert overfit.evidence["lowest_step"] == 0


@pytest.mark.parametrize(
    "losses", [[2.0, 2.1, 2.2], [2.0, 2.1, 2.05, 2.3], [2.0, 2.005, 2.01, 2.02]]
)
def test_fewer_or_smaller_rises_are_none(losses):
    assert divergence(30, checks(*losses), [1.0] * 10, 2.0, 2.0) is None


def test_a_loss_far_above_the_start_is_divergence_at_once():
    found = divergence(10, checks(2.0, 3.6), [2.0], 2.0, 2.0)
    assert found is not None
    assert "far above the 2 before the first step" in found.text
    found = divergence(10, [], [4.0] * 10, None, 2.0)
    assert found is not None
    assert found.text.startswith(
        "The training loss of the last 10 steps is 4 (median), far above the 2 that"
    )
    # Nine steps are too few, and with a start of 2.5 a median of 4 is near.
    assert divergence(10, [], [4.0] * 9, None, 2.0) is None
    assert divergence(10, [], [4.0] * 10, 2.5, 2.0) is None
    # One spike, however high, is none.
    assert divergence(10, [], [2.0] * 9 + [900.0], None, 2.0) is None
