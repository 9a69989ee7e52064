"""The update of one weight against an oracle that makes it whole, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.merge import update as module
from kpsvd_tune.merge.update import MOST_DEVIATION, Term, Update

DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


def oracle(terms: list[Term]) -> Tensor:
    """Delta, of torch's own Kronecker products."""
    return sum(
        (
            term.weight * torch.kron(one, other)
            for term in terms
            for one, other in zip(term.left, term.right, strict=True)
        ),
        torch.zeros(()),
    )


def last_place(value: float, dtype: torch.dtype) -> float:
    """The distance to the next number away from zero."""
    number = torch.tensor(abs(value), dtype=dtype)
    above = torch.nextafter(number, torch.tensor(torch.inf, dtype=dtype))
    return float(above.double() - number.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((5, 3, 4, 32), (1,)), ((6, 2, 8, 16), (3, 2)), ((7, 8, 9, 2), (2,)), ((40, 9, 1, 16), (6,))],
)
def test_a_weight_is_what_the_oracle_says(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    ranks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Blocks of a few rows, the last one of fewer.
    monkeypatch.setattr(module, "_BLOCK", 7 * shape[1] * shape[3])
    m, n, p, q = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = drawn(m * p, n * q)
    weight[0, 0] = 0
    weight = weight.to(dtype)
    terms = [
        Term(0.01 * drawn(r, m, n), drawn(r, p, q), scale)
        for r, scale in zip(ranks, (1.0, 0.3), strict=False)
    ]
    update = Update("layer", terms, dtype)
    found = torch.cat([block.clone() for _, block in update.rows(weight)])

    delta = oracle(terms)
    exact = weight.double() + delta
    assert found.dtype == dtype
    far = (found.double() - exact).abs()
    # One rounding, but for the order of sums in float64 itself.
    slack = 1e-14 * (weight.double().abs() + delta.abs())
    units = torch.tensor([last_place(float(each), dtype) for each in found.flatten()])
    assert (far <= MOST_DEVIATION * units.view_as(far) + slack).all()
    # In float64 another order of sums moves a number as far as rounding does.
    if dtype != torch.float64:
        expected = float((far / units.view_as(far)).max())
        assert update.deviation == pytest.approx(expected, abs=1e-5)
    assert update.deviation <= MOST_DEVIATION
    moved = found.double() - weight.double()
    assert update.kept == pytest.approx(
        float((moved * delta).sum() / delta.square().sum()), rel=1e-9
    )
    assert update.relative_size == pytest.approx(
        float(delta.norm() / weight.double().norm()), rel=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_numbers_below_the_normal_ones_are_measured(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).tiny
    weight = torch.zeros(16, 16, dtype=dtype)
    left = torch.full((1, 4, 4), least / 4, dtype=torch.float64)
    term = Term(left, torch.linspace(0.01, 1, 16, dtype=torch.float64).view(1, 4, 4))
    update = Update("layer", [term], dtype)
    (found,) = [block.clone() for _, block in update.rows(weight)]
    assert (found.double() < least).all()
    unit = least * torch.finfo(dtype).eps
    far = float((found.double() - oracle([term])).abs().max()) / unit
    assert far <= MOST_DEVIATION
    # Float32, in which it is divided, has 16 more digits there than bfloat16.
    assert update.deviation == pytest.approx(far, abs=1e-4)


def test_what_is_not_finite_is_named() -> None:
    weight = torch.full((4, 4), 6e4).to(torch.float16)
    for value in (1e5, float("nan"), float("-inf")):
        term = Term(torch.full((1, 2, 2), value).double(), torch.ones(1, 2, 2).double())
        with pytest.raises(MergeError, match=r"layer: the merged weight is not finite in torch\."):
            list(Update("layer", [term], torch.float16).rows(weight))


def test_a_weight_of_zeros_and_an_update_of_zeros_have_figures() -> None:
    zeros = Term(torch.zeros(1, 2, 2).double(), torch.ones(1, 2, 2).double())
    update = Update("layer", [zeros], torch.bfloat16)
    list(update.rows(torch.zeros(4, 4, dtype=torch.bfloat16)))
    assert (update.kept, update.relative_size, update.deviation) == (1.0, 0.0, 0.0)
