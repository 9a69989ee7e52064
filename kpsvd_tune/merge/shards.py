"""Writes merged weights shard by shard: what no adapter touches is copied, the rest is computed.

Names, shards, their order of tensors and their metadata stay as they are. A few threads hold one
tensor each, so that memory does not grow with the model. One of them computes at a time: the
others meanwhile read and write, and read back and hash whole files, which needs no Python.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.merge.changes import Changes
from kpsvd_tune.merge.update import Scratch, Update
from kpsvd_tune.models import Checkpoint, StoredTensor, WeightFile
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.models.stream import FLOATS, tensors_of
from kpsvd_tune.storage.durable import NewFile, make_folder, new_file
from kpsvd_tune.storage.json_files import parse_json, read_bytes, to_json

# Threads that hold a tensor each: one reads, one computes, one writes.
_HOLDERS = 3
# Threads that copy, sync and read back files.
_CARRIERS = 2
# Entries that are converted at a time.
_BLOCK = 1 << 20
# Bytes that are written, and read back, at a time.
_PIECE_BYTES = 1 << 20
# Of a file, that are copied at a time.
_COPIED_BYTES = 1 << 28
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the merged model."""

    key: str  # its name in the file
    dtype: str  # as safetensors names it
    size: tuple[int, ...]
    source: StoredTensor | None  # the base's; None for one that the base holds under another name
    layer: str | None = None  # the adapted layer whose weight it is
    value: Tensor | None = None  # of a module that was trained whole
    rows: tuple[Tensor, Tensor] | None = None  # numbers and values of rows that were trained

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        if self.is_copied:
            assert self.source is not None
            return self.source.num_bytes
        count = 1
        for each in self.size:
            count *= each
        return count * FLOATS[self.dtype].itemsize

    @property
    def is_copied(self) -> bool:
        """Whether the base's bytes are taken as they are."""
        is_changed = self.layer or self.value is not None or self.rows
        return self.source is not None and not is_changed and self.source.dtype == self.dtype


@dataclass(frozen=True)
class Plan:
    """The files of a merged model.

    Attributes:
        files: For each of the base's files what is written into its place.
        dtype: The dtype that most of the weights are stored in.
        is_untied: Whether embeddings that were one tensor are two now.
    """

    files: tuple[tuple[WeightFile, tuple[NewTensor, ...]], ...]
    dtype: str
    is_untied: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(each.num_bytes for _, tensors in self.files for each in tensors)


@dataclass
class Written:
    """What was measured while writing: for each adapted layer, and the sha256 of each file."""

    kept: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    is_rest_compared: bool = True


def stored_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype that most bytes of a base's weights have, as recipes name it; None for others."""
    sums: dict[str, int] = {}
    for each in checkpoint.tensors.values():
        if each.is_float:
            sums[each.dtype] = sums.get(each.dtype, 0) + each.num_bytes
    names = {_FLOAT_NAMES[dtype]: name for name, dtype in DTYPES.items()}
    return names.get(max(sums, key=sums.__getitem__, default=""))


def unstreamable(checkpoint: Checkpoint, changes: Changes) -> str | None:
    """Why a base cannot be merged tensor by tensor; None where it can."""
    names = [*(f"{name}.weight" for name in changes.layers), *changes.replaced, *changes.rows]
    for name in names:
        key = checkpoint.key_of(name)
        if key is None:
            return f"transformers joins or splits the stored tensors of {name} while loading"
        if not checkpoint.tensors[key].is_float and name not in changes.replaced:
            return f"{name} is stored as {checkpoint.tensors[key].dtype}"
    return None


def plan_files(checkpoint: Checkpoint, changes: Changes, dtype: str | None) -> Plan:
    """What is written where; `dtype` None, or that of most weights, keeps that of each tensor.

    Weights of a dtype that recipes have no name for, such as float64, become float32 by default.
    """
    most = stored_dtype(checkpoint)
    dtype = dtype or most or "float32"
    target = None if dtype == most else _FLOAT_NAMES[DTYPES[dtype]]
    layers = {checkpoint.key_of(f"{name}.weight"): name for name in changes.layers}
    # A tied tensor may be stored under each of its names.
    rows = {
        checkpoint.key_of(each): found
        for name, found in changes.rows.items()
        for each in (name, *checkpoint.ties.get(name, ()))
    }
    values, added = _whole(checkpoint, changes)

    def planned(stored: StoredTensor) -> NewTensor:
        return NewTensor(
            stored.key,
            target if target and stored.is_float else stored.dtype,
            stored.size,
            stored,
            layers.get(stored.key),
            values.get(stored.key),
            rows.get(stored.key),
        )

    files = [
        (file, tuple(planned(stored) for stored in file.tensors.values()))
        for file in checkpoint.files
    ]
    for name, (stored, value) in added.items():
        own = NewTensor(name, target or stored.dtype, stored.size, stored, value=value)
        at = [file.path for file, _ in files].index(checkpoint.file_of[stored.key].path)
        files[at] = (files[at][0], (*files[at][1], own))
    return Plan(tuple(files), dtype, bool(added) or _part(checkpoint, values))


def _part(checkpoint: Checkpoint, values: Mapping[str, Tensor]) -> bool:
    """Whether one of two tied tensors that are both stored was trained apart from the other."""
    for name, others in checkpoint.ties.items():
        for other in others:
            one, two = (checkpoint.parameters.get(each) for each in (name, other))
            if one in values and two is not None and two != one:
                twin = values.get(two)
                if twin is None or not torch.equal(values[str(one)], twin):
                    return True
    return False


def _whole(
    checkpoint: Checkpoint, changes: Changes
) -> tuple[dict[str, Tensor], dict[str, tuple[StoredTensor, Tensor | None]]]:
    """Values of stored tensors, and of those to be stored beside them: tied ones that part.

    A tensor of several names is stored once. Where one of them was trained, the others keep the
    stored value.
    """
    values: dict[str, Tensor] = {}
    added: dict[str, tuple[StoredTensor, Tensor | None]] = {}
    for name, value in changes.replaced.items():
        key = checkpoint.key_of(name)
        assert key is not None
        group = (name, *checkpoint.ties.get(name, ()))
        others = [
            each
            for each in group
            if each != name
            and each not in checkpoint.parameters
            # Two names that were trained to the same values stay one tensor.
            and not (each in changes.replaced and torch.equal(changes.replaced[each], value))
        ]
        if name in checkpoint.parameters:
            values[key] = value
            for each in others:
                added.setdefault(each, (checkpoint.tensors[key], changes.replaced.get(each)))
        elif not any(
            torch.equal(changes.replaced[each], value)
            for each in group
            if each in checkpoint.parameters and each in changes.replaced
        ):
            added[name] = checkpoint.tensors[key], value
    return values, added


@dataclass(frozen=True)
class _Task:
    """A part of the work on one file, which may be done at the same time as all others."""

    do: Callable[[], None]
    num_tensors: int  # that are done with it
    is_holder: bool  # whether it holds a tensor


class ShardWriter:
    """Writes the files of a plan into a folder.

    Args:
        checkpoint: The base's files.
        changes: What the adapters change in them.
        compares: Whether the base's weights are compared with what the adapters stored of them.
        advance: Told how many tensors of how many are done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        changes: Changes,
        compares: bool,
        advance: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._changes, self._compares = checkpoint, changes, compares
        self._advance = advance
        self._stopped = threading.Event()
        # Only the thread that computes has its memory.
        self._computing, self._scratch = threading.Lock(), Scratch()
        self._local = threading.local()
        self._written = Written()
        # Of the updated tensors: how many bytes were written in a piece, and their sum.
        self._sums: dict[str, list[tuple[int, int]]] = {}

    def write(self, plan: Plan, folder: Path) -> Written:
        """Write all files.

        Raises:
            MergeError: A weight is not finite in its dtype.
            AdapterError: The base is another than an adapter's.
            ResourceError: The disk refused.
        """
        total = sum(len(tensors) for _, tensors in plan.files)
        # The tasks end before the files are closed.
        with ExitStack() as files, _workers(self._stopped) as (holders, carriers):
            work = _Work(lambda done: self._advance(done, total))
            if self._compares:
                work.add(carriers.submit(self._compare_rest))
            for file, tensors in plan.files:
                path = folder / file.output_name
                make_folder(path.parent)
                new = files.enter_context(new_file(path))

                def finish(new: NewFile = new, path: Path = path) -> None:
                    work.add(carriers.submit(new.sync))
                    work.add(carriers.submit(self._read_back, path, folder))

                of_file = work.group(finish)
                for task in self._tasks(file, tensors, new):
                    pool = holders if task.is_holder else carriers
                    future = pool.submit(task.do)
                    work.add(future, of_file, task.num_tensors, task.is_holder)
                    # Bounded, so that a fault ends the work soon; a full disk is found early.
                    work.wait(2 * _HOLDERS)
                work.close(of_file)
            work.wait()
        _write_index(self._checkpoint, plan, folder)
        names = self._changes.layers
        for each in (self._written.kept, self._written.sizes, self._written.deviations):
            ordered = {name: each[name] for name in names}
            each.clear()
            each.update(ordered)
        return self._written

    def _tasks(
        self, file: WeightFile, tensors: tuple[NewTensor, ...], new: NewFile
    ) -> Iterator[_Task]:
        """The work on one file."""
        is_same = [each.key for each in tensors] == list(file.tensors)
        if is_same and file.path.suffix == ".safetensors" and all(t.is_copied for t in tensors):
            yield from self._copies(file.path, new, 0, file.path.stat().st_size, 0, len(tensors))
            return
        header, places = _header(tensors, file.metadata)
        new.write_at(0, header)
        for begin, end, to, count in _runs(tensors, places):
            yield from self._copies(file.path, new, begin, end, to, count)
        for tensor in tensors:
            if not (tensor.is_copied and tensor.source and tensor.source.location):
                yield _Task(partial(self._make, tensor, new, places[tensor.key]), 1, True)

    def _copies(
        self, source: Path, new: NewFile, begin: int, end: int, to: int, count: int
    ) -> Iterator[_Task]:
        """A long copy in pieces, between which it can be stopped; the last counts its tensors."""

        def copy(first: int, last: int) -> None:
            self._check_stopped()
            new.copy_from(source, first, last, to + first - begin)

        for first in range(begin, end, _COPIED_BYTES):
            last = min(end, first + _COPIED_BYTES)
            yield _Task(partial(copy, first, last), count if last == end else 0, False)

    def _make(self, tensor: NewTensor, new: NewFile, to: int) -> None:
        """Compute one tensor and write it."""
        if tensor.value is not None:
            self._cast(tensor, tensor.value, new, to)
            return
        assert tensor.source is not None
        if tensor.layer is not None:
            self._write_updated(tensor, self._updated(tensor, tensor.source), new, to)
            return
        stored = self._checkpoint.read(tensor.source.key)
        if tensor.rows is not None:
            numbers, values = tensor.rows
            stored = stored.clone()
            stored[numbers] = values.to(stored.dtype)
        self._cast(tensor, stored, new, to)

    def _updated(self, tensor: NewTensor, source: StoredTensor) -> Tensor:
        """Compute an updated weight, in place of the stored one where both have one dtype."""
        name, dtype = str(tensor.layer), FLOATS[tensor.dtype]
        weight = self._checkpoint.read(source.key, self._memory(source.num_bytes))
        is_own = source.location is not None and weight.dtype == dtype
        result = weight if is_own else torch.empty(weight.shape, dtype=dtype)
        with self._computing:
            if self._compares:
                self._check_stopped()
                self._changes.check_layer(name, weight)
            update = Update(name, self._changes.terms(name), dtype, self._scratch)
            for _ in update.rows(weight, result):
                self._check_stopped()
        self._written.kept[name] = update.kept
        self._written.sizes[name] = update.relative_size
        self._written.deviations[name] = update.deviation
        return result

    def _memory(self, num_bytes: int) -> Tensor:
        """This thread's memory for a stored tensor: fresh pages take longer than reading does."""
        held: Tensor | None = getattr(self._local, "memory", None)
        if held is None or len(held) < num_bytes:
            held = self._local.memory = torch.empty(num_bytes, dtype=torch.uint8)
        return held

    def _write_updated(self, tensor: NewTensor, result: Tensor, new: NewFile, to: int) -> None:
        data = _bytes(result)
        sums = self._sums[tensor.key] = []
        for begin in range(0, len(data), _PIECE_BYTES):
            self._check_stopped()
            piece = data[begin : begin + _PIECE_BYTES]
            new.write_at(to + begin, piece)
            sums.append((len(piece), _sum_of(piece)))

    def _read_back(self, path: Path, folder: Path) -> None:
        """Hash a file, and compare the updated weights in it with what was measured."""
        updated = [each for key, each in tensors_of(path).items() if key in self._sums]
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        with path.open("rb", buffering=0) as stream:

            def read(most: int) -> memoryview:
                self._check_stopped()
                piece = buffer[: _read_into(stream, buffer[:most])]
                digest.update(piece)
                return piece

            for location in sorted(updated, key=lambda each: each.begin):
                while (left := location.begin - stream.tell()) > 0 and read(min(left, len(buffer))):
                    pass
                for count, expected in self._sums[location.key]:
                    piece = read(count)
                    if len(piece) != count or _sum_of(piece) != expected:
                        raise MergeError(
                            f"{path.name} does not hold {location.key} as it was written: is the "
                            "disk damaged? Nothing was kept; merge again, or choose another "
                            "--output"
                        )
            while read(len(buffer)):
                pass
        self._written.hashes[str(path.relative_to(folder))] = digest.hexdigest()

    def _cast(self, tensor: NewTensor, value: Tensor, new: NewFile, to: int) -> None:
        dtype = FLOATS.get(tensor.dtype, value.dtype)
        flat = value.reshape(-1)
        for begin in range(0, len(flat), _BLOCK):
            self._check_stopped()
            block = flat[begin : begin + _BLOCK].to(dtype)
            if dtype.is_floating_point and not torch.isfinite(block).all():
                raise not_finite(tensor.key, dtype)
            new.write_at(to + begin * dtype.itemsize, _bytes(block))

    def _compare_rest(self) -> None:
        def fetch(name: str) -> Tensor | None:
            self._check_stopped()
            key = self._checkpoint.key_of(name)
            if key is None or not self._checkpoint.tensors[key].is_float:
                return None
            value = self._checkpoint.read(key)
            # In pieces: what is asked of a whole embedding takes twice its memory.
            if not all(
                torch.isfinite(each).all() for each in torch.split(value.reshape(-1), _BLOCK)
            ):
                raise not_finite(name, value.dtype)
            return value

        self._written.is_rest_compared = self._changes.check_rest(fetch)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Another task has failed, or the command was stopped."""


def not_finite(name: str, dtype: torch.dtype) -> MergeError:
    """The error of a weight, adapted or not, that its dtype does not hold."""
    return MergeError(
        f"{name}: not finite in {str(dtype).removeprefix('torch.')}; the base model is damaged, or "
        "the dtype's range too small: try --dtype float32. Nothing was written"
    )


@dataclass
class _Group:
    """Tasks of one file."""

    finish: Callable[[], None]  # called when all are done
    num_open: int = 1  # the group itself is one, until it is closed


class _Work:
    """Tasks that are being done, and what follows when all of a file are.

    Args:
        advance: Told how many tensors are done.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._pending: dict[Future[None], tuple[_Group | None, int, bool]] = {}
        self._num_held = self._done = 0

    def group(self, finish: Callable[[], None]) -> _Group:
        """Begin a group of tasks, after which something is called."""
        return _Group(finish)

    def add(
        self,
        future: Future[None],
        group: _Group | None = None,
        num_tensors: int = 0,
        is_holder: bool = False,
    ) -> None:
        """Take in a task that was begun."""
        self._pending[future] = group, num_tensors, is_holder
        self._num_held += is_holder
        if group is not None:
            group.num_open += 1

    def close(self, group: _Group) -> None:
        """End a group, to which nothing is added any more."""
        group.num_open -= 1
        if group.num_open == 0:
            group.finish()

    def wait(self, most_held: int | None = None) -> None:
        """Wait until all is done, or at most so many tasks that hold a tensor are left.

        Raises what a task raised.
        """
        while self._pending and (most_held is None or self._num_held > most_held):
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            for each in done:
                each.result()
                group, num_tensors, is_holder = self._pending.pop(each)
                self._num_held -= is_holder
                self._done += num_tensors
                if num_tensors:
                    self._advance(self._done)
                if group is not None:
                    self.close(group)


@contextmanager
def _workers(
    stopped: threading.Event,
) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Pools for tasks that hold a tensor and for the others, which end soon when the block fails.

    The tasks share the processor's threads.
    """
    before = torch.get_num_threads()
    each = max(1, before // 2)

    def share() -> None:
        torch.set_num_threads(each)

    holders = ThreadPoolExecutor(_HOLDERS, "merge", initializer=share)
    carriers = ThreadPoolExecutor(_CARRIERS, "merge files", initializer=share)
    try:
        yield holders, carriers
    except BaseException:
        stopped.set()
        raise
    finally:
        for pool in (holders, carriers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (holders, carriers):
            pool.shutdown(wait=True)
        torch.set_num_threads(before)


def _header(
    tensors: tuple[NewTensor, ...], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each tensor begins in it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    at = 0
    for each in tensors:
        begins[each.key] = at
        end = at + each.num_bytes
        entries[each.key] = {"dtype": each.dtype, "shape": each.size, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded as the library does, so that data begins at a multiple of eight.
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + at for key, at in begins.items()}


def _runs(
    tensors: tuple[NewTensor, ...], places: Mapping[str, int]
) -> list[tuple[int, int, int, int]]:
    """Stretches of a file that are copied: begin, end, where to, and how many tensors."""
    runs: list[tuple[int, int, int, int]] = []
    for each in tensors:
        location = each.source.location if each.source else None
        if not each.is_copied or location is None:
            continue
        to = places[each.key]
        if runs and runs[-1][1] == location.begin and sum(_span(runs[-1])) == to:
            begin, _, start, count = runs[-1]
            runs[-1] = begin, location.end, start, count + 1
        else:
            runs.append((location.begin, location.end, to, 1))
    return runs


def _span(run: tuple[int, int, int, int]) -> tuple[int, int]:
    """Where a stretch is copied to, and its length."""
    return run[2], run[1] - run[0]


def _bytes(block: Tensor) -> memoryview:
    array: Any = block.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_into(stream: FileIO, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends; how many bytes were read."""
    count = 0
    while count < len(buffer) and (more := stream.readinto(buffer[count:])):
        count += more
    return count


def _sum_of(data: memoryview) -> int:
    """The sum of the words of 8 bytes, modulo 2^64, which any one changed word changes.

    A checksum such as CRC-32 took a fifth of a merge's time.
    """
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole], dtype=np.uint64)
    return (int(words.sum()) + int.from_bytes(data[whole:], "little")) % 2**64


def _write_index(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """The list of which file holds which tensor, where there is more than one file."""
    if len(plan.files) == 1 and checkpoint.index is None:
        return
    content: dict[str, Any] = {}
    if checkpoint.index is not None:
        content = parse_json(read_bytes(checkpoint.index))
    names = {each.key: file.output_name for file, tensors in plan.files for each in tensors}
    # In the base's own order, then what is new.
    order = [key for key in content.get("weight_map", {}) if key in names]
    order += [key for key in names if key not in set(order)]
    content["metadata"] = {**(content.get("metadata") or {}), "total_size": plan.num_bytes}
    content["weight_map"] = {key: names[key] for key in order}
    with new_file(folder / "model.safetensors.index.json") as new:
        new.write_at(0, to_json(content))
