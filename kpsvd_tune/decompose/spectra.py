"""Compute the leading terms of every target matrix, each once, alone or with other processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import transformers
from torch import Tensor

from kpsvd_tune.decompose.cache import CachedTerms, SpectraCache, entry_key
from kpsvd_tune.decompose.hashes import weight_hash
from kpsvd_tune.decompose.tasks import Finished, Settings, Task
from kpsvd_tune.errors import ModelError
from kpsvd_tune.linalg import kpsvd
from kpsvd_tune.models import WeightReader


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
            finished = self._known(task)
            if finished is None:
                left.append(task)
            else:
                report(finished)
        return left

    def _known(self, task: Task) -> Finished | None:
        """What the cache holds of a task, without reading its weight."""
        digest = self.cache.hashes.get(*self._place(task.name))
        if digest is None:
            return None
        key = self._key(digest, task)
        entry = self.cache.read(key, task.shape, task.num_terms)
        return None if entry is None else _finished(task, key, entry, is_new=False)

    def _finish(self, task: Task, *, wait: bool) -> Finished | None:
        """Find or compute one matrix; None when another process computes it and we do not wait."""
        digest, weight = self._identify(task.name)
        key = self._key(digest, task)
        entry = self.cache.read(key, task.shape, task.num_terms)
        if entry is not None:
            return _finished(task, key, entry, is_new=False)
        with self.cache.lock(key, wait=wait) as held:
            if not held:
                return None
            # Another process may have finished it between our look and the lock.
            entry = self.cache.read(key, task.shape, task.num_terms)
            if entry is not None:
                return _finished(task, key, entry, is_new=False)
            weight = self._reader.load(task.name) if weight is None else weight
            entry = self._compute(task, weight)
            self.cache.write(key, entry)
        is_repaired = key in self.cache.damaged
        return _finished(task, key, entry, is_new=True, is_repaired=is_repaired)

    def _key(self, digest: str, task: Task) -> str:
        return entry_key(digest, task.shape, self._settings.tolerance, self._settings.seed)

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
        with _named(task.name):
            terms = kpsvd(
                weight.to(settings.device),
                task.shape,
                task.num_terms,
                tolerance=settings.tolerance,
                seed=settings.seed,
            )
        terms = replace(
            terms, values=terms.values.cpu(), left=terms.left.cpu(), right=terms.right.cpu()
        )
        return CachedTerms(terms, time.perf_counter() - started)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which module linalg refused."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{name} cannot be decomposed: {error}") from error


def _finished(
    task: Task,
    key: str,
    entry: CachedTerms,
    *,
    is_new: bool,
    is_repaired: bool = False,
) -> Finished:
    return Finished(
        name=task.name,
        key=key,
        shape=task.shape,
        note=task.note,
        values=tuple(entry.terms.values.tolist()),
        squared_norm=float(entry.terms.squared_norm),
        seconds=entry.seconds,
        is_new=is_new,
        is_repaired=is_repaired,
    )
