"""Whose a folder is: a run writes into its own or an empty one, and nothing else writes into a run.

What lies in a folder under the names of a run may be the user's: an adapter from elsewhere, the
recipe that is being read. Nothing of it is replaced on the word of a name alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from kpsvd_tune.errors import InputError

# How many names a message lists.
_MOST_NAMES = 5


def is_run(folder: Path) -> bool:
    """Whether a folder holds the record of a run of ours."""
    try:
        record = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("identity"), dict)


def refuse_foreign(folder: Path, ours: Collection[str], key: str = "output_dir") -> None:
    """Refuse a folder that holds anything but hidden files and what `ours` names.

    Args:
        folder: May be missing.
        ours: Names of entries that may be there.
        key: The option or recipe key that names the folder.

    Raises:
        InputError: Names what is there; or a file is in the way.
    """
    if folder.is_dir():
        found = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    elif folder.exists() or folder.is_symlink():
        raise InputError(f"{key}: {folder} is a file; expected a folder, or a name that is free")
    else:
        return
    foreign = [name for name in found if name not in ours]
    if not foreign:
        return
    listed = ", ".join(foreign[:_MOST_NAMES])
    more = len(foreign) - _MOST_NAMES
    listed += f" and {more} more" if more > 0 else ""
    raise InputError(
        f"{key}: {folder} holds {listed}, which nothing of kpsvd-tune wrote there, and which would "
        f"be replaced or mixed with; choose an empty folder or a new one, such as "
        f"{folder / 'new'}"
    )


def refuse_inside_run(folder: Path, key: str) -> None:
    """Refuse a folder that is that of a run, or lies in one.

    Args:
        folder: May be missing.
        key: The option or recipe key that names the folder.

    Raises:
        InputError: Names the run.
    """
    place = folder.resolve()
    for each in (place, *place.parents):
        if is_run(each):
            where = "is the folder of a run" if each == place else f"lies in the run {each}"
            raise InputError(
                f"{key}: {folder} {where}, into which only that run writes; name a folder outside"
            )
