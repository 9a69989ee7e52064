"""What pydantic found, as faults a person can act on: where, what was got, what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from kpsvd_tune.errors import closest, did_you_mean
from kpsvd_tune.recipe.reading import Path
from kpsvd_tune.recipe.schema import Recipe
from kpsvd_tune.recipe.values import show

# What people write who come from other toolkits.
_SYNONYMS = {
    word: key
    for key, words in {
        "adapter.dropout": "lora_dropout",
        "adapter.rank": "lora_r r",
        "adapter.target_modules": "lora_target_linear lora_target_modules",
        "dataset.max_length": "cutoff_len max_seq_length sequence_len",
        "dataset.path": "dataset_path train_file",
        "dataset.validation": "val_set_size val_size",
        "model.dtype": "torch_dtype",
        "model.path": "base_model model_name_or_path",
        "tracking": "report_to",
        "train.batch_size": "bs micro_batch_size per_device_train_batch_size",
        "train.early_stopping": "early_stopping_patience",
        "train.epochs": "num_epochs num_train_epochs",
        "train.gradient_accumulation": "grad_accum",
        "train.learning_rate": "lr",
        "train.log_every": "logging_steps",
        "train.save_every": "save_steps",
        "train.scheduler": "lr_scheduler lr_scheduler_type",
    }.items()
    for word in words.split()
}
_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}


Level = tuple[str, ...]


def _levels(section: Any, level: Level = ()) -> dict[Level, dict[str, str]]:
    """Every mapping of the schema, as key -> description; `*` stands for a key of any name."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        fields = section.model_fields
        inner = {
            field.alias or name: (field.annotation, field.description)
            for name, field in fields.items()
        }
    elif is_typeddict(section):
        hints = get_type_hints(section, include_extras=True)
        # The last metadata of a key is its Field with the description.
        inner = {name: (hint, hint.__metadata__[-1].description) for name, hint in hints.items()}
    else:
        below: dict[Level, dict[str, str]] = {}
        step = ("*",) if get_origin(section) is dict else ()
        for argument in get_args(section):
            below |= _levels(argument, level + step)
        return below
    levels = {level: {name: str(description) for name, (_, description) in inner.items()}}
    for name, (annotation, _) in inner.items():
        levels |= _levels(annotation, (*level, name))
    return levels


LEVELS = _levels(Recipe)
# Every key by its dotted name, but those of a source: they are keys of the dataset section too.
_DOTTED = {
    ".".join((*level, key)): key
    for level, keys in LEVELS.items()
    for key in keys
    if "*" not in level and level != ("dataset", "path")
}


def near_key(path: Path) -> tuple[str | None, str]:
    """The key of the same mapping that an unknown one was meant for, if any; advice to print."""
    level = _level(path[:-1])
    key = str(path[-1]).replace("-", "_").lower()
    here = list(LEVELS.get(level, ()))
    elsewhere = {
        dotted if "." in dotted else f"{name} at the top level": name
        for dotted, name in _DOTTED.items()
        if dotted.rpartition(".")[0] != ".".join(level)
    }
    if key in elsewhere and "." in key:
        return None, "dots are for overrides; in a file nest the keys"
    synonym = _SYNONYMS.get(key, "")
    if synonym.rpartition(".")[0] == ".".join(level):
        synonym = synonym.rpartition(".")[2]
    alike = _close(key, elsewhere.values())
    # In order of trust: a slip of a letter; the right key in the wrong place; a guess.
    for found in (
        _close(key, here, 0.8),
        [place for place, name in elsewhere.items() if name == key],
        [synonym] if synonym else [],
        _close(key, here, 0.6),
        [place for place, name in elsewhere.items() if name in alike],
    ):
        if found:
            return (found[0] if found[0] in here else None), f"did you mean {_one_of(found)}?"
    return None, f"expected {_one_of(here)}"


def key_like(name: str) -> str | None:
    """The dotted key of a recipe that a name stands for, which may be another toolkit's."""
    name = name.replace("-", "_")
    keys = [dotted for dotted in _DOTTED if not dotted.startswith("evaluation.")]
    if name in keys:
        return name
    if found := _SYNONYMS.get(name.rpartition(".")[2]):
        return found
    # The section of training first: most options of other tools are there.
    ends = sorted(
        (key for key in keys if key.endswith(f".{name}")),
        key=lambda key: not key.startswith("train."),
    )
    return ends[0] if ends else closest(name, keys, 0.8)


def message_of(error: ErrorDetails, path: Path) -> str:
    """Say what was got, what was expected and what to do."""
    kind, context, got = error["type"], error.get("ctx", {}), show(error["input"])
    if kind == "extra_forbidden":
        return f"unknown key; {near_key(path)[1]}"
    if kind == "missing":
        return f"missing; expected {LEVELS[_level(path[:-1])][str(path[-1])]}"
    if kind == "conflict":
        return str(context["message"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"got {got}; expected {_one_of(options)}{did_you_mean(str(error['input']), options)}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"got {got}; expected {words} {context[bound]:g}"
    if kind == "too_short":
        least = context["min_length"]
        return f"got {got}; expected at least {least} item{'s' if least > 1 else ''}"
    if kind in _TYPES:
        return f"got {got}; expected {_TYPES[kind]}{_hint(kind, error['input'], path)}"
    return error["msg"]


def _hint(kind: str, value: object, path: Path) -> str:
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind in ("model_type", "dict_type") and (keys := LEVELS.get(_level(path))):
        return f" with the keys {', '.join(list(keys)[:3])}" + ", ..." * (len(keys) > 3)
    return ""


def _level(path: Path) -> Level:
    """The place of a path in the schema: without list numbers, `*` for keys of any name."""
    level: Level = ()
    for step in path:
        if isinstance(step, str):
            level = (*level, "*") if (*level, "*") in LEVELS else (*level, step)
    return level


def _close(key: str, keys: Iterable[str], cutoff: float = 0.8) -> list[str]:
    found = closest(key, keys, cutoff)
    return [found] if found else []


def _one_of(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
