"""The bounds of what an adapter's file holds, where a budget cuts the ranks."""

from __future__ import annotations

import random

import pytest

from kpsvd_tune.estimate.ranks import PossibleRanks
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, RankRule, choose_ranks

SHAPES = [(8, 4, 4, 8), (4, 4, 4, 8), (8, 6, 4, 8), (2, 2, 16, 16)]


@pytest.mark.parametrize("form", ["both", "left", "right", "core"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_no_choice_within_a_budget_stores_more_than_the_bound(form: str, share: float) -> None:
    draw = random.Random(f"{form} {share}")
    for _ in range(20):
        plans = []
        for number in range(8):
            shape = KroneckerShape(*draw.choice(SHAPES))
            values = sorted((draw.random() for _ in range(12)), reverse=True)
            count = min(12, shape.max_rank)
            held = tuple(values[:count])
            plans.append(LayerPlan(f"l{number}", shape, values=held, squared_norm=20.0, form=form))
        rule = RankRule(method="fixed", min=0, max=12, window=12)
        most = choose_ranks(plans, rule)
        budget = round(share * sum(plan.num_parameters for plan in most))
        chosen = choose_ranks(
            plans, RankRule(method="fixed", min=0, max=12, window=12, budget=budget)
        )
        least = choose_ranks(plans, RankRule(method="fixed", min=0, max=0, window=12))
        bounds = PossibleRanks(tuple(least), tuple(most), budget, "bounds")
        for is_drawn in (False, True):
            _, high = bounds.num_stored(is_drawn=is_drawn)
            stored = sum(plan.stored(is_drawn) for plan in chosen)
            assert stored <= high <= 1.6 * stored + 200
