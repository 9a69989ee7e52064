"""The factor-shape rules: how a weight (out, in) is split into Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kpsvd_tune.linalg.kronecker import KroneckerShape

RULES = ("balanced", "thin", "pissa")


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
    raise ValueError(f"unknown factor shape {rule!r}: expected one of {', '.join(RULES)} or n, p")


def _explicit(out_features: int, in_features: int, sizes: Mapping[str, int]) -> ShapeChoice:
    if set(sizes) != {"n", "p"}:
        raise ValueError(f"an explicit factor shape needs n and p, got {dict(sizes)}")
    n, p = sizes["n"], sizes["p"]
    for name, divisor, side, size in (("n", n, "in", in_features), ("p", p, "out", out_features)):
        if divisor < 1 or size % divisor:
            raise ValueError(f"{name} = {divisor} does not divide {side} = {size}")
    return ShapeChoice(KroneckerShape(out_features // p, n, p, in_features // n))


def _divisor_below_root(size: int) -> int:
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
