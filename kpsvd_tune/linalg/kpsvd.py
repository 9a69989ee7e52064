"""Truncated KPSVD of one matrix: the leading terms of W = sum_k sigma_k U_k kron V_k.

Letters: M is R(W), or for its Gram matrix R(W)^T where that is smaller, (rows, cols); k is the
number of terms wanted. Bases of the row space are kept as rows, (j, cols), because products with
row-major blocks read M in the order in which it lies in memory. docs/decompose.md holds the
measurements behind the constants, and what was tried and did not help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.linalg.kronecker import KroneckerShape, rearrange

# Up to this smaller side all eigenvectors of the Gram matrix cost about 0.1 s, so that exact
# leading terms come for at most twice the time of the iteration.
DIRECT_SIZE = 768
# Vectors in a Krylov block. Narrow blocks reach a higher polynomial degree for the same number of
# products, wide ones use the processor better.
BLOCK_SIZE = 16
# Entries of M in one slice: its float32 form (2 MB) stays in cache between its two products.
SLICE_ENTRIES = 2**19


@dataclass(frozen=True)
class KPSVD:
    """Leading terms of a Kronecker-product SVD.

    Attributes:
        values: KP singular values sigma_k, (k,), float64, descending.
        left: U_k, (k, m, n), orthonormal as vectors, float32 (float64 for a float64 weight).
        right: V_k, (k, p, q), likewise.
        shape: The Kronecker shape.
        squared_norm: ||W||_F^2, of which shares are taken without a full decomposition.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    shape: KroneckerShape
    squared_norm: float

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A0 (rank, m, n) and B0 (rank, p, q), both scaled by sqrt(sigma_k).

        Raises:
            ValueError: More terms are asked for than were computed.
        """
        if not 0 <= rank <= len(self.values):
            raise ValueError(f"rank {rank} is outside 0..{len(self.values)}, the computed terms")
        root = self.values[:rank].sqrt().to(self.left.dtype)[:, None, None]
        return self.left[:rank] * root, self.right[:rank] * root


def kpsvd(
    weight: Tensor,
    shape: KroneckerShape,
    num_terms: int,
    *,
    tolerance: float = 5e-3,
    seed: int = 0,
) -> KPSVD:
    """Compute the first terms of the Kronecker-product SVD of a matrix.

    The best sum of r Kronecker products in Frobenius norm is given by the leading r singular
    triplets of R(W) (Eckart-Young). A small R(W) is decomposed whole through its Gram matrix,
    one of which most terms are wanted by LAPACK's SVD, a large one by block Lanczos.

    Lanczos stops when two further blocks raise the energy of the leading ``num_terms`` by less
    than a quarter of ``tolerance``. That is an estimate of the missing share of the optimum's
    energy, not a bound.

    Signs: in every U_k the entry of largest magnitude is positive.

    Args:
        weight: W, (m*p, n*q), floating, any device.
        shape: The Kronecker shape.
        num_terms: Terms wanted, at least 1; more than ``shape.max_rank`` gives all there are.
        tolerance: Accepted missing share of the leading energy, in [0, 1); 0 asks for LAPACK.
        seed: Seeds the start block; equal seeds and thread counts give equal bits.

    Returns:
        The terms, in float32 (float64 for a float64 weight).

    Raises:
        ValueError: Wrong sizes, a non-finite weight, or an argument out of range.

    Source: Van Loan and Pitsianis (1993); Golub and Underwood (1977) for block Lanczos; Musco
    and Musco (2015) for why a Krylov space, not a power iteration, is needed on flat spectra.
    """
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1, got {num_terms}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    if not weight.is_floating_point():
        raise ValueError(f"expected a floating-point weight, got {weight.dtype}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rearranged = rearrange(weight.detach(), shape).to(dtype)
    squared_norm = _squared_norm(rearranged)
    if not math.isfinite(squared_norm):
        _refuse(rearranged)
    k = min(num_terms, shape.max_rank)
    if tolerance == 0 or 4 * k > shape.max_rank:
        u, values, vt = torch.linalg.svd(rearranged, full_matrices=False)
        left, values, right = u[:, :k].T, values[:k], vt[:k]
    elif shape.max_rank > DIRECT_SIZE:
        vectors = _lanczos_vectors(rearranged, k, tolerance, seed)
        left, values, right = _triplets(rearranged, vectors)
    elif rearranged.shape[0] >= rearranged.shape[1]:
        left, values, right = _triplets(rearranged, _gram_vectors(rearranged, k))
    else:
        right, values, left = _triplets(rearranged.T, _gram_vectors(rearranged.T, k))
    signs = _signs(left)
    m, n, p, q = shape.as_tuple()
    return KPSVD(
        values=values.double(),
        left=(left * signs).reshape(k, m, n).contiguous(),
        right=(right * signs).reshape(k, p, q).contiguous(),
        shape=shape,
        squared_norm=squared_norm,
    )


def _gram_vectors(matrix: Tensor, k: int) -> Tensor:
    """Leading k right singular vectors, (k, cols), from all eigenvectors of M^T M."""
    vectors: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    return vectors[:, -k:].T


def _lanczos_vectors(matrix: Tensor, k: int, tolerance: float, seed: int) -> Tensor:
    """Leading k right singular vectors, (k, cols), by block Lanczos on M^T M.

    A wide M is not transposed: the longer vectors cost less than reading M across its rows.
    """
    cols = matrix.shape[1]
    generator = torch.Generator().manual_seed(seed)
    block = basis = _orthonormal_rows(_gaussian((BLOCK_SIZE, cols), matrix, generator))
    # M^T M on the basis, (j, j); its eigenvalues are squared Ritz values.
    projected = matrix.new_zeros(0, 0, dtype=torch.float64)
    energies: list[float] = []
    while True:
        product = _gram_product(matrix, block)
        projected = _bordered(projected, (product @ basis.T).double())
        energies.append(float(torch.linalg.eigvalsh(projected)[-k:].sum()))
        has_terms = len(basis) >= k and len(energies) > 2
        if has_terms and energies[-1] - energies[-3] <= 0.25 * tolerance * energies[-1]:
            break
        if len(basis) + BLOCK_SIZE > cols:
            break
        # Once the basis holds all that M can reach, nothing but rounding is left of the product,
        # most of it inside the basis, and no orthogonalisation can make new directions of that:
        # noise just above rounding can, and changes nothing otherwise. The second pass removes
        # what rounding left of the first, the third what it left where noise was all there was.
        size = float(torch.linalg.vector_norm(product)) or 1.0
        noise = _gaussian(block.shape, matrix, generator)
        block = product + noise * (size * torch.finfo(matrix.dtype).eps / math.sqrt(len(block)))
        for _ in range(3):
            block = _orthonormal_rows(block - (block @ basis.T) @ basis)
        basis = torch.cat([basis, block])
    vectors: Tensor = torch.linalg.eigh(projected).eigenvectors
    return vectors[:, -k:].T.to(matrix.dtype) @ basis


def _gaussian(size: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian rows of norm 1 or so; drawn on the CPU so that they depend on no device."""
    drawn = torch.randn(*size, generator=generator, dtype=like.dtype)
    return drawn.div_(math.sqrt(size[-1])).to(like.device)


def _gram_product(matrix: Tensor, block: Tensor) -> Tensor:
    """M^T M times a block given as rows, (b, cols): each slice of M is read once for both."""
    rows, cols = matrix.shape
    size = max(1, SLICE_ENTRIES // cols) if matrix.device.type == "cpu" else rows
    product = torch.zeros_like(block)
    for first in range(0, rows, size):
        part = matrix[first : first + size]
        product.addmm_(block @ part.T, part)
    return product


def _bordered(projected: Tensor, coefficients: Tensor) -> Tensor:
    """The symmetric matrix that has ``coefficients``, (b, j), as its last rows and columns."""
    old, new = len(projected), coefficients.shape[1]
    grown = projected.new_zeros(new, new)
    grown[:old, :old] = projected
    grown[old:] = coefficients
    grown[:old, old:] = coefficients[:, :old].T
    return grown


def _triplets(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best singular triplets of M within the span of orthonormal rows: u (k, rows), s, v."""
    vectors = _orthonormal_rows(vectors)
    u, s, vt = torch.linalg.svd(matrix @ vectors.T, full_matrices=False)
    return u.T, s, vt @ vectors


def _orthonormal_rows(block: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(block.T).Q
    return columns.T.contiguous()


def _squared_norm(matrix: Tensor) -> float:
    # Row by row, then in float64: neither a float64 copy of the matrix nor a float32 total.
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _refuse(matrix: Tensor) -> None:
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise ValueError(f"the weight holds {bad} non-finite entries of {matrix.numel()}")
    raise ValueError(
        f"the weight holds entries of magnitude {float(matrix.abs().max()):.3g}: its squares "
        f"overflow {matrix.dtype}"
    )


def _signs(left: Tensor) -> Tensor:
    """+1 or -1 for each row, (k, 1): the sign of its entry of largest magnitude."""
    picked = left.gather(1, left.abs().argmax(dim=1, keepdim=True))
    return torch.where(picked < 0, -1.0, 1.0).to(left.dtype)
