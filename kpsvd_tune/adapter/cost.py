"""Which way to apply an update and to differentiate it: a pure function of sizes and dtype.

No clock and no device is asked, so a run takes the same path every time. Costs are counted in
multiply-adds at the speed of a large matrix product; the constants are what products of other
forms were measured to cost beyond that (docs/performance.md has the measurements, and
scripts/benchmarks/paths.py repeats them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kpsvd_tune.linalg import KroneckerShape

# Building W + Delta moves two matrices of W's size and multiplies with an inner size of only 2r.
BUILD_PER_ENTRY = 41.0
BUILD_PER_TERM = 1.0
# Reading and writing an activation once, per entry: what keeps narrow products from full speed.
PASS_PER_ENTRY = 8.7
# Products batched over tokens, in the output and in the gradients, are too small for full speed.
BATCHED_SLOWNESS = 2.7
CHUNKED_SLOWNESS = 1.87
# The gradients' batched products have p columns: the slower, the fewer they are.
NARROW = 0.85
# The weight gradient is made at full speed; rearranging and contracting it is not.
REARRANGE_PER_ENTRY = 43.0
# A call of a small product, whatever its size.
CALL = 1.75e5


@dataclass(frozen=True)
class Plan:
    """How one call of a layer is computed.

    Args:
        path: ``activations`` applies the factors to x, ``weight`` builds W + Delta for the call.
        spread: Whether ``activations`` uses flat products (see :mod:`kpsvd_tune.adapter.kernel`).
        gradient: How the factors are differentiated: ``spread``, ``chunked`` or ``full``.
    """

    path: str
    spread: bool
    gradient: str


def choose_plan(
    tokens: int,
    rank: int,
    shape: KroneckerShape,
    dtype: torch.dtype,
    path: str = "auto",
    is_training: bool = True,
) -> Plan:
    """Choose the cheapest way for one call.

    Args:
        tokens: Number of rows of x.
        rank: Kronecker rank r.
        shape: The factors' shape.
        dtype: The base layer's dtype. In 16 bits W + Delta may not be rounded, so the weight path
            pays for a product with Delta beside the base's own.
        path: auto, activations or weight; the last two force the path.
        is_training: Whether the call is differentiated.
    """
    flat, batched = activation_cost(tokens, rank, shape)
    spread = flat <= batched
    gradient, lowest = "spread", float("inf")
    # A loop because torch.compile traces no min() with a key over sizes that vary.
    for kind, cost in gradient_costs(tokens, rank, shape).items():
        if cost < lowest:
            gradient, lowest = kind, cost
    if path == "auto":
        directions = 2 if is_training else 1
        activations = directions * (flat if spread else batched)
        if is_training and spread and gradient == "spread":
            # The projection of gy is shared between the gradients of x and of the factors.
            activations -= tokens * rank * shape.n * shape.p * shape.out_features
        weight = directions * build_cost(rank, shape)
        if torch.finfo(dtype).bits < 32:
            weight += tokens * shape.out_features * shape.in_features
        path = "weight" if weight < activations else "activations"
    return Plan(path, spread, gradient)


def build_cost(rank: int, shape: KroneckerShape) -> float:
    """Cost of W + Delta as a matrix."""
    entries = shape.out_features * shape.in_features
    return entries * (BUILD_PER_ENTRY + BUILD_PER_TERM * 2 * rank) + CALL


def activation_cost(tokens: int, rank: int, shape: KroneckerShape) -> tuple[float, float]:
    """Cost of adding x Delta^T to y by flat products and by products batched over tokens."""
    out, size = shape.out_features, shape.in_features
    right = 2 * rank * shape.p * size
    passes = PASS_PER_ENTRY * (size + 2 * out)
    flat_width = 2 * rank * shape.n * shape.p
    flat = tokens * (right + flat_width * out + passes) + flat_width * out * PASS_PER_ENTRY
    batched = tokens * (BATCHED_SLOWNESS * (right + 2 * rank * shape.n * out) + passes)
    return flat + 2 * CALL, batched + 3 * CALL


def gradient_costs(tokens: int, rank: int, shape: KroneckerShape) -> dict[str, float]:
    """Cost of the factors' gradients by each way of :mod:`kpsvd_tune.adapter.gradient`."""
    out, size = shape.out_features, shape.in_features
    narrow = rank * shape.p * size
    passes = PASS_PER_ENTRY * (size + out)
    return {
        "spread": tokens * 2 * (narrow + rank * shape.n * shape.p * out + passes),
        "chunked": tokens
        * CHUNKED_SLOWNESS
        * (1 + NARROW / shape.p)
        * 2
        * (narrow + rank * shape.n * out)
        + tokens * 2 * passes,
        "full": out * size * (tokens + REARRANGE_PER_ENTRY + 2 * rank),
    }
