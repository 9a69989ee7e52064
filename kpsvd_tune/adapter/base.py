"""The layer beneath an adapter: its sizes, and whether it is the one the adapter was made for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.sketch import (
    NUM_PROJECTIONS,
    SIZE,
    distance,
    sketch_module,
    sketch_rest,
    unpacked,
    without_peft,
)
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import rearrange

# How far <W, A0_1 kron B0_1> of the right base may be from the stored number, relative to it.
# Rounding W to 16 bits moves the product by about 2^-9 ||W|| / (sqrt(out in) sigma_1) of its
# size, below 1e-3 even for tiny layers; 4-bit weights by a few per cent.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16_BIT = 5e-3
TOLERANCE_QUANTISED = 1e-1


# The models that adapters were put on, for layers that are asked alone; by a number, since a layer
# must not own its model, and models are copied and pickled.
_MODELS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_OTHERS: ContextVar[list[str] | None] = ContextVar("other bases that are accepted", default=None)
RECORD = (2, SIZE)


@dataclass(frozen=True)
class Unchecked:
    """What a layer was told of its base by an adapter's configuration, and has not seen proved.

    Args:
        name: The module's name in the base model.
        fingerprint: <W, A0_1 kron B0_1> of the base that the adapter was made for; None where the
            adapter does not start from the weight's own terms.
        made_for: The name of that base.
    """

    name: str
    fingerprint: float | None
    made_for: str


@dataclass(frozen=True)
class Place:
    """Where a layer is, for comparing the base around it.

    Args:
        name: The layer's name in the base model.
        model: Of the model among those that live.
        saved_whole: The adapter's ``modules_to_save``.
        task: PEFT's task type.
        made_for: The name of the base, as the adapter has it.
    """

    name: str
    model: int
    saved_whole: tuple[str, ...]
    task: str | None
    made_for: str


@contextmanager
def other_base_allowed() -> Iterator[list[str]]:
    """Load adapters on whatever base is given, as long as the sizes fit.

    Yields:
        A list that gets the sentences with which such a base would have been refused.
    """
    found: list[str] = []
    token = _OTHERS.set(found)
    try:
        yield found
    finally:
        _OTHERS.reset(token)


def remember(model: nn.Module) -> int:
    """Give a number by which layers find their model as long as it lives."""
    _MODELS[id(model)] = model
    return id(model)


def refuse(message: str) -> None:
    """Refuse a base, or note it where another is allowed."""
    accepted = _OTHERS.get()
    if accepted is None:
        raise AdapterError(
            f"{message} To use it on this base all the same, pass --allow-other-base, or in Python "
            "load it inside kpsvd_tune.adapter.base.other_base_allowed()"
        )
    accepted.append(message)


def base_sizes(base_layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; packed quantised weights know their sizes as attributes."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[1], base_layer.weight.shape[0]
    out_features, in_features = base_layer.out_features, base_layer.in_features
    return int(cast(int, out_features)), int(cast(int, in_features))


@torch.no_grad()
def record_base(model: nn.Module, layers: Mapping[str, Any], adapter_name: str) -> None:
    """Store what the base is known by in an adapter that was made on it.

    Args:
        model: The model, wrapped by PEFT or not.
        layers: The adapted layers by their names in the base.
        adapter_name: The adapter.
    """
    if not layers:
        return
    place: Place = next(iter(layers.values())).kpsvd_place[adapter_name]
    rest = sketch_rest(without_peft(model), list(layers), place.saved_whole, place.task)
    of_rest = torch.zeros(SIZE, dtype=torch.int32) if rest is None else rest.packed()
    for layer in layers.values():
        own = sketch_module(layer.get_base_layer())
        if own is None:
            continue
        record = torch.stack([own.packed(), of_rest])
        held = layer.kpsvd_base[adapter_name]
        layer.kpsvd_base[adapter_name] = record.to(held.device)
        layer.kpsvd_seen[adapter_name] = _key(record)


def check_loaded(layer: Any) -> None:
    """Check what came past PEFT's hooks: transformers' load_adapter asks none, and sets the mode.

    Args:
        layer: The adapted layer; adapters whose factors are not here yet stay unchecked.

    Raises:
        AdapterError: See :func:`check_record` and :func:`check_base`.
    """
    for name in list(layer.kpsvd_left0):
        left0: Tensor = layer.kpsvd_left0[name]
        record: Tensor | None = dict(layer.kpsvd_base.items()).get(name)
        if left0.device.type == "meta":
            continue
        if record is not None and record.any():
            if not _is_new(layer, name):
                continue
            layer.kpsvd_unchecked.pop(name, None)
            check_record(layer, name, record)
            place = layer.kpsvd_place[name]
            model = _MODELS.get(place.model)
            layers = {} if model is None else _adapted(model, name)
            # Once for all layers that were loaded together; a copy of a model is not the model.
            if layers.get(place.name) is layer and not _is_rest_seen(layers, name, record):
                check_rest(model, layers, name, record)
            layer.kpsvd_seen[name] = _key(record)
        elif left0.any() and name in layer.kpsvd_unchecked:
            check_base(layer, name, layer.kpsvd_unchecked.pop(name))


@torch.no_grad()
def check_record(layer: Any, adapter_name: str, record: Tensor, given: str = "") -> None:
    """Compare the weight beneath an adapter with the one that the adapter was made for.

    Args:
        layer: The adapted layer; one whose weight is not here, on meta or shared out, passes.
        adapter_name: The adapter.
        record: (2, SIZE) int32, as it was stored.
        given: The name of the model at hand.

    Raises:
        AdapterError: The weights are others, and :func:`other_base_allowed` is not at work.
    """
    found = sketch_module(layer.get_base_layer())
    if found is None:
        return
    place: Place = layer.kpsvd_place[adapter_name]
    far, tolerance = distance(unpacked(record[0]), found)
    if not far <= tolerance:
        refuse(_other(place.name, far, tolerance, place.made_for, given))


@torch.no_grad()
def check_rest(
    model: nn.Module | None,
    layers: Mapping[str, Any],
    adapter_name: str,
    record: Tensor,
    given: str = "",
) -> None:
    """Compare all that no adapter lies on: embeddings, norms, biases, layers left alone.

    Args:
        model: The model.
        layers: The adapted layers by their names in the base.
        adapter_name: The adapter.
        record: As stored in any of the layers.
        given: The name of the model at hand.

    Raises:
        AdapterError: The weights are others, and :func:`other_base_allowed` is not at work.
    """
    if model is None or not layers or not record[1].any():
        return
    place: Place = next(iter(layers.values())).kpsvd_place[adapter_name]
    found = sketch_rest(without_peft(model), list(layers), place.saved_whole, place.task)
    if found is None:
        return
    far, tolerance = distance(unpacked(record[1]), found)
    if not far <= tolerance:
        refuse(_other("the weights without adapters", far, tolerance, place.made_for, given))


def _other(name: str, far: float, tolerance: float, made_for: str, given: str) -> str:
    model = f", the model given is {given!r}" if given else ""
    verb = "are" if name.startswith("the ") else "is"
    return (
        f"this adapter was trained on another base model: {name} {verb} {100 * far:.3g} % of the "
        f"norm away, by {NUM_PROJECTIONS} random projections (within {100 * tolerance:g} % is "
        f"taken for the same weight). The adapter names {made_for!r} as its base{model}."
    )


def _adapted(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "kpsvd_place")]
    return {
        layer.kpsvd_place[adapter_name].name: layer
        for layer in layers
        if adapter_name in layer.kpsvd_place
    }


def _is_new(layer: Any, name: str) -> bool:
    """Whether a layer's record is another than the one compared last."""
    return name not in layer.kpsvd_seen or layer.kpsvd_seen[name] != _key(layer.kpsvd_base[name])


def _is_rest_seen(layers: Mapping[str, Any], name: str, record: Tensor) -> bool:
    ends = _key(record)[SIZE:]
    return any(
        layer.kpsvd_seen.get(name, ())[SIZE:] == ends and not _is_new(layer, name)
        for layer in layers.values()
    )


def _key(record: Tensor) -> tuple[int, ...]:
    return tuple(record.flatten().tolist())


@torch.no_grad()
def check_base(
    layer: Any,
    adapter_name: str,
    expected: Unchecked,
    factors: tuple[Tensor, Tensor] | None = None,
    given: str = "",
) -> None:
    """Compare <W, A0_1 kron B0_1> with the number stored when the adapter was made.

    All that there is in adapters of older versions: one number a layer.

    Args:
        layer: The adapted layer; one whose weight is not here, on meta or shared out, passes.
        adapter_name: The adapter.
        expected: What its configuration says.
        factors: A0 and B0, where the layer has not got them yet.
        given: The name of the model at hand.

    Raises:
        AdapterError: The numbers differ.
    """
    if expected.fingerprint is None or not math.isfinite(expected.fingerprint):
        refuse(
            "this adapter says nothing by which its base model could be known "
            f"({expected.name} has the fingerprint {expected.fingerprint}), so that nothing was "
            f"compared. The adapter names {expected.made_for!r} as its base."
        )
        return
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
        refuse(
            f"this adapter was trained on another base model: {expected.name} projects to "
            f"{found:.6g} on its first term, expected {expected.fingerprint:.6g} (within "
            f"{tolerance:g} of it). The adapter names {expected.made_for!r} as its base{model}."
        )
