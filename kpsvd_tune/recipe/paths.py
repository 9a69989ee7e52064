"""Do the local paths of a recipe exist, and is there what the key expects? Hub ids are left alone.

Looked up without torch and without the network, on the document as written, so that a missing file
is told together with every other fault and with its line.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path as FilePath
from typing import Any

from kpsvd_tune.errors import InputError, some_of
from kpsvd_tune.offline import hub_problem
from kpsvd_tune.recipe.dataset import chat_template_problem
from kpsvd_tune.recipe.reading import Document, Fault, Path
from kpsvd_tune.storage.paths import exists, expand, inside, kind_of, named, siblings

# The sections that `validate` looks at; a command passes those that it uses.
SECTIONS = ("model", "dataset", "adapter", "restrain", "evaluation", "compare")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE = re.compile(r"\.(jsonl|json|csv|parquet|arrow|txt|md|gguf|safetensors|gz|zst)", re.I)


def path_faults(document: Document, sections: Collection[str] = SECTIONS) -> list[Fault]:
    """Faults of the local paths in some top-level sections, with no origin yet."""
    faults = []
    for path, text, section in _texts(document.value, (), {}):
        keys = tuple(step for step in path if isinstance(step, str))
        problem_of = _PROBLEMS.get(keys)
        # A blank is another fault.
        if problem_of is None or path[0] not in sections or not text.strip() or "\0" in text:
            continue
        if keys == ("evaluation", "path") and section.get("task") == "forgetting":
            problem_of = text_problem
        if problem := problem_of(text):
            faults.append(Fault(None, path, problem))
    return faults


def _texts(value: object, path: Path, section: Any) -> Iterator[tuple[Path, str, Any]]:
    """Every text of a document, with its place and the mapping that it stands in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*path, key), value)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index), section)
    elif isinstance(value, str):
        yield path, value, section


def looks_local(path: str) -> bool:
    """Whether a path can be no hub id, or lies here, or would lie in a folder that is here."""
    if "://" in path or path.startswith("package:"):
        return False
    is_file_name = _FILE.fullmatch(FilePath(path).suffix) is not None
    is_id = _HUB_ID.fullmatch(path) is not None
    return is_file_name or not is_id or exists(path) or _in_folder_here(path)


def _in_folder_here(path: str) -> bool:
    """Whether OWNER/NAME is more likely a slip in a path: OWNER is a folder here.

    The hub is not asked for such a name, unless it is in the hub's cache.
    """
    owner, slash, _ = path.partition("/")
    return bool(slash) and os.path.isdir(owner) and not _is_cached(path, "models", "datasets")


def _is_cached(path: str, *kinds: str) -> bool:
    """Whether the hub's cache holds something of an id."""
    from huggingface_hub.constants import HF_HUB_CACHE

    names = ("--".join((kind, *path.split("/"))) for kind in kinds)
    return any(os.path.isdir(os.path.join(HF_HUB_CACHE, name)) for name in names)


def not_here(path: str, what: str) -> str:
    """What a message says of a path where nothing lies; `what` was expected there."""
    text = f"there is no {what} {path}{siblings(path)}"
    if _HUB_ID.fullmatch(path) and _FILE.fullmatch(FilePath(path).suffix) is None:
        owner = path.partition("/")[0]
        text += (
            f"; the hub is not asked for it, because there is a folder {owner} here (if that name "
            f"is meant on the hub, fetch it first: hf download {path}, for rows with "
            "--repo-type dataset)"
        )
    return text


def model_problem(path: str) -> str | None:
    """What is wrong with a path that names a base model; None for a hub id or a model."""
    if not looks_local(path):
        return None
    kind = kind_of(path)
    if kind is None:
        return not_here(path, "folder or file")
    if kind in ("run", "adapter"):
        return (
            f"{path} is {named(kind)}, not a model; to train on from its adapter, name it in "
            "adapter.from and its base model here; to use it as a model, merge it first: "
            f"kpsvd-tune merge {shlex.quote(path)} --output FOLDER"
        )
    is_gguf = path.lower().endswith(".gguf")
    if kind in ("merged", "model") and (os.path.isdir(expand(path)) or is_gguf):
        return None
    parent = FilePath(path).parent
    if os.path.isfile(expand(path)) and kind_of(parent) in ("merged", "model"):
        return f"{path} is a file of a model; name its folder, {parent}"
    return (
        f"{path} is {named(kind)}; expected a folder with config.json and weights, or a .gguf file"
    )


def rows_problem(path: str) -> str | None:
    """What is wrong with a path that names rows; None for a hub id, a file or a folder of rows."""
    if not looks_local(path):
        return None
    kind = kind_of(path)
    if kind is None:
        if glob.has_magic(path):
            found = glob.glob(os.fspath(expand(path)), recursive=True)
            return None if found else f"no file matches {path}{siblings(path)}"
        # `datasets` writes a part of a file as path[:100]; whoever reads it knows.
        return not_here(path, "file")
    if kind in ("rows", "file", "folder"):
        return None
    return f"{path} is {named(kind)}; expected rows: a .jsonl, .json, .csv or .parquet file"


def text_problem(path: str) -> str | None:
    """What is wrong with a path that must be a text file."""
    kind = kind_of(path)
    if kind is None:
        return f"there is no file {path}{siblings(path)}"
    return None if os.path.isfile(expand(path)) else f"{path} is {named(kind)}; expected a file"


def adapter_problem(path: str) -> str | None:
    """What is wrong with a path that must hold a trained adapter."""
    kind = kind_of(path)
    if kind is None:
        return f"there is no folder {path}{siblings(path)}"
    if kind == "run" and not exists(FilePath(path) / "adapter" / "adapter_config.json"):
        return f"the run in {path} has no finished adapter; train it to its end first"
    if kind in ("run", "adapter"):
        return None
    cure = "expected a finished run, or a folder with adapter_config.json"
    if kind in ("merged", "model"):
        cure = "to train a new adapter on it, name it in model.path and leave this key out"
    elif kind == "comparison":
        cure = f"name one of its trials: {path}/trials/..."
    return f"{path} is {named(kind)}; {cure}"


def _held_out_problem(value: str) -> str | None:
    """What is wrong with held-out rows; None for a share or a number of rows."""
    return None if re.fullmatch(r"[\d.eE+-]+", value) else rows_problem(value)


def check_source(source: str, base: str | None = None) -> None:
    """Refuse what can be neither a run nor an adapter nor a model, before any library is loaded.

    `base` is where the base of an adapter lies, where that was typed.

    Raises:
        InputError: Says what lies there, or that nothing does.
    """
    if base and (problem := model_problem(base)):
        raise InputError(f"--base: {problem}")
    kind = kind_of(source)
    if kind is None and looks_local(source):
        raise InputError(not_here(source, "run, adapter or model"))
    if kind == "comparison":
        raise InputError(
            f"{source} is {named(kind)}: to see it, kpsvd-tune report {shlex.quote(source)}; to "
            f"use one of its trials, name that: {source}/trials/..."
        )
    if kind == "recipe":
        raise InputError(f"{source} is {named(kind)}; expected the run it made: its output_dir")
    if kind in ("rows", "file", "special"):
        raise InputError(f"{source} is {named(kind)}; expected a run, an adapter or a model")
    if kind == "folder" and (found := inside(source, "run", "adapter")):
        names = some_of([str(each) for each in found], 5)
        raise InputError(f"{source} is a folder with {names} in it: name one of them")


def check_reachable(source: str, base: str | None = None) -> None:
    """Refuse ids that only the hub could have, where it cannot be asked (InputError).

    `source` and `base` as for :func:`check_source`; for them torch need not be imported first.
    """
    for option, each in (("", source), ("--base ", base)):
        is_on_hub = each and not looks_local(each) and _HUB_ID.fullmatch(each)
        if each and is_on_hub and not _is_cached(each, "models") and (problem := hub_problem()):
            raise InputError(
                f"{option}{each}: there is no such folder here, nothing of it is in the local hub "
                f"cache, and the hub cannot be asked: {problem}; run once with a connection and "
                f"without --offline, or give the path of a folder{siblings(each)}"
            )


# The keys that hold paths, without the places in lists.
_PROBLEMS: dict[tuple[str, ...], Callable[[str], str | None]] = {
    ("model", "path"): model_problem,
    ("dataset", "path"): rows_problem,
    ("dataset", "path", "path"): rows_problem,
    ("dataset", "chat_template"): chat_template_problem,
    ("dataset", "validation"): _held_out_problem,
    ("adapter", "from"): adapter_problem,
    ("evaluation", "path"): rows_problem,
    ("evaluation", "shots_path"): rows_problem,
    ("evaluation", "json_schema"): text_problem,
    ("restrain", "text"): text_problem,
    ("compare", "test"): rows_problem,
    ("compare", "forgetting"): text_problem,
}
