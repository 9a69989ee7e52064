"""How far training has moved each layer, measured when its adapter is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.report.results import LearnedLayer, LearnedReport


@torch.no_grad()
def measure_learned(model: nn.Module, step: int) -> LearnedReport:
    """The Frobenius norm of every layer's update and of its base weight.

    Args:
        model: A model with KPSVD layers whose tensors are whole in this process.
        step: Optimiser steps done of the adapter that it holds.
    """
    layers = []
    for name, layer in kpsvd_layers(model):
        layers.append(
            LearnedLayer(
                name=name,
                update_norm=update_norm(*layer.terms("default")),
                weight_norm=weight_norm(layer, name),
            )
        )
    return LearnedReport(step, tuple(layers))


@torch.no_grad()
def weight_norm(layer: Any, name: str = "") -> float:
    """The Frobenius norm of a layer's base weight, added up in float32 without a copy of it."""
    return float(torch.linalg.vector_norm(base_weight(layer, name), dtype=torch.float32))


def update_norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of sum_k left_k kron right_k, which is not formed.

    Its square is the sum over all i, j of <left_i, left_j> <right_i, right_j>, in float64.

    Args:
        left: The left factors, (s, m, n).
        right: The right factors, (s, p, q).
    """
    grams = [each @ each.T for each in (_wide(left), _wide(right))]
    # Rounding may leave a square of nearly nothing below zero.
    return float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())


def _wide(factors: Tensor) -> Tensor:
    # On the CPU, since not every device knows float64.
    return factors.cpu().double().flatten(1)
