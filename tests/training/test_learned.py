"""How far each layer moved: the norms that are kept with the adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.linalg import kron_sum
from kpsvd_tune.report.results import LearnedLayer, LearnedReport
from kpsvd_tune.training.learned import measure_learned, update_norm


@pytest.mark.parametrize("form", ["both", "left", "core"])
def test_every_layer_s_norms_are_those_of_its_matrices(
    model_factory: Callable[..., LlamaForCausalLM], form: str
) -> None:
    base = model_factory()
    weights = {
        name: each.weight.detach().clone() for name, each in base.named_modules() if "proj" in name
    }
    model = get_peft_model(base, KpsvdConfig(target_modules="all-linear", rank=2, form=form))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)
    report = measure_learned(model, 7)
    assert report.step == 7
    layers = dict(kpsvd_layers(model))
    assert [each.name for each in report.layers] == list(layers) == list(weights)
    for each in report.layers:
        delta = layers[each.name].get_delta_weight("default")
        assert each.update_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert each.update_norm > 0
        assert each.weight_norm == pytest.approx(float(weights[each.name].norm()), rel=1e-5)


def test_the_norm_of_a_sum_of_kronecker_products_needs_no_dense_matrix() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(5, 3, 4), torch.randn(5, 2, 6)
    dense = kron_sum(left.double(), right.double())
    assert update_norm(left, right) == pytest.approx(float(dense.norm()), rel=1e-12)
    # Terms that cancel leave nothing, and no root of a negative number.
    assert update_norm(torch.stack([left[0], -left[0]]), torch.stack([right[0]] * 2)) < 1e-6


def test_a_weight_of_zeros_has_no_share() -> None:
    layers = (LearnedLayer("a", 1.0, 4.0), LearnedLayer("b", 1.0, 0.0), LearnedLayer("c", 3.0, 4.0))
    assert [each.share for each in layers] == [0.25, None, 0.75]
    assert [each.name for each in LearnedReport(1, layers).most()] == ["c", "a"]
