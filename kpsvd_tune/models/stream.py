"""Read single weight matrices from a checkpoint without loading the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import ModelError
from kpsvd_tune.models.loading import load_plain_model, load_skeleton, refuse_more_layers
from kpsvd_tune.models.source import ModelSource
from kpsvd_tune.storage.json_files import check_regular, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor's bytes lie in a safetensors file."""

    file: Path
    key: str  # the tensor's name in the file
    begin: int  # counted from the start of the file
    end: int  # one past the last byte
    dtype: str  # as safetensors names it
    size: tuple[int, ...]


class WeightReader:
    """Gives the weights of named layers, one at a time, as (out, in).

    A weight that lies in a safetensors file under a name of its own is read from there, in the
    stored dtype. The others (GGUF, pickled files, layouts that transformers splits or joins
    while loading) come from the loaded model, which is loaded when the first of them is asked
    for. `names` are full module names; a `skeleton`, on the meta device, is not built again.

    Raises:
        ModelError: A file is damaged, or a stored weight does not fit the model.
    """

    def __init__(
        self, source: ModelSource, names: Sequence[str], skeleton: PreTrainedModel | None = None
    ) -> None:
        self.source = source
        self.names = tuple(names)
        self._skeleton = load_skeleton(source) if skeleton is None else skeleton
        self._locations = _locate(source, self._skeleton, self.names)
        self._loaded: PreTrainedModel | None = None

    def location(self, name: str) -> TensorLocation | None:
        """Where a layer's weight lies on disk; None when it comes from the loaded model."""
        return self._locations.get(name)

    def size(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer, known without reading anything."""
        module = self._skeleton.get_submodule(name)
        rows, columns = _weight(self._skeleton, name).shape
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def load(self, name: str) -> Tensor:
        """The weight (out, in) in its stored dtype, on the CPU; a transposed view for Conv1D."""
        module = self._skeleton.get_submodule(name)
        location = self._locations.get(name)
        if location is not None:
            weight = read_tensor(location)
        else:
            if self._loaded is None:
                self._loaded = _load(self.source)
            weight = _weight(self._loaded, name).detach()
        return weight.T if isinstance(module, Conv1D) else weight

    def close(self) -> None:
        """Let go of the loaded model, if one was needed."""
        self._loaded = None


def read_tensor(
    location: TensorLocation, memory: Tensor | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """Read one tensor with plain file reads; ModelError where the file is too short.

    A memory map's pages would count as resident memory for as long as the file is open. `memory`,
    bytes of at least the tensor's size, is used in place of new memory. With `rows`, (first, one
    past the last), only those of its first dimension are read.
    """
    begin, end, size = location.begin, location.end, location.size
    if rows is not None:
        row_bytes = math.prod(size[1:]) * FLOATS[location.dtype].itemsize
        begin, end = begin + rows[0] * row_bytes, begin + rows[1] * row_bytes
        size = (rows[1] - rows[0], *size[1:])
    count = end - begin
    data = torch.empty(count, dtype=torch.uint8) if memory is None else memory[:count]
    array: Any = data.numpy()
    # Buffered, so that it reads until all is there, which a single call of the system may not.
    with location.file.open("rb") as stream:
        stream.seek(begin)
        if stream.readinto(array) < len(data):
            raise ModelError(
                f"{location.file} ends inside the tensor {location.key}; fetch it again"
            )
    return data.view(FLOATS[location.dtype]).reshape(size)


def _load(source: ModelSource) -> PreTrainedModel:
    # Dequantised numbers are exact in float32; pickled and fused checkpoints are nearly always
    # stored in the dtype of their configuration, and float32 holds those exactly too.
    return load_plain_model(source, "float32")


def _locate(
    source: ModelSource, skeleton: PreTrainedModel, names: Sequence[str]
) -> dict[str, TensorLocation]:
    if not source.is_safetensors:
        return {}
    stored = {key: place for file in source.weight_files for key, place in tensors_of(file).items()}
    parameters, _ = names_in_model(skeleton, list(stored))
    # Now, and not when the model is loaded after hours of work.
    taken = set(parameters.values())
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = [key for key in stored if not any(re.search(known, key) for known in ignored)]
    refuse_more_layers(source, set(left) - taken, taken)
    # What is packed as its configuration says comes from the loaded model, dequantised.
    is_quantised = getattr(skeleton.config, "quantization_config", None) is not None
    located: dict[str, TensorLocation] = {}
    for name in names:
        key = parameters.get(f"{name}.weight")
        if key is None:
            continue
        place = stored[key]
        expected = tuple(_weight(skeleton, name).shape)
        if place.dtype not in FLOATS and is_quantised:
            continue
        if place.dtype not in FLOATS:
            raise ModelError(
                f"{name} is stored as {place.dtype}, a packed quantised weight: KPSVD needs "
                "floating-point weights; use the unquantised checkpoint"
            )
        if place.size != expected:
            raise ModelError(
                f"{name} is stored with size {place.size}, and the configuration says {expected}: "
                "config.json and the weight files do not belong together"
            )
        located[name] = place
    return located


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    if not isinstance(weight, Tensor):
        raise ModelError(f"{name} has no weight")
    return weight


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, such as {"format": "pt"}."""
    with file.open("rb") as stream:
        entries, _ = read_header(stream)
    found = entries.get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()}


def tensors_of(file: Path) -> dict[str, TensorLocation]:
    """Where the tensors of a safetensors file lie, by their names; ModelError for a damaged one."""
    try:
        check_regular(file)
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            entries, start = read_header(stream)
        entries.pop("__metadata__", None)
        found = {key: _entry(file, key, entry, start) for key, entry in entries.items()}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not a safetensors file: {error}; fetch it again") from error
    # Before any work, and of every tensor: a cut file is found out now and not hours later.
    for place in found.values():
        if place.end > file_bytes:
            raise ModelError(
                f"{file} ends inside the tensor {place.key}: got {file_bytes:,} bytes, expected at "
                f"least {place.end:,}; fetch it again"
            )
    return found


def _entry(file: Path, key: str, entry: Any, start: int) -> TensorLocation:
    """One entry of a header whose data begins at ``start``; ValueError for one that cannot be."""
    if not isinstance(entry, dict) or not isinstance(dtype := entry.get("dtype"), str):
        raise ValueError(f"the tensor {key} has no dtype")
    offsets, size = entry.get("data_offsets"), entry.get("shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the tensor {key} has the data_offsets {offsets!r}")
    if not _are_counts(size):
        raise ValueError(f"the tensor {key} has the shape {size!r}")
    begin, end = offsets
    if dtype in FLOATS and end - begin != math.prod(size) * FLOATS[dtype].itemsize:
        raise ValueError(
            f"the tensor {key} of {dtype} with shape {size!r} needs "
            f"{math.prod(size) * FLOATS[dtype].itemsize:,} bytes, and its data_offsets hold "
            f"{end - begin:,}"
        )
    return TensorLocation(
        file=file, key=key, begin=start + begin, end=start + end, dtype=dtype, size=tuple(size)
    )


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )


def names_in_model(skeleton: PreTrainedModel, keys: list[str]) -> tuple[dict[str, str], set[str]]:
    """Map parameter names to the stored tensors that become them unchanged.

    As transformers' core_model_loading renames them. Tensors that a converter splits, joins or
    transposes are left out, and so are names that two stored tensors claim; what they become is
    the second result.
    """
    parameters = skeleton.state_dict()
    direct: dict[str, str] = {}
    claimed: set[str] = set()
    for key, names, conversion in _renamed(skeleton, keys):
        name = names[0]
        if name in claimed or conversion is not None:
            direct.pop(name, None)
        elif name in parameters:
            direct[name] = key
        claimed.update(names)
    return direct, claimed - direct.keys()


@dataclass
class Conversion:
    """Stored tensors that transformers splits, joins or transposes into parameters."""

    converter: Any  # transformers' WeightConverter
    target: str  # the first of the parameters
    sources: list[tuple[str, str]]  # stored name and the converter's pattern for it, in order


def conversions_in_model(skeleton: PreTrainedModel, keys: list[str]) -> dict[str, Conversion]:
    """For each parameter that a converter makes what it is made of, as transformers does it."""
    found: dict[str, Conversion] = {}
    for key, names, conversion in _renamed(skeleton, keys):
        if conversion is not None:
            converter, pattern = conversion
            one = found.setdefault(names[0], Conversion(converter, names[0], []))
            one.sources.append((key, pattern))
            found |= dict.fromkeys(names, one)
    return found


def _renamed(
    skeleton: PreTrainedModel, keys: list[str]
) -> Iterator[tuple[str, list[str], tuple[Any, str] | None]]:
    """For each stored name the names in the model, and where one converts it that and its pattern.

    In the order of transformers' loader.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    by_source = {pattern: each for each in converters for pattern in each.source_patterns}
    # Some renamings remember what they have seen, so the order must be the loader's.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], prefix, parameters)
        if pattern is None:
            yield key, [name], None
        else:
            # A tensor that is split is named after the first of its parts.
            first, *others = by_source[pattern].target_patterns
            names = [name, *(name.replace(first, each) for each in others)]
            yield key, names, (by_source[pattern], pattern)
