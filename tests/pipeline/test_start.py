"""What training starts from: directions differ, norms do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.events import SilentEvents
from kpsvd_tune.linalg import KroneckerShape, kpsvd
from kpsvd_tune.models import load_model, resolve_model
from kpsvd_tune.pipeline.start import starting_factors
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.training.loss import make_micro_batch
from kpsvd_tune.training.mean_gradient import mean_gradients

ROWS = [
    TokenizedRow(tuple(range(n, n + 12)), (-100,) * 4 + tuple(range(n + 4, n + 12)), n)
    for n in range(10)
]


def start(folder: Path, **adapter: Any) -> Any:
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "adapter": {"rank": {"method": "fixed", "window": 4, "max": 2}, **adapter},
            "train": {"batch_size": 2, "precision": "no"},
            "output_dir": "unused",
        }
    )
    source = resolve_model(str(folder))
    return starting_factors(recipe, source, ROWS, 0, torch.device("cpu"), SilentEvents())


def norms(factors: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    return {
        name: [torch.linalg.vector_norm(each, dim=(1, 2)) for each in pair]
        for name, pair in factors.items()
    }


@pytest.mark.parametrize("init", ["random", "gradient"])
def test_terms_keep_the_norms_of_the_weights_own(init: str, tiny_model_dir: Path) -> None:
    weight, other = start(tiny_model_dir), start(tiny_model_dir, init=init)
    assert weight.factors.keys() == other.factors.keys()
    expected = norms(weight.factors)
    for name, found in norms(other.factors).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(other.factors[name][0], weight.factors[name][0], atol=1e-3)
    # Only the weight's own terms tell one base from another.
    assert all(layer["fingerprint"] is None for layer in other.layers.values())
    assert all(layer["fingerprint"] > 0 for layer in weight.layers.values())


def test_the_gradient_start_points_where_the_gradient_does(tiny_model_dir: Path) -> None:
    found = start(tiny_model_dir, init="gradient", gradient_batches=2)
    model = load_model(resolve_model(str(tiny_model_dir)), "float32")
    from kpsvd_tune.data import StatelessSampler

    sampler = StatelessSampler(len(ROWS), 2, 1, 1, 0)
    batches = [
        make_micro_batch([ROWS[i] for i in sampler.batch(step, 0, 0)], 0) for step in range(2)
    ]
    for name, gradient in mean_gradients(model, list(found.factors), batches):
        terms = kpsvd(gradient, KroneckerShape(*found.layers[name]["shape"]), 2, tolerance=0)
        left = found.factors[name][0]
        cosine = torch.nn.functional.cosine_similarity(left.flatten(1), terms.left.flatten(1))
        torch.testing.assert_close(cosine.abs(), torch.ones(2), rtol=0, atol=1e-3)
        report = next(layer for layer in found.report.layers if layer.name == name)
        assert report.singular_values[0] == pytest.approx(float(terms.values[0]), rel=1e-3)


def test_random_starts_follow_the_seed(tiny_model_dir: Path) -> None:
    first, again = (start(tiny_model_dir, init="random") for _ in range(2))
    for name, pair in first.factors.items():
        assert torch.equal(pair[0], again.factors[name][0])
