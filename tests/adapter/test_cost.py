"""The cost model: pure, overridable, and right where the better way is known beyond doubt."""

from __future__ import annotations

import pytest
import torch

from kpsvd_tune.adapter.cost import Plan, choose_plan
from kpsvd_tune.linalg import KroneckerShape

BALANCED = KroneckerShape(64, 64, 64, 64)
THIN = KroneckerShape(2048, 2, 2, 2048)


@pytest.mark.parametrize("path", ["activations", "weight"])
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("shape", [BALANCED, THIN], ids=["balanced", "thin"])
def test_a_path_can_be_forced(shape: KroneckerShape, tokens: int, path: str) -> None:
    assert choose_plan(tokens, 4, shape, torch.float32, path).path == path


def test_few_tokens_take_activations_and_many_the_weight() -> None:
    paths = [choose_plan(t, 4, BALANCED, torch.float32).path for t in (1, 16, 1024, 4096)]
    assert paths == ["activations", "activations", "weight", "weight"]


def test_thin_factors_of_a_large_layer_take_flat_products() -> None:
    assert choose_plan(512, 4, THIN, torch.float32) == Plan("activations", True, "spread")


def test_sixteen_bits_make_the_weight_path_dearer() -> None:
    """W + Delta may not be rounded, so the weight path pays for a product of its own."""
    by_dtype = [
        [choose_plan(t, 1, BALANCED, dtype).path for t in range(1, 3000, 50)].count("weight")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert by_dtype[1] < by_dtype[0]


def test_the_choice_depends_on_nothing_but_sizes_and_dtype() -> None:
    plans = {choose_plan(300, 4, BALANCED, torch.float32) for _ in range(3)}
    assert len(plans) == 1
