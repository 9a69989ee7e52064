"""The layer beneath an adapter: its sizes, and whether it is the one the adapter was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import rearrange

# How far <W, A0_1 kron B0_1> of the right base may be from the stored number, relative to it.
# Rounding W to 16 bits moves the product by about 2^-9 ||W|| / (sqrt(out in) sigma_1) of its
# size, below 1e-3 even for tiny layers; 4-bit weights by a few per cent.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16_BIT = 5e-3
TOLERANCE_QUANTISED = 1e-1


@dataclass(frozen=True)
class Unchecked:
    """What a layer was told of its base by an adapter's configuration, and has not seen proved.

    Args:
        name: The module's name in the base model.
        fingerprint: <W, A0_1 kron B0_1> of the base that the adapter was made for.
        made_for: The name of that base.
    """

    name: str
    fingerprint: float
    made_for: str


def base_sizes(base_layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; packed quantised weights know their sizes as attributes."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[1], base_layer.weight.shape[0]
    out_features, in_features = base_layer.out_features, base_layer.in_features
    return int(cast(int, out_features)), int(cast(int, in_features))


def check_loaded(layer: Any) -> None:
    """Check what came past PEFT's hooks: transformers' load_adapter asks none, and sets the mode.

    Args:
        layer: The adapted layer; adapters whose factors are not here yet stay unchecked.

    Raises:
        AdapterError: See :func:`check_base`.
    """
    for name in list(layer.kpsvd_unchecked):
        left0: Tensor = layer.kpsvd_left0[name]
        if left0.device.type != "meta" and left0.any():
            check_base(layer, name, layer.kpsvd_unchecked.pop(name))


@torch.no_grad()
def check_base(
    layer: Any,
    adapter_name: str,
    expected: Unchecked,
    factors: tuple[Tensor, Tensor] | None = None,
    given: str = "",
) -> None:
    """Compare <W, A0_1 kron B0_1> with the number stored when the adapter was made.

    Args:
        layer: The adapted layer; one whose weight is not here, on meta or shared out, passes.
        adapter_name: The adapter.
        expected: What its configuration says.
        factors: A0 and B0, where the layer has not got them yet.
        given: The name of the model at hand.

    Raises:
        AdapterError: The numbers differ.
    """
    held: Tensor = layer.weight
    if held.device.type == "meta" or hasattr(held, "full_tensor"):
        return
    weight: Tensor = layer.get_base_weight().float()
    if isinstance(layer.get_base_layer(), Conv1D):
        weight = weight.T
    left0, right0 = factors or (layer.kpsvd_left0[adapter_name], layer.kpsvd_right0[adapter_name])
    rearranged = rearrange(weight, layer.kpsvd_shape[adapter_name])
    a, b = (factor[0].flatten().to(rearranged) for factor in (left0, right0))
    found = float(a @ (rearranged @ b))
    if layer.quantization_backend is not None:
        tolerance = TOLERANCE_QUANTISED
    else:
        tolerance = TOLERANCE.get(held.dtype, TOLERANCE_16_BIT)
    if not abs(found - expected.fingerprint) <= tolerance * abs(expected.fingerprint):
        model = f", the model given is {given!r}" if given else ""
        raise AdapterError(
            f"this adapter was trained on another base model: {expected.name} projects to "
            f"{found:.6g} on its first term, expected {expected.fingerprint:.6g} (within "
            f"{tolerance:g} of it). The adapter names {expected.made_for!r} as its base{model}."
        )
