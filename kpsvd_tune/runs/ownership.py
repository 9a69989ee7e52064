"""Whose a folder is: a run writes into its own or an empty one, and nothing else writes into a run.

What lies in a folder under the names of a run may be the user's: an adapter from elsewhere, the
recipe that is being read. Nothing of it is replaced on the word of a name alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import CheckpointError, InputError, some_of
from kpsvd_tune.storage.json_files import read_json

# What other commands leave: a file, a key in it, and what a folder with it is.
_MARKS = (
    ("compare.json", "shared", "the folder of a comparison"),
    ("merge_report.json", "max_logit_difference", "a merged model"),
    ("adapter_config.json", "factor_shape", "the folder of an adapter"),
    ("init/rank_report.json", "layers", "a folder that `init-only` wrote"),
    ("results.json", "conditions", "a folder that `eval` wrote"),
)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the record of a run of ours."""
    return isinstance(_content(folder / "run.json").get("identity"), dict)


def _content(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def refuse_foreign(folder: Path, ours: Collection[str], key: str = "output_dir") -> None:
    """Refuse a folder that holds anything but hidden files and what `ours` names.

    It may be missing. `key` is the option or recipe key that names it. InputError: something else
    is there.
    """
    if folder.is_dir():
        found = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    elif folder.is_symlink() and not folder.exists():
        raise InputError(
            f"{key}: {folder} is a link to {os.readlink(folder)}, where nothing lies; make that "
            "folder, or name another"
        )
    elif folder.exists():
        raise InputError(f"{key}: {folder} is a file; expected a folder, or a name that is free")
    else:
        return
    foreign = [name for name in found if name not in ours]
    if not foreign:
        return
    for mark, entry, what in _MARKS:
        if mark.partition("/")[0] in foreign and entry in _content(folder / mark):
            raise InputError(
                f"{key}: {folder} is {what}, and nothing else is written into it; choose an empty "
                f"folder or a new one, such as {folder}-new"
            )
    raise InputError(
        f"{key}: {folder} holds {some_of(foreign, 5)}, which nothing of kpsvd-tune wrote there, "
        "and which would be replaced or mixed with; choose an empty folder or a new one, such as "
        f"{folder / 'new'}"
    )


def refuse_inside_run(folder: Path, key: str) -> None:
    """Refuse a folder that is that of a run, or lies in one; InputError names the run.

    The folder may be missing; `key` is the option or recipe key that names it.
    """
    place = Path(os.path.realpath(folder))
    for each in (place, *place.parents):
        if is_run(each):
            where = "is the folder of a run" if each == place else f"lies in the run {each}"
            raise InputError(
                f"{key}: {folder} {where}, into which only that run writes; name a folder outside"
            )
