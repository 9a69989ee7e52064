"""What training starts from: directions differ, norms do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kpsvd_tune.decompose import decompose
from kpsvd_tune.models import resolve_model
from kpsvd_tune.recipe.adapter import AdapterRecipe


def start(folder: Path, **adapter: Any) -> Any:
    settings = {"rank": {"method": "fixed", "window": 4, "max": 2}, **adapter}
    return decompose(resolve_model(str(folder)), AdapterRecipe.model_validate(settings))


def norms(factors: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    return {
        name: [torch.linalg.vector_norm(each, dim=(1, 2)) for each in pair]
        for name, pair in factors.items()
    }


def test_random_terms_keep_the_norms_of_the_weights_own(tiny_model_dir: Path) -> None:
    weight, other = start(tiny_model_dir), start(tiny_model_dir, init="random")
    assert weight.factors.keys() == other.factors.keys()
    expected = norms(weight.factors)
    for name, found in norms(other.factors).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(other.factors[name][0], weight.factors[name][0], atol=1e-3)
    # Only the weight's own terms tell one base from another.
    assert all(layer["fingerprint"] is None for layer in other.layers.values())
    assert all(layer["fingerprint"] > 0 for layer in weight.layers.values())


def test_random_starts_follow_the_seed(tiny_model_dir: Path) -> None:
    first, again = (start(tiny_model_dir, init="random") for _ in range(2))
    for name, pair in first.factors.items():
        assert torch.equal(pair[0], again.factors[name][0])
