"""Compute the leading terms of every target matrix, each once, alone or with other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import transformers
from torch import Tensor

from kpsvd_tune.decompose.cache import SpectraCache, entry_key
from kpsvd_tune.decompose.hashes import weight_hash
from kpsvd_tune.errors import ModelError
from kpsvd_tune.linalg import LayerPlan, decompose_layer
from kpsvd_tune.linalg.kpsvd import DIRECT_SIZE
from kpsvd_tune.models import WeightReader

# Passes over a weight that the iteration for a large R(W) costs, for dividing the work and
# estimating the time left.
ITERATION_PASSES = 500
# What each matrix costs besides, in the same unit: its hash, the calls, and writing to the cache
# took 15 to 20 ms where 1e9 of the above took 0.13 to 0.19 s (SmolLM2-135M, AMD EPYC). Without it
# the time left rises after small matrices and falls after large ones.
MATRIX_WORK = 100_000_000


@dataclass(frozen=True)
class Settings:
    """How every matrix is decomposed."""

    cache_dir: Path
    num_terms: int  # leading terms wanted; a matrix that has fewer gives all it has
    tolerance: float  # accepted missing share of the leading energy
    seed: int  # of the iteration
    device: str = "cpu"


class Found(NamedTuple):
    """One layer with its spectrum; its factors stay in the cache."""

    plan: LayerPlan
    key: str  # of its cache entry
    # the entry was there, was computed now, or replaces a damaged one
    origin: Literal["cached", "computed", "repaired"]


class SpectraWorker:
    """Decomposes matrices, or finds them in the cache."""

    def __init__(self, reader: WeightReader, settings: Settings) -> None:
        self._reader = reader
        self._settings = settings
        self.cache = SpectraCache(settings.cache_dir)

    def run(self, plans: Sequence[LayerPlan], report: Callable[[Found], None]) -> None:
        """Decompose and report every layer; those that another process is computing come last.

        A ModelError says that a weight is missing, damaged or not finite.
        """
        waiting: list[LayerPlan] = []
        for plan in plans:
            if found := self._find(plan, wait=False):
                report(found)
            else:
                waiting.append(plan)
        for plan in waiting:
            if found := self._find(plan, wait=True):
                report(found)

    def look_up(
        self, plans: Sequence[LayerPlan], report: Callable[[Found], None]
    ) -> list[LayerPlan]:
        """Report what the cache holds of weights whose hashes are known, and give the others."""
        left: list[LayerPlan] = []
        for plan in plans:
            digest = self.cache.hashes.get(*self._place(plan.name))
            found = None if digest is None else self._cached(plan, self._key(digest, plan))
            if found is None:
                left.append(plan)
            else:
                report(found)
        return left

    def _find(self, plan: LayerPlan, *, wait: bool) -> Found | None:
        """Find or compute one layer; None when another process computes it and we do not wait."""
        digest, weight = self._identify(plan.name)
        key = self._key(digest, plan)
        if found := self._cached(plan, key):
            return found
        with self.cache.lock(key, wait=wait) as is_held:
            if not is_held:
                return None
            # Another process may have finished it between our look and the lock.
            if found := self._cached(plan, key):
                return found
            weight = self._reader.load(plan.name) if weight is None else weight
            plan = self._compute(plan, key, weight)
        return Found(plan, key, "repaired" if key in self.cache.damaged else "computed")

    def _compute(self, plan: LayerPlan, key: str, weight: Tensor) -> LayerPlan:
        settings = self._settings
        try:
            plan, terms = decompose_layer(
                plan,
                weight.to(settings.device),
                settings.num_terms,
                tolerance=settings.tolerance,
                seed=settings.seed,
            )
        except ValueError as error:
            raise ModelError(f"{plan.name} cannot be decomposed: {error}") from error
        values, left, right = (each.cpu() for each in (terms.values, terms.left, terms.right))
        self.cache.write(key, replace(terms, values=values, left=left, right=right), plan.seconds)
        return plan

    def _cached(self, plan: LayerPlan, key: str) -> Found | None:
        entry = self.cache.read(key, plan.shape, self._settings.num_terms)
        return None if entry is None else Found(plan.with_terms(*entry), key, "cached")

    def _key(self, digest: str, plan: LayerPlan) -> str:
        return entry_key(digest, plan.shape, self._settings.tolerance, self._settings.seed)

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


def work(plan: LayerPlan) -> float:
    """Estimated work of a layer, in multiply-adds up to a constant; each has some besides."""
    side = plan.shape.max_rank
    passes = side if side <= DIRECT_SIZE else ITERATION_PASSES
    return float(plan.shape.out_features * plan.shape.in_features * passes + MATRIX_WORK)


def divide(plans: Sequence[LayerPlan], num_parts: int) -> list[list[LayerPlan]]:
    """Divide layers into parts of about the same work, each in model order.

    The costliest layer goes first, each to the part that has least so far.
    """
    loads = [0.0] * num_parts
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index in sorted(range(len(plans)), key=lambda i: (-work(plans[i]), i)):
        least = loads.index(min(loads))
        loads[least] += work(plans[index])
        parts[least].append(index)
    return [[plans[index] for index in sorted(part)] for part in parts]
