"""Adapted layers that training does not reach are named, with the line that leaves them out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from model_zoo import ZOO, output_of
from peft import LoraConfig, get_peft_model
from torch import nn

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.idle import (
    exclusion,
    idle_cure,
    idle_layers,
    idle_message,
    trained_by_layer,
    unreached_layers,
)
from kpsvd_tune.adapter.targets import target_names


class Partial(nn.Module):
    """Calls one layer, reads the weight of another, detaches a third, and forgets the fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)
        self.detached, self.forgotten = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.called(x) @ self.read.weight
        with torch.no_grad():
            scale = self.detached(x)
        return self.head(y * scale)


@pytest.mark.parametrize(
    "config",
    [
        KpsvdConfig(target_modules=r"(?!head).*", rank=1, modules_to_save=["head"]),
        LoraConfig(
            target_modules=["called", "read", "detached", "forgotten"], modules_to_save=["head"]
        ),
    ],
    ids=["kpsvd", "lora"],
)
def test_what_gets_no_gradient_is_named(config: Any) -> None:
    model: Any = get_peft_model(Partial(), config)
    loss = model(torch.randn(3, 6)).sum()
    unreached = unreached_layers(model, loss)
    loss.backward()
    assert idle_layers(model) == unreached == ["read", "detached", "forgotten"]
    assert list(trained_by_layer(model)) == ["called", "read", "detached", "forgotten", "head"]


def test_the_message_names_layers_and_the_line_to_write() -> None:
    given = (["a.b", "a.c"], ["a.b", "a.c", "a.d"])
    message = idle_message(*given)
    assert message.startswith("2 of 3 adapted layers got no gradient in the first step: a.b, a.c.")
    assert idle_cure(*given).endswith("set adapter.exclude_modules: [a.b, a.c]")
    many = [f"vision.{n}.up" for n in range(8)]
    message = idle_message(many, [*many, "text.0.up"])
    assert "vision.5.up and 2 more. " in message
    cure = idle_cure(many, [*many, "text.0.up"])
    assert cure.endswith(r"set adapter.exclude_modules: 'vision\.\d+\.up'")


def test_a_pattern_that_would_leave_out_more_is_not_offered() -> None:
    idle = [f"layers.{n}.up" for n in range(8)]
    assert exclusion(idle, [*idle, "layers.9.up"]) == f"[{', '.join(idle)}]"


@pytest.mark.parametrize("name", ["llava on text", "bart's decoder alone"])
def test_what_the_message_offers_leaves_out_those_layers_alone(name: str) -> None:
    kind = ZOO[name]()
    model: Any = get_peft_model(kind.make(), KpsvdConfig(target_modules="all-linear", rank=1))
    output_of(model, kind.inputs).sum().backward()
    idle, adapted = idle_layers(model), list(trained_by_layer(model))
    offered = exclusion(idle, adapted)
    exclude: Any = (
        offered.strip("'") if offered.startswith("'") else re.split(", ", offered.strip("[]"))
    )
    names = target_names(kind.make(), "all-linear", exclude)
    assert names == [layer for layer in adapted if layer not in idle]
