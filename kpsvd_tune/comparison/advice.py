"""The lines that bring what a comparison recommends into use."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import yaml

from kpsvd_tune.comparison.setup import Setup

# PEFT's keys that name modules; the last part of a name means it in every layer.
_ALWAYS = ("r", "lora_alpha", "alpha")  # named also where they are its defaults
_MODULES = ("target_modules", "feedforward_modules")


def lines_to_use(setup: Setup) -> tuple[str, ...]:
    """Sections of a recipe for a KPSVD trial; PEFT's configuration for one of a baseline."""
    recipe = setup.recipe
    if setup.baseline is not None:
        config = setup.baseline.config
        return (
            f"{type(config).__name__}({_arguments(config)})",
            f"learning rate {recipe.train.learning_rate:g}; `kpsvd-tune train` trains KPSVD alone: "
            f"train it with PEFT, or take the adapter of this trial: {setup.folder / 'adapter'}",
        )
    adapter = recipe.adapter
    known = adapter.model_dump(mode="json", by_alias=True)
    section = adapter.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    # What decides a size is named also where it is the default.
    named = ("form",) if adapter.factor_size is not None else ("form", "factor_shape")
    section |= {key: known[key] for key in named}
    rank = {key: known["rank"][key] for key in ("method", "min", "max", "budget")}
    section["rank"] = {**rank, **section.get("rank", {})}
    first = ("form", "factor_shape", "factor_size", "rank")
    ordered = {key: section[key] for key in first if key in section} | section
    text = yaml.safe_dump(
        {"adapter": ordered, "train": {"learning_rate": recipe.train.learning_rate}},
        sort_keys=False,
        width=1000,
    )
    return tuple(text.splitlines())


def _arguments(config: Any) -> str:
    """What a configuration of PEFT has that differs from its defaults, and its rank and alpha."""
    plain = type(config)()
    shown = []
    for each in fields(config):
        value = getattr(config, each.name)
        is_default = value == getattr(plain, each.name) and each.name not in _ALWAYS
        if each.init and each.name != "peft_type" and not is_default:
            told = value
            if each.name in _MODULES:
                told = sorted({name.rpartition(".")[2] for name in value})
            shown.append(f"{each.name}={getattr(told, 'value', told)!r}")
    return ", ".join(shown)
