"""The slow, obvious reference: what every fast path is compared with.

float64 NumPy, loops, block slicing and brute force, written from the definitions and never
importing the package. Sizes must be small. Letters as in the package: W is (m*p, n*q), a left
factor (m, n), a right factor (p, q), r the number of terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Largest accepted |got - expected| relative to the largest expected magnitude, by dtype. One
# table for all tests: a test that needs more has found a fault.
TOLERANCE = {
    # Sums of a few hundred products lose at most three of sixteen digits; finite differences in
    # gradcheck bring their own tolerance.
    "float64": 1e-11,
    # Sums of a few hundred products of numbers near 1: 100 times the unit of 6e-8, with room for
    # the squares and square roots of a decomposition.
    "float32": 2e-5,
    # Eleven bits: unit 5e-4, some tens of rounded sums.
    "float16": 5e-3,
    # Eight bits: unit 4e-3, and results are rounded once more when stored.
    "bfloat16": 2e-2,
}


def assert_close(got: Any, expected: Any, dtype: str = "float64") -> None:
    """Compare two arrays (or tensors on the CPU) within the dtype's tolerance."""
    got = np.asarray(got.detach().double() if hasattr(got, "detach") else got, dtype=np.float64)
    if hasattr(expected, "detach"):
        expected = expected.detach().double()
    expected = np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    if not expected.size:
        return
    scale = np.abs(expected).max() or 1.0
    error = np.abs(got - expected).max() / scale
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def rearrange(weight: np.ndarray, m: int, n: int, p: int, q: int) -> np.ndarray:
    """R(W): row i*n + j is the (p, q) block at (i, j), read row by row."""
    rows = []
    for i in range(m):
        for j in range(n):
            block = weight[i * p : (i + 1) * p, j * q : (j + 1) * q]
            rows.append([block[row, column] for row in range(p) for column in range(q)])
    return np.array(rows, dtype=np.float64)


def kron_sum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The sum of np.kron over the terms."""
    (_, m, n), (_, p, q) = np.shape(left), np.shape(right)
    total: np.ndarray = np.zeros((m * p, n * q))
    for a, b in zip(left, right, strict=True):
        total = total + np.kron(a, b)
    return total


def kpsvd(
    weight: np.ndarray, m: int, n: int, p: int, q: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All terms: values (k,), left (k, m, n), right (k, p, q), each left's largest entry > 0."""
    u, s, vt = np.linalg.svd(rearrange(weight, m, n, p, q), full_matrices=False)
    left, right = u.T.reshape(-1, m, n).copy(), vt.reshape(-1, p, q).copy()
    for k in range(len(s)):
        if left[k].flat[np.abs(left[k]).argmax()] < 0:
            left[k], right[k] = -left[k], -right[k]
    return s, left, right


def delta(left0: np.ndarray, right0: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The update of the offset form: sum (A0 + a) kron (B0 + b) - A0 kron B0."""
    change: np.ndarray = kron_sum(left0 + a, right0 + b) - kron_sum(left0, right0)
    return change


def divisors(size: int) -> list[int]:
    """All divisors, ascending, by trial."""
    return [d for d in range(1, size + 1) if size % d == 0]


def energy_rank(values: Sequence[float], energy: float, whole: float) -> int:
    """Fewest leading terms with at least this share of ``whole``; all if there are too few."""
    for count in range(len(values) + 1):
        if sum(v * v for v in values[:count]) >= energy * whole - 1e-9 * whole:
            return count
    return len(values)


def pooled_ranks(shares: Sequence[Sequence[float]], energy: float) -> list[int]:
    """Every choice of leading terms is tried: fewest terms that hold the share, most energy."""
    whole = sum(sum(layer) for layer in shares)
    best: tuple[int, float, tuple[int, ...]] | None = None
    for counts in itertools.product(*(range(len(layer) + 1) for layer in shares)):
        held = sum(sum(layer[:count]) for layer, count in zip(shares, counts, strict=True))
        if held >= energy * whole - 1e-9 * whole:
            candidate = (sum(counts), -held, counts)
            best = candidate if best is None else min(best, candidate)
    assert best is not None
    return list(best[2])


def elbow_distances(values: Sequence[float]) -> list[float]:
    """How far each point lies below the line through the first and the last point."""
    x = np.linspace(0, 1, len(values))
    y = (np.array(values) - values[-1]) / (values[0] - values[-1])
    first, last = np.array([x[0], y[0]]), np.array([x[-1], y[-1]])
    chord = last - first
    distances = []
    for point in np.stack([x, y], axis=1):
        step = point - first
        # The cross product over the chord's length; positive below the chord.
        distances.append((chord[1] * step[0] - chord[0] * step[1]) / np.linalg.norm(chord))
    return distances


def noise_edge_rank(values: Sequence[float], squared_norm: float, rows: int, columns: int) -> int:
    """Terms above s (sqrt(rows) + sqrt(columns)), s^2 = residual energy per entry."""
    variance = (squared_norm - sum(v * v for v in values)) / (rows * columns)
    edge = math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))
    return len([v for v in values if v > edge])


def budget_ranks(
    shares: Sequence[Sequence[float]],
    costs: Sequence[int],
    minima: Sequence[int],
    maxima: Sequence[int],
    budget: int,
) -> list[int]:
    """Again and again the best next term of all that still fit, first layer on ties."""
    ranks = list(minima)
    while True:
        spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
        fitting = [
            i for i in range(len(ranks)) if ranks[i] < maxima[i] and spent + costs[i] <= budget
        ]
        if not fitting:
            return ranks
        ranks[max(fitting, key=lambda i: shares[i][ranks[i]] / costs[i])] += 1
