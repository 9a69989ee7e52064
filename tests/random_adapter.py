"""An adapter as training leaves it, without the training."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def add_offsets(peft: Any, scale: float = 0.05, seed: int = 3) -> None:
    """Add random numbers, equal ones in every run, to all that is trainable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
