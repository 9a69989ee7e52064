"""A recipe file and overrides in, a checked `Recipe` out; and back to YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe.checking import MAX_FAULTS, check, written_path
from kpsvd_tune.recipe.evaluation import EvaluationRecipe
from kpsvd_tune.recipe.extending import EXAMPLE, read_extended
from kpsvd_tune.recipe.paths import path_faults
from kpsvd_tune.recipe.reading import Document, Fault, Line, apply_override
from kpsvd_tune.recipe.schema import Recipe, TrainRecipe
from kpsvd_tune.recipe.split_words import unsplit
from kpsvd_tune.recipe.values import show

_TYPED_PARTS = (
    "stands in a recipe's file and not on the command line; to join parts there: "
    f"kpsvd-tune validate {EXAMPLE}"
)


def load_recipe(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    look_up: Collection[str] = (),
    of_run: bool = False,
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file of at most a mebibyte, or the name of a shipped recipe where there is no
            such file; parts joined by +, such as models/a+tasks/b, are one recipe.
        overrides: `key=value` each, a dotted path and a YAML value; later ones win.
        look_up: Top-level keys whose local paths must exist, of
            :data:`~kpsvd_tune.recipe.paths.SECTIONS`; a path that is missing or holds something
            else is a fault like any other.
        of_run: The file is what a run wrote down, possibly an earlier version's: it is read to
            know the run and not to train, so keys without an effect may stand in it.

    Returns:
        The recipe with its defaults filled in, frozen.

    Raises:
        RecipeError: With one line for every fault in the file and the overrides.
    """
    name, document = read_extended(path)
    if not isinstance(document.value, dict):
        got = "nothing" if document.value is None else show(document.value)
        message = f"got {got}; expected a mapping with the keys model, dataset, adapter, ..."
        document.faults = document.faults or [Fault(document.origins.get(()), (), message)]
        raise RecipeError(_render(name, document))
    for override, fault in unsplit(overrides):
        if re.match(r"\s*extends\s*[.=\[]", override):
            document.faults.append(Fault(override, ("extends",), _TYPED_PARTS))
        elif fault is not None:
            document.faults.append(Fault(override, (), fault))
        else:
            apply_override(document, override)
    recipe = check(document, of_run=of_run)
    _look_up(document, look_up)
    if recipe is None or document.faults:
        raise RecipeError(_render(name, document))
    return recipe


def evaluation_section(
    keys: Mapping[str, Any], options: Mapping[str, Any], overrides: Sequence[str] = ()
) -> EvaluationRecipe:
    """Read and check one section of `evaluation` that stands alone, as the command `eval` has it.

    Args:
        keys: What holds where nothing else is said.
        options: Key to the value of the command line's option of that name.
        overrides: `key=value` each, as for a recipe but with the section's own keys.

    Raises:
        RecipeError: With one line for every fault, each with the words of the command line.
    """
    section = {**keys, **options}
    # A whole recipe around it, so that it is checked and faults are told as everywhere else.
    document = Document({"model": {"path": "-"}, "output_dir": "-", "evaluation": [section]})
    place = ("evaluation", 0)
    document.origins |= {(*place, key): f"--{key.replace('_', '-')}" for key in options}
    for override, fault in unsplit(overrides):
        if fault is not None:
            document.faults.append(Fault(override, (), fault))
        else:
            apply_override(document, override, "evaluation.0.")
    recipe = check(document)
    _look_up(document, ("evaluation",))
    if recipe is None or document.faults:
        lines = []
        for origin, path, message in document.faults:
            # An option's name is that of its key.
            is_option = isinstance(origin, str) and origin.startswith("--")
            key = origin if is_option else written_path(path[2:])
            if not key and isinstance(origin, str):
                key = origin
            lines.append(f"{key}: {' '.join(message.split())}")
        raise RecipeError("\n".join(lines))
    found = recipe.evaluation[0]
    found.stands_at("--")
    return found


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe; `load_recipe` of the text gives an equal recipe.

    But for `train.epochs` that `max_steps` on the command line made void, which is left out.
    """
    content = recipe.model_dump(mode="json")
    default = TrainRecipe.model_fields["epochs"].default
    if recipe.train.max_steps is not None and recipe.train.epochs != default:
        del content["train"]["epochs"]
    return yaml.dump(
        content,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=2**20,
    )


def value_to_yaml(value: Any) -> str:
    """A value as a recipe holds it, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=2**20)
    return text.removesuffix("...\n").strip()


def _look_up(document: Document, sections: Collection[str]) -> None:
    """Add the faults of local paths, before others of the same line: those may follow from them."""
    broken = {fault.path for fault in document.faults}
    found = [
        Fault(document.origin_of(fault.path), fault.path, fault.message)
        for fault in path_faults(document, sections)
        # What an adapter decides is a conflict of this key with others, and true beside it.
        if fault.path not in broken or fault.path == ("adapter", "from")
    ]
    document.faults[:0] = found


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # Reading refuses them.


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Double quotes keep a template on one line, with its line breaks as \n; they are also the one
    # style in which PyYAML reads back every control character that it writes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _render(name: str, document: Document) -> str:
    """One line for each fault: those of the file by line, then those of the overrides."""
    lines = []
    origins = [fault.origin for fault in document.faults]
    files = [name, *(each.file for each in origins if isinstance(each, Line))]
    faults = sorted(document.faults, key=lambda fault: _order(fault, files))
    for origin, path, message in faults[:MAX_FAULTS]:
        place = f"{origin.file}:{origin.number}" if isinstance(origin, Line) else name
        if isinstance(origin, str):
            place = f"override {_shorten(origin)}"
        key = f"{written_path(path)}: " if path else ""
        lines.append(f"{place}: {key}{' '.join(message.split())}")
    if hidden := document.num_unlisted + len(faults) - len(lines):
        lines.append(f"{name}: and {hidden} more faults; is this a recipe?")
    return "\n".join(lines)


def _order(fault: Fault, files: Sequence[str]) -> tuple[bool, int, int]:
    """Faults of the files in the order of their names there, and last those of overrides."""
    origin = fault.origin
    if not isinstance(origin, Line):
        return isinstance(origin, str), 0, 0
    return False, files.index(origin.file), origin.number


def _shorten(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else text[:77] + "..."
