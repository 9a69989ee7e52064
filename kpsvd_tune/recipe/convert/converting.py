"""A configuration of another tool in, the text of a recipe and what was left out of it out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.errors import InputError, some_of
from kpsvd_tune.recipe.convert.axolotl import AXOLOTL
from kpsvd_tune.recipe.convert.keys import Rules, Target
from kpsvd_tune.recipe.convert.llama_factory import LLAMA_FACTORY, set_rows
from kpsvd_tune.recipe.convert.peft import PEFT
from kpsvd_tune.recipe.convert.trl import TRL
from kpsvd_tune.recipe.files import read_text, shown
from kpsvd_tune.recipe.loading import value_to_yaml
from kpsvd_tune.recipe.reading import Line, read_yaml
from kpsvd_tune.recipe.reference import MODELINE
from kpsvd_tune.recipe.schema import Recipe
from kpsvd_tune.storage.paths import expand

RULES: Mapping[str, Rules] = {
    "axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "trl": TRL,
    "PEFT": PEFT,
}
_UNKNOWN = "not known here as a key of that tool, and not carried over"
_PREFERENCES = (
    "trains on preferences, and `kpsvd-tune train` learns answers as they are; trl's DPOTrainer "
    "and RewardTrainer take a KPSVD adapter: docs/hosts.md, Preferences"
)
_WANTED = (
    "expected the YAML of axolotl (base_model), LLaMA-Factory (model_name_or_path with "
    "finetuning_type, stage or cutoff_len), trl (model_name_or_path with dataset_name or use_peft) "
    "or adapter_config.json of PEFT (peft_type)"
)


@dataclass(frozen=True)
class Converted:
    """A recipe made of another tool's configuration."""

    tool: str
    text: str  # of the recipe
    taken: Mapping[str, str]  # our dotted key -> the key it came from
    left: Mapping[str, tuple[str, str]]  # their key -> its value, and what that means for the run

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        left = {key: {"value": value, "meaning": said} for key, (value, said) in self.left.items()}
        return {"tool": self.tool, "taken": dict(self.taken), "left": left}


def convert(path: str | os.PathLike[str], name: str) -> Converted:
    """Read a configuration of another tool; nothing is written.

    Args:
        path: The file, YAML or JSON.
        name: What the run is called where the configuration names no folder.

    Raises:
        InputError: The file cannot be read, is of no known form, or trains on preferences.
    """
    file = expand(path)
    if not file.is_file():
        raise InputError(f"{path}: there is no such file; {_WANTED}")
    document = read_yaml(read_text(shown(file), file), shown(file))
    if document.faults:
        fault = document.faults[0]
        at = fault.origin.number if isinstance(fault.origin, Line) else 1
        raise InputError(f"{shown(file)}:{at}: {fault.message}")
    settings = document.value
    if not isinstance(settings, dict) or not settings:
        raise InputError(f"{shown(file)}: holds no mapping of keys; {_WANTED}")
    tool = _tool_of(settings, shown(file))
    target = Target()
    rules = RULES[tool]
    for key, value in settings.items():
        if rule := rules.get(key):
            rule(target, key, value)
        elif value is not None:
            target.leave(key, value, _UNKNOWN)
    if tool == "LLaMA-Factory":
        set_rows(target, settings, file.parent)
    target.content.setdefault("output_dir", f"runs/{name}")
    if "path" not in target.content.get("model", {}):
        raise InputError(f"{shown(file)}: names no base model, which a recipe needs")
    return Converted(tool, _text(tool, shown(file), target), target.taken, target.left)


def _tool_of(settings: Mapping[str, Any], name: str) -> str:
    kind = settings.get("peft_type")
    if kind is not None:
        if kind == "KPSVD":
            raise InputError(
                f"{name}: is of a KPSVD adapter, which is ours: to train it on, name its folder in "
                "adapter.from of a recipe"
            )
        if kind != "LORA":
            raise InputError(f"{name}: peft_type is {kind!r}; expected LORA")
        return "PEFT"
    tool = None
    if "base_model" in settings:
        tool = "axolotl"
    elif "model_name_or_path" in settings:
        if settings.keys() & {"finetuning_type", "stage", "cutoff_len", "lora_target", "template"}:
            tool = "LLaMA-Factory"
        elif settings.keys() & (TRL.keys() - {"model_name_or_path"}):
            tool = "trl"
    if tool is None:
        keys = some_of(list(map(str, settings)), 8)
        raise InputError(f"{name}: is of no known form: it holds the keys {keys}; {_WANTED}")
    for key, harmless in (("rl", ()), ("reward_model", (False,)), ("stage", ("sft", "pt"))):
        value = settings.get(key)
        if value is not None and value not in harmless:
            raise InputError(f"{name}: {key}: {value} {_PREFERENCES}")
    if tool == "trl" and "beta" in settings:
        raise InputError(f"{name}: beta: {settings['beta']} {_PREFERENCES}")
    return tool


def _text(tool: str, name: str, target: Target) -> str:
    lines = [
        MODELINE,
        f"# Purpose: what {name} of {tool} trains, with a KPSVD adapter.",
        "# Needs:   a look at the keys that were left out, at the end.",
        "# Command: kpsvd-tune train RECIPE",
        "",
        "extends: adapters/equal-ranks   # targets, rank and rate, where nothing else is said",
    ]
    order = list(Recipe.model_fields)
    for section in sorted(target.content, key=order.index):
        lines += ["", *_lines(section, target.content[section], (), target.taken)]
    if target.left:
        lines += ["", f"# Left out of {name}:"]
        for key, (value, meaning) in target.left.items():
            lines.append(f"#   {key}: {value}")
            lines.append(f"#     {meaning}")
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any, path: tuple[str, ...], taken: Mapping[str, str]) -> list[str]:
    place = (*path, key)
    indent = "  " * len(path)
    source = taken.get(".".join(place))
    if isinstance(value, dict) and value and source is None:
        inner = [line for name, each in value.items() for line in _lines(name, each, place, taken)]
        return [f"{indent}{key}:", *inner]
    text = f"{indent}{key}: {value_to_yaml(value)}"
    return [f"{text:<32}  # {source}" if source else text]
