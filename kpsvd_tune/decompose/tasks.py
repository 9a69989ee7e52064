"""The pieces of a decomposition: what is to do, how, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kpsvd_tune.linalg import KroneckerShape

# Passes over a weight that its decomposition costs, for sharing out work and guessing the time
# left: up to this smaller side R(W) is decomposed whole, above it by an iteration.
DIRECT_SIZE = 768
ITERATION_PASSES = 500


@dataclass(frozen=True)
class Task:
    """One matrix to decompose.

    Attributes:
        name: The module.
        shape: The Kronecker shape.
        num_terms: Leading terms wanted; a matrix that has fewer gives all it has.
        note: What the shape had to fall back on, or None.
    """

    name: str
    shape: KroneckerShape
    num_terms: int
    note: str | None = None

    @property
    def cost(self) -> float:
        """Estimated work, in multiply-adds up to a constant."""
        entries = float(self.shape.out_features * self.shape.in_features)
        side = self.shape.max_rank
        return entries * (side if side <= DIRECT_SIZE else ITERATION_PASSES)


@dataclass(frozen=True)
class Finished:
    """What the rank rules need of one matrix; its factors stay in the cache.

    Attributes:
        name: The module.
        key: The cache entry.
        shape: The Kronecker shape.
        note: What the shape had to fall back on, or None.
        values: KP singular values of the window.
        squared_norm: ||W||_F^2.
        seconds: Time the decomposition took when it was computed.
        is_new: Whether this call computed it.
        is_repaired: Whether it replaces a damaged cache entry.
    """

    name: str
    key: str
    shape: KroneckerShape
    note: str | None
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
