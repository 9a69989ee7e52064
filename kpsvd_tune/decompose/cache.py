"""The spectra cache: one file a matrix, shared by runs, committed atomically, checked by hash."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kpsvd_tune.decompose.hashes import HashIndex, raw_bytes
from kpsvd_tune.linalg import KPSVD, KroneckerShape
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import make_folder, replace_file
from kpsvd_tune.storage.json_files import check_types, read_bytes, read_header
from kpsvd_tune.storage.locks import hold
from kpsvd_tune.storage.paths import CACHE_PLACE, cache_folder

# Part of every key: raise it whenever linalg.kpsvd gives other numbers for the same input.
ALGORITHM_VERSION = 2


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/kpsvd-tune``, by default ``~/.cache/kpsvd-tune``."""
    return cache_folder()


def entry_key(weight: str, shape: KroneckerShape, tolerance: float, seed: int) -> str:
    """Name an entry by all that its numbers depend on (a weight by its hash) but its term count."""
    parts = [ALGORITHM_VERSION, weight, shape.as_tuple(), float(tolerance).hex(), seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class SpectraCache:
    """Finished matrices on disk; ``damaged`` lists keys whose entries did not match their hash.

    An entry with more terms serves for fewer, since the leading terms are a prefix. Entries are
    written to a temporary file, synced and renamed, so a killed run leaves none half-written; a
    lock held while a matrix is computed keeps two runs from computing the same one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_cache_dir() if folder is None else Path(folder)
        self.hashes = HashIndex(self.folder / "hashes")
        self.damaged: set[str] = set()

    def read(self, key: str, shape: KroneckerShape, num_terms: int) -> tuple[KPSVD, float] | None:
        """Read leading terms and the seconds they took; None when absent, too few or damaged."""
        try:
            data = read_bytes(self._file(key))
        except OSError:
            return None
        entry = _decode(data, key, shape)
        if entry is None:
            self.damaged.add(key)
            return None
        terms, seconds = entry
        if len(terms.values) < min(num_terms, shape.max_rank):
            return None
        cut = replace(
            terms,
            values=terms.values[:num_terms],
            left=terms.left[:num_terms],
            right=terms.right[:num_terms],
        )
        return cut, seconds

    def write(self, key: str, terms: KPSVD, seconds: float) -> None:
        """Commit terms and the seconds they took; the caller holds :meth:`lock`."""
        file = self._file(key)
        with explained(f"write {file}", CACHE_PLACE):
            make_folder(file.parent)
            replace_file(file, _encode(key, terms, seconds))

    @contextmanager
    def lock(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of an entry, and yield whether it is held: always True with ``wait``.

        Entries whose keys begin alike share a lock, and a process holds one lock at a time.
        """
        file = self.folder / "locks" / f"{key[:2]}.lock"
        with ExitStack() as stack:
            with explained(f"lock {file}", CACHE_PLACE):
                make_folder(file.parent)
                held = stack.enter_context(hold(file, wait=wait))
            # Without locks two runs compute the same matrix at worst.
            yield held is not False

    def _file(self, key: str) -> Path:
        return self.folder / "spectra" / key[:2] / f"{key}.safetensors"


def _encode(key: str, terms: KPSVD, seconds: float) -> bytes:
    tensors = {"values": terms.values, "left": terms.left, "right": terms.right}
    # Hexadecimal floats come back bit for bit.
    facts = {
        "key": key,
        "squared_norm": float(terms.squared_norm).hex(),
        "seconds": float(seconds).hex(),
    }
    return save(
        {name: value.contiguous() for name, value in tensors.items()},
        metadata={**facts, "sha256": _content_hash(facts, tensors)},
    )


def _decode(data: bytes, key: str, shape: KroneckerShape) -> tuple[KPSVD, float] | None:
    """Read an entry; None for anything but what :func:`_encode` wrote under this key."""
    try:
        header, _ = read_header(io.BytesIO(data))
        facts = check_types(header["__metadata__"], dict[str, str])
        digest = facts.pop("sha256")
        tensors = load(data)
        if facts["key"] != key or digest != _content_hash(facts, tensors):
            return None
        terms = KPSVD(
            values=tensors["values"],
            left=tensors["left"],
            right=tensors["right"],
            shape=shape,
            squared_norm=float.fromhex(facts["squared_norm"]),
        )
        return terms, float.fromhex(facts["seconds"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _content_hash(facts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()
