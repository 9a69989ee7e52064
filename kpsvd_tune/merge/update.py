"""The update of one weight: added in float64, rounded once, and measured against what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.linalg import kron_sum_rows

# Entries that are computed at a time. In float64 they take a megabyte, which stays in a processor's
# cache; smaller blocks make two threads wait for each other's turn in Python.
_BLOCK = 1 << 17
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


@dataclass(frozen=True)
class _Scratch:
    """Memory for one block, which is used again for the next: fresh pages cost more than sums."""

    delta: Tensor  # the update, float64
    exact: Tensor  # float64
    wide: Tensor  # float64
    stored: Tensor  # in the dtype
    bits: Tensor  # integers of its width
    units: Tensor  # float32 where the dtype has 16 bits, else float64
    quotient: Tensor  # the same

    @classmethod
    def of(cls, size: tuple[int, int], dtype: torch.dtype) -> _Scratch:
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        double = torch.float64
        dtypes = double, double, double, dtype, _FORMATS[dtype].integer, wide, wide
        return cls(*(torch.empty(size, dtype=each) for each in dtypes))

    def first(self, rows: int) -> _Scratch:
        """The same memory for fewer rows."""
        return _Scratch(*(getattr(self, each.name)[:rows] for each in fields(self)))


class Update:
    """Adds an update to one weight, block by block, and measures what was stored.

    Args:
        name: The layer's, for messages.
        terms: The parts of Delta, each of the weight's size.
        dtype: Of the stored weight.
    """

    def __init__(self, name: str, terms: Sequence[Term], dtype: torch.dtype) -> None:
        self._name, self._terms, self._dtype = name, terms, dtype
        self._of_lost = self._of_update = self._of_weight = self._deviation = 0.0

    @torch.no_grad()
    def rows(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the updated weight in blocks of whole rows, as (first row, (rows, columns)).

        A block is overwritten by the next one.

        Args:
            weight: W, (m*p, n*q), floating.

        Raises:
            MergeError: An entry is not finite in the dtype.
        """
        step = min(len(weight), max(1, _BLOCK // weight.shape[1]))
        scratch = _Scratch.of((step, weight.shape[1]), self._dtype)
        for begin in range(0, len(weight), step):
            before = weight[begin : begin + step]
            block = scratch if len(before) == step else scratch.first(len(before))
            self._add_terms(begin, block)
            yield begin, self._stored(before, block)

    def _add_terms(self, begin: int, block: _Scratch) -> None:
        """Fill in rows of the update."""
        end = begin + len(block.delta)
        for index, term in enumerate(self._terms):
            out = block.delta if index == 0 else block.exact
            kron_sum_rows(term.left, term.right, begin, end, out)
            if term.weight != 1:
                out.mul_(term.weight)
            if index:
                block.delta.add_(out)

    def _stored(self, before: Tensor, block: _Scratch) -> Tensor:
        """W + Delta, rounded, and what it is measured by."""
        wide = block.wide.copy_(before)
        self._of_weight += _product(wide, wide)
        exact = torch.add(wide, block.delta, out=block.exact)
        stored = block.stored.copy_(exact)
        # What rounding takes away, exactly.
        lost = exact.sub_(wide.copy_(stored))
        self._of_update += _product(block.delta, block.delta)
        self._of_lost += _product(lost, block.delta)
        far = _in_last_places(lost, stored, block)
        # Whatever is not finite in the dtype is not finite here.
        if not math.isfinite(far):
            raise MergeError(
                f"{self._name}: the merged weight is not finite in {self._dtype}: the adapter is "
                "broken or the dtype's range too small; try --dtype float32"
            )
        self._deviation = max(self._deviation, far)
        return stored

    @property
    def kept(self) -> float:
        """<W' - W, Delta> / ||Delta||^2 with W' the stored weight; 1 where nothing is added.

        Far below 1 where W has 16 bits and Delta is smaller than half the spacing around it.
        """
        return 1 - self._of_lost / self._of_update if self._of_update > 0 else 1.0

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


def _in_last_places(lost: Tensor, stored: Tensor, block: _Scratch) -> float:
    """The largest |lost| in units in the last place of the stored numbers; `lost` is float64."""
    known = _FORMATS[stored.dtype]
    # The exponent's bits alone are a power of two; those of numbers below the normal ones are 0.
    torch.bitwise_and(stored.view(known.integer), known.exponent, out=block.bits)
    units = block.units.copy_(block.bits.view(stored.dtype))
    # Divided by a power of two, float32 is as good as float64.
    far = _largest(block.quotient.copy_(lost).div_(units))
    if not math.isfinite(far):
        far = _largest(block.quotient.copy_(lost).div_(units.clamp_(min=2.0**known.least)))
    return far * 2.0 ** (known.digits - 1)


def _largest(values: Tensor) -> float:
    """The largest absolute value."""
    least, most = torch.aminmax(values)
    # Of a number and NaN, max would take the number.
    return float(torch.maximum(-least, most))
