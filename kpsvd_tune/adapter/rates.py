"""The learning rate of each factor: the same for all, or relative to the weight it changes."""

from __future__ import annotations

import math

from torch import nn

from kpsvd_tune.adapter.base import Fetch, weight_at_hand
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers


def rate_factors(
    model: nn.Module,
    *,
    is_relative: bool = False,
    adapter_name: str = "default",
    fetch: Fetch | None = None,
) -> dict[str, float]:
    """What the learning rate of each offset is to be multiplied with.

    With Adam one step moves every entry of a factor by about the rate. Moving a alone moves Delta
    by sum_k a_k kron B0_k, so with m*n entries of size eta its Frobenius norm is
    eta sqrt(m n sum_k ||B0_k||^2), which differs by shape, layer and rank. The relative rate
    divides by that and multiplies with ||W||_F: the learning rate then is the relative change of
    W that one step of one factor makes, everywhere.

    Args:
        model: A model with KPSVD layers, wrapped by PEFT.
        is_relative: Whether to scale as above.
        adapter_name: The adapter.
        fetch: Reads a weight of the base by its name, where it is on the meta device.

    Returns:
        Name in ``model.named_parameters()`` to factor, for offsets that are trained.
    """
    factors: dict[int, float] = {}
    for name, layer in kpsvd_layers(model, adapter_name):
        form = layer.kpsvd_form[adapter_name]
        if form.is_scaled:
            # Their frozen factors hold the scale that makes the rate relative.
            factors |= dict.fromkeys(map(id, layer.trained(adapter_name)), 1.0)
            continue
        left0, right0 = layer.kpsvd_left0[adapter_name], layer.kpsvd_right0[adapter_name]
        shape = form.shape
        left = right = 1.0
        if is_relative:
            with weight_at_hand(layer, name, fetch):
                norm = float(base_weight(layer, name).float().norm())
            left = norm / math.sqrt(shape.m * shape.n * float(right0.square().sum()))
            right = norm / math.sqrt(shape.p * shape.q * float(left0.square().sum()))
        factors[id(layer.kpsvd_left[adapter_name])] = left
        factors[id(layer.kpsvd_right[adapter_name])] = right
    return {
        name: factors[id(parameter)]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in factors
    }
