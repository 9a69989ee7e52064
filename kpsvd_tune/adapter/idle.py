"""Adapted layers that training does not reach: never called, or read past their forward.

A vision tower on text, cross attention without encoder states, a projection whose weight another
module multiplies with: their offsets get no gradient, count against the budget, and make
DistributedDataParallel wait for gradients that never come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from kpsvd_tune.adapter.model import kpsvd_layers

# A list of more names than this is written as a regular expression.
LISTED = 6


def idle_layers(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Name the adapted layers whose offsets have no gradient; to be asked after a backward pass.

    Args:
        model: A model with KPSVD layers, wrapped by PEFT or not.
        adapter_name: The adapter.
    """
    return [
        name
        for name, offsets in _trained_offsets(model, adapter_name)
        if all(offset.grad is None for offset in offsets)
    ]


def unreached_layers(model: nn.Module, loss: Tensor, adapter_name: str = "default") -> list[str]:
    """Name the adapted layers that a loss does not depend on, without a backward pass.

    Args:
        model: A model with KPSVD layers, wrapped by PEFT or not.
        loss: What it gave, with its graph.
        adapter_name: The adapter.
    """
    reached: set[int] = set()
    seen, left = set(), [loss.grad_fn]
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
        for name, offsets in _trained_offsets(model, adapter_name)
        if not any(id(offset) in reached for offset in offsets)
    ]


def exclusion(idle: Sequence[str], adapted: Sequence[str]) -> str:
    """What to give ``exclude_modules`` so that the idle layers are left out, and no other.

    Args:
        idle: Names of idle layers.
        adapted: Names of all adapted layers.

    Returns:
        A list of names, or a quoted regular expression where that is shorter, as YAML has it.
    """
    if len(idle) <= LISTED:
        return f"[{', '.join(idle)}]"
    # Layers that differ in their numbers alone are one pattern.
    patterns = dict.fromkeys(re.sub(r"\\?\b\d+\b", r"\\d+", re.escape(name)) for name in idle)
    expression = "|".join(patterns)
    if {name for name in adapted if re.fullmatch(expression, name)} == set(idle):
        return f"'{expression}'"
    return f"[{', '.join(idle)}]"


def idle_message(idle: Sequence[str], adapted: Sequence[str]) -> str:
    """Say which layers are idle, what that means and how to leave them out."""
    named = ", ".join(idle[:LISTED]) + (f" and {len(idle) - LISTED} more" if idle[LISTED:] else "")
    return (
        f"{len(idle)} of {len(adapted)} adapted layers got no gradient in the first step: {named}. "
        "The model does not call them on these data, or uses their weight in another way; they "
        "stay as they are and count in the number of trainable parameters. To give their share "
        f"to the others, set adapter.exclude_modules: {exclusion(idle, adapted)}"
    )


def _trained_offsets(model: nn.Module, adapter_name: str) -> list[tuple[str, list[Tensor]]]:
    return [
        (name, offsets)
        for name, layer in kpsvd_layers(model, adapter_name)
        if (
            offsets := [
                offset
                for offset in (layer.kpsvd_left[adapter_name], layer.kpsvd_right[adapter_name])
                if offset.requires_grad
            ]
        )
    ]
