"""Adapted layers that training does not reach: never called, or read past their forward.

A vision tower on text, cross attention without encoder states, a projection whose weight another
module multiplies with: what is trained there gets no gradient, counts against the budget, and makes
DistributedDataParallel wait for gradients that never come. For PEFT's other methods too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from kpsvd_tune.adapter.targets import plain_name

# A list of more names than this is written as a regular expression.
LISTED = 6


def idle_layers(model: nn.Module) -> list[str]:
    """Name the adapted layers that have no gradient at all; to be asked after a backward pass.

    Args:
        model: A model with adapters, wrapped by PEFT or not; only what is trained counts.
    """
    return [
        name
        for name, trained in trained_by_layer(model).items()
        if all(parameter.grad is None for parameter in trained)
    ]


def unreached_layers(model: nn.Module, loss: Tensor) -> list[str]:
    """Name the adapted layers with a trained parameter that a loss does not depend on.

    Args:
        model: A model with adapters, wrapped by PEFT or not.
        loss: What it gave, with its graph.
    """
    reached: set[int] = set()
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            reached.add(id(variable))
        left += [following for following, _ in node.next_functions]
    return [
        name
        for name, trained in trained_by_layer(model).items()
        if not all(id(parameter) in reached for parameter in trained)
    ]


def trained_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained, by the name of its layer in the base model."""
    adapted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.rpartition(".")[0]
            holder = module
            while holder and holder not in adapted:
                holder = holder.rpartition(".")[0]
            plain = plain_name(holder or module).removeprefix("base_model.model.")
            layers.setdefault(plain, []).append(parameter)
    return layers


def idle_message(idle: Sequence[str], adapted: Sequence[str]) -> str:
    """Say which layers are idle, and what that means.

    Args:
        idle: Names of layers without a gradient.
        adapted: Names of all adapted layers.
    """
    named = ", ".join(idle[:LISTED]) + (f" and {len(idle) - LISTED} more" if idle[LISTED:] else "")
    return (
        f"{len(idle)} of {len(adapted)} adapted layers got no gradient in the first step: {named}. "
        "The model does not call them on these data, or uses their weight in another way. They "
        "stay as they are, and count as trainable parameters all the same"
    )


def idle_cure(idle: Sequence[str], adapted: Sequence[str]) -> str:
    """Say how to leave the idle layers out."""
    return (
        "To give their share to the other layers, set adapter.exclude_modules: "
        f"{exclusion(idle, adapted)}"
    )


def exclusion(idle: Sequence[str], adapted: Sequence[str]) -> str:
    """What to give ``exclude_modules``, as YAML, so that the idle layers are left out and no other.

    A list of names, or a quoted regular expression where that is shorter.
    """
    if len(idle) > LISTED:
        # Layers that differ in their numbers alone are one pattern.
        patterns = dict.fromkeys(re.sub(r"\b\d+\b", r"\\d+", re.escape(name)) for name in idle)
        expression = "|".join(patterns)
        if {name for name in adapted if re.fullmatch(expression, name)} == set(idle):
            return f"'{expression}'"
    return f"[{', '.join(idle)}]"
