"""Truncated KPSVD of one matrix: the leading terms of W = sum_k sigma_k U_k kron V_k.

Letters: M is R(W) or its transpose, whichever is tall; Q_j the blocks of an orthonormal Krylov
basis of M^T M; P_j = M Q_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.linalg.kronecker import KroneckerShape, rearrange

# Up to this smaller side a LAPACK SVD costs a fraction of a second and is exact, so there is
# nothing to gain from an iteration.
DIRECT_SIZE = 1024
# Width of a Krylov block. Narrow blocks reach a higher polynomial degree for the same work,
# wide ones use the processor better; 16 was the best of 8, 16, 24, 32 on flat spectra.
BLOCK_SIZE = 16


@dataclass(frozen=True)
class KPSVD:
    """Leading terms of a Kronecker-product SVD.

    Attributes:
        values: KP singular values sigma_k, (k,), float64, descending.
        left: U_k, (k, m, n), orthonormal as vectors, float32 (float64 for a float64 weight).
        right: V_k, (k, p, q), likewise.
        shape: The Kronecker shape.
        squared_norm: ||W||_F^2, so that energy shares need no further decomposition.
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
    triplets of R(W) (Eckart-Young). Small matrices go to LAPACK. Large ones use a block Krylov
    iteration on R(W)^T R(W) with full reorthogonalisation, stopped when two further blocks
    raise the leading energy by less than a quarter of ``tolerance``; that rule is an estimate of
    the missing share of the optimum's energy, not a bound.

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

    Source: Van Loan and Pitsianis (1993); Halko, Martinsson, Tropp (2011) for the randomised
    start; Musco and Musco (2015) for block Krylov against flat spectra.
    """
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1, got {num_terms}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    if not weight.is_floating_point():
        raise ValueError(f"expected a floating-point weight, got {weight.dtype}")
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"the weight holds {bad} non-finite entries of {weight.numel()}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rearranged = rearrange(weight.detach().to(dtype), shape)
    squared_norm = _squared_norm(rearranged)
    k = min(num_terms, shape.max_rank)
    # The iteration needs room for a few blocks; wanting a large share of all terms is a full SVD.
    small = shape.max_rank <= DIRECT_SIZE or 4 * (k + BLOCK_SIZE) > shape.max_rank
    if small or tolerance == 0:
        u, s, vt = torch.linalg.svd(rearranged, full_matrices=False)
        u, s, v = u[:, :k], s[:k], vt[:k].T
    else:
        tall = rearranged.shape[0] >= rearranged.shape[1]
        u, s, v = _block_krylov(rearranged if tall else rearranged.T, k, tolerance, seed)
        if not tall:
            u, v = v, u
    signs = _signs(u)
    m, n, p, q = shape.as_tuple()
    return KPSVD(
        values=s.double(),
        left=(u * signs).T.reshape(k, m, n).contiguous(),
        right=(v * signs).T.reshape(k, p, q).contiguous(),
        shape=shape,
        squared_norm=squared_norm,
    )


def _block_krylov(
    matrix: Tensor, k: int, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading k singular triplets of a tall matrix (rows, cols) as u, s, v."""
    cols = matrix.shape[1]
    generator = torch.Generator().manual_seed(seed)
    # Drawn on the CPU so that the start block does not depend on the device.
    start = torch.randn(cols, BLOCK_SIZE, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    image = matrix @ basis
    energies: list[float] = []
    while True:
        energy = _leading_energy(image, k)
        energies.append(energy)
        has_terms = basis.shape[1] >= k
        if has_terms and len(energies) > 2:
            gain = energy - energies[-3]
            if gain <= 0.25 * tolerance * energy:
                break
        if basis.shape[1] + BLOCK_SIZE > cols:
            break
        block = matrix.T @ image[:, -BLOCK_SIZE:]
        # Twice is enough: one pass of block Gram-Schmidt leaves errors of the order of the
        # cancellation, a second removes them.
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
        # A converged subspace makes the block rank deficient; QR then fills it with directions
        # that need orthogonalising against the basis once more.
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], dim=1)
        image = torch.cat([image, matrix @ block], dim=1)
    q, r = torch.linalg.qr(image)
    u, s, vt = torch.linalg.svd(r)
    return q @ u[:, :k], s[:k], basis @ vt[:k].T


def _leading_energy(image: Tensor, k: int) -> float:
    """Sum of the k largest squared singular values of M restricted to the basis."""
    gram = (image.T @ image).double()
    return float(torch.linalg.eigvalsh(gram)[-k:].sum())


def _squared_norm(matrix: Tensor) -> float:
    # Row by row, then in float64: neither a float64 copy of the matrix nor a float32 total.
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _signs(u: Tensor) -> Tensor:
    pivot = u.abs().argmax(dim=0)
    picked = u.gather(0, pivot[None, :])[0]
    return torch.where(picked < 0, -1.0, 1.0).to(u.dtype)


def relative_error(decomposition: KPSVD, rank: int) -> float:
    """||W - sum_{k<=rank} sigma_k U_k kron V_k||_F / ||W||_F, from the energies alone.

    Args:
        decomposition: The leading terms.
        rank: Terms kept, at most those computed.

    Returns:
        A number in [0, 1]; 0 for a zero matrix.
    """
    if decomposition.squared_norm == 0:
        return 0.0
    kept = float(decomposition.values[:rank].square().sum())
    return math.sqrt(max(0.0, 1.0 - kept / decomposition.squared_norm))
