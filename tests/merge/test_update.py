"""The update of one weight against an oracle that makes it whole, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpsvd_tune.errors import MergeError
from kpsvd_tune.merge import update as module
from kpsvd_tune.merge.update import MOST_DEVIATION, Term, Update

DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64
# What a sum in float32 adds to a sum in float64, in units in the last place of the stored number.
SPARE = {torch.bfloat16: 2**-17, torch.float16: 2**-14}


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


def units_towards(stored: Tensor, exact: Tensor) -> Tensor:
    """The distance of each stored number to the next one on the side of the exact one, float64."""
    assert torch.isfinite(stored).all()
    upwards = exact > stored.double()
    towards = torch.where(upwards, torch.inf, -torch.inf).to(stored.dtype)
    return (torch.nextafter(stored, towards).double() - stored.double()).abs()


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
        if dtype in SPARE:
            # A bound, which counts in the smaller unit at a power of two.
            most = float((far / units_towards(found, exact)).max())
            assert expected <= update.deviation <= most + 2 * SPARE[dtype] + 1e-9
        else:
            assert update.deviation == pytest.approx(expected, abs=1e-5)
    assert update.deviation <= MOST_DEVIATION
    moved = found.double() - weight.double()
    # Of 16-bit weights this is summed up in float32 within a row.
    assert update.kept == pytest.approx(
        float((moved * delta).sum() / delta.square().sum()), rel=1e-7 if dtype in SPARE else 1e-9
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


@pytest.mark.parametrize("dtype", SPARE)
@pytest.mark.parametrize("ranks", [(1,), (2,), (1, 1)])
@pytest.mark.parametrize("source", [None, torch.float32])
def test_16_bits_are_as_good_as_float64_where_weight_and_terms_cancel(
    dtype: torch.dtype, ranks: tuple[int, ...], source: torch.dtype | None
) -> None:
    """A stored number may be the wrong neighbour only where a tie is 2^-13 units away or less."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    terms = [Term(drawn(r, 8, 8), drawn(r, 16, 32)) for r in ranks]
    if len(terms) == 2:
        # Their sum is a thousandth of each.
        terms[1] = Term(terms[0].left, terms[0].right * (1 + 1e-3 * drawn(1, 16, 32)), -1.0)
    delta = oracle(terms)
    # The sum of weight and update is up to 2^-8 and 2^-11 of each, or zero but for their digits.
    weight = (-delta * (1 + 2**-7 * drawn(128, 1))).to(source or dtype)
    update = Update("layer", terms, dtype)
    found = torch.cat([block.clone() for _, block in update.rows(weight)])
    exact = weight.double() + delta
    scale = sum((oracle([Term(e.left.abs(), e.right.abs())]) for e in terms), torch.zeros(()))
    assert (exact.abs() < 2**-5 * delta.abs()).double().mean() > 0.9
    slack = 2**-50 * (weight.double().abs() + scale)
    far = (found.double() - exact).abs()
    assert (far <= (0.5 + 2**-13) * units_towards(found, exact) + slack).all()
    # The way of float64: rounded to float32, and that to 16 bits.
    reference = exact.float().to(dtype)
    assert (found != reference).double().mean() < 1e-3
    assert update.deviation <= 0.5 + SPARE[dtype]
    assert update.relative_size == pytest.approx(
        float(delta.norm() / weight.double().norm()), rel=1e-9
    )


@pytest.mark.parametrize("dtype", SPARE)
@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12, 1e-30])
@pytest.mark.parametrize("rank", [1, 2])
def test_an_update_that_rounding_loses_whole_is_told_however_small_it_is(
    dtype: torch.dtype, size: float, rank: int
) -> None:
    """Float32 loses its sum with the weight, and has no squares of numbers below 1e-22."""
    left, right = torch.full((rank, 4, 4), size), torch.full((rank, 4, 16), 0.1 / rank)
    update = Update("layer", [Term(left.double(), right.double())], dtype)
    list(update.rows(torch.ones(16, 64, dtype=dtype)))
    assert update.kept == pytest.approx(0, abs=1e-6)
    assert update.relative_size == pytest.approx(0.1 * size, rel=1e-6)


def test_squares_that_float32_does_not_hold_are_measured() -> None:
    term = Term(torch.full((1, 4, 4), 1e20).double(), torch.full((1, 4, 16), 3e8).double())
    update = Update("layer", [term], torch.bfloat16)
    list(update.rows(torch.full((16, 64), 1e30).to(torch.bfloat16)))
    assert 0 < update.deviation <= MOST_DEVIATION
    assert update.kept == pytest.approx(1, abs=1e-1)
    assert update.relative_size == pytest.approx(3e-2, rel=1e-2)


def test_rounding_up_to_infinity_is_told() -> None:
    """Float32 holds the sum, and bfloat16 does not."""
    weight = torch.full((4, 4), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    term = Term(torch.full((1, 2, 2), 1e38).double(), torch.full((1, 2, 2), 0.01).double())
    with pytest.raises(MergeError, match=r"layer: the merged weight is not finite in torch\."):
        list(Update("layer", [term], torch.bfloat16).rows(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_can_be_updated_in_its_own_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 5 * 32)
    weight = torch.randn(16, 32).to(dtype)
    term = Term(torch.randn(2, 4, 4).double(), torch.randn(2, 4, 8).double())
    apart = Update("layer", [term], dtype)
    expected = torch.cat([block.clone() for _, block in apart.rows(weight)])
    own = Update("layer", [term], dtype)
    list(own.rows(weight, weight))
    assert torch.equal(weight, expected)
    assert (own.kept, own.relative_size, own.deviation) == (
        apart.kept,
        apart.relative_size,
        apart.deviation,
    )
