"""Where to cut one spectrum, or several pooled: each rule gives a number of leading terms.

Letters: ``values`` are KP singular values sigma_k over the window of computed leading terms,
descending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kpsvd_tune.linalg.kronecker import KroneckerShape

# Terms below this share of sigma_1 are what float32 leaves of an exact zero. Their factors start
# at zero, where the gradient of a product vanishes, so such a term could never learn.
ROUNDING = 1e-6
# Sums that reach a threshold up to float64 rounding have reached it.
SLACK = 1e-12
# A curve closer to its chord than this (both axes scaled to 1) has no elbow.
STRAIGHT = 1e-3


def num_usable(values: Sequence[float]) -> int:
    """Count the terms that are more than rounding."""
    return sum(value > ROUNDING * values[0] for value in values)


def energy_count(values: Sequence[float], energy: float, whole: float) -> tuple[int, bool]:
    """Find the fewest terms that hold a share ``energy``, in (0, 1], of ``whole``.

    ``whole`` is the window's energy or ||W||_F^2. Gives all terms and False when they hold less.
    """
    target, held = energy * whole * (1 - SLACK), 0.0
    for count, value in enumerate(values):
        if held >= target:
            return count, True
        held += value * value
    return len(values), held >= target


def pooled_counts(shares: Sequence[Sequence[float]], energy: float) -> list[int]:
    """Find the fewest terms of all layers together that hold a share of their pooled windows.

    ``shares`` are sigma_k^2 / ||W||_F^2 of each layer, descending; ``energy`` is in (0, 1].
    """
    terms = [
        (share, -layer, -term)
        for layer, window in enumerate(shares)
        for term, share in enumerate(window)
    ]
    target = energy * math.fsum(share for share, _, _ in terms) * (1 - SLACK)
    counts, held = [0] * len(shares), 0.0
    # Shares fall within a layer, so the largest first takes leading terms first; ties go to the
    # earlier layer.
    for share, layer, _ in sorted(terms, reverse=True):
        if held >= target:
            break
        counts[-layer] += 1
        held += share
    return counts


def elbow_count(values: Sequence[float]) -> tuple[int, str | None]:
    """Count the terms up to the point of the curve farthest below its chord, itself included.

    Gives all terms, and a sentence, when there is no elbow.

    Source: Satopaa, Albrecht, Irwin and Raghavan, "Finding a kneedle in a haystack" (2011).
    Departs from the source in: no smoothing, since singular values are already monotone.
    """
    last = len(values) - 1
    if last < 2:
        return len(values), f"no elbow: a window of {len(values)} is too short"
    span = values[0] - values[last]
    if span <= ROUNDING * values[0]:
        return len(values), "no elbow: the spectrum is flat"
    # Both axes are scaled to [0, 1]; the distance to the falling diagonal is (1 - x - y)/sqrt(2).
    depths = [1 - k / last - (values[k] - values[last]) / span for k in range(last + 1)]
    depth = max(depths)
    if depth < STRAIGHT:
        return len(values), "no elbow: the spectrum is nowhere below its chord"
    return depths.index(depth) + 1, None


def noise_edge_count(
    values: Sequence[float], squared_norm: float, shape: KroneckerShape
) -> tuple[int, str | None]:
    """Count the terms above the largest singular value that noise like the residual would have.

    The edge is s (sqrt(rows) + sqrt(columns)) of R(W), s^2 = residual energy / (out*in), from
    ``squared_norm`` = ||W||_F^2. Signal below the window counts as noise, so the edge is too high
    rather than too low. Gives all terms, and a sentence, when the window leaves no residual.

    Source: the idea of a threshold from the noise level, Gavish and Donoho (2014); the edge is
    that of a Gaussian matrix.
    """
    rest = squared_norm - math.fsum(value * value for value in values)
    if rest <= ROUNDING * squared_norm:
        return len(values), "no noise edge: the window leaves nothing of the weight"
    deviation = math.sqrt(rest / (shape.out_features * shape.in_features))
    edge = deviation * (math.sqrt(shape.m * shape.n) + math.sqrt(shape.p * shape.q))
    count = sum(value > edge for value in values)
    return count, None if count else "no term stands above the noise edge"
