"""The factor-shape rules: how a weight (out, in) is split into Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kpsvd_tune.linalg.kpsvd import kpsvd
from kpsvd_tune.linalg.kronecker import KroneckerShape

RULES = ("balanced", "thin", "pissa")
# auto: multiply-adds of one term for one token, as a share of the frozen layer's out*in.
MAX_COMPUTE = 0.05
# auto: exact LoRA width of one term. Delta needs twice that a term, so four terms still fit into
# 512, the widest LoRA that common servers accept.
MAX_LORA_WIDTH = 64
# auto: shapes are told apart by differences far above this share of their energy.
AUTO_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ShapeChoice:
    """A shape and, when the rule had to fall back, one sentence that says so."""

    shape: KroneckerShape
    note: str | None = None


def choose_shape(out_features: int, in_features: int, rule: str | Mapping[str, int]) -> ShapeChoice:
    """Split out = m*p and in = n*q by a rule.

    ``balanced``: n is the largest divisor of ``in`` not above its square root, p likewise of
    ``out``. ``thin``: n = p = 2 where both sizes are even, else 1. ``pissa``: n = p = 1, where
    R(W) = W. A mapping ``{"n": n, "p": p}`` sets both; each must divide its size.

    Args:
        out_features: Rows of the weight, at least 1.
        in_features: Columns of the weight, at least 1.
        rule: A rule's name or explicit sizes.

    Returns:
        The shape, with a note when a prime size forced a side to 1 or ``thin`` was impossible.

    Raises:
        ValueError: Unknown rule, explicit sizes that do not divide, or sizes below 1.
    """
    if min(out_features, in_features) < 1:
        raise ValueError(f"a weight of size {(out_features, in_features)} has nothing to split")
    if isinstance(rule, Mapping):
        return _explicit(out_features, in_features, rule)
    if rule == "pissa":
        return ShapeChoice(KroneckerShape(out_features, 1, 1, in_features))
    if rule == "thin":
        if out_features % 2 == 0 and in_features % 2 == 0:
            return ShapeChoice(KroneckerShape(out_features // 2, 2, 2, in_features // 2))
        return ShapeChoice(
            KroneckerShape(out_features, 1, 1, in_features),
            f"thin needs even sizes, got ({out_features}, {in_features}): n = p = 1",
        )
    if rule == "balanced":
        n, p = _divisor_below_root(in_features), _divisor_below_root(out_features)
        sides = [
            f"{name} = {size} is prime"
            for name, size, divisor in (("out", out_features, p), ("in", in_features, n))
            if divisor == 1 and size > 1
        ]
        note = f"{' and '.join(sides)}: that side is not split" if sides else None
        return ShapeChoice(KroneckerShape(out_features // p, n, p, in_features // n), note)
    if rule == "auto":
        raise ValueError("factor shape 'auto' depends on the weight: call auto_shape with it")
    raise ValueError(f"unknown factor shape {rule!r}: expected one of {', '.join(RULES)} or n, p")


def auto_shape(
    weight: Tensor,
    window: int = 16,
    *,
    max_compute: float = MAX_COMPUTE,
    max_lora_width: int = MAX_LORA_WIDTH,
    seed: int = 0,
) -> ShapeChoice:
    """Choose the shape that holds the most energy per trainable parameter of one matrix.

    Candidates are the divisor pairs nearest to n = p and to n/p = sqrt(in/out), where a term has
    the fewest parameters, the smaller of the two being 1, 4, 16, 64, ... up to the fourth root of
    out*in: two for each, so at most ten for any weight in use. Those above a limit drop out. Each
    of the others gets as many whole terms (at least one) as cost what ``window`` terms of
    n = p = 1 cost, and the energy of these terms over their parameters is compared. Equal
    parameters, not equal terms, since energy per parameter falls with every further term. Ties go
    to the smaller n*p, hence to fewer multiply-adds.

    Args:
        weight: W, (out, in), floating.
        window: Terms of n = p = 1 whose parameters are spent, at least 1.
        max_compute: Most multiply-adds of one term for one token, relative to out*in.
        max_lora_width: Widest exact LoRA form of one term, ``KroneckerShape.lora_width``.
        seed: Seeds the decompositions.

    Returns:
        The shape; with a note when no candidate is within the limits or the weight is zero, in
        which case it is n = p = 1.

    Raises:
        ValueError: An argument out of range, or a weight that cannot be decomposed.

    Source: our own rule; Cai, Chen and Xiao (KoPA, 2022) choose the shape by an information
    criterion, which also trades fit against parameters.
    """
    if weight.dim() != 2:
        raise ValueError(f"expected a weight of size (out, in), got {tuple(weight.shape)}")
    if window < 1:
        raise ValueError(f"the window must be at least 1, got {window}")
    out_features, in_features = weight.shape
    plain = choose_shape(out_features, in_features, "pissa").shape
    candidates = [
        shape
        for shape in candidate_shapes(out_features, in_features)
        if term_compute(shape) <= max_compute and shape.lora_width <= max_lora_width
    ]
    if not candidates:
        return ShapeChoice(plain, "auto: no shape is within the limits: n = p = 1")
    budget = window * plain.num_parameters
    best, most = plain, 0.0
    for shape in candidates:
        terms = min(max(1, budget // shape.num_parameters), shape.max_rank)
        found = kpsvd(weight, shape, terms, tolerance=AUTO_TOLERANCE, seed=seed)
        density = found.energy(terms) / (terms * shape.num_parameters)
        if density > most:
            best, most = shape, density
    return ShapeChoice(best, None if most else "auto: the weight is zero: n = p = 1")


def candidate_shapes(out_features: int, in_features: int) -> list[KroneckerShape]:
    """Return the shapes that ``auto`` compares, by rising n*p, then n; see :func:`auto_shape`."""
    skew = math.sqrt(in_features / out_features)
    pairs = set()
    size = 1
    while size**4 <= out_features * in_features:
        for wide, tall in ((1.0, 1.0), (max(skew, 1.0), max(1 / skew, 1.0))):
            n = _nearest_divisor(in_features, size * wide)
            p = _nearest_divisor(out_features, size * tall)
            pairs.add((n * p, n, p))
        size *= 4
    return [KroneckerShape(out_features // p, n, p, in_features // n) for _, n, p in sorted(pairs)]


def term_compute(shape: KroneckerShape) -> float:
    """Return the multiply-adds of one term for one token relative to out*in, in the cheaper order.

    Right factor first: in*p + out*n; left factor first: in*m + out*q.
    """
    rows, columns = shape.out_features, shape.in_features
    right_first = columns * shape.p + rows * shape.n
    left_first = columns * shape.m + rows * shape.q
    return min(right_first, left_first) / (rows * columns)


def _explicit(out_features: int, in_features: int, sizes: Mapping[str, int]) -> ShapeChoice:
    if set(sizes) != {"n", "p"}:
        raise ValueError(f"an explicit factor shape needs n and p, got {dict(sizes)}")
    n, p = sizes["n"], sizes["p"]
    for name, divisor, side, size in (("n", n, "in", in_features), ("p", p, "out", out_features)):
        if divisor < 1 or size % divisor:
            raise ValueError(f"{name} = {divisor} does not divide {side} = {size}")
    return ShapeChoice(KroneckerShape(out_features // p, n, p, in_features // n))


def _nearest_divisor(size: int, target: float) -> int:
    """The divisor with the smallest ratio to the target, the smaller of equals."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / target)))


def _divisor_below_root(size: int) -> int:
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
