"""Kronecker shapes, the Van Loan-Pitsianis rearrangement, and sums of Kronecker products.

Letters used here: W (out, in) is a weight with out = m*p and in = n*q; a left factor A is
(m, n), a right factor B is (p, q); r is the Kronecker rank, the number of terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to so many terms are added one by one where rows of B are so wide; else one matrix product.
_FEW_TERMS, _WIDE = 4, 16


@dataclass(frozen=True)
class KroneckerShape:
    """How a weight (out, in) = (m*p, n*q) splits into left (m, n) and right (p, q) factors.

    Raises:
        ValueError: A size is not a positive integer.
    """

    m: int
    n: int
    p: int
    q: int

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.p, self.q) < 1:
            raise ValueError(f"factor sizes must be at least 1, got {self.as_tuple()}")

    def as_tuple(self) -> tuple[int, int, int, int]:
        """Return (m, n, p, q)."""
        return (self.m, self.n, self.p, self.q)

    @property
    def out_features(self) -> int:
        """Rows of the weight, m*p."""
        return self.m * self.p

    @property
    def in_features(self) -> int:
        """Columns of the weight, n*q."""
        return self.n * self.q

    @property
    def num_parameters(self) -> int:
        """Parameters of one term, m*n + p*q."""
        return self.m * self.n + self.p * self.q

    @property
    def max_rank(self) -> int:
        """The largest possible Kronecker rank, min(m*n, p*q)."""
        return min(self.m * self.n, self.p * self.q)


FORMS = ("both", "left", "right", "core")


def num_trained(form: str, shape: KroneckerShape, rank: int) -> int:
    """Trained values of a layer.

    Args:
        form: both (each term's two factors), left or right (one of them), core (r x r numbers).
        shape: The Kronecker shape.
        rank: Its number of terms r.
    """
    if form == "core":
        return rank * rank
    sizes = {"left": shape.m * shape.n, "right": shape.p * shape.q}
    return rank * sizes.get(form, shape.num_parameters)


def rearrange(weight: Tensor, shape: KroneckerShape) -> Tensor:
    """Rearrange W so that Kronecker products become rank-one matrices.

    R(W)[i*n + j, k*q + l] = W[i*p + k, j*q + l], hence R(A kron B) = vec(A) vec(B)^T with
    row-major vec, and ||R(W)||_F = ||W||_F. A plain reshape does not have this property.

    Args:
        weight: W, (m*p, n*q), any dtype.
        shape: The split of the sizes.

    Returns:
        R(W), (m*n, p*q), same dtype; a copy unless the permutation happens to be trivial.

    Raises:
        ValueError: The weight's sizes are not those of the shape.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products" (1993), section 2.
    """
    m, n, p, q = shape.as_tuple()
    if weight.shape != (m * p, n * q):
        raise ValueError(
            f"a weight of size {tuple(weight.shape)} does not split as (m, n, p, q) = "
            f"{shape.as_tuple()}: expected size {(m * p, n * q)}"
        )
    return weight.reshape(m, p, n, q).permute(0, 2, 1, 3).reshape(m * n, p * q)


def unrearrange(rearranged: Tensor, shape: KroneckerShape) -> Tensor:
    """Undo :func:`rearrange`.

    Args:
        rearranged: R(W), (m*n, p*q), any dtype.
        shape: The split of the sizes.

    Returns:
        W, (m*p, n*q), same dtype.

    Raises:
        ValueError: The sizes are not those of the shape.
    """
    m, n, p, q = shape.as_tuple()
    if rearranged.shape != (m * n, p * q):
        raise ValueError(
            f"a rearranged matrix of size {tuple(rearranged.shape)} does not belong to (m, n, p, q)"
            f" = {shape.as_tuple()}: expected size {(m * n, p * q)}"
        )
    return rearranged.reshape(m, n, p, q).permute(0, 2, 1, 3).reshape(m * p, n * q)


def kron_sum(left: Tensor, right: Tensor) -> Tensor:
    """Return sum_k left[k] kron right[k] as a dense matrix.

    One matrix product of the vectorised factors, then the inverse rearrangement.

    Args:
        left: A, (r, m, n), floating.
        right: B, (r, p, q), same dtype and number of terms.

    Returns:
        (m*p, n*q), same dtype; zeros when r is 0.

    Raises:
        ValueError: The factors are not stacks of matrices or differ in their number of terms.
    """
    shape = _shape_of(left, right)
    return unrearrange(left.flatten(1).T @ right.flatten(1), shape)


def kron_sum_rows(
    left: Tensor,
    right: Tensor,
    begin: int,
    end: int,
    out: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    """Return some rows of :func:`kron_sum`, of which nothing else is made.

    Args:
        left: A, (r, m, n), floating.
        right: B, (r, p, q), same dtype and number of terms.
        begin: The first row.
        end: One past the last row, at most m*p.
        out: Filled and returned where given, (end - begin, n*q), contiguous, same dtype.
        is_added: The rows are added to what ``out`` holds.

    Returns:
        (end - begin, n*q), same dtype.

    Raises:
        ValueError: As :func:`kron_sum`, or there are no such rows.
    """
    shape = _shape_of(left, right)
    if not 0 <= begin < end <= shape.out_features:
        raise ValueError(f"rows {begin} to {end} of {shape.out_features}")
    if out is None:
        out = left.new_empty(end - begin, shape.in_features)
    p, row = shape.p, begin
    while row < end:
        # Row i*p + k belongs to row i of A and row k of B.
        i, k = divmod(row, p)
        count, last = 1, min(p, k + end - row)
        if k == 0 and last == p:
            count = (end - row) // p
        rows = count * (last - k)
        part = out[row - begin : row - begin + rows].view(count, last - k, shape.n, shape.q)
        _add_terms(left[:, i : i + count], right[:, k:last], part, is_added)
        row += rows
    return out


def _add_terms(left: Tensor, right: Tensor, out: Tensor, is_added: bool) -> None:
    """Fill (m, p, n, q) with sum_k A[k, i, j] B[k, a, b] at [i, a, j, b], or add that to it."""
    if 0 < len(left) <= _FEW_TERMS and right.shape[2] >= _WIDE:
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            factors = one[:, None, :, None], other[None, :, None, :]
            if index or is_added:
                out.addcmul_(*factors)
            else:
                torch.mul(*factors, out=out)
        return
    if len(left) > left.shape[2]:
        # Broadcast, the product below would copy B for every row of A.
        product = left.flatten(1).T @ right.flatten(1)
        sizes = left.shape[1], left.shape[2], right.shape[1], right.shape[2]
        found = product.view(sizes).permute(0, 2, 1, 3)
    elif is_added:
        found = left.permute(1, 2, 0)[:, None] @ right.permute(1, 0, 2)
    else:
        torch.matmul(left.permute(1, 2, 0)[:, None], right.permute(1, 0, 2), out=out)
        return
    if is_added:
        out.add_(found)
    else:
        out.copy_(found)


def _shape_of(left: Tensor, right: Tensor) -> KroneckerShape:
    if left.dim() != 3 or right.dim() != 3 or left.shape[0] != right.shape[0]:
        raise ValueError(
            f"expected factors of sizes (r, m, n) and (r, p, q), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    return KroneckerShape(left.shape[1], left.shape[2], right.shape[1], right.shape[2])
