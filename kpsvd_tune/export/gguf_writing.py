"""Writes a GGUF file, tensor by tensor, and leaves in the model what the file holds of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpsvd_tune.errors import ExportError
from kpsvd_tune.export.gguf_model import (
    Entry,
    GgufModel,
    from_file_order,
    heads_of,
    is_permuted,
    to_file_order,
)

# The types of the gguf package, by what users call them; and llama.cpp's number of a file in which
# most tensors have that type.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
# The error of a rounded matrix as a share of its norm that passes. A block of 32 numbers of Q8_0
# has steps of its largest one / 127: its error is at most sqrt(32) * 0.5625 / 127 of its norm.
_MOST_ERROR = {"F32": 0.0, "F16": 2.0**-10, "BF16": 2.0**-8, "Q8_0": 0.0251}
# Of metadata; llama.cpp reads the second version of its quantised blocks.
_QUANTIZATION_VERSION = 2
# Entries that are rounded at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a new file."""

    name: str  # in the file
    type: Any  # GGMLQuantizationType
    size: tuple[int, ...]  # as torch has it
    key: str | None  # the model's weight; None for one that only the base's file has
    is_copied: bool  # whether the base file's bytes are taken as they are

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file, without padding."""
        from gguf.constants import GGML_QUANT_SIZES

        entries, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.size)) // entries * size


def plan_tensors(
    file: GgufModel, names: Mapping[str, str], model: Any, dtype: str, is_base: bool
) -> list[NewTensor]:
    """What each tensor of the new file will be.

    Args:
        file: The file whose metadata are taken.
        names: For each tensor's name that of the model's weight.
        model: With merged weights in float32.
        dtype: One of TYPES, for matrices. Vectors are float32, as llama.cpp wants them; a matrix
            whose rows have no whole number of blocks is float16.
        is_base: Whether the file holds the base's weights. What the merge did not change is then
            copied from it, and nothing of it is rounded a second time.
    """
    weights = model.state_dict()
    order = [*file.tensors, *(name for name in names if name not in file.tensors)]
    plan = []
    for name in order:
        key = names.get(name)
        if key is None:
            # A tied model's second embedding goes; what no layer has is kept.
            if not name.startswith("output."):
                stored = file.tensors[name]
                plan.append(NewTensor(name, stored.tensor_type, file.size(name), None, True))
            continue
        weight = weights[key]
        if is_base and name in file.tensors and _is_unchanged(file, name, weight, model.config):
            kind = file.tensors[name].tensor_type
            plan.append(NewTensor(name, kind, tuple(weight.shape), key, True))
        else:
            plan.append(NewTensor(name, _type_for(weight, dtype), tuple(weight.shape), key, False))
    return plan


def _is_unchanged(file: GgufModel, name: str, weight: Tensor, config: Any) -> bool:
    before = file.values(name)
    if is_permuted(name, file.architecture):
        before = from_file_order(before, heads_of(name, config))
    return torch.equal(before, weight)


def _type_for(weight: Tensor, dtype: str) -> Any:
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES

    if weight.ndim < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[TYPES[dtype]]
    is_whole = weight.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if is_whole else GGMLQuantizationType.F16


@torch.no_grad()
def write_gguf(
    path: Path,
    file: GgufModel,
    plan: Sequence[NewTensor],
    model: Any,
    dtype: str,
    changed: Mapping[str, Entry],
    measure: Callable[[str, Tensor, Tensor], None],
    advance: Callable[[int, int], None],
) -> None:
    """Write the file; the model's weights come to be what the file holds of them.

    Args:
        path: A new file in a folder of `write_folder`, which syncs it.
        file: Where metadata come from, and tensors that are copied.
        plan: Its tensors.
        model: With merged weights in float32.
        dtype: One of TYPES.
        changed: Metadata that replace the file's own.
        measure: Told of each weight that is rounded its name, its values, and the rounded ones.
        advance: Told how many tensors of how many are done.

    Raises:
        ExportError: A weight is not finite in its type, or what is stored is too far from it.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    writer: Any
    with closing(GGUFWriter(path, file.architecture)) as writer:
        for key, entry in {**file.metadata(), **changed}.items():
            writer.add_key_value(key, entry.value, entry.type, sub_type=entry.sub_type)
        writer.add_file_type(_FILE_TYPES[TYPES[dtype]])
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        for each in plan:
            kind = np.dtype(plain.get(each.type, np.uint8))
            is_plain = each.type in plain
            size = each.size if is_plain else quant_shape_to_byte_shape(each.size, each.type)
            writer.add_tensor_info(each.name, size, kind, each.num_bytes, raw_dtype=each.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (stream,) = writer.fout
        writer.write_padding(stream, stream.tell())
        weights = model.state_dict()
        for number, each in enumerate(plan, 1):
            if each.is_copied:
                stream.write(file.tensors[each.name].data.tobytes())
            else:
                assert each.key is not None
                weight = weights[each.key]
                rounded = _write_weight(stream, each, weight, file.architecture, model.config)
                _check_rounding(each, weight, rounded)
                measure(each.key, weight, rounded)
                weight.copy_(rounded)
            writer.write_padding(stream, each.num_bytes)
            advance(number, len(plan))


def _write_weight(
    stream: Any, tensor: NewTensor, weight: Tensor, architecture: str, config: Any
) -> Tensor:
    """Round one weight and write it; the rounded numbers, in the weight's own order."""
    from gguf.quants import dequantize, quantize

    permuted = is_permuted(tensor.name, architecture)
    heads = heads_of(tensor.name, config)
    rows = to_file_order(weight, heads) if permuted else weight
    rounded = torch.empty_like(rows)
    step = max(1, _BLOCK // max(1, rows[0].numel()))
    for begin in range(0, len(rows), step):
        # What overflows is told below.
        with np.errstate(over="ignore", invalid="ignore"):
            data = quantize(rows[begin : begin + step].contiguous().numpy(), tensor.type)
            values = torch.from_numpy(np.array(dequantize(data, tensor.type), dtype=np.float32))
        if not torch.isfinite(values).all():
            raise ExportError(
                f"{tensor.key}: not finite in {tensor.type.name}; the adapter is broken or the "
                "type's range too small: try --dtype float32. Nothing was written"
            )
        stream.write(data.tobytes())
        rounded[begin : begin + step] = values
    return from_file_order(rounded, heads) if permuted else rounded


def _check_rounding(tensor: NewTensor, weight: Tensor, rounded: Tensor) -> None:
    most = _MOST_ERROR[tensor.type.name] * float(weight.norm())
    far = float((rounded - weight).norm())
    # Written so that a number that is none fails.
    if not far <= most:
        raise ExportError(
            f"{tensor.key}: what {tensor.type.name} holds of it is {far:.3g} away, and at most "
            f"{most:.3g} is expected of the rounding: its values are too small for the type, or "
            "they were put in a wrong order: try --dtype float32. Nothing was written"
        )
