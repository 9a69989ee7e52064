"""What lies at a path of this machine: a run, an adapter, a comparison, a model, rows.

Commands take paths of several kinds, and a user mixes them up; whoever refuses a path says what it
is, and what to do with it. A path that this user may not look at counts as one where nothing lies.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from kpsvd_tune.errors import InputError, closest

Kind = Literal[
    "recipe", "run", "comparison", "adapter", "merged", "model", "rows", "folder", "file", "special"
]
# What a message about the cache folder says that the user can choose.
CACHE_PLACE = "a cache folder by XDG_CACHE_HOME"
_ROWS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_WORDS: dict[Kind, str] = {
    "recipe": "a recipe",
    "run": "the folder of a run",
    "comparison": "the folder of a comparison",
    "adapter": "the folder of an adapter",
    "merged": "a merged model",
    "model": "a model",
    "rows": "a file of rows",
    "folder": "a folder",
    "file": "a file",
    "special": "a named pipe, socket or device",
}


def expand(path: str | os.PathLike[str]) -> Path:
    """Replace a leading ~; that of an unknown user stays, for nothing lies there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/kpsvd-tune``, by default ``~/.cache/kpsvd-tune``.

    InputError: the variable names the home of a user who is not there, or there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "kpsvd-tune"
    except RuntimeError as error:
        raise InputError(
            f"the cache folder {base} cannot be found: {error} Set XDG_CACHE_HOME to a folder that "
            "can be written"
        ) from error


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something lies there that this user may see."""
    # os.path answers for names with NUL, too long ones and forbidden folders, where Path raises.
    return os.path.exists(expand(path))


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """What lies at a path, links followed; None where there is nothing."""
    place = expand(path)
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(mode):
        return _folder_kind(place)
    if not stat.S_ISREG(mode):
        return "special"
    suffix = place.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return "recipe"
    if suffix in (".gguf", ".safetensors"):
        return "model"
    return "rows" if suffix in _ROWS else "file"


def inside(folder: str | os.PathLike[str], *kinds: Kind) -> list[Path]:
    """What of some kinds lies directly in a folder, by name; nothing where it cannot be read."""
    try:
        names = sorted(os.listdir(expand(folder)))
    except (OSError, ValueError):
        return []
    return [path for name in names if kind_of(path := Path(folder) / name) in kinds]


def named(kind: Kind) -> str:
    """The kind in words, as in "is the folder of a run"."""
    return _WORDS[kind]


def siblings(path: str | os.PathLike[str]) -> str:
    """What a message adds of a path where nothing lies: from where it was looked for, what is near.

    It begins with " (looked from ...)" for a relative path.
    """
    place = expand(path)
    looked = "" if place.is_absolute() else f" (looked from {_cwd()})"
    try:
        names = sorted(os.listdir(place.parent))
    except (OSError, ValueError):
        if os.path.isfile(place.parent):
            return f"{looked}; {place.parent} is a file"
        return f"{looked}; there is no folder {place.parent} either"
    # Compared without suffixes, whose letters would make test.jsonl look like train.jsonl.
    stems = {Path(name).stem: name for name in names}
    if near := closest(place.stem, stems):
        return f"{looked}; did you mean {place.with_name(stems[near])}?"
    return looked


def check_writable(folder: Path) -> None:
    """Find out before long work whether a folder can be made and written; InputError if not.

    Nothing is left behind.
    """
    place = folder.absolute()
    try:
        while not _lies_there(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder} cannot be written: {reason} ({place}); name another folder"
        ) from error


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder where a folder, a pipe or a device bears a name that is to be written."""
    for name in names:
        kind = kind_of(folder / name)
        if kind is not None and not os.path.isfile(folder / name):
            raise InputError(
                f"{folder / name} is {named(kind)}, and a file is to be written there; remove it, "
                "or name another folder"
            )


def _lies_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _folder_kind(folder: Path) -> Kind:
    def holds(*names: str) -> bool:
        return any(os.path.exists(folder / name) for name in names)

    if holds("compare.json", "comparison.json"):
        return "comparison"
    if holds("run.json", "init/rank_report.json", "checkpoints"):
        return "run"
    if holds("adapter_config.json"):
        return "adapter"
    if holds("config.json"):
        return "merged" if holds("merge_report.json") else "model"
    return "folder"


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "a folder that is gone"
