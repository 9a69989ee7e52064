"""Sums of Kronecker products as thin products, against the dense matrix's own SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpsvd_tune.export import low_rank as module
from kpsvd_tune.export.low_rank import low_rank
from kpsvd_tune.linalg import kron_sum


def factors(s: int, m: int, n: int, p: int, q: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s + m)
    return (
        torch.randn(s, m, n, generator=generator, dtype=torch.float64),
        torch.randn(s, p, q, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [
        ((4, 40, 2, 2, 40), 16),  # thin: s n p
        ((3, 5, 4, 3, 6), 15),  # more terms than a rank can use
        ((1, 5, 3, 4, 2), 6),  # one term: rank(A) rank(B)
        ((2, 30, 1, 1, 20), 2),  # LoRA itself
    ],
)
def test_the_rank_is_that_of_the_dense_update(sizes: tuple[int, ...], rank: int) -> None:
    left, right = factors(*sizes)
    found = low_rank(left, right, 64)
    dense = kron_sum(left, right)
    assert found.exact_rank == rank == int(torch.linalg.matrix_rank(dense))
    torch.testing.assert_close(found.left @ found.right, dense)
    assert found.total == pytest.approx(float(dense.square().sum()))
    assert found.kept(rank) == pytest.approx(1.0)


def test_offsets_that_lie_in_the_span_of_what_is_there_give_a_lower_rank() -> None:
    """The formula 2 r n p counts 16 here, and the numerical rank is 4."""
    left, right = factors(2, 20, 2, 2, 20)
    # (1.5 A) kron B - A kron B, written as two terms: half of A kron B.
    found = low_rank(torch.cat([1.5 * left, left]), torch.cat([right, -right]), 64)
    assert found.exact_rank == 8
    one = low_rank(left[:1].expand(4, -1, -1), right[:1].expand(4, -1, -1), 64)
    assert one.exact_rank == 4


def test_a_truncated_update_is_the_best_of_its_rank_and_says_its_energy() -> None:
    left, right = factors(3, 6, 6, 5, 5)
    found = low_rank(left, right, 8)
    dense = kron_sum(left, right)
    u, values, vt = torch.linalg.svd(dense)
    torch.testing.assert_close(found.left @ found.right, (u[:, :8] * values[:8]) @ vt[:8])
    share = float(values[:8].square().sum() / values.square().sum())
    assert found.kept(8) == pytest.approx(share)
    assert found.exact_rank == 30
    assert found.rank_for(1 - share) == 8
    assert found.rank_for(1 - share - 1e-6) == 9


def test_a_large_core_is_decomposed_by_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(1, 30, 30, 30, 30)
    monkeypatch.setattr(module, "WHOLE", 100)
    found = low_rank(left, right, 8)
    dense = kron_sum(left, right)
    values = torch.linalg.svdvals(dense)
    share = float(values[:8].square().sum() / values.square().sum())
    assert share - 0.01 < found.kept(8) <= share + 1e-9
    assert found.total == pytest.approx(float(values.square().sum()))
    left_out = float((dense - found.left @ found.right).square().sum()) / found.total
    assert 1 - left_out == pytest.approx(found.kept(8))
    assert found.exact_rank is None
    assert found.rank_for(0.001) is None


def test_an_update_of_zeros_has_rank_0() -> None:
    found = low_rank(torch.zeros(2, 3, 3), torch.randn(2, 4, 4), 8)
    assert found.exact_rank == 0
    assert found.kept(1) == 1.0
    assert found.rank_for(0.01) == 0
