"""The GGUF file of a base model: its tensors, and the metadata that llama.cpp needs beside them.

Which rules split a text before BPE is named in a GGUF file by llama.cpp's converter alone, from a
table of its own. A file with another name there is read without an error and splits texts into
other tokens. So a new file takes all of its metadata from one that llama.cpp's converter wrote for
the same base model.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import InputError, ModelError, some_of
from kpsvd_tune.models import ModelSource

# What llama.cpp calls the models whose tensors are known here, and transformers' names of them.
ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
_ROUTE = (
    "merge, and let llama.cpp's own converter write the file: kpsvd-tune merge RUN --output "
    "merged; python llama.cpp/convert_hf_to_gguf.py merged --outtype q8_0 --outfile model.gguf. "
    "docs/serving.md has the whole way"
)
# Read by llama.cpp and computed by transformers: they belong to no layer.
_ROPE_FACTORS = "rope_freqs.weight"
OUTPUT = "output.weight"
# Bytes to which a tensor's place is rounded up.
_PADDING = 32
# What is another in a new file, or says how the old one was quantised.
_OWN = re.compile(
    r"GGUF\.|general\.(architecture|alignment|file_type|quantization_version)$|quantize\.|split\."
)
# Of a configuration, which both files must say alike.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
)


@dataclass(frozen=True)
class Entry:
    """One value of a GGUF file's metadata, with the type that it is stored as."""

    value: Any
    type: Any  # GGUFValueType
    sub_type: Any | None  # of an array's values


class GgufModel:
    """A GGUF file of a base model, mapped into memory.

    Attributes:
        path: The file.
        architecture: One of ARCHITECTURES.
        tensors: Each tensor as the gguf package reads it, by name, in the order of the file.

    Raises:
        ModelError: The file is damaged, one of several parts, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(
                "--to gguf needs the gguf package; install it with: pip install 'kpsvd-tune[gguf]'"
            )
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ModelError(f"{path} is no whole GGUF file: {error}; fetch it again") from error
        self.tensors: dict[str, Any] = {each.name: each for each in self._reader.tensors}
        self.architecture = str(self._value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"--to gguf: {path} is of the architecture {self.architecture!r}, whose tensors "
                f"are not known here; expected {', '.join(ARCHITECTURES)}. {capital(_ROUTE)}"
            )
        if (self._value("split.count") or 1) > 1:
            raise ModelError(
                f"--to gguf: {path} is one of {self._value('split.count')} parts of a model; "
                "expected one file: join them with llama.cpp's llama-gguf-split --merge"
            )

    @property
    def tokens(self) -> list[str]:
        """The vocabulary, in the order of its numbers."""
        entry = self._entry("tokenizer.ggml.tokens")
        return [] if entry is None else [each.decode(errors="replace") for each in entry.value]

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends an answer, if the file names one."""
        found = self._value("tokenizer.ggml.eos_token_id")
        return None if found is None else int(found)

    @property
    def rescales_rope(self) -> bool:
        """Whether llama.cpp computes other rotations than the base frequency alone gives."""
        kind = self._value(f"{self.architecture}.rope.scaling.type")
        return _ROPE_FACTORS in self.tensors or kind not in (None, "none")

    def bytes_with(self, num_bytes: float, is_base: bool) -> int:
        """At most so many bytes has a new file whose matrices take `num_bytes` a number.

        `is_base` says that tensors may be copied from this file.
        """
        total = int(self._reader.data_offset)
        for each in self.tensors.values():
            # Of vectors, which are float32.
            new = each.n_elements * (num_bytes if len(each.shape) > 1 else 4)
            total += int(max(new, each.n_bytes if is_base else 0)) + _PADDING
        return total

    def metadata(self) -> dict[str, Entry]:
        """What a new file takes over as it is."""
        found = {}
        for key in self._reader.fields:
            entry = None if _OWN.match(key) else self._entry(key)
            if entry is not None:
                found[key] = entry
        return found

    def values(self, name: str) -> Tensor:
        """A tensor's values in float32, in the file's own order of rows."""
        from gguf.quants import dequantize

        stored = self.tensors[name]
        found = dequantize(stored.data, stored.tensor_type)
        return torch.from_numpy(np.array(found, dtype=np.float32))

    def size(self, name: str) -> tuple[int, ...]:
        """A tensor's size as torch has it."""
        return tuple(int(each) for each in reversed(self.tensors[name].shape))

    def _value(self, key: str) -> Any:
        entry = self._entry(key)
        if entry is None:
            return None
        return (
            entry.value.decode(errors="replace") if isinstance(entry.value, bytes) else entry.value
        )

    def _entry(self, key: str) -> Entry | None:
        """A value of the metadata; None where there is none, or an array of nothing."""
        from gguf import GGUFValueType

        field = self._reader.fields.get(key)
        if field is None:
            return None
        kind = field.types[0]
        if kind == GGUFValueType.STRING:
            return Entry(bytes(field.parts[-1]), kind, None)
        if kind != GGUFValueType.ARRAY:
            return Entry(field.parts[-1].tolist()[0], kind, None)
        if len(field.types) == 1:
            return None
        sub_type = field.types[1]
        if sub_type == GGUFValueType.ARRAY:
            raise ModelError(f"{self.path}: {key} is an array of arrays, which is not known here")
        if sub_type == GGUFValueType.STRING:
            return Entry([bytes(field.parts[at]) for at in field.data], kind, sub_type)
        return Entry(
            [each for at in field.data for each in field.parts[at].tolist()], kind, sub_type
        )


def choose_file(source: ModelSource, metadata_from: Path | None) -> Path:
    """The file whose metadata a new one takes: the base itself, or what the user names."""
    if source.kind == "gguf":
        if metadata_from is not None:
            raise InputError(
                f"--metadata-from {metadata_from}: the base {source.path} is a GGUF file itself, "
                "and its own metadata are taken; leave the option out"
            )
        return source.weight_files[0]
    if metadata_from is None:
        raise InputError(
            f"--to gguf: the base {source.path} is no GGUF file, and only llama.cpp's converter "
            "knows what such a file must say of a tokenizer. Name a GGUF file of the same base, in "
            "whatever quantisation, whose metadata can be taken: --metadata-from FILE.gguf. Or "
            f"{_ROUTE}"
        )
    if not metadata_from.is_file():
        raise InputError(
            f"--metadata-from {metadata_from}: there is no such file; expected a GGUF file of the "
            f"base {source.path}"
        )
    return metadata_from


def names_in_file(file: GgufModel, model: Any) -> dict[str, str]:
    """For each tensor of a new file the name of the model's weight that it holds.

    Raises:
        ModelError: The model has weights that the file has no name for, or other sizes; the two
            are of different models.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = get_tensor_name_map(arch, model.config.num_hidden_layers)
    weights, names, strange = model.state_dict(), {}, []
    for key in weights:
        stem, _, last = key.rpartition(".")
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        found = known.get_name(stem)
        if found is None:
            strange.append(key)
        else:
            names[f"{found}.{last}"] = key
    if strange:
        raise ModelError(
            f"--to gguf: the model has {some_of(strange)}, for which a GGUF file of the "
            f"architecture {file.architecture} has no place; {_ROUTE}"
        )
    absent = [name for name in names if name not in file.tensors and name != OUTPUT]
    more = [
        name for name in file.tensors if name not in names and name not in (OUTPUT, _ROPE_FACTORS)
    ]
    if absent or more:
        raise ModelError(
            f"{file.path} and the base are different models: "
            + (
                f"the file lacks {some_of(absent)}"
                if absent
                else f"only the file holds {some_of(more)}"
            )
        )
    for name, key in names.items():
        if name in file.tensors and file.size(name) != tuple(weights[key].shape):
            raise ModelError(
                f"{file.path} holds {name} with size {file.size(name)}, and the model's {key} has "
                f"{tuple(weights[key].shape)}: expected a file of the same base, and a vocabulary "
                f"that was not resized; else {_ROUTE}"
            )
    return names


def check_vocabulary(
    file: GgufModel, tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase
) -> None:
    """Refuse a file whose tokens are others than the model's (ModelError).

    Tokens that the base's own tokenizer has beyond the file's, for which the model has no row, are
    passed over: transformers adds its default ones to some GGUF files.
    """
    tokens, vocabulary, known = file.tokens, tokenizer.get_vocab(), of_base.get_vocab()
    odd = [
        repr(token)
        for token, number in sorted(vocabulary.items(), key=lambda each: each[1])
        if (tokens[number] != token if number < len(tokens) else known.get(token) != number)
    ]
    if odd:
        raise ModelError(
            f"{file.path} has another vocabulary than the model: {some_of(odd)} "
            f"{'is' if len(odd) == 1 else 'are'} not there under the same number. Expected a file "
            f"of the same base, and a tokenizer that the training did not change; else {_ROUTE}"
        )


def check_configuration(file: GgufModel, config: Any, of_file: Any) -> None:
    """Refuse a file that says something else of the model than its configuration (ModelError).

    Args:
        file: The file.
        config: The model's configuration.
        of_file: What transformers makes of the file's metadata.
    """
    if config.model_type not in ARCHITECTURES[file.architecture]:
        raise ModelError(
            f"{file.path} is of the architecture {file.architecture}, and the base is "
            f"{config.model_type}: expected a GGUF file of the same base; models that can be "
            f"written are {', '.join(sorted(sum(ARCHITECTURES.values(), ())))}. "
            f"{capital(_ROUTE)}"
        )
    for key in _SIZES:
        own, found = _setting(config, key), _setting(of_file, key)
        if own != found and not _are_close(own, found):
            raise ModelError(
                f"{file.path} says {key} {found}, and the base's configuration {own}: expected a "
                f"GGUF file of the same base; else {_ROUTE}"
            )


def check_rope(file: GgufModel, model: Any) -> None:
    """Refuse a file with which llama.cpp would compute other rotations than the model (ModelError).

    What transformers reads of a file leaves them out, so that comparing logits would not show it.
    """
    rope: Mapping[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default" and not file.rescales_rope:
        return
    if kind == "llama3" and _ROPE_FACTORS in file.tensors:
        used = model.model.rotary_emb.inv_freq.float().cpu()
        steps = torch.arange(len(used), dtype=torch.float32) / len(used)
        plain = 1.0 / float(rope["rope_theta"]) ** steps
        factors = file.values(_ROPE_FACTORS)
        if factors.shape == used.shape and torch.allclose(plain / factors, used, rtol=1e-3):
            return
    raise ModelError(
        f"{file.path} and the base's configuration (rope_type {kind!r}) give different rotary "
        f"embeddings, or ones that cannot be compared here; {_ROUTE}"
    )


def is_permuted(name: str, architecture: str) -> bool:
    """Whether llama.cpp keeps a tensor's rows in the order of its own rotary embedding."""
    return architecture == "llama" and re.search(r"\.attn_[qk]\.", name) is not None


def to_file_order(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key weight (heads * size, ...) as GGUF files of Llama have them.

    transformers rotates entry i of a head together with entry i + size / 2, llama.cpp with its
    neighbour: the two halves of each head are interleaved.
    """
    rows = len(weight) // num_heads
    halves = weight.reshape(num_heads, 2, rows // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def from_file_order(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`to_file_order`."""
    rows = len(weight) // num_heads
    pairs = weight.reshape(num_heads, rows // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config: Any) -> int:
    """The number of heads in a query or key tensor."""
    count = config.num_key_value_heads if ".attn_k." in name else config.num_attention_heads
    return int(count)


def capital(text: str) -> str:
    """A text that begins a sentence."""
    return text[0].upper() + text[1:]


def _setting(config: Any, key: str) -> Any:
    if key == "rope_theta":
        return (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    found = getattr(config, key, None)
    if key == "head_dim" and found is None:
        return config.hidden_size // config.num_attention_heads
    return found


def _are_close(one: Any, other: Any) -> bool:
    """Whether two numbers are one, stored in float32 and in float64."""
    numbers: Sequence[Any] = (one, other)
    return all(isinstance(each, float | int) for each in numbers) and bool(
        np.isclose(one, other, rtol=1e-5, atol=0)
    )
