"""A base model without its weights, and the files that they are read from one at a time.

For processes that share out the weights: none of them ever holds more of the model than its part
and a tensor or two.
"""

from __future__ import annotations

import copy
import re
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kpsvd_tune.errors import some_of
from kpsvd_tune.models.checkpoint import Checkpoint
from kpsvd_tune.models.loading import DTYPES, load_skeleton, warn_of_extra
from kpsvd_tune.models.source import ModelSource
from kpsvd_tune.models.stream import FLOATS, Conversion, conversions_in_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a model without weights is given, by which its weights are found.
_ATTRIBUTE = "streamed_weights"


class StreamedWeights:
    """The weights of one model on the meta device, read from its files as the model has them.

    Names are those of the base's parameters and saved buffers, without PEFT's wrappers.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._conversions = conversions_in_model(model, list(checkpoint.tensors))
        # What the last conversion gave, for it may be several parameters.
        self._converted: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedWeights:
        """The same one: a copied model has the same files."""
        return self

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A parameter on the CPU, in the dtype that the model has it in.

        With `rows`, (first, one past the last) of the first dimension, only those; a tensor that
        is stored as it is in the model is then not read as a whole.
        """
        key = self._checkpoint.key_of(name)
        dtype = self._parameters[name].dtype
        if key is not None:
            # What is read of a pickled file is a view of the mapped file.
            is_mapped = self._checkpoint.tensors[key].location is None
            return self._checkpoint.read(key, rows=rows).to(dtype, copy=is_mapped)
        names = (name, *self._checkpoint.ties.get(name, ()))
        own = next(each for each in names if each in self._conversions)
        if own not in self._converted:
            # Before the next one is read: two would be held.
            self._converted = {}
            self._converted = self._convert(self._conversions[own], dtype)
        whole = self._converted[own]
        return whole if rows is None else whole[slice(*rows)].clone()

    def left_out(self) -> list[str]:
        """Stored tensors that the model has no place for, but for those that it knows to ignore."""
        used = set(self._checkpoint.parameters.values())
        used |= {key for each in self._conversions.values() for key, _ in each.sources}
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return sorted(
            key
            for key in self._checkpoint.tensors
            if key not in used and not any(re.search(each, key) for each in ignored)
        )

    def close(self) -> None:
        """Let go of what is kept between two calls."""
        self._converted = {}
        self._checkpoint.close()

    def why_not(self) -> str | None:
        """Why the weights cannot all be read one at a time; None where they can."""
        stored = self._checkpoint.tensors
        names = (name for name in self._parameters if name not in self._conversions)
        keys = {name: self._checkpoint.key_of(name) for name in names}
        ties = self._checkpoint.ties
        lost = [
            name
            for name, key in keys.items()
            if key is None and not any(each in self._conversions for each in ties.get(name, ()))
        ]
        if lost:
            return f"its files hold no values for {some_of(lost)}"
        if packed := [key for key in keys.values() if key and stored[key].dtype not in FLOATS]:
            return f"its files hold {some_of(packed)} in {stored[packed[0]].dtype}"
        for file in self._checkpoint.files:
            if file.path.suffix != ".safetensors" and not zipfile.is_zipfile(file.path):
                return f"{file.name} was written by torch before 1.6, and is read as a whole"
        if apart := self._told_apart():
            return f"its files hold different values for {some_of(apart)}, tied by config.json"
        return None

    def _told_apart(self) -> list[str]:
        """Tied parameters that are stored several times with different values.

        transformers does not tie those.
        """
        own = self._checkpoint.parameters
        for name, others in self._checkpoint.ties.items():
            group = [each for each in (name, *others) if each in own]
            for other in group[1:]:
                one, two = (self._checkpoint.read(own[each]) for each in (group[0], other))
                if not torch.equal(one, two):
                    return [group[0], other]
        return []

    def _convert(self, conversion: Conversion, dtype: torch.dtype) -> dict[str, Tensor]:
        """What transformers makes of several stored tensors, by name."""
        # The converter collects what it is given, and the mapping's own one is for all layers.
        converter = copy.deepcopy(conversion.converter)
        for key, pattern in conversion.sources:
            value = self._checkpoint.read(key).to(dtype)
            converter.add_tensor(conversion.target, key, pattern, value)
        found: dict[str, Any] = converter.convert(
            conversion.target, model=self._model, config=self._model.config
        )
        values = {name: each[0] if isinstance(each, list) else each for name, each in found.items()}
        return {name: each.contiguous() for name, each in values.items()}


def load_streamed(
    source: ModelSource, dtype: str, attn_implementation: str | None = None
) -> PreTrainedModel | str:
    """The model that `load_model` gives with all its parameters on the meta device.

    Buffers are here, with their values. :func:`streamed_weights` finds what the parameters are
    read by. Where that is not possible the reason is returned, in words.

    Raises:
        ModelError: As of `load_model`; what it would say of the weights is said now.
    """
    if source.kind == "gguf":
        return "a GGUF file is dequantised as a whole"
    model = load_skeleton(source, DTYPES[dtype], attn_implementation, with_buffers=True)
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are stored quantised"
    _keep_wide(model, DTYPES[dtype])
    checkpoint = Checkpoint(source, model)
    weights = StreamedWeights(checkpoint, model)
    if (reason := weights.why_not()) is not None:
        weights.close()
        return reason
    _fill_buffers(model, checkpoint)
    if extra := weights.left_out():
        warn_of_extra(source, extra)
    setattr(model, _ATTRIBUTE, weights)
    weights.close()
    model.train(False)
    return model


def streamed_weights(model: nn.Module) -> StreamedWeights | None:
    """What the weights of a model of :func:`load_streamed` are read by, adapted or not."""
    found: StreamedWeights | None = getattr(model, _ATTRIBUTE, None)
    return found


def to_be_filled(base: nn.Module) -> Iterator[tuple[str, list[tuple[nn.Module, str]], Tensor]]:
    """Each parameter of a base on the meta device: its name, its places (module, name), and itself.

    Tied ones come once with all their places. Wrappers of PEFT's are looked through, and the copy
    of a module that is trained whole has the name of the module.
    """
    found: dict[int, tuple[str, list[tuple[nn.Module, str]], Tensor]] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                name = _plain(f"{path}.{key}" if path else key)
                _, places, _ = found.setdefault(id(parameter), (name, [], parameter))
                places.append((module, key))
    yield from found.values()


def _plain(name: str) -> str:
    """The name of a parameter without the wrappers of PEFT and torch.compile."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        # The adapter's name follows.
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join(p for p in parts if p not in ("base_layer", "original_module", "_orig_mod"))


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Give parameters float32 that transformers keeps in it, whatever is asked for."""
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, names, _ = build_glob_alternation(list(plan))
    for name, places, parameter in to_be_filled(model):
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None:
            wide = nn.Parameter(parameter.to(plan[names[found.lastgroup]]))
            for module, key in places:
                module._parameters[key] = wide


def _fill_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Read the buffers that are saved with the model; the others are made with it."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and (key := checkpoint.key_of(name)) is not None:
            buffer.copy_(checkpoint.read(key))
