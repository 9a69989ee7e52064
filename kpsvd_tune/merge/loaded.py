"""Adapters on a base that is loaded: to compare logits, and where a base cannot be streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import _get_submodules
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base import note_seen
from kpsvd_tune.adapter.forms import CORE, LEFT, RIGHT, RIGHT0
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import InputError, some_of
from kpsvd_tune.merge.changes import Part, terms_of
from kpsvd_tune.merge.shards import Written, not_finite
from kpsvd_tune.merge.update import Update
from kpsvd_tune.models import ModelSource, load_plain_model
from kpsvd_tune.runs.find import add_adapter, load_adapter

# What is multiplied to weigh an update: Delta is linear in these tensors of each form together.
_LINEAR = {"both": (RIGHT, RIGHT0), "left": (LEFT,), "right": (RIGHT,), "core": (CORE,)}


def load_adapted(
    parts: Sequence[Part], source: ModelSource, allow_other_base: bool
) -> tuple[PeftModel, str | None]:
    """Load a base in float32 with weighted adapters, all active, and the note on another base."""
    model: Any
    model, other = load_adapter(
        load_plain_model(source, "float32"), parts[0].folder, allow_other_base
    )
    names = [model.active_adapter]
    for number, part in enumerate(parts[1:], 2):
        names.append(f"adapter{number}")
        more = add_adapter(model, part.folder, names[-1], allow_other_base)
        other = other or more
    for name, part in zip(names, parts, strict=True):
        if part.weight != 1:
            _weigh(model, name, part.weight)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model, other


@torch.no_grad()
def merge_into(model: PeftModel, dtype: torch.dtype) -> tuple[PreTrainedModel, Written]:
    """Add the active adapters' updates to a loaded base and take the adapters off.

    Weights come to be in `dtype`, each rounded once. The model given is used up. MergeError: a
    weight is not finite in the dtype.
    """
    written = Written()
    inner: Any = model.base_model.model
    by_layer: dict[str, list[tuple[float, Any, str]]] = {}
    for adapter in model.active_adapters:
        for name, layer in kpsvd_layers(model, adapter):
            by_layer.setdefault(name, []).append((1.0, layer, adapter))
    for name, adapted in by_layer.items():
        layer = adapted[0][1]
        weight = layer.get_base_weight()
        terms = terms_of(adapted)
        if isinstance(layer.get_base_layer(), Conv1D):
            terms = [each.transposed() for each in terms]
        update = Update(name, terms, dtype)
        stored = torch.empty(weight.shape, dtype=weight.dtype)
        for row, block in update.rows(weight.cpu()):
            stored[row : row + len(block)] = block
        layer.set_base_weight(stored.to(weight.device))
        parent, _, child = _get_submodules(inner, name)
        setattr(parent, child, layer.get_base_layer())
        written.kept[name] = update.kept
        written.sizes[name] = update.relative_size
        written.deviations[name] = update.deviation
    # What is left are modules that were trained whole.
    plain: Any = model.merge_and_unload()
    plain.to(dtype)
    check_finite(plain)
    return plain, written


def check_finite(model: torch.nn.Module) -> None:
    """Name the weights, adapted or not, that are not finite in the dtype they have."""
    weights = [each for each in model.named_parameters() if each[1].is_floating_point()]
    if broken := [each for each in weights if not torch.isfinite(each[1]).all()]:
        raise not_finite(some_of([name for name, _ in broken]), broken[0][1].dtype)


@torch.no_grad()
def _weigh(model: PeftModel, adapter: str, weight: float) -> None:
    """Multiply an adapter's update by a number."""
    config: Any = model.peft_config[adapter]
    if config.modules_to_save or config.trainable_token_indices:
        raise InputError(
            "a module that was trained whole is taken as it is; expected the weight 1, or an "
            "adapter without modules_to_save"
        )
    for _, layer in kpsvd_layers(model, adapter):
        for part in _LINEAR[layer.kpsvd_form[adapter].name]:
            held: Any = getattr(layer, part)
            held[adapter].mul_(weight)
        record: Any = dict(layer.kpsvd_base.items()).get(adapter)  # type: ignore[no-untyped-call]
        if record is not None:
            # These factors were compared with the base before.
            note_seen(layer, adapter, record, layer.frozen(adapter))
