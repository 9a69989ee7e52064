"""The factor-shape rules: how a weight (out, in) is split into Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def nearest_shape(
    out_features: int, in_features: int, form: str, wanted: int | Sequence[int]
) -> ShapeChoice:
    """Split out = m*p and in = n*q so that the trained factor has about the wanted size.

    Then a layer costs the same whatever its width.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        form: left, whose factors are (m, n), or right, whose are (p, q).
        wanted: Rows and columns of the trained factor; one number stands for both.

    Returns:
        The shape of the nearest divisors, by their ratio to what was wanted and the smaller of
        two that are as near; the note says where they are not the numbers wanted.

    Raises:
        ValueError: A form that trains not one factor, or sizes that are no two whole numbers of 1
            and more.
    """
    if form not in ("left", "right"):
        raise ValueError(
            f"factor_size is the size of the one factor that the forms left and right train, got "
            f"it with the form {form}: set factor_shape instead"
        )
    rows, columns = (wanted, wanted) if isinstance(wanted, int) else _pair(wanted)
    if min(rows, columns) < 1:
        raise ValueError(f"factor_size must be at least 1, got {rows} x {columns}")
    m, n = _nearest_divisor(out_features, rows), _nearest_divisor(in_features, columns)
    note = None
    if (m, n) != (rows, columns):
        note = f"factor_size {rows} x {columns}: the nearest divisors give {m} x {n}"
    shape = KroneckerShape(m, n, out_features // m, in_features // n)
    if form == "right":
        shape = KroneckerShape(out_features // m, in_features // n, m, n)
    return ShapeChoice(shape, note)


def _pair(wanted: Sequence[int]) -> tuple[int, int]:
    is_list = isinstance(wanted, (list, tuple))
    if not is_list or len(wanted) != 2 or not all(isinstance(each, int) for each in wanted):
        raise ValueError(f"factor_size: got {wanted!r}; expected two whole numbers or one")
    return wanted[0], wanted[1]


def _nearest_divisor(size: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*small, *(size // d for d in small)})
    return min(divisors, key=lambda d: max(d, wanted) / min(d, wanted))


def _divisor_below_root(size: int) -> int:
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
