"""The factor-shape rules: divisors by trial, and fallbacks said."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpsvd_tune.linalg import KroneckerShape, ShapeChoice, choose_shape
from kpsvd_tune.linalg.shape import nearest_shape

sizes = st.integers(1, 300)
small = settings(max_examples=50, deadline=None)


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
        ((4, 4), "auto", "unknown factor shape 'auto': expected one of balanced, thin, pissa"),
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


@pytest.mark.parametrize(
    ("size", "form", "wanted", "expected", "is_told"),
    [
        ((576, 1536), "left", 32, (32, 32, 18, 48), False),
        ((576, 1536), "right", [18, 48], (32, 32, 18, 48), False),
        ((4096, 11008), "left", 64, (64, 64, 64, 172), False),
        ((192, 576), "left", 30, (32, 32, 6, 18), True),
        ((7, 11), "left", [4, 3], (7, 1, 1, 11), True),
        ((7, 11), "right", 100, (1, 1, 7, 11), True),
        ((12, 12), "left", [5, 1], (6, 1, 2, 12), True),
    ],
)
def test_a_wanted_size_gives_the_nearest_divisors(
    size: tuple[int, int],
    form: str,
    wanted: int | list[int],
    expected: tuple[int, int, int, int],
    is_told: bool,
) -> None:
    choice = nearest_shape(*size, form, wanted)
    assert choice.shape.as_tuple() == expected
    rows, columns = expected[:2] if form == "left" else expected[2:]
    assert choice.note is None or f"the nearest divisors give {rows} x {columns}" in choice.note
    assert (choice.note is not None) == is_told


@pytest.mark.parametrize(
    ("form", "wanted", "message"),
    [
        ("core", 8, "forms left and right train, got it with the form core"),
        ("both", 8, "forms left and right train, got it with the form both"),
        ("left", 0, "at least 1, got 0 x 0"),
        ("left", [1, 2, 3], "expected two whole numbers or one"),
        ("left", [1, 2.5], "expected two whole numbers or one"),
    ],
)
def test_wrong_sizes_of_the_trained_factor(form: str, wanted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_shape(12, 12, form, wanted)
