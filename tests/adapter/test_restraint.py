"""An update that is cut back: the least of what was asked for, in every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.layer import KpsvdLayer
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.restraint import Restraint
from kpsvd_tune.linalg import kron_sum

FORMS: list[dict[str, Any]] = [
    {"form": "left", "factor_size": 8},
    {"form": "right", "factor_size": [4, 8]},
    {"form": "core"},
]
TRAINED = [torch.arange(40)[None], torch.arange(5, 60, 2)[None]]
OTHER = [torch.arange(100, 140)[None], torch.arange(200, 250)[None]]


def adapted(model: Any, **options: Any) -> Any:
    """The model with random updates of two terms, in evaluation mode."""
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2, "init_weights": False}
    settings |= {"task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    found = get_peft_model(model, KpsvdConfig(**(settings | options)))
    return found.eval()


def inputs(model: Any, layers: dict[str, KpsvdLayer], batches: list[Tensor]) -> dict[str, Tensor]:
    """The inputs (tokens, in) of each layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda _, given, name=name: found[name].append(given[0].flatten(0, 1))
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def delta(layer: KpsvdLayer) -> Tensor:
    return kron_sum(*layer.terms("default")).detach().double()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_features_times_what_is_trained_are_the_update(
    tiny_model: Any, options: dict[str, Any]
) -> None:
    model = adapted(tiny_model, **options)
    for _, layer in kpsvd_layers(model):
        form, tensors = layer.kpsvd_form["default"], layer.tensors("default")
        x = torch.randn(7, layer.in_features)
        features = form.features(x, tensors)
        assert features is not None
        assert features.numel() == 7 * form.num_features
        rows = form.as_rows(tensors[0].detach())
        given = form.from_rows(rows)
        assert torch.equal(given, tensors[0])
        # Samples lie one after another in a token; each gives the rows of what is trained.
        found = (features @ rows.T).view(7, -1, len(rows))
        if form.name == "left":
            found = found.transpose(1, 2)
        wanted = x @ delta(layer).float().T
        torch.testing.assert_close(found.reshape(7, -1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_cut_update_is_the_least_of_what_was_asked_for(
    tiny_model: Any, options: dict[str, Any], strength: float
) -> None:
    model = adapted(tiny_model, **options)
    layers = dict(kpsvd_layers(model))
    own, other = inputs(model, layers, TRAINED), inputs(model, layers, OTHER)
    before = {name: delta(layer) for name, layer in layers.items()}
    Restraint(model, TRAINED, OTHER).apply(strength)
    for name, layer in layers.items():
        part = layer.trained("default")[0]

        def objective(values: Tensor, layer: KpsvdLayer = layer, name: str = name) -> Tensor:
            tensors = (values, *(each.double() for each in layer.frozen("default")))
            update = kron_sum(*layer.kpsvd_form["default"].terms(tensors))
            x, y = own[name].double(), other[name].double()
            lost = (x @ (update - before[name]).T).square().sum(1).mean()
            kept = (y @ update.T).square().sum(1).mean()
            return lost + strength * kept

        values = part.detach().double().requires_grad_()
        least = objective(values)
        least.backward()
        assert values.grad is not None
        # No direction leads further down: the gradient is rounding beside that of other values.
        start = (2 * values.detach()).requires_grad_()
        objective(start).backward()
        assert start.grad is not None
        assert values.grad.norm() < 1e-3 * start.grad.norm()


def test_the_form_both_shrinks_its_offsets(tiny_model: Any) -> None:
    model = adapted(tiny_model, form="both")
    held = [
        p.detach().clone() for _, layer in kpsvd_layers(model) for p in layer.trained("default")
    ]
    Restraint(model, TRAINED, OTHER).apply(3.0)
    found = [p for _, layer in kpsvd_layers(model) for p in layer.trained("default")]
    for before, after in zip(held, found, strict=True):
        torch.testing.assert_close(after, before / 4)


@pytest.mark.parametrize("options", [{"form": "both"}, *FORMS], ids=str)
def test_strengths_do_not_add_up_and_zero_gives_back(
    tiny_model: Any, options: dict[str, Any]
) -> None:
    model = adapted(tiny_model, **options)
    held = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    restraint = Restraint(model, TRAINED, OTHER)
    restraint.apply(1.0)
    once = {n: p.detach().clone() for n, p in model.named_parameters() if n in held}
    restraint.apply(5.0)
    restraint.apply(1.0)
    for name, parameter in model.named_parameters():
        if name in held:
            assert torch.equal(parameter, once[name])
    restraint.apply(0.0)
    for name, parameter in model.named_parameters():
        if name in held:
            assert np.array_equal(parameter.detach().numpy(), held[name].numpy())


class Branch(nn.Module):
    """Two layers, of which tokens above 10 alone go through the second."""

    def __init__(self, is_called_without_tokens: bool) -> None:
        super().__init__()
        self.is_called_without_tokens = is_called_without_tokens
        self.embedding = nn.Embedding(20, 16)
        self.usual, self.rare = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        y: Tensor = self.usual(x)
        chosen = input_ids > 10
        if self.is_called_without_tokens or chosen.any():
            y = y.clone()
            y[chosen] = self.rare(x[chosen])
        return y


LOW, HIGH = [torch.arange(8)[None]], [torch.arange(6, 16)[None]]


@pytest.mark.parametrize("is_called", [False, True], ids=["not called", "called without tokens"])
@pytest.mark.parametrize("form", ["left", "right", "core", "both"])
def test_a_layer_that_the_text_does_not_reach_stays_as_trained(form: str, is_called: bool) -> None:
    model = adapted(Branch(is_called), form=form, task_type=None)
    held = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    Restraint(model, HIGH, LOW).apply(2.0)
    for name, parameter in model.named_parameters():
        if name in held:
            assert parameter.isfinite().all()
            assert torch.equal(parameter, held[name]) == (".rare." in name)


@pytest.mark.parametrize("form", ["left", "both"])
def test_a_layer_that_the_text_alone_reaches_shrinks(form: str) -> None:
    model = adapted(Branch(is_called_without_tokens=True), form=form, task_type=None)
    rare = dict(kpsvd_layers(model))["rare"]
    held = [part.detach().clone() for part in rare.trained("default")]
    Restraint(model, LOW, HIGH).apply(3.0)
    for before, after in zip(held, rare.trained("default"), strict=True):
        torch.testing.assert_close(after, before / 4)
