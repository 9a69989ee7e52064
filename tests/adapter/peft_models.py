"""What the tests of PEFT's contract share: an adapted tiny model, moved away from its start."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig

IDS = torch.arange(24).reshape(2, 12)


def config(**options: Any) -> KpsvdConfig:
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
    return KpsvdConfig(**(settings | {"task_type": "CAUSAL_LM"} | options))


def adapt(model: nn.Module, name: str = "default", **options: Any) -> Any:
    return get_peft_model(model, config(**options), adapter_name=name)


def perturb(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise.to(parameter.dtype))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result
