"""The factor-shape rules: divisors by trial, fallbacks said, and what `auto` picks."""

from __future__ import annotations

import importlib
import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpsvd_tune.linalg import (
    KroneckerShape,
    ShapeChoice,
    auto_shape,
    choose_shape,
    kpsvd,
    unrearrange,
)

module = importlib.import_module("kpsvd_tune.linalg.shape")
sizes = st.integers(1, 300)
small = settings(max_examples=50, deadline=None)


def planted(sizes: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """Noise, and three Kronecker products of these sizes that stand far above it."""
    shape = KroneckerShape(*sizes)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape.m * shape.n, shape.p * shape.q
    left, right = (torch.randn(size, 3, generator=generator) for size in (rows, columns))
    noise = torch.randn(rows, columns, generator=generator)
    return unrearrange(left @ right.T + 0.1 * noise, shape)


# Rules that need sizes only


@small
@given(sizes, sizes)
def test_balanced_takes_the_largest_divisors_not_above_the_roots(out_features, in_features):
    shape = choose_shape(out_features, in_features, "balanced").shape
    assert shape.n == max(d for d in oracle.divisors(in_features) if d * d <= in_features)
    assert shape.p == max(d for d in oracle.divisors(out_features) if d * d <= out_features)
    assert (shape.out_features, shape.in_features) == (out_features, in_features)


@pytest.mark.parametrize(
    ("size", "rule", "expected"),
    [
        ((4096, 4096), "balanced", (64, 64, 64, 64)),
        ((11008, 4096), "balanced", (128, 64, 86, 64)),
        ((1536, 576), "balanced", (48, 24, 32, 24)),
        ((1, 12), "balanced", (1, 3, 1, 4)),
        ((12, 1), "balanced", (4, 1, 3, 1)),
        ((192, 576), "thin", (96, 2, 2, 288)),
        ((7, 8), "pissa", (7, 1, 1, 8)),
        ((6, 20), {"n": 5, "p": 3}, (2, 5, 3, 4)),
        ((6, 20), {"n": 20, "p": 6}, (1, 20, 6, 1)),
    ],
)
def test_shapes_by_hand(size, rule, expected):
    assert choose_shape(size[0], size[1], rule) == ShapeChoice(KroneckerShape(*expected))


@pytest.mark.parametrize(
    ("size", "rule", "expected", "note"),
    [
        ((7, 12), "balanced", (7, 3, 1, 4), "out = 7 is prime: that side is not split"),
        ((12, 5), "balanced", (4, 1, 3, 5), "in = 5 is prime: that side is not split"),
        (
            (2, 3),
            "balanced",
            (2, 1, 1, 3),
            "out = 2 is prime and in = 3 is prime: that side is not split",
        ),
        ((7, 8), "thin", (7, 1, 1, 8), "thin needs even sizes, got (7, 8): n = p = 1"),
        ((8, 7), "thin", (8, 1, 1, 7), "thin needs even sizes, got (8, 7): n = p = 1"),
    ],
)
def test_a_fallback_is_said(size, rule, expected, note):
    assert choose_shape(size[0], size[1], rule) == ShapeChoice(KroneckerShape(*expected), note)


@pytest.mark.parametrize(
    ("size", "rule", "message"),
    [
        ((4, 4), "square", "unknown factor shape 'square': expected one of balanced, thin, pissa"),
        ((4, 4), "auto", "factor shape 'auto' depends on the weight: call auto_shape with it"),
        ((4, 6), {"n": 4, "p": 2}, "n = 4 does not divide in = 6"),
        ((4, 6), {"n": 3, "p": 3}, "p = 3 does not divide out = 4"),
        ((4, 6), {"n": 0, "p": 2}, "n = 0 does not divide in = 6"),
        ((4, 6), {"n": 3}, r"an explicit factor shape needs n and p, got \{'n': 3\}"),
        ((0, 4), "balanced", r"a weight of size \(0, 4\) has nothing to split"),
    ],
)
def test_an_impossible_shape_is_refused(size, rule, message):
    with pytest.raises(ValueError, match=message):
        choose_shape(size[0], size[1], rule)


# auto


@pytest.mark.parametrize("sizes", [(256, 1, 1, 256), (64, 4, 4, 64), (16, 16, 16, 16)])
def test_auto_finds_the_shape_that_the_weight_was_made_of(sizes):
    choice = auto_shape(planted(sizes), 3, max_compute=1.0, max_lora_width=10_000)
    assert choice == ShapeChoice(KroneckerShape(*sizes))


def test_auto_is_the_best_of_its_candidates_by_exact_energy_per_parameter():
    weight = torch.randn(96, 48, generator=torch.Generator().manual_seed(3))
    window = 4
    budget = window * (96 + 48)

    def density(shape: KroneckerShape) -> float:
        values, _, _ = oracle.kpsvd(weight.double().numpy(), *shape.as_tuple())
        terms = min(max(1, budget // shape.num_parameters), shape.max_rank)
        return float((values[:terms] ** 2).sum()) / (terms * shape.num_parameters)

    candidates = module.candidate_shapes(96, 48)
    choice = auto_shape(weight, window, max_compute=1.0, max_lora_width=10_000)
    assert density(choice.shape) == pytest.approx(max(map(density, candidates)), rel=1e-5)


@small
@given(sizes, sizes)
def test_candidates_divide_are_few_and_distinct(out_features, in_features):
    candidates = module.candidate_shapes(out_features, in_features)
    assert len(set(candidates)) == len(candidates) <= 10
    assert KroneckerShape(out_features, 1, 1, in_features) in candidates
    for shape in candidates:
        assert (shape.out_features, shape.in_features) == (out_features, in_features)


def test_candidates_by_hand():
    found = [(shape.n, shape.p) for shape in module.candidate_shapes(4096, 1024)]
    # n = p at 1, 4, 16, and n/p = sqrt(1024/4096) beside them.
    assert found == [(1, 1), (1, 2), (4, 4), (4, 8), (16, 16), (16, 32)]


@pytest.mark.parametrize("limit", [{"max_compute": 0.1}, {"max_lora_width": 16}])
def test_auto_stays_within_its_limits(limit):
    weight = planted((16, 16, 16, 16))
    shape = auto_shape(weight, 3, **{"max_compute": 1.0, "max_lora_width": 10_000, **limit}).shape
    assert module.term_compute(shape) <= limit.get("max_compute", 1.0)
    assert shape.lora_width <= limit.get("max_lora_width", 10_000)
    assert shape != KroneckerShape(16, 16, 16, 16)


def test_auto_without_a_candidate_within_the_limits_says_so():
    choice = auto_shape(planted((8, 2, 2, 8)), 3, max_compute=1e-6)
    assert choice == ShapeChoice(
        KroneckerShape(16, 1, 1, 16), "auto: no shape is within the limits: n = p = 1"
    )


def test_auto_on_a_zero_weight_says_so():
    choice = auto_shape(torch.zeros(64, 64), 3)
    assert choice == ShapeChoice(
        KroneckerShape(64, 1, 1, 64), "auto: the weight is zero: n = p = 1"
    )


def test_auto_repeats_itself_and_takes_bf16():
    weight = planted((16, 4, 4, 16)).bfloat16()
    assert auto_shape(weight) == auto_shape(weight)


def test_auto_copes_with_a_prime_row():
    assert auto_shape(torch.ones(1, 13), max_compute=2.0).shape == KroneckerShape(1, 1, 1, 13)


@pytest.mark.parametrize(
    ("weight", "window", "message"),
    [
        (torch.zeros(4, 4, 4), 3, r"expected a weight of size \(out, in\), got \(4, 4, 4\)"),
        (torch.zeros(4, 4), 0, "the window must be at least 1, got 0"),
        (torch.full((64, 64), math.nan), 3, "the weight holds 4096 non-finite entries of 4096"),
    ],
)
def test_auto_refuses_bad_arguments(weight, window, message):
    with pytest.raises(ValueError, match=message):
        auto_shape(weight, window)


@pytest.mark.parametrize("sizes", [(6, 2, 4, 5), (5, 1, 1, 7), (2, 6, 8, 3)])
def test_term_compute_counts_the_cheaper_order(sizes):
    m, n, p, q = sizes
    # x as (n, q): X B^T is n*q*p and A(.) m*n*p; or A X is m*n*q and (.)B^T m*q*p.
    cheaper = min(n * q * p + m * n * p, m * n * q + m * q * p)
    expected = cheaper / (m * p * n * q)
    assert module.term_compute(KroneckerShape(*sizes)) == pytest.approx(expected)


def test_auto_compares_decompositions_and_not_guesses(monkeypatch):
    seen = []

    def recording(weight, shape, terms, **options):
        seen.append((shape, terms))
        return kpsvd(weight, shape, terms, **options)

    monkeypatch.setattr(module, "kpsvd", recording)
    auto_shape(planted((16, 4, 4, 16)), 3, max_compute=1.0, max_lora_width=10_000)
    budget = 3 * (64 + 64)
    assert len(seen) == len(module.candidate_shapes(64, 64))
    assert all(terms * shape.num_parameters <= budget for shape, terms in seen)
