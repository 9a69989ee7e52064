"""Random factors that a seed gives again."""

from __future__ import annotations

import torch

from kpsvd_tune.linalg import drawn_factor


def test_the_numbers_never_change() -> None:
    """An adapter stores the seed alone: other numbers would be another adapter."""
    found = drawn_factor(7, "model.layers.0.mlp.up_proj kpsvd_right0", (1, 2, 3)).flatten()
    expected = torch.tensor([0.8380215, -0.2040473, 1.0885845, -0.8708009, 0.2281636, -3.1256227])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_each_seed_name_and_layer_has_its_own() -> None:
    drawn = [drawn_factor(*each, (4,)) for each in ((0, "a"), (0, "b"), (1, "a"), (0, "a"))]
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_numbers_are_standard_normal() -> None:
    drawn = drawn_factor(0, "large", (200, 100))
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.02
