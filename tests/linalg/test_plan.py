"""One layer from its shape to its rank: what it holds of the energy, and what an adapter keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kpsvd_tune.linalg import (
    KroneckerShape,
    LayerPlan,
    RankRule,
    choose_ranks,
    decompose_layer,
    kpsvd,
    rearrange,
)

SHAPE = KroneckerShape(4, 3, 2, 5)


def test_a_weight_is_planned_by_the_rule_of_its_shape() -> None:
    assert LayerPlan.of_weight("a", (8, 15), {"n": 3, "p": 2}) == LayerPlan("a", SHAPE)
    prime = LayerPlan.of_weight("a", (7, 12), "balanced")
    assert prime.note == "out = 7 is prime: that side is not split"
    with pytest.raises(ValueError, match="n = 4 does not divide in = 15"):
        LayerPlan.of_weight("a", (8, 15), {"n": 4, "p": 2})


def test_energies_are_shares_of_the_whole_weight() -> None:
    plan = LayerPlan("a", SHAPE, values=(3.0, 2.0, 1.0), squared_norm=20.0)
    assert plan.shares() == [9 / 20, 4 / 20, 1 / 20]
    assert plan.energy(2) == pytest.approx(13 / 20)
    assert plan.relative_error(2) == pytest.approx(math.sqrt(7 / 20))
    assert plan.within(1).energy(3) == pytest.approx(9 / 20)
    # Rounding must not take a share above the whole.
    assert LayerPlan("a", SHAPE, values=(1.0,), squared_norm=1.0 - 1e-16).energy(1) == 1.0


def test_decomposing_fills_the_spectrum_and_gives_the_terms() -> None:
    weight = torch.randn(8, 15, generator=torch.Generator().manual_seed(0))
    plan, terms = decompose_layer(LayerPlan("a", SHAPE), weight, 4, tolerance=0, seed=0)
    expected = kpsvd(weight, SHAPE, 4, tolerance=0)
    assert torch.equal(terms.left, expected.left)
    assert plan.values == tuple(expected.values.tolist())
    assert plan.squared_norm == expected.squared_norm
    assert plan.seconds > 0
    with pytest.raises(ValueError, match="non-finite"):
        decompose_layer(plan, weight * math.inf, 4, tolerance=0, seed=0)


def test_an_adapter_keeps_shape_rank_and_fingerprint() -> None:
    plan = LayerPlan("a", SHAPE, values=(3.0, 2.0), squared_norm=13.0)
    (plan,) = choose_ranks([plan], RankRule(method="fixed", max=2))
    assert plan.settings() == {"shape": [4, 3, 2, 5], "rank": 2, "fingerprint": 9.0}
    assert plan.settings(is_of_weight=False)["fingerprint"] is None
    assert plan.num_parameters == 2 * SHAPE.num_parameters


@pytest.mark.parametrize("form", ["left", "right", "core"])
def test_random_directions_hold_their_mean_share(form: str) -> None:
    """The mean of ||R(W) v||^2 over unit vectors v of random directions, by drawing many."""
    torch.manual_seed(0)
    shape, weight = KroneckerShape(2, 3, 4, 2), torch.randn(8, 6)
    matrix = rearrange(weight, shape)
    left, right = (nn.functional.normalize(torch.randn(4000, size), dim=1) for size in matrix.shape)
    held = {
        "left": (right @ matrix.T).square().sum(1),
        "right": (left @ matrix).square().sum(1),
        "core": ((left @ matrix) * right).sum(1).square(),
    }[form]
    squared_norm = float(weight.square().sum())
    plan = LayerPlan("layer", shape, form=form).with_random_terms(squared_norm, 4)
    assert plan.values[0] ** 2 == pytest.approx(float(held.mean()), rel=0.1)
    assert len(plan.values) == 4
    assert len(plan.with_random_terms(squared_norm, 100).values) == shape.max_rank
    assert plan.squared_norm == squared_norm


@pytest.mark.parametrize("squared_norm", [math.nan, math.inf])
def test_random_terms_need_a_finite_weight(squared_norm: float) -> None:
    with pytest.raises(ValueError, match="norm is not finite, so it holds NaN or infinite"):
        LayerPlan("a", SHAPE, form="core").with_random_terms(squared_norm, 4)


@pytest.mark.parametrize(
    ("form", "rank", "drawn", "stored"),
    [
        ("both", 2, False, 88),
        ("left", 2, False, 44),
        ("right", 2, False, 44),
        ("core", 3, False, 75),
    ]
    + [("left", 2, True, 24), ("right", 2, True, 20), ("core", 3, True, 9)],
)
def test_what_a_file_holds_of_a_layer(form: str, rank: int, drawn: bool, stored: int) -> None:
    """SHAPE has left factors of 12 numbers and right ones of 10."""
    assert LayerPlan("a", SHAPE, rank=rank, form=form).stored(drawn) == stored


def test_a_core_costs_its_square_in_the_budget() -> None:
    plans = [
        LayerPlan(name, SHAPE, form="core", values=(2.0, 1.0, 1.0, 1.0), squared_norm=8.0)
        for name in "ab"
    ]
    rule = RankRule(method="fixed", window=4, min=1, max=4, budget=13)
    chosen = choose_ranks(plans, rule)
    assert [plan.rank for plan in chosen] == [3, 2]
    assert sum(plan.num_parameters for plan in chosen) == 13
