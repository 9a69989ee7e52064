"""Base models with weights of 4 or 8 bits, by bitsandbytes, and the memory that they take."""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import ModelError
from kpsvd_tune.hardware import four_bits

# As recipes name them: 4-bit NormalFloat with scales that are quantised too (QLoRA, arXiv
# 2305.14314), and 8-bit integers with outlying inputs apart (LLM.int8, arXiv 2208.07339).
QUANTISATIONS = ("nf4", "int8")
# Weights that share a scale in nf4, and scales that share one of their own.
_BLOCK, _SCALES = 64, 256


def quantisation_config(kind: str, dtype: torch.dtype) -> Any:
    """What transformers needs to quantise a model while it loads it.

    Args:
        kind: nf4 or int8.
        dtype: What the layers compute in, and what the other weights are kept in.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization: {kind} needs the bitsandbytes package; install it with: "
            "pip install 'kpsvd-tune[quant]'"
        )
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if kind == "int8":
        # Each layer says in each step that its inputs are multiplied in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def settle_quantised(model: nn.Module, path: str) -> None:
    """See to it that a base computes on every CPU with its 4-bit weights as they are stored.

    Raises:
        ModelError: bitsandbytes reads some of them wrongly here.
    """
    _refuse(four_bits.settle(model), path)


def check_quantisation(skeleton: nn.Module, kind: str | None, path: str, device: str) -> None:
    """Refuse before any weight is read what :func:`settle_quantised` would refuse once it is.

    Nothing is known, and nothing refused, where bitsandbytes is not installed.
    """
    is_known = importlib.util.find_spec("bitsandbytes") is not None
    if kind == "nf4" and device == "cpu" and is_known:
        widths = {
            name: module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            for name, module in _quantised_layers(skeleton).items()
        }
        _refuse(four_bits.foreseen(widths, kind), path)


def _quantised_layers(model: nn.Module) -> dict[str, Any]:
    """Every linear layer but the output head, whose weight is often the embedding's too."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _refuse(fault: str | None, path: str) -> None:
    if fault:
        raise ModelError(
            f"model {path!r}: {fault}; expected plain weights (model.quantization: null), or "
            "model.quantization: int8"
        )


def dequantised(model: Any) -> Any:
    """The same model with plain weights, and with a Conv1D where one had been quantised.

    transformers packs (in, out) as (out, in), and makes an nn.Linear of it again.
    """
    make: Any = Conv1D  # which has no types
    names = [
        name
        for name, module in model.named_modules()
        if getattr(module, "source_cls", None) is Conv1D
    ]
    plain = model.dequantize()
    for name in names:
        linear = plain.get_submodule(name)
        own = make(linear.out_features, linear.in_features)
        own.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        if linear.bias is not None:
            own.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        plain.set_submodule(name, own)
    return plain


def weight_bytes(model: nn.Module, dtype: torch.dtype, kind: str | None = None) -> int:
    """Bytes of a model's weights in a dtype; shared ones count once.

    Args:
        model: May be on the meta device.
        dtype: Of the weights that are not quantised.
        kind: nf4, int8 or None.
    """
    quantised: dict[int, int] = {}
    for module in _quantised_layers(model).values() if kind else ():
        count = module.weight.numel()
        rows = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        scales = math.ceil(count / _BLOCK)
        nf4 = math.ceil(count / 2) + scales + 4 * math.ceil(scales / _SCALES)
        quantised[id(module.weight)] = nf4 if kind == "nf4" else count + 4 * rows
    return sum(
        quantised.get(id(each), each.numel() * dtype.itemsize) for each in model.parameters()
    )
