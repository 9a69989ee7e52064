"""A base model larger than the card: decoder blocks that do not fit stay in the host's memory.

Their frozen weights are copied to the card each time they compute, and dropped right afterwards.
What is trained, adapters, buffers, and all that is in no decoder block always lie on the card.

Accelerate's hooks are not used. They restore a layer after its forward pass, which a recomputation
by torch's checkpointing ends with an exception, so a layer of every block would stay on the card;
and set on each linear layer they would change how an adapter computes. Here the weights are there
for a whole attention or MLP, so that everything computes as it does on a card that holds them all.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from kpsvd_tune.errors import RecipeError, ResourceError
from kpsvd_tune.processes import num_processes
from kpsvd_tune.units import size

# Share of the free memory that is left to activations, caches of keys and values, and fragments.
RESERVE = 0.25
# Gradients and AdamW's two moments, in sizes of what is trained.
_OPTIMISER = 3
_METHOD = re.compile(r"self\.(\w+)\.\w+\(")
_MARK = "brings_weights"  # of a forward pass that does
_Place = tuple[nn.Module, str]  # a parameter's owner, and its name there


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model lie."""

    num_blocks: int  # decoder blocks
    num_offloaded: int  # of those, how many have weights in the host's memory
    offloaded_bytes: int  # of these weights


def place(
    model: nn.Module, device_map: str | None, device: torch.device, note: Callable[[str], None]
) -> None:
    """Bring a model, loaded on the CPU, to a device as `model.device_map` says; null leaves it.

    Args:
        model: May have adapters on it, of which some parameters are trained.
        device_map: auto or None.
        device: To compute on.
        note: Told what lies where.

    Raises:
        RecipeError: Several processes or Apple's mps, or the model has no decoder blocks.
        ResourceError: What has to lie on the card does not fit there.
    """
    if device_map is None or is_offloaded(model):
        return
    check_device(device)
    free = free_bytes(device)
    if free is None:
        note("model.device_map: auto does nothing on a CPU: the weights are in its memory anyway")
        return
    found = offload(model, device, free)
    if not found.num_offloaded:
        note(f"model.device_map: auto: everything fits on {device}, nothing is offloaded")
        return
    note(
        f"model.device_map: auto: {found.num_blocks - found.num_offloaded} of {found.num_blocks} "
        f"decoder blocks are on {device}; the weights of {found.num_offloaded}, "
        f"{size(found.offloaded_bytes)}, stay in the host's memory and are copied for each use"
    )


def check_device(device: torch.device) -> None:
    """Refuse `model.device_map: auto` where it cannot work; RecipeError says why."""
    check_alone()
    if device.type == "mps":
        raise RecipeError(
            "model.device_map: auto: Apple's mps has no memory of its own, so there is nothing to "
            "offload to; expected model.device_map: null"
        )


def check_alone(planned: int = 1) -> None:
    """Refuse `model.device_map: auto` in several processes, running or planned: RecipeError."""
    if (count := max(num_processes(), planned)) > 1:
        raise RecipeError(
            f"model.device_map: auto: got {count} processes; expected one, for each would keep the "
            "base in the host's memory: to train on several GPUs set train.parallel: fsdp and "
            "model.device_map: null; to score a run leave --gpus and --processes out"
        )


def offload(model: nn.Module, device: torch.device, free: int) -> Placement:
    """Move a model to a device with ``free`` bytes, and leave in place the blocks beyond that.

    The first blocks go to the device, and room is left there for the largest that does not. Losses,
    gradients and answers have the bits that they have where everything lies on that device.

    Raises:
        RecipeError: The model has no decoder blocks.
        ResourceError: What has to lie on the card does not fit there.
    """
    blocks = _offloadable(model)
    if not blocks:
        raise RecipeError(
            f"model.device_map: auto: {type(model).__name__} does not say which of its modules are "
            "decoder blocks, so none can stay in the host's memory; expected null"
        )
    sizes = [_bytes(owner._parameters[name] for owner, name in block.places) for block in blocks]
    state = _OPTIMISER * _bytes(each for each in model.parameters() if each.requires_grad)
    others = _bytes([*model.parameters(), *model.buffers()]) - sum(sizes)
    room = round((1 - RESERVE) * free) - state - others
    if sum(sizes) > room and others + max(sizes) + state > free:
        raise ResourceError(
            f"{device} has {size(free)} free, and what model.device_map: auto keeps there takes "
            f"{size(others + max(sizes) + state)}: all but the decoder blocks, the largest of "
            "these, and what the optimiser keeps; expected a larger card, fewer other programs on "
            "it, or a smaller base"
        )
    num_kept = num_that_fit(sizes, room)
    away = blocks[num_kept:]
    with _taken_out([place for block in away for place in block.places]):
        model.to(device)
    for block in away:
        for module, places in block.by_child.items():
            _bring(module, places, device)
    return Placement(len(blocks), len(away), sum(sizes[num_kept:]))


def is_offloaded(model: nn.Module) -> bool:
    """Whether a part of the model lies in the host's memory; such a model must not be moved."""
    return any(hasattr(vars(each).get("forward"), _MARK) for each in model.modules())


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's authors say must stay on one device."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def block_parameters(skeleton: nn.Module) -> list[int]:
    """Numbers of each block's weights that can be offloaded, of a base without adapters."""
    return [
        sum(cast(Tensor, owner._parameters[name]).numel() for owner, name in block.places)
        for block in _offloadable(skeleton, is_base=True)
    ]


def num_that_fit(sizes: Sequence[int], room: int) -> int:
    """How many of the first blocks lie in so many bytes; beside the largest where not all do."""
    if sum(sizes) <= room:
        return len(sizes)
    room -= max(sizes)
    return sum(total <= room for total in accumulate(sizes))


@dataclass(frozen=True)
class _Block:
    """The weights of a decoder block that can be offloaded, by the child that they are brought for.

    Not for the block itself: transformers checkpoints the forward pass of its class, below what is
    set on the block, and a recomputation would find no weights.
    """

    by_child: dict[nn.Module, list[_Place]]

    @property
    def places(self) -> list[_Place]:
        return [place for places in self.by_child.values() for place in places]


def _offloadable(model: nn.Module, is_base: bool = False) -> list[_Block]:
    """The outermost decoder blocks, in the order of the model; of a base all weights are frozen.

    Of their weights not what is trained, nor adapters, which PEFT keeps in dictionaries; nor packed
    ones, nor those that have another place in the model.
    """
    held = Counter(id(each) for module in model.modules() for each in module._parameters.values())

    def can_go(parameter: nn.Parameter | None) -> bool:
        if type(parameter) is not nn.Parameter or held[id(parameter)] > 1:
            return False
        return parameter.is_floating_point() and (is_base or not parameter.requires_grad)

    blocks = decoder_blocks(model)
    inner = {id(each) for block in blocks for each in block.modules() if each is not block}
    return [
        _Block(
            {
                child: [
                    (owner, name)
                    for owner in child.modules()
                    if not isinstance(owner, nn.ParameterDict)
                    for name, parameter in owner._parameters.items()
                    if can_go(parameter)
                ]
                for child in _called(block)
            }
        )
        for block in blocks
        if id(block) not in inner
    ]


def _called(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward pass a block calls, also those that it keeps in lists.

    Not those of which it uses other methods, as Gemma 3n's does: nothing would bring their weights.
    """
    by_methods: list[str] = []
    with suppress(OSError):  # a class without a source
        by_methods = _METHOD.findall(inspect.getsource(type(block).forward))
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child)
        elif name not in by_methods:
            yield child


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of tensors; shared ones count once."""
    return sum(
        each.nbytes for each in {id(each): each for each in tensors if each is not None}.values()
    )


@contextmanager
def _taken_out(places: Sequence[_Place]) -> Iterator[None]:
    """Parameters are not in the model inside, so that it can be moved without them."""
    held = [owner._parameters[name] for owner, name in places]
    for owner, name in places:
        owner._parameters[name] = None
    try:
        yield
    finally:
        for (owner, name), parameter in zip(places, held, strict=True):
            owner._parameters[name] = parameter


def _bring(module: nn.Module, places: Sequence[_Place], device: torch.device) -> None:
    """Have a module compute with weights that are copied to the device, and dropped afterwards."""
    forward: Callable[..., Any] = module.forward
    values = [cast(Tensor, owner._parameters[name]).detach() for owner, name in places]

    @wraps(forward)
    def with_weights(*args: Any, **kwargs: Any) -> Any:
        # Put back also after an exception, by which a recomputation ends.
        with _taken_out(places):
            for (owner, name), value in zip(places, values, strict=True):
                copied = value.to(device, non_blocking=True, copy=True)
                owner._parameters[name] = nn.Parameter(copied, requires_grad=False)
            return forward(*args, **kwargs)

    setattr(with_weights, _MARK, True)
    module.forward = with_weights


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that this process can still take; None of a CPU's."""
    if device.type == "cpu":
        return None
    gc.collect()  # a model of before, with an adapter, refers to itself
    memory: Any = torch.get_device_module(device)
    memory.empty_cache()
    free, _ = memory.mem_get_info(device)
    return int(free)
