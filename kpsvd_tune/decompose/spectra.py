"""Compute the leading terms of every target matrix, each once, alone or with other processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import transformers
from torch import Tensor

from kpsvd_tune.decompose.cache import CachedTerms, SpectraCache, entry_key
from kpsvd_tune.decompose.hashes import weight_hash
from kpsvd_tune.errors import ModelError
from kpsvd_tune.linalg import KroneckerShape, kpsvd
from kpsvd_tune.models import WeightReader

# Relative cost of the two ways kpsvd takes, in passes over R(W): up to this smaller side it is
# decomposed whole, above it by an iteration that takes about this many passes.
DIRECT_SIZE = 1024
ITERATION_PASSES = 500


@dataclass(frozen=True)
class Task:
    """One matrix to decompose.

    Attributes:
        name: The module.
        shape: The Kronecker shape.
        num_terms: Leading terms wanted; a matrix that has fewer gives all it has.
    """

    name: str
    shape: KroneckerShape
    num_terms: int

    @property
    def cost(self) -> float:
        """Estimated work, in multiply-adds up to a constant."""
        size = self.shape.out_features * self.shape.in_features
        side = self.shape.max_rank
        return float(size) * (side if side <= DIRECT_SIZE else ITERATION_PASSES)


@dataclass(frozen=True)
class Progress:
    """How far a decomposition is.

    Attributes:
        name: The matrix just finished.
        done: Matrices finished.
        total: Matrices in all.
        seconds_left: Estimate from the work done so far; None before anything was computed.
        energy: Mean share of ||W||_F^2 that the windows of the finished matrices hold.
    """

    name: str
    done: int
    total: int
    seconds_left: float | None
    energy: float


@dataclass(frozen=True)
class Finished:
    """What the rank rules need of one matrix; its factors stay in the cache.

    Attributes:
        name: The module.
        key: The cache entry.
        values: KP singular values of the window.
        squared_norm: ||W||_F^2.
        seconds: Time the decomposition took when it was computed.
        is_new: Whether this call computed it.
        is_repaired: Whether it replaces a damaged cache entry.
    """

    name: str
    key: str
    values: tuple[float, ...]
    squared_norm: float
    seconds: float
    is_new: bool
    is_repaired: bool = False

    @property
    def energy(self) -> float:
        """Share of ||W||_F^2 that the window holds; 0 for a zero matrix."""
        if self.squared_norm == 0:
            return 0.0
        return sum(value * value for value in self.values) / self.squared_norm


@dataclass(frozen=True)
class Settings:
    """How every matrix is decomposed.

    Attributes:
        cache_dir: The cache folder.
        tolerance: Accepted missing share of the leading energy.
        seed: Seeds the iteration.
        device: Where the decomposition runs.
    """

    cache_dir: Path
    tolerance: float
    seed: int
    device: str = "cpu"


class SpectraWorker:
    """Decomposes matrices, or finds them in the cache.

    Args:
        reader: Gives the weights.
        settings: How to decompose.
    """

    def __init__(self, reader: WeightReader, settings: Settings) -> None:
        self._reader = reader
        self._settings = settings
        self.cache = SpectraCache(settings.cache_dir)

    def run(self, tasks: Sequence[Task], report: Callable[[Finished], None]) -> None:
        """Finish every task, in order but for those that another process has in hand.

        Args:
            tasks: The matrices.
            report: Called after each.

        Raises:
            ModelError: A weight is missing, damaged or not finite.
        """
        waiting: list[Task] = []
        for task in tasks:
            finished = self._finish(task, wait=False)
            if finished is None:
                waiting.append(task)
            else:
                report(finished)
        for task in waiting:
            finished = self._finish(task, wait=True)
            if finished is not None:
                report(finished)

    def look_up(self, tasks: Sequence[Task], report: Callable[[Finished], None]) -> list[Task]:
        """Report what the cache holds of weights whose hashes are known.

        Args:
            tasks: The matrices.
            report: Called after each that was found.

        Returns:
            The others.
        """
        left: list[Task] = []
        for task in tasks:
            digest = self.cache.hashes.get(*self._place(task.name))
            entry = None if digest is None else self.cache.read(*self._entry(task, digest))
            if digest is None or entry is None:
                left.append(task)
            else:
                report(_finished(task, self._entry(task, digest)[0], entry, is_new=False))
        return left

    def _finish(self, task: Task, *, wait: bool) -> Finished | None:
        """Find or compute one matrix; None when another process computes it and we do not wait."""
        digest, weight = self._identify(task.name)
        entry_at = self._entry(task, digest)
        key = entry_at[0]
        entry = self.cache.read(*entry_at)
        if entry is not None:
            return _finished(task, key, entry, is_new=False)
        with self.cache.lock(key, wait=wait) as held:
            if not held:
                return None
            # Another process may have finished it between our look and the lock.
            entry = self.cache.read(*entry_at)
            if entry is not None:
                return _finished(task, key, entry, is_new=False)
            weight = self._reader.load(task.name) if weight is None else weight
            entry = self._compute(task, weight)
            self.cache.write(key, entry)
        is_repaired = key in self.cache.damaged
        return _finished(task, key, entry, is_new=True, is_repaired=is_repaired)

    def _entry(self, task: Task, digest: str) -> tuple[str, KroneckerShape, int]:
        key = entry_key(digest, task.shape, self._settings.tolerance, self._settings.seed)
        return key, task.shape, task.num_terms

    def _place(self, name: str) -> tuple[Sequence[Path], str]:
        """The files a weight comes from and its place in them."""
        location = self._reader.location(name)
        if location is None:
            # What the loader makes of the files may change with its version.
            label = f"loaded {name} by transformers {transformers.__version__}"
            return self._reader.source.weight_files, label
        label = f"{location.key} {location.begin} {location.end} {location.dtype}"
        return [location.file], label

    def _identify(self, name: str) -> tuple[str, Tensor | None]:
        """The weight's hash, and the weight itself where it had to be read for that."""
        files, label = self._place(name)
        digest = self.cache.hashes.get(files, label)
        if digest is not None:
            return digest, None
        weight = self._reader.load(name)
        digest = weight_hash(weight)
        self.cache.hashes.put(files, label, digest)
        return digest, weight

    def _compute(self, task: Task, weight: Tensor) -> CachedTerms:
        started = time.perf_counter()
        settings = self._settings
        try:
            terms = kpsvd(
                weight.to(settings.device),
                task.shape,
                task.num_terms,
                tolerance=settings.tolerance,
                seed=settings.seed,
            )
        except ValueError as error:
            raise ModelError(f"{task.name} cannot be decomposed: {error}") from error
        terms = replace(
            terms, values=terms.values.cpu(), left=terms.left.cpu(), right=terms.right.cpu()
        )
        return CachedTerms(terms, time.perf_counter() - started)


def shares(tasks: Sequence[Task], num_shares: int) -> list[list[Task]]:
    """Deal tasks out so that the shares cost about the same.

    The costliest task goes first, each to the share that has least so far; the result depends on
    the tasks alone, so processes that never talk agree on it.

    Args:
        tasks: The matrices, in model order.
        num_shares: How many shares, at least 1.

    Returns:
        The shares, each in model order.
    """
    loads = [0.0] * num_shares
    dealt: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(tasks)), key=lambda i: (-tasks[i].cost, i)):
        least = loads.index(min(loads))
        loads[least] += tasks[index].cost
        dealt[least].append(index)
    return [[tasks[index] for index in sorted(share)] for share in dealt]


class ProgressMeter:
    """Turns finished matrices into :class:`Progress`.

    Args:
        tasks: All matrices that will be reported.
        show: Receives the progress; None for none.
    """

    def __init__(self, tasks: Sequence[Task], show: Callable[[Progress], None] | None) -> None:
        self._costs = {task.name: task.cost for task in tasks}
        self._show = show
        self._left = sum(self._costs.values())
        self._computed = 0.0
        self._energies: list[float] = []
        self._started: float | None = None

    def __call__(self, finished: Finished) -> None:
        """Count one more matrix and show where we are."""
        if self._started is None:
            # Loading a model that cannot be streamed says nothing about the matrices.
            self._started = time.perf_counter() - (finished.seconds if finished.is_new else 0.0)
        cost = self._costs[finished.name]
        self._left -= cost
        # What came from the cache took no time and says nothing about the rest.
        self._computed += cost if finished.is_new else 0.0
        self._energies.append(finished.energy)
        if self._show is None:
            return
        elapsed = time.perf_counter() - self._started
        rate = self._computed / elapsed if elapsed > 0 else 0.0
        self._show(
            Progress(
                name=finished.name,
                done=len(self._energies),
                total=len(self._costs),
                seconds_left=max(0.0, self._left) / rate if rate > 0 else None,
                energy=sum(self._energies) / len(self._energies),
            )
        )


def _finished(
    task: Task, key: str, entry: CachedTerms, *, is_new: bool, is_repaired: bool = False
) -> Finished:
    return Finished(
        name=task.name,
        key=key,
        values=tuple(entry.terms.values.tolist()),
        squared_norm=float(entry.terms.squared_norm),
        seconds=entry.seconds,
        is_new=is_new,
        is_repaired=is_repaired,
    )
