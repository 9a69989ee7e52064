"""Weights of 4 bits on a CPU: kept as bitsandbytes stored them, and told where it misreads them.

Read in the source of bitsandbytes 0.49 and 0.50, and tried.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kpsvd_tune.errors import some_of

_BLOCK = 64  # weights that share a scale, if not chosen otherwise


def settle(model: nn.Module) -> str | None:
    """Have the model compute with its 4-bit weights as they are stored, on every CPU.

    Returns:
        Which of them bitsandbytes reads wrongly on this one, as a clause; None where it is none.
    """
    keep_as_stored(model)
    return _told(misread_layers(model))


def foreseen(widths: Mapping[str, int], kind: str) -> str | None:
    """What :func:`settle` would say of linear layers of so many inputs, before they are loaded.

    Args:
        widths: Inputs of each layer that is to be quantised, by its name.
        kind: nf4 or fp4.
    """
    import bitsandbytes  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

    odd = {width for width in widths.values() if width % _BLOCK}
    wrong = {width for width in odd if _is_misread(width, _BLOCK, kind)}
    return _told({name: width for name, width in widths.items() if width in wrong})


def _told(misread: Mapping[str, int]) -> str | None:
    if not misread:
        return None
    widths = ", ".join(str(width) for width in sorted({*misread.values()}))
    return (
        f"bitsandbytes dequantises the 4-bit weights of {some_of([*misread])} wrongly on this CPU: "
        f"it does so where the number of inputs, here {widths}, is not a whole number of the "
        "blocks that share a scale (64 inputs, if not chosen otherwise)"
    )


def keep_as_stored(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew, and undo it where it has.

    On a CPU with units for bfloat16 (avx512_bf16) its layer packs its weight anew, in place, the
    first time that it computes in evaluation mode without gradients, for a kernel that is made
    for generation: scales and products are rounded to bfloat16 in any dtype, and sizes that do
    not divide are an AssertionError. The layer stays so in training, where this kernel passes no
    gradient on to the layer's input, and what dequantises the weight reads it as if it were in
    its old place. Undoing it leaves the scales rounded.
    """
    for module in _layers(model).values():
        module.support_avx512bf16_for_cpu = False
        if getattr(_state(module), "packing_format_for_cpu", False):
            # Saving is where bitsandbytes undoes it.
            module.state_dict()


def misread_layers(model: nn.Module) -> dict[str, int]:
    """Which layers' 4-bit weights bitsandbytes dequantises wrongly on this CPU, and their inputs.

    On a CPU with AVX-512 it was seen to take a wrong scale where a row is not a whole number of
    blocks. Each such width is tried: the same bits read as one long row, where blocks cannot be
    mistaken, must give the same numbers.
    """
    wrong: dict[tuple[int, int, str], bool] = {}
    found: dict[str, int] = {}
    for name, module in _layers(model).items():
        state = _state(module)
        if state is None or module.weight.device.type != "cpu":
            continue
        width = state.shape[-1]
        kind = (width, state.blocksize, state.quant_type)
        if width % state.blocksize and kind not in wrong:
            wrong[kind] = _is_misread(*kind)
        if wrong.get(kind):
            found[name] = width
    return found


def _layers(model: nn.Module) -> dict[str, Any]:
    """The 4-bit linear layers; there are none where nobody has imported bitsandbytes."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return {}
    kind = bitsandbytes.nn.Linear4bit
    return {name: each for name, each in model.named_modules() if isinstance(each, kind)}


def _state(module: Any) -> Any:
    """Sizes and scales of a layer's weight; None where it has not been quantised yet."""
    return getattr(module.weight, "quant_state", None)


def _is_misread(width: int, blocksize: int, kind: str) -> bool:
    functional: Any = sys.modules["bitsandbytes"].functional
    # As many rows as a block has numbers make whole blocks. Each block has a scale of its own.
    scales = torch.arange(1.0, width + 1).repeat_interleave(blocksize)
    weight = scales.view(blocksize, width)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=kind)
    flat = copy.copy(state)
    flat.shape = torch.Size((1, weight.numel()))
    read = functional.dequantize_4bit(packed, state)
    return not torch.equal(read.flatten(), functional.dequantize_4bit(packed, flat).flatten())
