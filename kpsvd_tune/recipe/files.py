"""Where recipes lie: files of the user, and those that come with the package."""

from __future__ import annotations

import os
import shlex
from pathlib import Path as FilePath

from kpsvd_tune.errors import RecipeError, did_you_mean
from kpsvd_tune.recipe.reading import MAX_BYTES
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


# Folders of parts: a recipe is made of one of each by `extends`, and none of them is a whole one.
PART_FOLDERS = ("models", "tasks", "machines", "adapters")


def shipped_files() -> dict[str, FilePath]:
    """Find the recipes and parts of recipes that come with the package.

    Returns:
        Their files by name: the path below the recipes folder without `.yaml`, in order of name.
    """
    # A wheel carries them inside the package; a checkout has them beside it, next to pyproject.
    folder = shipped_folder()
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def shipped_folder() -> FilePath:
    """The folder of what comes with the package; it may not be there."""
    folder = _PACKAGE / "recipes"
    if not folder.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        folder = _PACKAGE.parent / "recipes"
    return folder


def shipped_recipes() -> dict[str, FilePath]:
    """The whole recipes among :func:`shipped_files`."""
    return {name: file for name, file in shipped_files().items() if not is_part(name)}


def shipped_parts() -> dict[str, FilePath]:
    """The parts among :func:`shipped_files`."""
    return {name: file for name, file in shipped_files().items() if is_part(name)}


def is_part(name: str) -> bool:
    """Whether a shipped file of that name is a part."""
    return name.partition("/")[0] in PART_FOLDERS and "/" in name


def locate(path: str | os.PathLike[str], folder: FilePath | None = None) -> tuple[str, FilePath]:
    """Find a recipe or part by its path, from ``folder`` (default: here), or by a shipped name.

    Returns:
        What to call it, a shipped part by its name, and its file, which is a regular one.

    Raises:
        RecipeError: Nothing is there, or something else.
    """
    file = expand(path)
    if folder is not None and not file.is_absolute():
        file = FilePath(os.path.normpath(folder / file))
    shipped = shipped_files()
    name = os.fspath(path).removesuffix(".yaml")
    if not os.path.isfile(file) and name in shipped:
        return name if is_part(name) else shown(shipped[name]), shipped[name]
    if kind := kind_of(file):
        if not os.path.isfile(file):
            raise RecipeError(f"{shown(file)}: {_not_a_recipe(file, kind)}")
    else:
        raise RecipeError(f"{shown(file)}: {_not_found(file, name, wants_part=folder is not None)}")
    if use := next((use for end, use in _NO_RECIPES.items() if end in file.suffixes), None):
        raise RecipeError(
            f"{shown(file)}: is no recipe; expected a YAML file, which names {use}; "
            "to begin with one: kpsvd-tune recipes copy quickstart my.yaml"
        )
    return shown(file), file


def read_text(name: str, file: FilePath) -> str:
    """The text of a recipe; ``name`` is what messages call it.

    Raises:
        RecipeError: It cannot be read, is too large, or is not UTF-8.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than 1 MiB, the limit for a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None


def _not_found(file: FilePath, name: str, *, wants_part: bool) -> str:
    beside = [each.name for each in file.parent.glob("*.y*ml")]
    shipped = shipped_parts() if wants_part else shipped_recipes()
    known = [*shipped, *shipped_parts()]
    near = did_you_mean(file.name, beside) or did_you_mean(name, known)
    near = near or did_you_mean(file.stem, known)
    kind = "parts" if wants_part else "recipes"
    return (
        f"not found; expected a recipe file, or one of the shipped {kind} "
        f"{', '.join(shipped)}{near}"
    )


def _not_a_recipe(file: FilePath, kind: Kind) -> str:
    """What is wrong with a folder or a special file that was given as a recipe."""
    model, report = ", which names it in model.path", shlex.quote(shown(file))
    advice = {
        "run": f"; that of the run is {shown(file / 'recipe.yaml')}",
        "comparison": f": the one it was made with; to see it: kpsvd-tune report {report}",
        "model": model,
        "merged": model,
        "adapter": "; to train on from an adapter, name it in adapter.from",
    }.get(kind, f"; shipped recipes: {', '.join(shipped_recipes())}")
    return f"is {named(kind)}; expected a recipe file{advice}"


def shown(file: FilePath) -> str:
    """The file as the user would name it: relative where it lies below the current folder."""
    text = os.fspath(file)
    if file.is_absolute() and file.is_relative_to(FilePath.cwd()):
        text = os.fspath(file.relative_to(FilePath.cwd()))
    return text if text.isprintable() else repr(text)
