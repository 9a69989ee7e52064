"""The update of one weight: added in float64, rounded once, and measured against what is stored.

A 16-bit weight is rounded by way of float32, and what the sum in float64 is to the one in float32
is known, so that a 16-bit weight is measured in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.linalg import kron_sum_rows

# Entries that are computed at a time. In float64 they take two megabytes, which stay in a
# processor's outer cache; with smaller blocks Python takes a larger part of the time.
_BLOCK = 1 << 18
# The largest deviation that passes, in units in the last place. Rounding to nearest gives a half;
# 16 bits are rounded by way of float32, which adds at most 2^-14.
MOST_DEVIATION = 0.5 + 2**-10
# Products in float32 below this, and those that are not finite, are taken again in float64: squares
# of numbers below 1e-22 are zero in float32.
_LEAST_PRODUCT = 1e-25


@dataclass(frozen=True)
class _Format:
    """How a dtype holds a number."""

    integer: torch.dtype  # of the same width
    exponent: int  # the mask of the exponent's bits
    digits: int  # binary digits of the significand, the hidden one counted
    least: int  # the exponent of the smallest normal number

    @property
    def spare(self) -> int:
        """The digits that float32 has more."""
        return 24 - self.digits


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


class Scratch:
    """Memory for blocks, which is used again and again: fresh pages cost more than sums."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The memory of that name, in the size of a block; of other dtypes it is the same one."""
        key = name, like.shape, dtype
        if key not in self._views:
            num_bytes = like.numel() * dtype.itemsize
            held = self._held.get(name)
            if held is None or len(held) < num_bytes:
                # Views of what was too small keep it alive.
                self._views = {each: view for each, view in self._views.items() if each[0] != name}
                held = self._held[name] = torch.empty(num_bytes, dtype=torch.uint8)
            self._views[key] = held[:num_bytes].view(dtype).view(like.shape)
        return self._views[key]


class Update:
    """Adds an update to one weight, block by block, and measures what was stored.

    Args:
        name: The layer's, for messages.
        terms: The parts of Delta, each of the weight's size.
        dtype: Of the stored weight.
        scratch: Memory that one update after the other may use.
    """

    def __init__(
        self, name: str, terms: Sequence[Term], dtype: torch.dtype, scratch: Scratch | None = None
    ) -> None:
        self._name, self._dtype = name, dtype
        self._scratch = scratch or Scratch()
        self._terms = [(each.weight * each.left, each.right) for each in terms]
        self._of_moved = self._of_update = self._of_weight = self._deviation = 0.0
        # Of 16-bit weights: the factors in float32, where there is one term.
        self._alone: tuple[Tensor, Tensor] | None = None
        if dtype.itemsize == 2 and len(terms) == 1 and len(terms[0].left) == 1:
            left, right = self._terms[0]
            self._alone = left.float(), right.float()
            self._of_update = float(left.square().sum() * right.square().sum())

    @torch.no_grad()
    def rows(self, weight: Tensor, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the updated weight in blocks of whole rows, as (first row, (rows, columns)).

        A block is overwritten by the next one, or is a part of `into` where that is given.

        Args:
            weight: W, (m*p, n*q), floating.
            into: Filled with the updated weight: of W's size, in the dtype; it may be W itself.

        Raises:
            MergeError: An entry is not finite in the dtype.
        """
        step = min(len(weight), max(1, _BLOCK // weight.shape[1]))
        add = self._add_narrow if self._dtype.itemsize == 2 else self._add_wide
        for begin in range(0, len(weight), step):
            before = weight[begin : begin + step]
            if into is None:
                stored = self._scratch.get("stored", before, self._dtype)
            else:
                stored = into[begin : begin + step]
            add(begin, before, stored)
            yield begin, stored

    def _fill(self, begin: int, out: Tensor) -> None:
        """Fill in rows of the update, float64."""
        end = begin + len(out)
        for index, (left, right) in enumerate(self._terms):
            kron_sum_rows(left, right, begin, end, out, is_added=index > 0)

    def _add_wide(self, begin: int, before: Tensor, stored: Tensor) -> None:
        """Store W + Delta, and measure it in float64."""
        scratch = self._scratch
        delta, exact, wide = (scratch.get(name, before) for name in ("delta", "exact", "wide"))
        self._fill(begin, delta)
        self._of_weight += _product(wide.copy_(before), wide)
        stored.copy_(torch.add(wide, delta, out=exact))
        # What rounding takes away, exactly.
        lost = exact.sub_(wide.copy_(stored))
        of_update = _product(delta, delta)
        self._of_update += of_update
        self._of_moved += of_update - _product(lost, delta)
        self._note(_in_last_places(lost, stored, scratch))

    def _add_narrow(self, begin: int, before: Tensor, stored: Tensor) -> None:
        """Store W + Delta in 16 bits, and measure in float32 what the last rounding does."""
        single, integer, end = torch.float32, torch.int32, begin + len(before)
        scratch, known = self._scratch, _FORMATS[stored.dtype]
        weight = scratch.get("weight", before, single).copy_(before)
        # Torch has no fast way from float16 to float64 but by float32.
        narrow = weight if before.dtype == torch.float16 else before
        exact = scratch.get("exact", before).copy_(narrow)
        self._of_weight += _product(exact, exact)
        update = scratch.get("update", before, single)
        if self._alone is not None:
            # The numbers of one term cannot cancel, so that float32 has them to its last digit.
            kron_sum_rows(*self._terms[0], begin, end, exact, is_added=True)
            kron_sum_rows(*self._alone, begin, end, update)
        else:
            delta = scratch.get("delta", before)
            self._fill(begin, delta)
            self._of_update += _product(delta, delta)
            update.copy_(delta)
            exact.add_(delta)
        near = scratch.get("near", before, single).copy_(exact)
        # In the memory of the sum, which is needed no more.
        back = scratch.get("exact", before, single).copy_(stored.copy_(near))
        # The bits of float32 count its numbers, of which 2^spare are a unit of the 16-bit number.
        # Below a power of two the unit is half as large: then this says more than the distance.
        bits, steps = back.view(integer), near.view(integer)
        far = _largest(torch.sub(bits, steps, out=steps)) / 2**known.spare
        if not far <= 0.5:
            # Units of numbers below the normal ones of float16 are larger than that.
            torch.sub(bits, steps, out=steps)
            far = _in_last_places(near.sub_(back), stored, scratch)
        # From what was stored and not from the sum: float32 loses an update of 2^-25 of the weight.
        of_moved = _product(back.sub_(weight), update)
        self._of_moved += of_moved
        if self._of_update > 0:
            # The sum in float64 is at most half a number of float32 from the one in float32.
            far += 2.0 ** -(known.spare + 1)
        # What is not finite makes the product so.
        self._note(far if math.isfinite(of_moved) else math.inf)

    def _note(self, far: float) -> None:
        """Take in the largest deviation of a block."""
        # Whatever is not finite in the dtype is not finite here.
        if not math.isfinite(far):
            raise MergeError(
                f"{self._name}: the merged weight is not finite in {self._dtype}: the adapter is "
                "broken or the dtype's range too small; try --dtype float32"
            )
        self._deviation = max(self._deviation, far)

    @property
    def kept(self) -> float:
        """<W' - W, Delta> / ||Delta||^2 with W' the stored weight; 1 where nothing is added.

        Far below 1 where W has 16 bits and Delta is smaller than half the spacing around it.
        """
        return self._of_moved / self._of_update if self._of_update > 0 else 1.0

    @property
    def relative_size(self) -> float:
        """||Delta||_F / ||W||_F; 0 for a weight of zeros."""
        return float((self._of_update / self._of_weight) ** 0.5) if self._of_weight > 0 else 0.0

    @property
    def deviation(self) -> float:
        """The largest |W' - (W + Delta)|, in units in the last place of the stored number.

        For 16 bits a bound of it, at most 2^-14 above.
        """
        return self._deviation


def _product(one: Tensor, other: Tensor) -> float:
    """The inner product of two matrices; of float32 each row is summed up in it, all in float64."""
    if one.dtype == torch.float64:
        return float(torch.dot(one.view(-1), other.view(-1)))
    found = float(torch.linalg.vecdot(one, other).double().sum())
    if not _LEAST_PRODUCT < abs(found) < math.inf:
        return _product(one.double(), other.double())
    return found


def _in_last_places(lost: Tensor, stored: Tensor, scratch: Scratch) -> float:
    """The largest |lost| in units in the last place of the stored numbers."""
    known = _FORMATS[stored.dtype]
    # The exponent's bits alone are a power of two; those of numbers below the normal ones are 0.
    bits = scratch.get("bits", stored, known.integer)
    torch.bitwise_and(stored.view(known.integer), known.exponent, out=bits)
    units = scratch.get("units", stored, lost.dtype).copy_(bits.view(stored.dtype))
    # Divided by a power of two, float32 is as good as float64.
    far = _largest(units.clamp_(min=2.0**known.least).reciprocal_().mul_(lost))
    return far * 2.0 ** (known.digits - 1)


def _largest(values: Tensor) -> float:
    """The largest absolute value."""
    least, most = (float(each) for each in torch.aminmax(values))
    # Of a number and NaN, max would take the number.
    return max(-least, most) if least <= most else math.nan
