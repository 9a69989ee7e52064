"""The state of a training as safetensors and JSON, with an exact way back; no pickle anywhere.

A state is a tree of dicts, lists, tuples, scalars and tensors, as torch's `state_dict` methods give
it. Its tensors go to one safetensors file; all else goes to JSON, where whatever JSON cannot tell
apart (a tuple, a key that is no string, a tensor's place) is wrapped in a one-key object.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kpsvd_tune.errors import CheckpointError, NonFiniteError
from kpsvd_tune.storage.json_files import parse_json, to_json

# Keys of the wrapping objects; a plain dict that uses one as its only key is wrapped itself.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds."""

    step: int  # optimiser steps done
    offsets: dict[str, Tensor]  # the trained tensors by parameter name
    optimizer: dict[str, Any]  # as `optimizer_state` gives it
    scheduler: dict[str, Any]  # the learning-rate schedule's state
    random: list[dict[str, Any]]  # the state of every random generator, one entry a process
    progress: dict[str, Any]  # counters of the loop, JSON values only
    metrics_bytes: int = 0  # length of metrics.jsonl when the state was taken


def to_files(state: TrainingState) -> Iterable[tuple[str, bytes]]:
    """The files of a checkpoint, made one at a time; NonFiniteError if one is infinite or NaN."""
    optimizer_tensors: dict[str, Tensor] = {}
    random_tensors: dict[str, Tensor] = {}
    content = {
        "step": state.step,
        "metrics_bytes": state.metrics_bytes,
        "progress": state.progress,
        "scheduler": pack(state.scheduler, {}),
        "optimizer": pack(state.optimizer, optimizer_tensors),
        "random": pack(state.random, random_tensors),
    }
    for name, tensor in [*state.offsets.items(), *optimizer_tensors.items()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"step {state.step}: {name} holds an infinite or NaN number; it was not saved, "
                "and the checkpoint before stays the newest"
            )
    yield "offsets.safetensors", _to_safetensors(state.offsets)
    yield "optimizer.safetensors", _to_safetensors(optimizer_tensors)
    yield "random.safetensors", _to_safetensors(random_tensors)
    yield "state.json", to_json(content)


def from_files(files: Mapping[str, bytes]) -> TrainingState:
    """The state that `to_files` was given, on the CPU; CheckpointError if a file is not right."""
    try:
        content = parse_json(files["state.json"])
        return TrainingState(
            step=content["step"],
            offsets=load(files["offsets.safetensors"]),
            optimizer=unpack(content["optimizer"], load(files["optimizer.safetensors"])),
            scheduler=unpack(content["scheduler"], {}),
            random=unpack(content["random"], load(files["random.safetensors"])),
            progress=content["progress"],
            metrics_bytes=content["metrics_bytes"],
        )
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks {error}; expected one of ours") from error
    except (ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint's state cannot be read ({error}); expected one of ours"
        ) from error


def pack(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Turn a state tree into JSON values, its tensors put into `tensors` under readable names."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, dict):
        plain = all(isinstance(key, str) for key in tree)
        packed = {key: pack(value, tensors, _join(name, key)) for key, value in tree.items()}
        if plain and not (len(tree) == 1 and next(iter(tree)).startswith("$")):
            return packed
        return {_ITEMS: [[pack(key, tensors, name), value] for key, value in packed.items()]}
    if isinstance(tree, list | tuple):
        items = [pack(value, tensors, _join(name, index)) for index, value in enumerate(tree)]
        return {_TUPLE: items} if isinstance(tree, tuple) else items
    if isinstance(tree, float) and not math.isfinite(tree):
        raise TypeError(f"{name} is {tree}; expected a finite number")
    # Subclasses, numpy's scalars for one, would come back as their base: refused like the rest.
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}, which safetensors and JSON cannot hold")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` was given, types included."""
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        kind, content = next(iter(packed.items()))
        if kind == _TENSOR:
            return tensors[content]
        if kind == _TUPLE:
            return tuple(unpack(value, tensors) for value in content)
        if kind == _ITEMS:
            return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
    return {key: unpack(value, tensors) for key, value in packed.items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Any]:
    """An optimiser's state keyed by parameter names, which outlive the order of parameters.

    It is `{"state": {name: {...}}, "groups": [{..., "params": [name]}]}`, tensors not copied.
    """
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {
        "state": {names[key]: dict(value) for key, value in optimizer.state.items()},
        "groups": groups,
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Mapping[Tensor, str]
) -> None:
    """Put back what `optimizer_state` took, bit for bit; CheckpointError: of other parameters."""
    ours = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    check_groups(state, ours)
    numbers = {name: index for index, name in enumerate(name for group in ours for name in group)}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: value for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state["groups"]
            ],
        }
    )


def check_groups(state: Mapping[str, Any], ours: list[list[str]]) -> None:
    """Refuse an optimiser's state whose groups hold parameters of other names than `ours`."""
    saved = [group["params"] for group in state["groups"]]
    if ours != saved:
        raise CheckpointError(
            f"the checkpoint's optimiser has {sum(map(len, saved))} parameters in {len(saved)} "
            f"groups, the run's has {sum(map(len, ours))} in {len(ours)}, or their names differ"
        )


def random_state(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """The state of this process's generators: python, numpy, torch, and each accelerator device."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
        "devices": {
            str(device): torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type != "cpu"
        },
    }
    generator: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = generator
    state["numpy"] = {
        "kind": str(kind),
        "keys": torch.tensor(keys.tolist()),
        "numbers": [int(position), int(has_gauss), float(gauss)],
    }
    return state


def load_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator where `random_state` found it."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    for name, value in state["devices"].items():
        device = torch.device(name)
        torch.get_device_module(device).set_rng_state(value, device)
    if saved := state.get("numpy"):
        keys = np.array(saved["keys"].tolist(), dtype=np.uint32)
        np.random.set_state((saved["kind"], keys, *saved["numbers"]))


def _to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    return save(
        {
            name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )


def _join(name: str, key: object) -> str:
    return f"{name}/{key}" if name else str(key)
