"""Layers without gradients in a run: one warning in the first step, and the rest is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.training import Training
from kpsvd_tune.training.batches import first_tokens, make_micro_batch
from kpsvd_tune.training.engines.plain import allow_unused_parameters
from kpsvd_tune.training.loss import SummedTokenLoss

ROWS = [TokenizedRow(tuple(range(1, 30)), (-100,) * 25 + (26, 27, 28, 29), 0)]
EXAMPLE = make_micro_batch([first_tokens(ROWS[0])], 0)


def with_extra(make: Callable[..., Any], name: str, targets: list[str]) -> Any:
    """A model with an adapted layer that nothing calls."""
    model = make()
    model.add_module(name, nn.ModuleList([nn.Linear(4, 4)]))
    return get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("extra", ["q_proj"], False),
        ("extra", ["q_proj", "extra.0"], True),
    ],
)
def test_ddp_looks_for_unused_parameters_where_there_are_some(
    name: str, targets: list[str], expected: bool, model_factory: Callable[..., Any]
) -> None:
    model = with_extra(model_factory, name, targets)
    model.train()
    handler = SimpleNamespace(find_unused_parameters=None)
    accelerator = SimpleNamespace(ddp_handler=handler, device=torch.device("cpu"))
    state = torch.get_rng_state()
    allow_unused_parameters(SummedTokenLoss(model), EXAMPLE, accelerator)
    assert handler.find_unused_parameters is expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class Experts(nn.Module):
    """One expert that every token takes, by the layout of models with experts of their own."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([expert])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.experts[0](x)
        return found


def test_experts_of_their_own_are_looked_for_though_the_probe_reached_them(
    model_factory: Callable[..., Any],
) -> None:
    model = model_factory()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Experts(mlp.up_proj)
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=["experts.0"], task_type="CAUSAL_LM")
    )
    handler = SimpleNamespace(find_unused_parameters=None)
    accelerator = SimpleNamespace(ddp_handler=handler, device=torch.device("cpu"))
    allow_unused_parameters(SummedTokenLoss(adapted), EXAMPLE, accelerator)
    assert handler.find_unused_parameters is True


def test_a_run_says_once_which_layers_it_does_not_train(
    model_factory: Callable[..., Any],
    start_training: Callable[..., Training],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And goes on: the rest is trained, saved, and resumed to the same bits."""

    def model() -> Any:
        torch.manual_seed(1)
        return with_extra(model_factory, "extra", ["q_proj", "extra.0"])

    with caplog.at_level(logging.WARNING):
        whole = start_training("whole", model=model(), max_steps=4)
        assert len(list(whole.steps())) == 4
    said = [record.message for record in caplog.records if "got no gradient" in record.message]
    assert len(said) == 1
    assert said[0].startswith("1 of 3 adapted layers got no gradient in the first step: extra.0. ")
    assert said[0].endswith("adapter.exclude_modules: [extra.0]")
    caplog.clear()
    parts = start_training("parts", model=model(), max_steps=4, save_every=2)
    steps = parts.steps()
    assert [next(steps).step for _ in range(2)] == [1, 2]
    steps.close()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resumed = start_training("parts", model=model(), max_steps=4, save_every=2)
        assert [metrics.step for metrics in resumed.steps()] == [3, 4]
    assert "got no gradient" not in caplog.text
    for name, value in whole.trained_weights().items():
        assert torch.equal(resumed.trained_weights()[name], value), name


def test_a_run_that_trains_all_layers_says_nothing(
    start_training: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        list(start_training(max_steps=1).steps())
    assert "gradient" not in caplog.text
