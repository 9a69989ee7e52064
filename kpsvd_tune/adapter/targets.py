"""Which modules of a model a KPSVD adapter goes to, by PEFT's own matching rules."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import AdapterError


def match_targets(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Find the layers that a configuration targets, in model order.

    Args:
        model: The base model, with or without adapters already injected; may be on meta.
        config: A PEFT configuration with target_modules, exclude_modules and modules_to_save.

    Returns:
        Module name to module, each a Linear or Conv1D (or an adapted one).

    Raises:
        AdapterError: Nothing matches, or a match is not a linear layer or shares its weight.
    """
    config = copy.copy(config)
    # PEFT's own resolution of "all-linear", which leaves the output embedding out.
    _maybe_include_all_linear_layers(config, model)
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    )
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        found: Any = check_target_module_exists(config, name)
        if isinstance(found, _ExcludedModule) or not found:
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise AdapterError(
                f"target module {name} is a {type(base).__name__}: KPSVD adapts Linear and Conv1D "
                "layers only; name other modules or exclude this one"
            )
        sharing = [
            owner for owner in owners.get(id(base.weight), []) if not owner.startswith(f"{name}.")
        ]
        if sharing:
            raise AdapterError(
                f"target module {name} shares its weight with {sharing[0]}: adapting one would "
                "change or untie the other; exclude it"
            )
        targets[name] = module
    if not targets:
        raise AdapterError(_nothing_matched(model, config.target_modules))
    return targets


def _nothing_matched(model: nn.Module, wanted: Any) -> str:
    kinds = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
    )
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    close = [
        match
        for name in names
        for match in difflib.get_close_matches(name.rpartition(".")[2], kinds, n=1)
    ]
    hint = f"; did you mean {', '.join(sorted(set(close)))}?" if close else ""
    return (
        f"target_modules {wanted!r} match no layer of the model; its linear layers are "
        f"{', '.join(kinds) or 'none'}{hint}"
    )
