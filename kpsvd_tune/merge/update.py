"""The update of one weight: added in float64, rounded once, and measured against what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.linalg import kron_sum_rows

# Entries that are computed at a time. In float64 they take half a megabyte, which stays in a
# processor's cache, and in memory that the allocator keeps: larger blocks are given back and
# fetched again page by page, which took more time than the arithmetic.
_BLOCK = 1 << 16
# The largest deviation that passes, in units in the last place. Rounding to nearest gives a half;
# torch rounds float64 to 16 bits by way of float32, which adds at most 2^-14.
MOST_DEVIATION = 0.5 + 2**-10


@dataclass(frozen=True)
class _Format:
    """How a dtype holds a number."""

    integer: torch.dtype  # of the same width
    exponent: int  # the mask of the exponent's bits
    digits: int  # binary digits of the significand, the hidden one counted
    least: int  # the exponent of the smallest normal number


_FORMATS = {
    torch.bfloat16: _Format(torch.int16, 0x7F80, 8, -126),
    torch.float16: _Format(torch.int16, 0x7C00, 11, -14),
    torch.float32: _Format(torch.int32, 0x7F800000, 24, -126),
    torch.float64: _Format(torch.int64, 0x7FF0000000000000, 53, -1022),
}


@dataclass(frozen=True)
class Term:
    """A part of a weight's update: weight * sum_k left[k] kron right[k]."""

    left: Tensor  # (s, m, n), float64
    right: Tensor  # (s, p, q), float64
    weight: float = 1.0

    def transposed(self) -> Term:
        """The same for a weight that is stored as (in, out)."""
        return Term(self.left.mT.contiguous(), self.right.mT.contiguous(), self.weight)


class Update:
    """Adds an update to one weight, block by block, and measures what was stored.

    Args:
        name: The layer's, for messages.
        terms: The parts of Delta, each of the weight's size.
        dtype: Of the stored weight.
    """

    def __init__(self, name: str, terms: Sequence[Term], dtype: torch.dtype) -> None:
        self._name, self._terms, self._dtype = name, terms, dtype
        self._overlap = self._of_update = self._of_weight = self._deviation = 0.0

    @torch.no_grad()
    def rows(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the updated weight in blocks of whole rows, as (first row, (rows, columns)).

        Args:
            weight: W, (m*p, n*q), floating.

        Raises:
            MergeError: An entry is not finite in the dtype.
        """
        step = max(1, _BLOCK // weight.shape[1])
        for begin in range(0, len(weight), step):
            before = weight[begin : begin + step].double()
            end = begin + len(before)
            delta = self._delta(begin, end)
            yield begin, self._stored(before, delta)

    def _delta(self, begin: int, end: int) -> Tensor:
        """Rows of the update."""
        found: Tensor | None = None
        for term in self._terms:
            part = kron_sum_rows(term.left, term.right, begin, end)
            part = part if term.weight == 1 else part.mul_(term.weight)
            found = part if found is None else found.add_(part)
        assert found is not None
        return found

    def _stored(self, before: Tensor, delta: Tensor) -> Tensor:
        exact = before + delta
        stored = exact.to(self._dtype)
        after = stored.double()
        # The difference is exact; its quotient by a power of two is as good in float32.
        units = last_places(stored)
        far = float(exact.sub_(after).to(units.dtype).abs_().div_(units).max())
        # Whatever is not finite in the dtype is not finite here.
        if not math.isfinite(far):
            raise MergeError(
                f"{self._name}: the merged weight is not finite in {self._dtype}: the adapter is "
                "broken or the dtype's range too small; try --dtype float32"
            )
        self._deviation = max(self._deviation, far)
        self._of_weight += _product(before, before)
        self._of_update += _product(delta, delta)
        self._overlap += _product(after.sub_(before), delta)
        return stored

    @property
    def kept(self) -> float:
        """<W' - W, Delta> / ||Delta||^2 with W' the stored weight; 1 where nothing is added.

        Far below 1 where W has 16 bits and Delta is smaller than half the spacing around it.
        """
        return self._overlap / self._of_update if self._of_update > 0 else 1.0

    @property
    def relative_size(self) -> float:
        """||Delta||_F / ||W||_F; 0 for a weight of zeros."""
        return float((self._of_update / self._of_weight) ** 0.5) if self._of_weight > 0 else 0.0

    @property
    def deviation(self) -> float:
        """The largest |W' - (W + Delta)|, in units in the last place of the stored number."""
        return self._deviation


def _product(one: Tensor, other: Tensor) -> float:
    """The inner product of two matrices."""
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))


def last_places(stored: Tensor) -> Tensor:
    """The unit in the last place of each stored number: float32 for 16 bits, else float64."""
    known = _FORMATS[stored.dtype]
    wide = torch.float32 if stored.dtype.itemsize == 2 else torch.float64
    # The exponent's bits alone are a power of two; those of numbers below the normal ones are 0.
    powers = (stored.view(known.integer) & known.exponent).view(stored.dtype).to(wide)
    return powers.clamp_(min=2.0**known.least).mul_(2.0 ** (1 - known.digits))
