"""Hashes of files, read once in pieces of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kpsvd_tune.storage.disk import explained

# Hashing frees Python's interpreter lock, so two files are hashed in the time of one.
_AT_ONCE = 2


def file_hash(file: str | Path) -> str:
    """The sha256 of a file as hexadecimal digits; OSError where it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files by their names; ResourceError where one cannot be read."""
    wanted = sorted(files)

    def read(file: Path) -> str:
        with explained(f"read {file}"):
            return file_hash(file)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {
            file.name: found for file, found in zip(wanted, pool.map(read, wanted), strict=True)
        }
