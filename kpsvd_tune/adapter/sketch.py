"""How an adapter recognises its base model: random projections of the base's weights.

A tensor's sketch is its inner products with eight random vectors of signs, which are the same for
every tensor of a size and come from a hash, so that all machines use equal ones. The mean square
of the differences of two sketches estimates the squared distance of the tensors: two that differ by
d in norm have sketches that differ by less than 0.45 d once in a hundred times. Whatever the
difference is, noise, a fine-tuning or one entry, no direction is spared by design; who knows the
signs could construct one.

The base may come in another dtype than the one at hand. A sketch therefore holds the projections
of the weight as it is and rounded to bfloat16 and to float16: rounding is the same function on
both sides, so that a float32 checkpoint is compared exactly with its 16-bit copy.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NUM_PROJECTIONS = 8
# Everything is added up in float64. A chunk of two megabytes stays in a processor's outer cache.
_BLOCK, _CHUNK = 4096, 1 << 18
FORMS: tuple[torch.dtype | None, ...] = (None, torch.bfloat16, torch.float16)
SIZE = 1 + len(FORMS) * NUM_PROJECTIONS
_EXACT, _BF16, _FP16, _OTHER, _MIXED, _MIXED_OTHER = range(1, 7)
_KINDS = {
    torch.float64: _EXACT,
    torch.float32: _EXACT,
    torch.bfloat16: _BF16,
    torch.float16: _FP16,
}
# Largest distance that passes, relative to the weight's norm. Equal weights differ by the order of
# sums in float32 at most; a float32 checkpoint rounded once to bfloat16 and once to float16 by
# about 1e-3, estimated from eight numbers; weights of four bits by a tenth and more.
TOLERANCE, TOLERANCE_16_BIT, TOLERANCE_QUANTISED = 1e-6, 4e-3, 0.3
# Modules that PEFT trains whole for these tasks, and fills with new random numbers.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Sketch:
    """Projections of one tensor, or of the sum of several."""

    kind: int  # the narrowest dtype that holds its values
    values: Tensor  # (forms, projections), float64, on the CPU
    norm: float = 0.0  # of what was projected; 0 where a stored sketch does not say
    # Whether every dtype holds its values, as the ones of a fresh norm, so that the kind tells
    # nothing of the model's.
    is_any_kind: bool = False

    def packed(self) -> Tensor:
        """As int32, which no cast to another dtype touches: the kind, then bits of float32."""
        bits = self.values.float().flatten().view(torch.int32)
        return torch.cat([torch.tensor([self.kind], dtype=torch.int32), bits])


def unpacked(stored: Tensor) -> Sketch:
    """Read what :meth:`Sketch.packed` gave."""
    stored = stored.detach().cpu()
    values = stored[1:].contiguous().view(torch.float32).double()
    # Above the lowest byte lies what is no part of the sketch.
    return Sketch(int(stored[0]) & 0xFF, values.reshape(len(FORMS), NUM_PROJECTIONS))


@torch.no_grad()
def sketch(weight: Tensor, is_quantised: bool = False, known: int | None = None) -> Sketch:
    """Project one floating-point weight of any size, which may be dequantised from fewer bits.

    With the kind of the sketch that it is compared with, the forms are left out (as zeros) that
    :func:`distance` does not look at for two weights of 16 bits and one dtype. Their entries, each
    exact in float32, are summed up in it, to 1e-7 of the norm, and to 1e-6 where one is a
    thousand times all others.
    """
    is_alike = not is_quantised and known in (_BF16, _FP16) and _KINDS.get(weight.dtype) == known
    wide = torch.float32 if is_alike else torch.float64
    flat = weight.detach().reshape(-1)
    device = flat.device if flat.device.type != "mps" else torch.device("cpu")
    signs = _block_signs(wide).to(device).T
    values = torch.zeros(len(FORMS), NUM_PROJECTIONS, dtype=torch.float64)
    square = 0.0
    is_form = [True] * len(FORMS)
    of_blocks = _signs("blocks", math.ceil(flat.numel() / _BLOCK))
    # Memory that is used again: fresh pages cost as much as the sums.
    held = torch.empty(min(_CHUNK, flat.numel()), dtype=wide, device=device)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK].to(device)
        first, count = begin // _BLOCK, len(chunk) // _BLOCK  # blocks
        for index, form in enumerate(FORMS[:1] if is_alike else FORMS):
            rounded = chunk if form is None else chunk.float().to(form)
            if form is not None:
                is_form[index] = is_form[index] and torch.equal(rounded.to(chunk.dtype), chunk)
            entries = held[: len(chunk)].copy_(rounded)
            own = float(torch.dot(entries, entries))
            if not math.isfinite(own):
                # Neither infinity nor NaN may hide all other entries.
                torch.nan_to_num(entries, posinf=7e4, neginf=-7e4, out=entries)
                own = float(torch.dot(entries, entries))
            square += own if form is None else 0.0
            if count:
                projected = entries[: count * _BLOCK].view(-1, _BLOCK) @ signs
                values[index] += (projected.cpu() * of_blocks[first : first + count]).sum(0)
            if rest := len(entries) % _BLOCK:
                values[index] += (entries[-rest:] @ signs[:rest]).cpu() * of_blocks[first + count]
    kind = _OTHER if is_quantised else _KINDS.get(weight.dtype, _OTHER)
    if kind == _EXACT:
        # A 16-bit file that was loaded in float32, as merging does, is a 16-bit weight still.
        kind = _BF16 if is_form[1] else _FP16 if is_form[2] else _EXACT
    is_any_kind = all(is_form) and not is_quantised and not is_alike
    return Sketch(kind, values, math.sqrt(square), is_any_kind)


def sketch_module(module: nn.Module, known: int | None = None) -> Sketch | None:
    """Project the weight of one adapted layer's base; None where it is not here.

    `known` is as in :func:`sketch`.
    """
    for name, weight, is_quantised in _weights(module):
        if name == "weight" and weight is not None:
            return sketch(weight, is_quantised, known)
    return None


@dataclass(frozen=True)
class Rest:
    """All weights of a base that no adapter lies on."""

    sketch: Sketch  # the sum of their sketches, each with random signs of its name
    # by name: the sum of its first projection and its norm, and the norm
    numbers: dict[str, tuple[float, float]]


def sketch_rest(
    model: nn.Module,
    adapted: Sequence[str],  # names of the layers whose weights are left out
    saved_whole: Sequence[str],  # modules_to_save, left out too
    task: str | None,  # PEFT's task type, some of which save a head whole
    with_buffers: bool = True,  # floating buffers that are saved with the model count as weights
    fetch: Callable[[str], Tensor | None] | None = None,  # reads one that is not loaded, by name
    known: int | None = None,  # the kind of what it is compared with, as in :func:`sketch`
) -> Rest | None:
    """Project all weights of a base but the adapted; None where some are sharded or not there."""
    ends = (*saved_whole, *_HEADS.get(str(getattr(task, "value", task)), ()))
    left_out = {f"{name}.weight" for name in adapted}
    values = torch.zeros(len(FORMS), NUM_PROJECTIONS, dtype=torch.float64)
    square = 0.0
    kinds: set[int] = set()
    vague: set[int] = set()
    numbers: dict[str, tuple[float, float]] = {}
    for path, module in _base_modules(model):
        if any(_is_under(path, end) for end in ends):
            continue
        for name, weight, is_quantised in _weights(module, with_buffers):
            full = f"{path}.{name}" if path else name
            if full in left_out:
                continue
            if weight is None and fetch is not None:
                weight = fetch(full)
            if weight is None:
                return None
            one = sketch(weight, is_quantised, known)
            values += one.values * _signs(full, 1)
            square += one.norm**2
            (vague if one.is_any_kind else kinds).add(one.kind)
            # The projection alone is zero for some constant tensors, the norm blind to signs.
            numbers[full] = float(one.values[0, 0]) + one.norm, one.norm
    kinds = kinds or vague
    if not kinds:
        return None
    kind = kinds.pop() if len(kinds) == 1 else _MIXED_OTHER if _OTHER in kinds else _MIXED
    return Rest(Sketch(kind, values, math.sqrt(square)), numbers)


def distance(stored: Sketch, found: Sketch) -> tuple[float, float]:
    """The estimated distance of two sketches, relative to the norm, and the largest that passes."""
    pair = {stored.kind, found.kind}
    forms = [0]
    # Of equal dtypes one form decides; rounding again would only hide a difference.
    if len(pair) > 1 or pair & {_MIXED, _MIXED_OTHER}:
        forms += [1] if pair & {_BF16, _MIXED, _MIXED_OTHER} else []
        forms += [2] if pair & {_FP16, _MIXED, _MIXED_OTHER} else []
    scale = found.norm or 1.0
    far = [
        float((stored.values[form] - found.values[form]).square().mean().sqrt()) / scale
        for form in forms
    ]
    if not all(math.isfinite(each) for each in (scale, *far)):
        # Whatever is divided by an infinite norm would pass.
        return math.inf, TOLERANCE
    if min(far) > TOLERANCE and pair & {_OTHER, _MIXED_OTHER}:
        return far[0], TOLERANCE_QUANTISED
    if min(far) > TOLERANCE and len(pair) > 1 and pair <= {_BF16, _FP16, _MIXED}:
        # A float32 checkpoint was rounded in two ways, neither of which gives the other.
        return min(far), TOLERANCE_16_BIT
    return min(far), TOLERANCE


def is_of_few_bits(stored: Sketch) -> bool:
    """Whether a sketch is of a quantised weight."""
    return stored.kind in (_OTHER, _MIXED_OTHER)


def without_peft(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers."""
    tuner = getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


def _is_under(path: str, end: str) -> bool:
    """Whether a module is one that ends in a name of ``modules_to_save``, or lies in one."""
    parts = path.split(".")
    return any(".".join(parts[: k + 1]).endswith(end) for k in range(len(parts)))


def _base_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules, as they are called without adapters and torch.compile."""
    if isinstance(model, BaseTunerLayer):
        model = model.get_base_layer()
    elif isinstance(model, AuxiliaryTrainingWrapper):
        yield from _base_modules(model.original_module, path)
        return
    yield path, model
    for name, child in model.named_children():
        inner = path if name == "_orig_mod" else f"{path}.{name}" if path else name
        yield from _base_modules(child, inner)


def _weights(
    module: nn.Module, with_buffers: bool = False
) -> Iterator[tuple[str, Tensor | None, bool]]:
    """A module's own floating weights as (name, weight, whether it is dequantised).

    Offloaded ones are fetched; None stands for one that is sharded or not loaded.
    """
    backend = resolve_quantization_backend(module)
    with align_module_device(module):
        if backend is not None:
            try:
                packed = backend.get_base_weight(module)
                # Conv1D holds (in, out), which transformers packs as (out, in).
                was_conv1d = getattr(module, "source_cls", None) is Conv1D
                yield "weight", packed.T if was_conv1d else packed, True
            except (ValueError, TypeError, NotImplementedError):
                yield "weight", None, True
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if with_buffers and backend is None:
            # Statistics of batch norm and the like; the scales of a quantised weight are in it.
            own |= {
                name: buffer
                for name, buffer in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set
            }
        for name, parameter in own.items():
            if not parameter.is_floating_point() or (backend is not None and name == "weight"):
                continue
            is_gone = parameter.is_meta or not parameter.numel()
            is_here = not is_gone and not hasattr(parameter, "full_tensor")
            yield name, parameter if is_here else None, False


@functools.cache
def _block_signs(dtype: torch.dtype) -> Tensor:
    """(projections, entries of a block): the layout that the product is fastest with."""
    return _signs("entries", _BLOCK).T.contiguous().to(dtype)


def _signs(label: str, count: int) -> Tensor:
    """(count, projections) of +-1 in float64, from a hash of the label."""
    bits = hashlib.shake_256(f"kpsvd sketch {label}".encode()).digest(count)
    signs = np.unpackbits(np.frombuffer(bits, dtype=np.uint8)).astype(np.float64) * 2 - 1
    return torch.from_numpy(signs).reshape(count, NUM_PROJECTIONS)
