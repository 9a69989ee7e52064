"""What shipped recipes and parts say of themselves in their opening comment, and their sizes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.recipe.files import shipped_folder, shipped_parts

_FIELD = re.compile(r"# ([A-Z]\w+): +(.*)")
_MORE = re.compile(r"# {3,}(\S.*)")
COMBINATIONS = "combinations.json"


@dataclass(frozen=True)
class Combination:
    """A model, a task and a machine that go together, and what `plan` says of them."""

    name: str  # of the three parts, joined by +
    parameters: int  # of the base model
    trained: int  # parameters of the adapter
    memory_bytes: int  # the most that one device, or a machine without one, holds at once

    @property
    def parts(self) -> tuple[str, str, str]:
        """The model, the task and the machine, without their folders."""
        model, task, machine = (each.partition("/")[2] for each in self.name.split("+"))
        return model, task, machine

    @property
    def options(self) -> str:
        """What the command `train` is given besides."""
        heads = (head_of(shipped_parts()[each]) for each in self.name.split("+"))
        return " ".join(head["Options"] for head in heads if "Options" in head)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        model, task, machine = self.parts
        return {
            "model": model,
            "task": task,
            "machine": machine,
            "parameters": self.parameters,
            "trained": self.trained,
            "memory_bytes": self.memory_bytes,
            "options": self.options,
        }


def head_of(file: Path) -> dict[str, str]:
    """The fields of a recipe's opening comment, such as Purpose and Needs, each on one line."""
    found: dict[str, str] = {}
    field = None
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if match := _FIELD.fullmatch(line):
            field = match[1]
            # A second command, say, stands for itself.
            found.setdefault(field, match[2].strip())
        elif (match := _MORE.fullmatch(line)) and field:
            found[field] += f" {match[1].strip()}"
        else:
            field = None
    return found


def candidates() -> Iterator[str]:
    """Every model with every task that it can do and every machine, even too small ones."""
    parts = shipped_parts()
    kinds = [
        [name for name in parts if name.startswith(f"{folder}/")]
        for folder in ("models", "tasks", "machines")
    ]
    for model, task, machine in itertools.product(*kinds):
        left_out = head_of(parts[model]).get("Tasks", "").removeprefix("all but ").split(", ")
        if task.partition("/")[2] not in left_out:
            yield f"{model}+{task}+{machine}"


def combinations() -> list[Combination]:
    """The shipped combinations: those that fit their machine by `plan`."""
    file = shipped_folder() / COMBINATIONS
    if not file.is_file():
        return []
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    fields = ("parameters", "trained", "memory_bytes")
    return [Combination(name, *(sizes[field] for field in fields)) for name, sizes in found.items()]
