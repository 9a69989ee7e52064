"""The cost model: pure, overridable, and right where the better way is known beyond doubt."""

from __future__ import annotations

import pytest

from kpsvd_tune.adapter.forms import Both, Plan, Way
from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.linalg import KroneckerShape

BALANCED = KroneckerShape(64, 64, 64, 64)
THIN = KroneckerShape(2048, 2, 2, 2048)


@pytest.mark.parametrize("path", ["activations", "weight"])
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("shape", [BALANCED, THIN], ids=["balanced", "thin"])
def test_a_path_can_be_forced(shape: KroneckerShape, tokens: int, path: str) -> None:
    update = Both(shape, 4).plan(tokens, path).update
    assert (update is Dense) == (path == "weight")


def test_few_tokens_take_activations_and_many_the_weight() -> None:
    ways = [Both(BALANCED, 4).plan(tokens).update for tokens in (1, 16, 1024, 4096)]
    assert [way is Dense for way in ways] == [False, False, True, True]


def test_thin_factors_of_a_large_layer_take_flat_products() -> None:
    assert Both(THIN, 4).plan(512) == Plan(Flat, Flat)


def test_a_delta_that_cannot_be_added_makes_the_weight_path_dearer() -> None:
    """In 16 bits W + Delta may not be rounded, so the weight path pays for a product of its own."""
    counts = [
        sum(
            Both(BALANCED, 1).plan(tokens, can_add=can_add).update is Dense
            for tokens in range(1, 3000, 50)
        )
        for can_add in (True, False)
    ]
    assert counts[1] < counts[0]


def test_the_choice_depends_on_nothing_but_sizes() -> None:
    assert len({Both(BALANCED, 4).plan(300) for _ in range(3)}) == 1


@pytest.mark.parametrize(("tokens", "rank", "shape"), [(300, 4, BALANCED), (512, 2, THIN)])
def test_costs_are_those_of_the_measured_model(
    tokens: int, rank: int, shape: KroneckerShape
) -> None:
    """Worked out from the formulas in docs/performance.md; a change would change runs' bits."""
    m, n, p, q = shape.as_tuple()
    out, size, terms = m * p, n * q, 2 * rank
    expected: dict[Way, float] = {
        Flat: tokens * (terms * p * size + terms * n * p * out + 8.7 * (size + 2 * out))
        + terms * n * p * out * 8.7
        + 3.5e5,
        Batched: tokens * (2.7 * terms * (p * size + n * out) + 8.7 * (size + 2 * out)) + 5.25e5,
        Dense: out * size * (41.0 + terms) + 1.75e5,
    }
    for way, cost in expected.items():
        assert way.update_cost(tokens, terms, shape) == pytest.approx(cost, rel=1e-12)
    gradients: dict[Way, float] = {
        Flat: 2 * tokens * (rank * (p * size + n * p * out) + 8.7 * (size + out)),
        Batched: 2
        * tokens
        * (1.87 * (1 + 0.85 / p) * rank * (p * size + n * out) + 8.7 * (size + out)),
        Dense: out * size * (tokens + 43.0 + 2 * rank),
    }
    for way, cost in gradients.items():
        assert way.gradient_cost(tokens, rank, shape) == pytest.approx(cost, rel=1e-12)
