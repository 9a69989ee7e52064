"""A configuration of another tool in, the text of a recipe and what was left out of it out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError, some_of
from kpsvd_tune.recipe.convert.axolotl import AXOLOTL
from kpsvd_tune.recipe.convert.keys import NOTHING, Rules, Target
from kpsvd_tune.recipe.convert.llama_factory import LLAMA_FACTORY, set_rows
from kpsvd_tune.recipe.convert.peft import PEFT
from kpsvd_tune.recipe.convert.trl import TRL
from kpsvd_tune.recipe.files import read_text, shown
from kpsvd_tune.recipe.loading import value_to_yaml
from kpsvd_tune.recipe.reading import Line, read_yaml
from kpsvd_tune.recipe.reference import MODELINE
from kpsvd_tune.recipe.schema import Recipe
from kpsvd_tune.storage.paths import expand, kind_of, named, siblings

RULES: Mapping[str, Rules] = {
    "axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "trl": TRL,
    "PEFT": PEFT,
}
# What the tools do where a key is left out, as far as it decides which rows, tokens and steps are
# learnt and is not what our keys do: our key -> theirs, and its default.
_DEFAULTS: Mapping[str, Mapping[str, tuple[str, Any]]] = {
    "axolotl": {
        "dataset.max_length": ("sequence_len", 512),
        "dataset.too_long": ("excess_length_strategy", "drop"),
        "train.batch_size": ("micro_batch_size", 1),
    },
    "LLaMA-Factory": {
        "dataset.max_length": ("cutoff_len", 2048),
        "train.batch_size": ("per_device_train_batch_size", 8),
        "train.epochs": ("num_train_epochs", 3.0),
    },
    "trl": {
        "dataset.max_length": ("max_length", 1024),
        "train.batch_size": ("per_device_train_batch_size", 8),
        "train.epochs": ("num_train_epochs", 3.0),
    },
    "PEFT": {},
}
# Keys that ask for held-out rows; without any of them nothing is held out there.
_LOOKS = (
    *("test_datasets", "eval_dataset", "eval_strategy", "evals_per_epoch", "do_eval"),
    *("early_stopping_patience", "load_best_model_at_end"),
)
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
    if not os.path.isfile(file):
        raise InputError(f"{path}: {_no_file(file)}")
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
    _set_defaults(target, settings, tool)
    target.content.setdefault("output_dir", f"runs/{name}")
    if "path" not in target.content.get("model", {}):
        raise InputError(f"{shown(file)}: names no base model, which a recipe needs")
    return Converted(tool, _text(tool, shown(file), target), target.taken, target.left)


def _set_defaults(target: Target, settings: Mapping[str, Any], tool: str) -> None:
    """Set what the tool does where its configuration says nothing, and ours would do otherwise."""
    has_rows = target.has("dataset.path")
    for key, (theirs, value) in _DEFAULTS[tool].items():
        is_told = theirs in target.left or (key == "train.epochs" and target.has("train.max_steps"))
        if not target.has(key) and not is_told and (has_rows or key.startswith("train.")):
            target.set(key, value, f"{theirs}, by default")
    if has_rows and not target.has("dataset.validation"):
        if all(settings.get(key) in NOTHING for key in _LOOKS):
            target.set("dataset.validation", 0, "nothing is held out there")
        else:
            target.leave(
                "held-out rows",
                None,
                "2 % of the rows are held out here: set dataset.validation to a file or a share",
            )
    is_full = tool == "axolotl" and target.content.get("train", {}).get("precision") == "no"
    if is_full and not target.has("model.dtype"):
        target.set("model.dtype", "float32", "neither bf16 nor fp16")


def _no_file(place: Path) -> str:
    """What is wrong with a path that is no file, and which files there could be meant."""
    kind = kind_of(place)
    if kind is None:
        return f"there is no such file{siblings(place)}; {_WANTED}"
    if not os.path.isdir(place):
        return f"is {named(kind)}, and convert reads one file; {_WANTED}"
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        return f"is a folder that cannot be read: {error.strerror}; name one file; {_WANTED}"
    suits = [each for each in names if each.lower().endswith((".yaml", ".yml"))]
    suits = [each for each in names if each == "adapter_config.json"] or suits
    if not suits:
        return f"is {named(kind)}, with no such file in it; {_WANTED}"
    command = f"kpsvd-tune recipes convert {shlex.quote(str(place / suits[0]))}"
    held = "" if len(suits) == 1 else f", which holds {some_of(suits)}"
    return f"is {named(kind)}{held}; expected one file: {command}"


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
    if tool is None and settings.keys() <= Recipe.model_fields.keys() | {"extends"}:
        raise InputError(
            f"{name}: is a recipe of kpsvd-tune, so there is nothing to convert; next: kpsvd-tune "
            f"validate {shlex.quote(name)}"
        )
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
