"""Nothing infinite or NaN reaches a weight or a file."""

from __future__ import annotations

import math

import pytest
import torch

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.training.nonfinite import check_finite


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_planted_value_stops_the_run_before_the_step(start_training, lora_model, tmp_path, value):
    model = lora_model()
    training = start_training(model=model, save_every=1)
    steps = training.steps()
    next(steps)
    next(steps)
    before = weights(model)
    model.base_model.model.lm_head.weight.data[:, 0] = value
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan on process 0") as caught:
        next(steps)
    assert caught.value.exit_code == 3
    expected = [100 + index for index in training._sampler.batch(2, 0, 0)]
    assert f"rows {expected[0]}, {expected[1]}. " in str(caught.value)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_infinite_gradient_under_a_finite_loss_stops_the_run(start_training, lora_model):
    model = lora_model()
    training = start_training(model=model, gradient_accumulation=2)
    before = weights(model)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient norm is (nan|inf) while every"):
        next(training.steps())
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])


def test_message_names_the_process_and_shortens_long_lists_of_rows():
    with pytest.raises(NonFiniteError, match=r"inf on process 1, .* rows 0, 1, .* 15 and 4 more\."):
        check_finite(7, [1.0, math.inf], 1.0, lambda process: range(20 * process))
    with pytest.raises(NonFiniteError, match=r"norm is inf .* on processes 0 to 1: 5, 5\."):
        check_finite(7, [1.0, 1.0], math.inf, lambda process: [5])


def test_finite_numbers_and_a_norm_left_to_the_scaler_pass():
    check_finite(7, [1.0, 2.0], 3.0, lambda process: [])
    check_finite(7, [1.0, 2.0], None, lambda process: [])
