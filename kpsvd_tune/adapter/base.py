"""The layer beneath an adapter: its sizes, and whether it is the one the adapter was made for."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base_config import differences, hash_of, values_of
from kpsvd_tune.adapter.sketch import (
    NUM_PROJECTIONS,
    SIZE,
    Rest,
    distance,
    is_of_few_bits,
    sketch,
    sketch_module,
    sketch_rest,
    unpacked,
    without_peft,
)
from kpsvd_tune.adapter.sketch import TOLERANCE as SKETCH_TOLERANCE
from kpsvd_tune.errors import AdapterError, some_of
from kpsvd_tune.linalg import KroneckerShape, rearrange

_log = logging.getLogger(__name__)

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
_DISTANCES: ContextVar[dict[str, float] | None] = ContextVar("distances of bases", default=None)
RECORD = (2, SIZE)
# Reads a weight of the base by its name; None: it cannot.
Fetch = Callable[[str], Tensor | None]
# The first number of a record's row is the kind of its sketch. Above that byte the first row says
# whether the factors were found to be the weight's own terms (form both) or has their mark (other
# forms), the second has the configuration.
_BITS = 8
_MARK_SLACK = 3
# Entries of a weight that are projected on factors at a time.
_BAND = 1 << 20
# A model has a few hundred tensors; beyond this no number of each is kept.
_MOST_NUMBERS = 4096


@dataclass(frozen=True)
class Place:
    """Where a layer is and what its adapter says of the base, for comparing the base with it."""

    name: str  # of the layer in the base model
    model: int  # its number, by remember
    saved_whole: tuple[str, ...]  # the adapter's modules_to_save
    task: str | None  # PEFT's task type
    made_for: str  # name of the base, as the adapter has it
    # <W, A0_1 kron B0_1> of the adapter's base; None: its factors are not W's own terms
    fingerprint: float | None


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


@contextmanager
def noted_distances() -> Iterator[dict[str, float]]:
    """Note how far plain weights are from the quantised ones that adapters were trained on.

    Yields:
        By layer, the distance relative to the weight's norm, estimated from random projections.
    """
    found: dict[str, float] = {}
    token = _DISTANCES.set(found)
    try:
        yield found
    finally:
        _DISTANCES.reset(token)


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


@contextmanager
def weight_at_hand(layer: Any, name: str, fetch: Fetch | None) -> Iterator[None]:
    """Let an adapted layer have its base weight inside, where that is on the meta device.

    Args:
        layer: The layer, which does not keep the weight.
        name: Its name in the base.
        fetch: Reads a weight by its name; None changes nothing.
    """
    own: Any = layer.get_base_layer()._parameters
    held = own["weight"]
    if fetch is None or not held.is_meta:
        yield
        return
    weight = fetch(f"{name}.weight")
    if weight is not None:
        own["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        own["weight"] = held


@torch.no_grad()
def record_base(
    model: nn.Module,
    layers: Mapping[str, Any],
    adapter_name: str,
    config: Any,
    fetch: Fetch | None = None,
) -> None:
    """Store what the base is known by in an adapter that was made on it.

    Args:
        model: The model, wrapped by PEFT or not.
        layers: The adapted layers by their names in the base.
        adapter_name: The adapter.
        config: Its configuration, which gets what a message can name.
        fetch: Reads a weight of the base by its name, where it is on the meta device.
    """
    if not layers:
        return
    base = without_peft(model)
    place: Place = next(iter(layers.values())).kpsvd_place[adapter_name]
    rest = sketch_rest(base, list(layers), place.saved_whole, place.task, fetch=fetch)
    of_rest = torch.zeros(SIZE, dtype=torch.int32) if rest is None else rest.sketch.packed()
    config.base_config = values_of(base)
    of_rest[0] |= hash_of(config.base_config) << _BITS
    config.base_tensors = None
    if rest is not None and len(rest.numbers) <= _MOST_NUMBERS:
        config.base_tensors = {
            name: float(f"{number:.8g}") for name, (number, _) in rest.numbers.items()
        }
    for name, layer in layers.items():
        with weight_at_hand(layer, name, fetch):
            _record_layer(layer, adapter_name, of_rest)


def _record_layer(layer: Any, adapter_name: str, of_rest: Tensor) -> None:
    own = sketch_module(layer.get_base_layer())
    if own is None:
        return
    of_own = own.packed()
    if layer.kpsvd_form[adapter_name].name == "both":
        told = int(_wrong_term(layer, adapter_name, is_of_few_bits(own)) == "")
    else:
        told = _mark(layer.frozen(adapter_name))
    of_own[0] |= told << _BITS
    record = torch.stack([of_own, of_rest])
    held = layer.kpsvd_base[adapter_name]
    layer.kpsvd_base[adapter_name] = record.to(held.device)
    note_seen(layer, adapter_name, record, layer.frozen(adapter_name))


def check_loaded(layer: Any) -> None:
    """Check what came past PEFT's hooks: transformers' load_adapter asks none, and sets the mode.

    Adapters whose factors are not here yet stay unchecked.
    """
    for name in list(layer.kpsvd_form):
        factors: tuple[Tensor, ...] = layer.frozen(name)
        record: Tensor | None = dict(layer.kpsvd_base.items()).get(name)
        if any(each.is_meta for each in (*factors, *([] if record is None else [record]))):
            continue
        if record is not None and record.any():
            seen = layer.kpsvd_seen.get(name, ())
            key = _key(record, factors)
            if seen == key or layer.merged:
                continue
            if seen[: record.numel()] == key[: record.numel()]:
                # The base is known; other factors came with the same record.
                if told := int(record[0, 0]) >> _BITS:
                    few = is_of_few_bits(unpacked(record[0])) or layer.quantization_backend
                    check_terms(layer, name, bool(few), told)
                layer.kpsvd_seen[name] = key
                continue
            check_record(layer, name, record, unchecked=layer.kpsvd_unchecked.pop(name, None))
            place = layer.kpsvd_place[name]
            model = _MODELS.get(place.model)
            layers = {} if model is None else _adapted(model, name)
            # Once for all layers that were loaded together; a copy of a model is not the model.
            if layers.get(place.name) is layer and not _is_rest_seen(layers, name, record):
                configs = getattr(model, "peft_config", {})
                check_rest(model, layers, name, record, configs.get(name))
            layer.kpsvd_seen[name] = key
        elif factors[0].any() and name in layer.kpsvd_unchecked:
            check_base(layer, name, layer.kpsvd_unchecked.pop(name))


@torch.no_grad()
def check_record(
    layer: Any,
    adapter_name: str,
    record: Tensor,  # (2, SIZE) int32, as it was stored
    given: str = "",  # name of the model at hand
    factors: tuple[Tensor, ...] | None = None,  # frozen ones, where the layer has not got them yet
    unchecked: Place | None = None,  # where it was not compared before
) -> None:
    """Refuse a weight that the adapter was not made for, and factors that are not of that weight.

    A weight on the meta device or sharded passes. With :func:`other_base_allowed` another weight
    passes too.
    """
    stored = unpacked(record[0])
    found = sketch_module(layer.get_base_layer(), stored.kind)
    if found is None:
        return
    place: Place = layer.kpsvd_place[adapter_name]
    far, tolerance = distance(stored, found)
    if not far <= tolerance and (exact := sketch_module(layer.get_base_layer())):
        # The first one may have been summed up in float32, where one huge entry hides others.
        far, tolerance = distance(stored, exact)
    if not far <= tolerance:
        refuse(_other(place.name, far, tolerance, place.made_for, given))
        return
    noted = _DISTANCES.get()
    is_apart = is_of_few_bits(stored) and not is_of_few_bits(found) and far > SKETCH_TOLERANCE
    if noted is not None and is_apart:
        noted[place.name] = far
    is_newer, told = int(record[1, 0]) >> _BITS, int(record[0, 0]) >> _BITS
    if told or (not is_newer and unchecked and unchecked.fingerprint):
        is_quantised = is_of_few_bits(stored) or is_of_few_bits(found)
        check_terms(layer, adapter_name, is_quantised, told, factors)


@torch.no_grad()
def check_rest(
    model: nn.Module | None,
    layers: Mapping[str, Any],  # by their names in the base
    adapter_name: str,
    record: Tensor,  # as stored in any of the layers
    config: Any = None,
    given: str = "",  # name of the model at hand
    fetch: Fetch | None = None,  # reads a weight that is not loaded
) -> bool:
    """Refuse other weights where no adapter lies, and another configuration of the model.

    Weights are embeddings, norms, biases, layers left alone and buffers. With
    :func:`other_base_allowed` all may be others. Tells whether the weights were compared.
    """
    if model is None or not layers:
        return False
    base = without_peft(model)
    place: Place = next(iter(layers.values())).kpsvd_place[adapter_name]
    told, stored = int(record[1, 0]) >> _BITS, unpacked(record[1])
    found = None
    if stored.kind:
        # Records of older versions hold nothing of the configuration and of buffers.
        options = base, list(layers), place.saved_whole, place.task, bool(told), fetch
        found = sketch_rest(*options, stored.kind)
    if found is not None:
        far, tolerance = distance(stored, found.sketch)
        if not far <= tolerance and (exact := sketch_rest(*options)) is not None:
            # Those of one dtype were summed up in float32, and to the forms that they need.
            found = exact
            far, tolerance = distance(stored, found.sketch)
        if not far <= tolerance:
            message = _other("the weights without adapters", far, tolerance, place.made_for, given)
            numbers = getattr(config, "base_tensors", None) or {}
            refuse(message + _named(numbers, found, max(tolerance, 1e-5)))
    if told:
        _check_config(values_of(base), config, told, place.made_for)
    else:
        say_uncompared()
    return found is not None


@torch.no_grad()
def check_weight(layer: Any, adapter_name: str, weight: Tensor) -> None:
    """Compare one weight of the base with what the adapter stored of it, as loading does.

    `weight` is in the base layer's own layout; the layer, on the meta device, does not keep it.
    Whatever differs is refused as in :func:`check_record` and :func:`check_base`.
    """
    place: Place = layer.kpsvd_place[adapter_name]
    with weight_at_hand(layer, place.name, lambda _: weight):
        record: Tensor | None = dict(layer.kpsvd_base.items()).get(adapter_name)
        if record is not None and record.any():
            check_record(layer, adapter_name, record, unchecked=place)
        else:
            check_base(layer, adapter_name, place)


def say_uncompared() -> None:
    """Tell what an adapter of an older version cannot be asked."""
    _log.warning(
        "this adapter is of an older version, which stored nothing of its base's configuration: "
        "whether config.json is the same (rms_norm_eps, rope_parameters and the like) was not "
        "compared"
    )


def _check_config(found: Mapping[str, Any], config: Any, told: int, made_for: str) -> None:
    """Compare configurations by value where the adapter's own is at hand, else by a hash."""
    stored = getattr(config, "base_config", None) or {}
    if hash_of(stored) == told:
        changed = some_of(differences(stored, found), 5)
    elif hash_of(found) != told:
        changed = "by a hash; loaded with its own adapter_config.json it says which values"
    else:
        changed = ""
    if changed:
        refuse(
            "this adapter was trained on another base model: the configuration of the model given "
            f"differs ({changed}). The adapter names {made_for!r} as its base."
        )


def _named(stored: Mapping[str, float], found: Rest, least: float) -> str:
    """The tensors that differ, the furthest first, and what new random ones are due to."""
    far = {
        name: abs(stored[name] - number) / (norm or 1.0)
        for name, (number, norm) in found.numbers.items()
        if name in stored
    }
    # What is not finite is far away.
    names = sorted((name for name in far if not far[name] <= least), key=lambda name: -far[name])
    lost = sorted(found.numbers.keys() ^ stored.keys()) if stored else []
    if not names and not lost:
        return ""
    text = f" It is in {some_of(names)}." if names else ""
    text += f" One of the two has no {some_of(lost)}." if lost else ""
    if 0 < len(names) < len(far):
        text += (
            " Modules that a checkpoint lacks are filled with new random numbers at each load, of "
            "which transformers warns: if these are such, save the base once with save_pretrained "
            "and load that folder from then on, or name them in modules_to_save and train anew."
        )
    return text


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


def _is_rest_seen(layers: Mapping[str, Any], name: str, record: Tensor) -> bool:
    """Whether one of the layers was loaded with the same second row, and compared."""
    ends = tuple(record[1].tolist())
    return any(
        layer.kpsvd_seen.get(name, ())[SIZE : 2 * SIZE] == ends
        and tuple(layer.kpsvd_base[name][1].tolist()) == ends
        for layer in layers.values()
    )


def note_seen(layer: Any, name: str, record: Tensor, factors: tuple[Tensor, ...]) -> None:
    """Remember that a record and frozen factors were compared with the base."""
    layer.kpsvd_seen[name] = _key(record, factors)


def _key(record: Tensor, factors: tuple[Tensor, ...]) -> tuple[float, ...]:
    sums = torch.cat([factor.flatten(1).sum(1) for factor in factors])
    return (*record.flatten().tolist(), *sums.tolist())


@torch.no_grad()
def check_base(
    layer: Any,
    adapter_name: str,
    expected: Place,
    factors: tuple[Tensor, ...] | None = None,  # frozen ones, where the layer has not got them yet
    given: str = "",  # name of the model at hand
) -> None:
    """Refuse a weight whose <W, A0_1 kron B0_1> is not what it was when the adapter was made.

    One number a layer is all that there is in adapters of older versions. A weight on the meta
    device or sharded passes.
    """
    if expected.fingerprint is None or not math.isfinite(expected.fingerprint):
        refuse(
            "this adapter says nothing by which its base model could be known "
            f"({expected.name} has the fingerprint {expected.fingerprint}), so that nothing was "
            f"compared. The adapter names {expected.made_for!r} as its base."
        )
        return
    projections = _projections(layer, adapter_name, factors)
    if projections is None:
        return
    found = float(projections[0][0])
    if layer.quantization_backend is not None:
        tolerance = TOLERANCE_QUANTISED
    else:
        tolerance = TOLERANCE.get(layer.weight.dtype, TOLERANCE_16_BIT)
    if not abs(found - expected.fingerprint) <= tolerance * abs(expected.fingerprint):
        model = f", the model given is {given!r}" if given else ""
        refuse(
            f"this adapter was trained on another base model: {expected.name} projects to "
            f"{found:.6g} on its first term, expected {expected.fingerprint:.6g} (within "
            f"{tolerance:g} of it). The adapter names {expected.made_for!r} as its base{model}."
        )
    else:
        check_terms(layer, adapter_name, layer.quantization_backend is not None, 1, factors)


def check_terms(
    layer: Any,
    adapter_name: str,
    is_quantised: bool,  # the weight is of few bits, here or when the adapter was made
    told: int,  # what the record says of them
    factors: tuple[Tensor, ...] | None = None,  # frozen ones, where the layer has not got them yet
) -> None:
    """Refuse frozen factors that are not those that the adapter was made with, in their order.

    Factors of layers or of terms may have been exchanged; the layer must be on its own base. The
    form both has the weight's own terms, which the weight knows; others have a mark.
    """
    if layer.kpsvd_form[adapter_name].name == "both":
        wrong = _wrong_term(layer, adapter_name, is_quantised, factors)
    else:
        found = _mark(factors or layer.frozen(adapter_name))
        is_same = all(
            abs((found >> place & 2047) - (told >> place & 2047)) <= _MARK_SLACK
            for place in (0, 11)
        )
        wrong = "" if is_same else f"its frozen factors project to {found}, expected {told}"
    if wrong:
        raise AdapterError(
            f"{layer.kpsvd_place[adapter_name].name}: {wrong}; the frozen factors were exchanged "
            "with those of another layer or term, or damaged; expected the adapter's file as it "
            "was saved"
        )


def _mark(factors: tuple[Tensor, ...]) -> int:
    """Two random projections of frozen factors, relative to their norm, as a number of 23 bits.

    Equal up to the slack for factors rounded to 16 bits; others have it once in ten thousand. Each
    counts by its direction: the scale that one of a pair carries would hide the other.
    """
    flat = [factor.detach().cpu().double().flatten() for factor in factors]
    found = sketch(torch.cat([each / (each.norm() or 1.0) for each in flat]))
    marks = (found.values[0, :2] / (found.norm or 1.0) * 256).round().clamp(-1024, 1023) + 1024
    return int(marks[0]) | int(marks[1]) << 11 | 1 << 22


def _wrong_term(
    layer: Any,
    adapter_name: str,
    is_quantised: bool,
    factors: tuple[Tensor, ...] | None = None,
) -> str:
    """What the first term that is not the weight's own projects to; "" where there is none.

    <W, A0_k kron B0_k> is sigma_k^2, as is ||A0_k||^2 ||B0_k||^2, and sigma_k falls with k.
    """
    projections = _projections(layer, adapter_name, factors)
    if projections is None:
        return ""
    found, expected = (each / projections[1].sqrt() for each in projections)
    tolerance = TOLERANCE_QUANTISED if is_quantised else TOLERANCE_16_BIT
    slack = tolerance * expected.max()
    rises = torch.cat([expected.new_zeros(1), expected.diff()])
    # Written so that what is not a number is wrong.
    right = ((found - expected).abs() <= slack) & (rises <= slack)
    if right.all():
        return ""
    k = int((~right).nonzero()[0])
    return (
        f"the weight projects to {float(found[k]):.6g} on term {k + 1}, expected "
        f"{float(expected[k]):.6g}, and no more on a later term than on an earlier"
    )


def _projections(
    layer: Any, adapter_name: str, factors: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor] | None:
    """<W, A0_k kron B0_k> and ||A0_k||^2 ||B0_k||^2 of all terms; None: no weight is here."""
    held: Tensor = layer.weight
    if held.device.type == "meta" or hasattr(held, "full_tensor"):
        return None
    weight: Tensor = layer.get_base_weight()
    if isinstance(layer.get_base_layer(), Conv1D):
        weight = weight.T
    left0, right0 = factors or layer.frozen(adapter_name)
    a, b = (factor.float().to(weight.device) for factor in (left0, right0))
    shape: KroneckerShape = layer.kpsvd_form[adapter_name].shape
    found = a.new_zeros(len(a))
    # In bands of rows, so that no copies of the whole weight are made.
    step = max(1, _BAND // (shape.p * shape.in_features))
    for first in range(0, shape.m, step):
        band = a[:, first : first + step]
        rows = weight[first * shape.p : (first + step) * shape.p].float()
        part = KroneckerShape(band.shape[1], *shape.as_tuple()[1:])
        found += ((band.flatten(1) @ rearrange(rows, part)) * b.flatten(1)).sum(1)
    return found, a.square().sum((1, 2)) * b.square().sum((1, 2))
