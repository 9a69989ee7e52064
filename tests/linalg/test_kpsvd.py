"""The truncated KPSVD against np.linalg.svd, its optimality, and every path to it."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpsvd_tune.linalg import (
    KPSVD,
    KroneckerShape,
    LayerPlan,
    kpsvd,
    kron_sum,
    rearrange,
    unrearrange,
)

# The package exports a function of the same name, which hides the module.
module = importlib.import_module("kpsvd_tune.linalg.kpsvd")

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
small = settings(max_examples=20, deadline=None)
# Large enough for Lanczos to stop early, small enough for the oracle.
LARGE = KroneckerShape(16, 12, 15, 14)


def random_weight(shape: KroneckerShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        shape.out_features, shape.in_features, generator=generator, dtype=torch.float64
    )


def planted_weight(shape: KroneckerShape, seed: int = 0) -> Tensor:
    """A few strong terms over a random bulk, as in trained weights; not far above its edge."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape.m * shape.n, shape.p * shape.q
    left, right = (
        torch.linalg.qr(torch.randn(size, 32, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    strengths = 2 * (rows**0.5 + columns**0.5) * torch.arange(1, 33, dtype=torch.float64) ** -0.3
    planted = (left * strengths) @ right.T
    return random_weight(shape, seed) + unrearrange(planted, shape)


def approximation(terms: KPSVD, rank: int) -> Tensor:
    return kron_sum(*terms.factors(rank))


def check_triplets(terms: KPSVD, weight: Tensor, dtype: str) -> None:
    """Orthonormal factors, descending values, the sign rule, and M v = sigma u."""
    k = len(terms.values)
    for stack in (terms.left, terms.right):
        flat = stack.flatten(1).double()
        oracle.assert_close(flat @ flat.T, np.eye(k), dtype)
    assert (terms.values.diff() <= 0).all()
    assert (terms.values >= 0).all()
    for left in terms.left:
        assert left.flatten()[left.abs().argmax()] > 0
    images = rearrange(weight.double(), terms.shape) @ terms.right.flatten(1).double().T
    oracle.assert_close(images, (terms.left.flatten(1).double().T * terms.values), dtype)


@pytest.fixture(params=["svd", "gram", "lanczos"])
def path(request, monkeypatch):
    """Force one of the three ways to the terms; sizes in these tests are far below the switch."""
    if request.param == "lanczos":
        monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    return request.param


def decompose(weight: Tensor, shape: KroneckerShape, k: int, path: str, **options) -> KPSVD:
    options.setdefault("tolerance", {"svd": 0.0, "gram": 0.01, "lanczos": 1e-12}[path])
    return kpsvd(weight, shape, k, **options)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_values_and_factors_equal_the_oracle(sizes, dtype):
    shape = KroneckerShape(*sizes)
    weight = random_weight(shape).to(getattr(torch, dtype))
    values, left, right = oracle.kpsvd(weight.double().numpy(), *sizes)
    terms = kpsvd(weight, shape, shape.max_rank)
    assert terms.left.dtype == terms.right.dtype == weight.dtype
    assert terms.values.dtype == torch.float64
    oracle.assert_close(terms.values, values, dtype)
    check_triplets(terms, weight, dtype)
    for k in range(1, shape.max_rank + 1):
        expected = oracle.kron_sum(values[:k, None, None] * left[:k], right[:k])
        # Single terms of close values may rotate among each other; only their sums are compared.
        if k == shape.max_rank or values[k - 1] - values[k] > 0.05 * values[0]:
            oracle.assert_close(approximation(terms, k), expected, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [LARGE, KroneckerShape(15, 14, 16, 12)], ids=["wide", "tall"])
def test_every_path_finds_the_leading_terms(path, shape, dtype):
    weight = planted_weight(shape).to(getattr(torch, dtype))
    values, _, _ = oracle.kpsvd(weight.double().numpy(), *shape.as_tuple())
    terms = decompose(weight, shape, 20, path)
    oracle.assert_close(terms.values, values[:20], dtype)
    check_triplets(terms, weight, dtype)


@small
@given(sizes)
def test_all_terms_restore_the_weight(sizes):
    shape = KroneckerShape(*sizes)
    weight = random_weight(shape)
    terms = kpsvd(weight, shape, shape.max_rank + 3)
    assert len(terms.values) == shape.max_rank
    oracle.assert_close(approximation(terms, shape.max_rank), weight)


def test_a_sum_of_three_kronecker_products_is_found_exactly(path):
    generator = torch.Generator().manual_seed(1)
    m, n, p, q = LARGE.as_tuple()
    left = torch.randn(3, m, n, generator=generator, dtype=torch.float64)
    right = torch.randn(3, p, q, generator=generator, dtype=torch.float64)
    weight = kron_sum(left, right)
    terms = decompose(weight, LARGE, 5, path)
    oracle.assert_close(approximation(terms, 3), weight)
    assert (terms.values[3:] < 1e-6 * terms.values[0]).all()
    flat = terms.left.flatten(1)
    oracle.assert_close(flat @ flat.T, np.eye(5))


def test_a_zero_matrix_has_zero_values_and_still_orthonormal_factors(path):
    weight = torch.zeros(LARGE.out_features, LARGE.in_features)
    terms = decompose(weight, LARGE, 5, path)
    assert terms.values.tolist() == [0.0] * 5
    assert terms.squared_norm == 0.0
    plan = LayerPlan("zeros", LARGE).with_terms(terms)
    assert plan.energy(5) == 0.0
    assert plan.relative_error(5) == 0.0
    check_triplets(terms, weight, "float32")


def test_a_matrix_of_one_entry_is_found(path):
    weight = torch.zeros(LARGE.out_features, LARGE.in_features)
    weight[7, 9] = -3.0
    terms = decompose(weight, LARGE, 2, path)
    oracle.assert_close(terms.values, [3.0, 0.0], "float32")
    oracle.assert_close(approximation(terms, 1), weight, "float32")


@pytest.mark.slow
@small
@given(sizes)
def test_eckart_young(sizes):
    shape = KroneckerShape(*sizes)
    weight = random_weight(shape)
    terms = kpsvd(weight, shape, shape.max_rank)
    norm = float(weight.square().sum())
    assert terms.squared_norm == pytest.approx(norm, rel=1e-12)
    plan = LayerPlan("layer", shape).with_terms(terms)
    generator = torch.Generator().manual_seed(0)
    for rank in range(shape.max_rank + 1):
        residual = float((weight - approximation(terms, rank)).square().sum())
        assert residual == pytest.approx(float(terms.values[rank:].square().sum()), abs=1e-9 * norm)
        assert plan.energy(rank) == pytest.approx(1 - residual / norm, abs=1e-9)
        assert plan.relative_error(rank) ** 2 == pytest.approx(residual / norm, abs=1e-9)
        # The best multiple of random factors, by least squares, never beats it.
        left = torch.randn(rank, shape.m, shape.n, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, shape.p, shape.q, generator=generator, dtype=torch.float64)
        columns = (
            torch.stack(
                [kron_sum(a[None], b[None]).flatten() for a, b in zip(left, right, strict=True)],
                dim=1,
            )
            if rank
            else weight.new_zeros(weight.numel(), 1)
        )
        fit = torch.linalg.lstsq(columns, weight.flatten(), driver="gelsd").solution
        other = float((weight.flatten() - columns @ fit).square().sum())
        assert residual <= other + 1e-9 * norm


def test_energy_grows_with_the_number_of_terms():
    shape = KroneckerShape(6, 5, 4, 7)
    terms = kpsvd(random_weight(shape), shape, shape.max_rank)
    plan = LayerPlan("layer", shape).with_terms(terms)
    energies = [plan.energy(rank) for rank in range(shape.max_rank + 1)]
    assert energies[0] == 0.0
    assert energies[-1] == pytest.approx(1.0)
    assert all(low < high for low, high in zip(energies, energies[1:], strict=False))


def test_pissa_is_the_shape_with_single_column_and_row_factors():
    shape = KroneckerShape(12, 1, 1, 9)
    weight = random_weight(shape)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    terms = kpsvd(weight, shape, 4)
    oracle.assert_close(terms.values, s[:4])
    oracle.assert_close(approximation(terms, 4), (u[:, :4] * s[:4]) @ vt[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_decomposed_in_float32(dtype):
    weight = random_weight(LARGE).to(dtype)
    terms = kpsvd(weight, LARGE, 4)
    same = kpsvd(weight.float(), LARGE, 4)
    assert terms.left.dtype == terms.right.dtype == torch.float32
    assert torch.equal(terms.left, same.left)
    assert torch.equal(terms.values, same.values)


def test_a_negated_weight_changes_only_the_right_factors(path):
    weight = planted_weight(LARGE)
    terms, negated = (decompose(w, LARGE, 5, path) for w in (weight, -weight))
    oracle.assert_close(negated.left, terms.left)
    oracle.assert_close(negated.right, -terms.right)


def test_equal_calls_give_equal_bits_and_leave_the_weight_and_the_random_state_alone(path):
    weight = planted_weight(LARGE).float().requires_grad_()
    before, state = weight.detach().clone(), torch.get_rng_state()
    first, second = (decompose(weight, LARGE, 6, path) for _ in range(2))
    for field in dataclasses.fields(KPSVD):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert not first.left.requires_grad
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_changes_the_start_but_not_the_terms(monkeypatch):
    monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    weight = planted_weight(LARGE)
    first, second = (kpsvd(weight, LARGE, 4, tolerance=1e-12, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.left, second.left)
    oracle.assert_close(first.values, second.values)


@pytest.mark.parametrize("make", [planted_weight, random_weight])
@pytest.mark.parametrize("tolerance", [5e-3, 1e-4])
def test_lanczos_keeps_its_tolerance(monkeypatch, make, tolerance):
    monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    weight = make(LARGE)
    values, _, _ = oracle.kpsvd(weight.numpy(), *LARGE.as_tuple())
    best = float((values[:16] ** 2).sum())
    got = float(kpsvd(weight, LARGE, 16, tolerance=tolerance).values.square().sum())
    assert (1 - tolerance) * best <= got <= (1 + 1e-9) * best


def test_a_looser_tolerance_stops_earlier(monkeypatch):
    monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    products: list[int] = []
    product = module._gram_product

    def counting(matrix, block):
        products[-1] += 1
        return product(matrix, block)

    monkeypatch.setattr(module, "_gram_product", counting)
    for tolerance in (0.3, 5e-3, 1e-6):
        products.append(0)
        kpsvd(planted_weight(LARGE), LARGE, 4, tolerance=tolerance)
    assert products[0] < products[1] < products[2]


def test_lanczos_directions_stay_orthogonal_after_the_space_is_exhausted(monkeypatch):
    # One entry: after two blocks everything is found, and what follows is made of rounding.
    monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    weight = torch.zeros(LARGE.out_features, LARGE.in_features)
    weight[7, 9] = -3.0
    terms = kpsvd(weight, LARGE, 33, tolerance=1e-15)
    flat = terms.right.flatten(1)
    oracle.assert_close(flat @ flat.T, np.eye(33), "float32")
    assert terms.values[0] == pytest.approx(3.0, rel=1e-6)


def test_lanczos_ends_when_the_basis_spans_the_whole_space(monkeypatch):
    monkeypatch.setattr(module, "DIRECT_SIZE", 0)
    shape = KroneckerShape(9, 4, 5, 7)
    weight = random_weight(shape)
    terms = kpsvd(weight, shape, 8, tolerance=1e-15)
    # 35 columns hold two blocks of 16; the last 3 directions are never looked at.
    assert len(terms.values) == 8
    values, _, _ = oracle.kpsvd(weight.numpy(), *shape.as_tuple())
    assert (terms.values.numpy() <= values[:8] * (1 + 1e-12)).all()


def test_factors_split_the_value_evenly_between_the_sides():
    shape = KroneckerShape(3, 2, 2, 4)
    terms = kpsvd(random_weight(shape), shape, 4)
    left, right = terms.factors(3)
    assert left.shape == (3, 3, 2)
    assert right.shape == (3, 2, 4)
    oracle.assert_close(left.flatten(1).square().sum(1), terms.values[:3])
    oracle.assert_close(right.flatten(1).square().sum(1), terms.values[:3])
    assert terms.factors(0)[0].shape == (0, 3, 2)


@pytest.mark.parametrize("rank", [-1, 5])
def test_more_terms_than_computed_are_refused(rank):
    shape = KroneckerShape(3, 2, 2, 4)
    terms = kpsvd(random_weight(shape), shape, 4)
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\.4, the computed terms"):
        terms.factors(rank)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4, 4), {"num_terms": 0}, "num_terms must be at least 1, got 0"),
        (torch.zeros(4, 4), {"tolerance": 1.0}, r"tolerance must be in \[0, 1\), got 1.0"),
        (torch.zeros(4, 4), {"tolerance": -0.1}, r"tolerance must be in \[0, 1\), got -0.1"),
        (
            torch.zeros(4, 4, dtype=torch.int8),
            {},
            "expected a floating-point weight, got torch.int8",
        ),
        (torch.zeros(4, 6), {}, r"a weight of size \(4, 6\) does not split"),
        (
            torch.tensor([[float("nan"), 1, 1, 1]] * 2 + [[1, float("inf"), 1, 1]] * 2),
            {},
            "the weight holds 4 non-finite entries of 16",
        ),
        (
            torch.full((4, 4), 1e30),
            {},
            r"the weight holds entries of magnitude 1e\+30: its squares overflow torch.float32",
        ),
    ],
)
def test_bad_arguments_are_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        kpsvd(weight, KroneckerShape(2, 2, 2, 2), **{"num_terms": 2, **options})
