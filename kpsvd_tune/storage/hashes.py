"""Hashes of files, read once in pieces of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kpsvd_tune.storage.disk import explained

# Hashing frees Python's interpreter lock, so two files are hashed in the time of one.
_AT_ONCE = 2


def file_hash(file: Path) -> str:
    """The sha256 of a file as hexadecimal digits; ResourceError where it cannot be read."""
    with explained(f"read {file}"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files of a folder, by name; ResourceError where one cannot be read."""
    wanted = sorted(names)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(
            zip(wanted, pool.map(file_hash, [folder / name for name in wanted]), strict=True)
        )
