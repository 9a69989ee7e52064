"""How far each adapted layer has moved: the norms behind dead layers and exploding offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from kpsvd_tune.adapter.idle import exclusion, trained_by_layer
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.training.learned import update_norm, weight_norm


class Offsets:
    """Measures a model whose trained weights this process holds whole; nothing is changed.

    It costs one read of what is trained, and the first time one of the adapted base weights; so it
    is asked at validations and checkpoints only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = trained_by_layer(model)
        self._layers = dict(kpsvd_layers(model))

    def norms(self) -> dict[str, float]:
        """Frobenius norm of all that is trained in each adapted layer; equal bits if unmoved."""
        return dict(zip(self._trained, map(_norm, self._trained.values()), strict=True))

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """Norm of each KPSVD layer's update over that of its weight; empty for other adapters."""
        return {
            name: update_norm(*layer.terms("default")) / self._weights[name]
            for name, layer in self._layers.items()
            if self._weights[name] > 0
        }

    def advice(self, dead: Sequence[str]) -> str:
        """What leaves these layers out, as the end of a sentence."""
        out = exclusion(dead, list(self._trained))
        return f"to leave them out, set adapter.exclude_modules: {out}"

    @cached_property
    def _weights(self) -> Mapping[str, float]:
        return {name: weight_norm(layer) for name, layer in self._layers.items()}


@torch.no_grad()
def _norm(tensors: Sequence[Tensor]) -> float:
    parts = [torch.linalg.vector_norm(each, dtype=_wide(each)) for each in tensors]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
