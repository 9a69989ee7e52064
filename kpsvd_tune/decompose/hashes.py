"""What a weight is known by: the hash of its numbers, and an index that spares the hashing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpsvd_tune.errors import ResourceError
from kpsvd_tune.storage.durable import append_file, make_folder
from kpsvd_tune.storage.json_files import parse_json, read_bytes

# A file this young may still be written to within the resolution of its time stamp.
SETTLED_SECONDS = 2.0


def weight_hash(weight: Tensor) -> str:
    """Hexadecimal sha256 of dtype, sizes and bytes of a weight (out, in), any dtype, on the CPU.

    A transposed view is hashed as it is stored, so that no copy is made, and never equals the hash
    of its transpose.
    """
    transposed = weight.T.is_contiguous() and not weight.is_contiguous()
    stored = weight.T if transposed else weight.contiguous()
    head = json.dumps([str(weight.dtype), list(weight.shape), transposed])
    digest = hashlib.sha256(head.encode())
    digest.update(raw_bytes(stored))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's bytes without copying them."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class HashIndex:
    """Remembers the hashes of weights that lie in files.

    Reading and hashing 13 GB takes longer than trying another threshold should. So an entry is
    trusted while path, size, times of modification and of change, and inode of its files and the
    place of the tensor in them are unchanged, as git trusts them. A program can reset the time of
    modification, and the system sets the time of change when it does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, dict[str, str]] = {}

    def get(self, files: Sequence[Path], label: str) -> str | None:
        """Return the hash noted for the tensor at the place ``label`` in its files, or None."""
        place, _ = self._place(files)
        if place not in self._known:
            self._known[place] = _read(place)
        return self._known[place].get(label)

    def put(self, files: Sequence[Path], label: str, digest: str) -> None:
        """Note the hash of a tensor, unless a file is too young to be told from its successor."""
        place, newest = self._place(files)
        if time.time() - newest < SETTLED_SECONDS:
            return
        self._known.setdefault(place, {})[label] = digest
        # Lines are appended in one write, so several processes may add to one file; a line starts
        # with the line break, so that one torn by a kill spoils none but itself.
        line = "\n" + json.dumps([label, digest])
        # The index only saves time; a folder that cannot be written is the cache's to report.
        with suppress(ResourceError):
            make_folder(self._folder)
            append_file(place, line.encode())

    def _place(self, files: Sequence[Path]) -> tuple[Path, float]:
        stats = [(file, file.stat()) for file in files]
        identity = [
            [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            for file, stat in stats
        ]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        return self._folder / f"{name}.jsonl", max(stat.st_mtime for _, stat in stats)


def _read(place: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    try:
        lines = read_bytes(place).splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            label, digest = parse_json(line, list[Any])
        except ValueError:
            continue
        if isinstance(label, str) and isinstance(digest, str) and len(digest) == 64:
            known[label] = digest
    return known
