"""The weight files of a base model as they are stored: every tensor by name, read one at a time."""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kpsvd_tune.errors import ModelError, some_of
from kpsvd_tune.models.loading import DAMAGED, refuse_more_layers
from kpsvd_tune.models.source import ModelSource
from kpsvd_tune.models.stream import (
    FLOATS,
    TensorLocation,
    names_in_model,
    read_metadata,
    read_tensor,
    tensors_of,
)
from kpsvd_tune.storage.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names that safetensors has for the dtypes that pickled files hold.
_NAMES = {dtype: name for name, dtype in FLOATS.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file."""

    key: str  # its name in the file
    dtype: str  # as safetensors names it
    size: tuple[int, ...]
    num_bytes: int
    location: TensorLocation | None  # None in a pickled file, whose tensors come from torch

    @property
    def is_float(self) -> bool:
        """Whether it is of floating-point numbers that torch adds up (8 bits are not)."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class WeightFile:
    """One weight file."""

    path: Path
    name: str  # in the model's folder
    tensors: Mapping[str, StoredTensor]  # by name, in the order of their bytes
    metadata: Mapping[str, str]

    @property
    def output_name(self) -> str:
        """What the file is called where it is written as safetensors."""
        if self.name.endswith(".safetensors"):
            return self.name
        return re.sub(r"^pytorch_model", "model", self.name).removesuffix(".bin") + ".safetensors"


class Checkpoint:
    """All tensors of a base model's weight files.

    Safetensors are read with plain file reads; pickled files are mapped into memory, and read
    without running anything that is in them.

    Attributes:
        files: The weight files.
        index: The file that lists which of them holds which tensor; None where there is none.
        tensors: Each stored tensor by its name.
        file_of: The file of each.
        parameters: The stored name of each parameter and buffer of the model that becomes it
            unchanged; those that transformers splits, joins or transposes are absent.
        ties: For each parameter that shares its tensor the names of the others.

    Raises:
        ModelError: A file is damaged, or the files hold no values for a weight of the model.
    """

    def __init__(self, source: ModelSource, skeleton: PreTrainedModel) -> None:
        self._source = source
        self.index = _index(source)
        self.files = tuple(self._file(path) for path in source.weight_files)
        self.tensors = {key: each for file in self.files for key, each in file.tensors.items()}
        self.file_of = {key: file for file in self.files for key in file.tensors}
        self.parameters, converted = names_in_model(skeleton, list(self.tensors))
        self.ties = tied_names(skeleton)
        self._check_whole(skeleton, converted)

    def key_of(self, name: str) -> str | None:
        """The stored tensor that becomes a parameter, its own or that of one tied to it."""
        for each in (name, *self.ties.get(name, ())):
            if each in self.parameters:
                return self.parameters[each]
        return None

    def read(
        self, key: str, memory: Tensor | None = None, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """One tensor in its stored dtype, on the CPU; in `memory` as :func:`read_tensor` has it.

        With `rows` only those, as :func:`read_tensor` has it. Of a pickled file it is mapped, and
        `memory` stays as it is.
        """
        location = self.tensors[key].location
        if location is not None:
            return read_tensor(location, memory, rows)
        whole = _unpickled(self.file_of[key].path)[key].detach()
        return whole if rows is None else whole[slice(*rows)]

    def close(self) -> None:
        """Let go of files that are mapped."""
        _unpickled.cache_clear()

    def _file(self, path: Path) -> WeightFile:
        name = str(path.relative_to(self._source.folder))
        if path.suffix == ".safetensors":
            found = sorted(tensors_of(path).values(), key=lambda each: (each.begin, each.end))
            stored = [
                StoredTensor(each.key, each.dtype, each.size, each.end - each.begin, each)
                for each in found
            ]
            return WeightFile(path, name, {each.key: each for each in stored}, read_metadata(path))
        tensors = {}
        seen: dict[tuple[int, int], str] = {}
        for key, tensor in _unpickled(path).items():
            if tensor.dtype not in _NAMES:
                raise ModelError(
                    f"{path}: {key} has the dtype {tensor.dtype}, which is not known here; "
                    "expected floating-point weights"
                )
            # Tied weights lie in a pickled file once and have several names; a file of
            # safetensors has one of them, as transformers writes it.
            place = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()))
            if (
                tensor.numel()
                and seen.setdefault(place, key) != key
                and _is_twin(tensor, _unpickled(path)[seen[place]])
            ):
                continue
            num_bytes = tensor.numel() * tensor.element_size()
            size = tuple(tensor.shape)
            tensors[key] = StoredTensor(key, _NAMES[tensor.dtype], size, num_bytes, None)
        return WeightFile(path, name, tensors, {"format": "pt"})

    def _check_whole(self, skeleton: PreTrainedModel, converted: set[str]) -> None:
        """Refuse files that lack weights of the model, or hold more layers than it has."""
        taken = set(self.parameters.values())
        ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        left = [key for key in self.tensors if not any(re.search(each, key) for each in ignored)]
        known = skeleton.state_dict()
        refuse_more_layers(self._source, set(left) - taken, taken)
        optional = getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()
        missing = sorted(
            name
            for name in known
            if self.key_of(name) is None
            and name not in converted
            and not any(re.search(each, name) for each in optional)
        )
        if missing:
            raise ModelError(
                f"model {self._source.path!r}: its files hold no values for {len(missing)} "
                f"weights, the first is {missing[0]}; the download is incomplete or belongs to "
                "another architecture"
            )
        for name, key in self.parameters.items():
            found, expected = self.tensors[key].size, tuple(known[name].shape)
            if found != expected:
                raise ModelError(
                    f"{name} is stored with size {found}, and the configuration says {expected}: "
                    "config.json and the weight files do not belong together"
                )


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that shares its tensor the names of the others."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def _index(source: ModelSource) -> Path | None:
    """The index that the weight files were found by."""
    found = (
        source.folder / f"{stem}.index.json" for stem in ("model.safetensors", "pytorch_model.bin")
    )
    single = {path.name for path in source.weight_files} & {
        "model.safetensors",
        "pytorch_model.bin",
    }
    return None if single else next((each for each in found if each.is_file()), None)


def _is_twin(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


# Two, since embeddings of a first and of a last file are asked for in turns.
@functools.lru_cache(maxsize=2)
def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped; nothing that is in it runs."""
    try:
        # Files of torch before 1.6 cannot be mapped.
        found: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (*DAMAGED, RuntimeError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise ModelError(
            f"{path} is cut or damaged ({type(error).__name__}: {reason}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, expected tensors by name")
    if odd := [str(key) for key, each in found.items() if not isinstance(each, Tensor)]:
        raise ModelError(f"{path}: {some_of(odd)} are no tensors; expected the weights alone")
    return found
