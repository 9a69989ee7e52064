"""The rearrangement and sums of Kronecker products: oracle, identities, gradients, failures."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpsvd_tune.linalg import (
    KroneckerShape,
    kron_sum,
    kron_sum_rows,
    rearrange,
    unrearrange,
)

# Square, tall, wide, odd, prime, single rows and columns, and PiSSA's n = p = 1.
SHAPES = [
    (2, 2, 2, 2),
    (5, 2, 3, 2),
    (2, 3, 2, 7),
    (3, 5, 7, 3),
    (1, 7, 11, 1),
    (1, 1, 1, 9),
    (1, 4, 1, 3),
    (13, 1, 1, 1),
    (6, 1, 1, 5),
    (1, 1, 1, 1),
]
sizes = st.tuples(*[st.integers(1, 5)] * 4)
small = settings(max_examples=25, deadline=None)


def factors(sizes: tuple[int, int, int, int], terms: int, **options: object) -> list[Tensor]:
    m, n, p, q = sizes
    generator = torch.Generator().manual_seed(m * 1000 + n * 100 + p * 10 + q)
    dtype = options.pop("dtype", torch.float64)
    return [
        torch.randn(terms, *size, generator=generator, dtype=torch.float64).to(dtype)  # type: ignore[call-overload]
        for size in ((m, n), (p, q))
    ]


@pytest.mark.parametrize("sizes", SHAPES)
def test_rearrange_is_block_slicing(sizes):
    m, n, p, q = sizes
    weight = torch.randn(m * p, n * q, dtype=torch.float64)
    expected = oracle.rearrange(weight.numpy(), *sizes)
    assert (rearrange(weight, KroneckerShape(*sizes)).numpy() == expected).all()


def test_rearrange_is_not_a_plain_reshape():
    weight = torch.arange(16.0).reshape(4, 4)
    rows = rearrange(weight, KroneckerShape(2, 2, 2, 2)).tolist()
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@small
@given(sizes)
def test_rearrange_keeps_every_entry_and_the_inverse_restores_them(sizes):
    shape = KroneckerShape(*sizes)
    weight = torch.arange(float(shape.out_features * shape.in_features)).reshape(
        shape.out_features, shape.in_features
    )
    rearranged = rearrange(weight, shape)
    assert rearranged.shape == (shape.m * shape.n, shape.p * shape.q)
    assert torch.equal(rearranged.flatten().sort().values, weight.flatten())
    assert torch.equal(unrearrange(rearranged, shape), weight)
    assert torch.equal(rearrange(unrearrange(rearranged, shape), shape), rearranged)


@small
@given(sizes)
def test_rearrange_turns_a_kronecker_product_into_an_outer_product(sizes):
    (left,), (right,) = factors(sizes, 1)
    rearranged = rearrange(torch.kron(left, right), KroneckerShape(*sizes))
    oracle.assert_close(rearranged, torch.outer(left.flatten(), right.flatten()))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]
)
def test_rearrange_moves_any_dtype_untouched(dtype):
    weight = torch.arange(24).reshape(4, 6).to(dtype)
    shape = KroneckerShape(2, 3, 2, 2)
    assert rearrange(weight, shape).dtype == dtype
    assert torch.equal(unrearrange(rearrange(weight, shape), shape), weight)


def test_shape_counts():
    shape = KroneckerShape(6, 2, 4, 5)
    assert shape.as_tuple() == (6, 2, 4, 5)
    assert (shape.out_features, shape.in_features) == (24, 10)
    assert shape.num_parameters == 6 * 2 + 4 * 5
    assert shape.max_rank == 12


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("terms", [0, 1, 3])
def test_kron_sum_equals_the_oracle(sizes, terms):
    left, right = factors(sizes, terms)
    oracle.assert_close(kron_sum(left, right), oracle.kron_sum(left.numpy(), right.numpy()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kron_sum_in_low_precision(dtype):
    left, right = factors((5, 2, 3, 4), 3, dtype=getattr(torch, dtype))
    found = kron_sum(left, right)
    assert found.dtype == left.dtype
    oracle.assert_close(
        found, oracle.kron_sum(left.double().numpy(), right.double().numpy()), dtype
    )


@pytest.mark.parametrize("sizes", [(2, 3, 2, 2), (3, 1, 1, 4), (1, 2, 3, 1)])
def test_gradients_equal_finite_differences(sizes):
    left, right = (factor.requires_grad_() for factor in factors(sizes, 2))
    assert torch.autograd.gradcheck(kron_sum, (left, right))


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"factor sizes must be at least 1, got \(2, 0, 1, 3\)"):
        KroneckerShape(2, 0, 1, 3)


def test_a_weight_of_another_size_is_refused():
    message = (
        r"a weight of size \(4, 5\) does not split as \(m, n, p, q\) = \(2, 2, 2, 3\): expected "
        r"size \(4, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        rearrange(torch.zeros(4, 5), KroneckerShape(2, 2, 2, 3))


def test_a_rearranged_matrix_of_another_size_is_refused():
    message = (
        r"a rearranged matrix of size \(4, 5\) does not belong to \(m, n, p, q\) = \(2, 2, 2, 3\): "
        r"expected size \(4, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        unrearrange(torch.zeros(4, 5), KroneckerShape(2, 2, 2, 3))


@pytest.mark.parametrize(
    ("left", "right"), [((2, 3), (1, 2, 3)), ((1, 2, 3), (2, 3)), ((2, 2, 3), (3, 2, 3))]
)
def test_factors_that_do_not_pair_are_refused(left, right):
    message = r"expected factors of sizes \(r, m, n\) and \(r, p, q\), got "
    with pytest.raises(ValueError, match=message):
        kron_sum(torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("sizes", SHAPES)
def test_any_rows_of_a_sum_are_those_of_the_whole(sizes: tuple[int, int, int, int]) -> None:
    left, right = factors(sizes, 3)
    whole = torch.from_numpy(oracle.kron_sum(left.numpy(), right.numpy()))
    for begin in range(len(whole)):
        for end in range(begin + 1, len(whole) + 1):
            rows = kron_sum_rows(left, right, begin, end)
            torch.testing.assert_close(rows, whole[begin:end])


@pytest.mark.parametrize(
    ("sizes", "terms"),
    [((3, 2, 4, 16), 1), ((3, 2, 4, 16), 3), ((3, 2, 4, 5), 2), ((3, 2, 4, 5), 9)],
)
def test_rows_of_a_sum_are_added_to_what_is_there(
    sizes: tuple[int, int, int, int], terms: int
) -> None:
    left, right = factors(sizes, terms)
    whole = torch.from_numpy(oracle.kron_sum(left.numpy(), right.numpy()))
    for begin, end in ((0, 12), (0, 8), (2, 3), (3, 10), (6, 12)):
        before = torch.linspace(-1, 1, (end - begin) * whole.shape[1], dtype=torch.float64)
        out = before.view(end - begin, -1).clone()
        assert kron_sum_rows(left, right, begin, end, out, is_added=True) is out
        torch.testing.assert_close(out, before.view_as(out) + whole[begin:end])


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (2, 2), (3, 2), (0, 7)])
def test_rows_that_are_not_there_are_refused(begin: int, end: int) -> None:
    left, right = factors((2, 2, 3, 2), 1)
    with pytest.raises(ValueError, match=f"rows {begin} to {end} of 6"):
        kron_sum_rows(left, right, begin, end)
