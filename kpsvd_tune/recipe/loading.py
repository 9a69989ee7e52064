"""A recipe file and overrides in, a checked `Recipe` out; and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import yaml

from kpsvd_tune.errors import RecipeError, did_you_mean
from kpsvd_tune.recipe.checking import MAX_FAULTS, check, written_path
from kpsvd_tune.recipe.evaluation import EvaluationRecipe
from kpsvd_tune.recipe.paths import path_faults
from kpsvd_tune.recipe.reading import MAX_BYTES, Document, Fault, apply_override, read_yaml
from kpsvd_tune.recipe.schema import Recipe, TrainRecipe
from kpsvd_tune.recipe.values import show
from kpsvd_tune.storage.paths import Kind, expand, kind_of, named

_PACKAGE = FilePath(__file__).parents[1]
# Endings of files that go into a recipe and are none.
_ROWS = "a file of rows in dataset.path"
_NO_RECIPES = {
    ".jsonl": _ROWS,
    ".csv": _ROWS,
    ".parquet": _ROWS,
    ".gguf": "a model in model.path",
    ".safetensors": "the folder of a model in model.path",
    ".py": "all that a script would set",
}


def shipped_recipes() -> dict[str, FilePath]:
    """Find the recipes that come with the package.

    Returns:
        Their files by name: the path below the recipes folder without `.yaml`, in order of name.
    """
    # A wheel carries them inside the package; a checkout has them beside it, next to pyproject.
    folder = _PACKAGE / "recipes"
    if not folder.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        folder = _PACKAGE.parent / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


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
            such file.
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
    name, text = _read_text(path)
    document = read_yaml(text)
    if not isinstance(document.value, dict):
        got = "nothing" if document.value is None else show(document.value)
        message = f"got {got}; expected a mapping with the keys model, dataset, adapter, ..."
        document.faults = document.faults or [Fault(document.origins.get(()), (), message)]
        raise RecipeError(_render(name, document))
    for override in overrides:
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
    for override in overrides:
        apply_override(document, f"evaluation.0.{override}")
    recipe = check(document)
    _look_up(document, ("evaluation",))
    if recipe is None or document.faults:
        lines = []
        for origin, path, message in document.faults:
            # An option's name is that of its key.
            is_option = isinstance(origin, str) and origin.startswith("--")
            key = origin if is_option else written_path(path[2:])
            if not key and isinstance(origin, str):
                key = origin.removeprefix("evaluation.0.")
            lines.append(f"{key}: {' '.join(message.split())}")
        raise RecipeError("\n".join(lines))
    return recipe.evaluation[0]


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


def _read_text(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The name to use in messages, and the text of the file."""
    file = expand(path)
    shipped = shipped_recipes()
    if not os.path.isfile(file) and (name := os.fspath(path).removesuffix(".yaml")) in shipped:
        file = shipped[name]
    if kind := kind_of(file):
        if not os.path.isfile(file):
            raise RecipeError(f"{_shown(file)}: {_not_a_recipe(file, kind)}")
    else:
        beside = [each.name for each in file.parent.glob("*.y*ml")]
        near = did_you_mean(file.name, beside) or did_you_mean(file.stem, shipped)
        raise RecipeError(
            f"{_shown(file)}: not found; expected a recipe file, or one of the shipped recipes "
            f"{', '.join(shipped)}{near}"
        )
    if use := next((use for end, use in _NO_RECIPES.items() if end in file.suffixes), None):
        raise RecipeError(
            f"{_shown(file)}: is no recipe; expected a YAML file, which names {use}; "
            "to begin with one: kpsvd-tune recipes copy quickstart my.yaml"
        )
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{_shown(file)}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{_shown(file)}: larger than 1 MiB, the limit for a recipe")
    try:
        return _shown(file), content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{_shown(file)}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None


def _not_a_recipe(file: FilePath, kind: Kind) -> str:
    """What is wrong with a folder or a special file that was given as a recipe."""
    model = ", which names it in model.path"
    advice = {
        "run": f"; that of the run is {_shown(file / 'recipe.yaml')}",
        "comparison": f": the one it was made with; to see it: kpsvd-tune report {_shown(file)}",
        "model": model,
        "merged": model,
        "adapter": "; to train on from an adapter, name it in adapter.from",
    }.get(kind, f"; shipped recipes: {', '.join(shipped_recipes())}")
    return f"is {named(kind)}; expected a recipe file{advice}"


def _shown(file: FilePath) -> str:
    """The file as the user would name it: relative where it lies below the current folder."""
    text = os.fspath(file)
    if file.is_absolute() and file.is_relative_to(FilePath.cwd()):
        text = os.fspath(file.relative_to(FilePath.cwd()))
    return text if text.isprintable() else repr(text)


def _render(name: str, document: Document) -> str:
    """One line for each fault: those of the file by line, then those of the overrides."""
    lines = []
    faults = sorted(document.faults, key=_order)
    for origin, path, message in faults[:MAX_FAULTS]:
        place = f"{name}:{origin}" if isinstance(origin, int) else name
        if isinstance(origin, str):
            place = f"override {_shorten(origin)}"
        key = f"{written_path(path)}: " if path else ""
        lines.append(f"{place}: {key}{' '.join(message.split())}")
    if hidden := document.num_unlisted + len(faults) - len(lines):
        lines.append(f"{name}: and {hidden} more faults; is this a recipe?")
    return "\n".join(lines)


def _order(fault: Fault) -> tuple[bool, int]:
    return isinstance(fault.origin, str), fault.origin if isinstance(fault.origin, int) else 0


def _shorten(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else text[:77] + "..."
