"""Puts what a disk refuses into words: what was tried, why it failed, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from kpsvd_tune.errors import KpsvdTuneError, ResourceError
from kpsvd_tune.units import size

_CURES = {
    errno.ENOSPC: "free some space, or choose {place} on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another {place}",
    errno.EROFS: "the file system is read-only; choose {place} that can be written",
    errno.EACCES: "choose {place} that this user may write",
    errno.EPERM: "choose {place} that this user may write",
    errno.ENOENT: "the folder vanished; was {bare} moved, deleted or unmounted?",
    errno.EEXIST: "a file is in the way; remove it, or choose another {place}",
    errno.ENOTEMPTY: "something was put there meanwhile; remove it, or choose another {place}",
    errno.ENOTDIR: "a file is in the way; remove it, or choose another {place}",
    errno.EFBIG: "the file is larger than a limit allows; see `ulimit -f`, or choose another disk",
}
_place: ContextVar[str] = ContextVar("place", default="an output_dir")
# Libraries in Rust (safetensors, tokenizers) keep the system's number only in their text.
_RUST = re.compile(r"os error (\d+)")


@contextlib.contextmanager
def explained(attempt: str, place: str | None = None) -> Iterator[None]:
    """Turn what a disk refuses inside into a ResourceError: why it failed, and what to do.

    Args:
        attempt: What is tried, as in "could not write FILE".
        place: What the user can choose instead: the key or option that names the folder. Inside
            another one it is the other's by default, else an output_dir.
    """
    token = _place.set(place or _place.get())
    try:
        yield
    except KpsvdTuneError:
        raise
    except Exception as error:
        refused = as_disk_error(error)
        if refused is None:
            raise
        raise ResourceError(
            f"could not {attempt}: {refused.strerror or refused}; {cure(refused, _place.get())}"
        ) from error
    finally:
        _place.reset(token)


def as_disk_error(error: Exception) -> OSError | None:
    """The error as the system's, where it is one or tells of one; None where it is another."""
    if isinstance(error, OSError):
        return error
    number = _RUST.search(str(error))
    if number is None:
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


def cure(error: OSError, place: str) -> str:
    """What to do about an error with the system's number; `place` is as in :func:`explained`."""
    text = _CURES.get(error.errno or 0, "try again, or choose {place} on another disk")
    bare = place.removeprefix("an ").removeprefix("a ")
    return text.replace("another {place}", "another {bare}").format(place=place, bare=bare)


def check_room(needed: int, output: Path, what: str) -> None:
    """Refuse an output that needs more bytes than its disk has free (ResourceError).

    `what` is written there, such as "the merged model".
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.05 * needed:
        raise ResourceError(
            f"{what} needs {size(needed)} on disk and {existing} has {size(free)} free: make room "
            "or choose another --output"
        )
