"""A sum of Kronecker products as a product of two thin matrices, the form that LoRA has.

With orthonormal bases U_A, V_A of the columns and rows of all left factors A_k together, and U_B,
V_B of all right factors B_k,

    sum_k A_k kron B_k = (U_A kron U_B) C (V_A kron V_B)^T,   C = sum_k A'_k kron B'_k,

where A'_k and B'_k are the factors in these bases. The outer matrices have orthonormal columns, so
the singular values of the small core C are those of the update, exactly. Thin factors leave a core
of at most 2 r n p rows and columns, whatever the size of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.linalg import KroneckerShape, kpsvd, kron_sum

# Up to this smaller side all singular values of a core are computed, in a second or so.
WHOLE = 1024
# An update counts as held exactly where what is left out of it is, in Frobenius norm, below the
# rounding of float32, in which adapters are stored.
EXACT = torch.finfo(torch.float32).eps
# Missing share of the leading energy that block Lanczos accepts on larger cores.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LowRank:
    """Leading singular triplets of an update of size (out, in)."""

    left: Tensor  # U sqrt(S), (out, k), float64
    right: Tensor  # sqrt(S) V^T, (k, in), float64
    energies: Tensor  # squared singular values that were computed, k or more, descending, float64
    total: float  # ||Delta||_F^2, the sum of all of them

    def kept(self, rank: int) -> float:
        """The share of the update's energy that the first ``rank`` triplets hold, 0 to 1."""
        return min(1.0, float(self.energies[:rank].sum()) / self.total) if self.total else 1.0

    def rank_for(self, lost: float) -> int | None:
        """The fewest triplets that leave out at most that share of the energy.

        None where more are needed than were computed.
        """
        unseen = max(0.0, self.total - float(self.energies.sum()))
        # Summed from the smallest up, so that rounding hides none of them.
        tails = self.energies.flip(0).cumsum(0).flip(0) + unseen
        held = torch.cat([tails, tails.new_tensor([unseen])]) <= lost * self.total
        return int(held.to(torch.int8).argmax()) if bool(held.any()) else None

    @property
    def exact_rank(self) -> int | None:
        """The numerical rank; None where it is above the number of triplets computed."""
        return self.rank_for(EXACT**2)


@torch.no_grad()
def low_rank(left: Tensor, right: Tensor, most: int) -> LowRank:
    """The first ``most`` singular triplets of sum_k left_k kron right_k.

    Args:
        left: A, (s, m, n), floating, finite.
        right: B, (s, p, q), floating, finite.
        most: Triplets wanted, at least 1.

    Returns:
        At most that many; all squared singular values where the core has a side of up to WHOLE.
    """
    left, right = left.double(), right.double()
    u_a, v_a = _span(left), _span(left.mT)
    u_b, v_b = _span(right), _span(right.mT)
    core = kron_sum(u_a.T @ left @ v_a, u_b.T @ right @ v_b)
    if min(core.shape) <= WHOLE:
        u, values, vt = torch.linalg.svd(core, full_matrices=False)
        total = float(values.square().sum())
    else:
        # With this shape the terms of a Kronecker-product SVD are singular triplets.
        shape = KroneckerShape(core.shape[0], 1, 1, core.shape[1])
        terms = kpsvd(core, shape, most, tolerance=_TOLERANCE)
        u, values, vt = terms.left[:, :, 0].T, terms.values, terms.right[:, 0]
        total = terms.squared_norm
    root = values[:most].sqrt()
    return LowRank(
        left=_kron_times(u_a, u_b, u[:, :most] * root),
        right=_kron_times(v_a, v_b, vt[:most].T * root).T,
        energies=values.square(),
        total=total,
    )


def _span(matrices: Tensor) -> Tensor:
    """An orthonormal basis of all columns of (s, rows, columns), (rows, at most s columns)."""
    rows = matrices.shape[1]
    side_by_side = matrices.transpose(0, 1).reshape(rows, -1)
    if side_by_side.shape[1] >= rows:
        return torch.eye(rows, dtype=matrices.dtype, device=matrices.device)
    basis: Tensor = torch.linalg.qr(side_by_side).Q
    return basis


def _kron_times(one: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """(one kron other) x for (m, a), (p, b) and (a b, k): (m p, k), no Kronecker product built."""
    a, k = one.shape[1], x.shape[1]
    half = (one @ x.reshape(a, -1)).view(len(one), -1, k)
    return (other @ half).reshape(-1, k)
