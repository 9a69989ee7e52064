"""The adapted layer against the dense formula in float64: outputs, input and factor gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.linalg import kron_sum

# Float32 sums of a few hundred products, compared with float64: a few units of 1e-7.
FLOAT32 = 5e-6


def adapted_layer(sizes: tuple[int, int], bias: bool = False, **options: Any) -> tuple[Any, Any]:
    """A one-layer model with non-zero offsets, and its adapted layer."""
    out_features, in_features = sizes
    settings: dict[str, Any] = {"target_modules": ["0"], "rank": 3} | options
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=bias))
    model: Any = get_peft_model(base, KpsvdConfig(**settings))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for factors in (layer.kpsvd_left, layer.kpsvd_right):
            for factor in factors.values():
                factor.normal_(std=0.05)
    return model, layer


def reference(layer: Any, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """W x + Delta x and the gradients by autograd, in float64, with Delta built whole."""
    a, b = (f["default"].detach().double() for f in (layer.kpsvd_left, layer.kpsvd_right))
    left0, right0 = (f["default"].double() for f in (layer.kpsvd_left0, layer.kpsvd_right0))
    a.requires_grad_()
    b.requires_grad_()
    inputs = x.detach().double().requires_grad_()
    base = layer.get_base_layer()
    delta = kron_sum(left0 + a, right0 + b) - kron_sum(left0, right0)
    y = inputs @ (base.weight.detach().double() + delta).T
    if base.bias is not None:
        y = y + base.bias.detach().double()
    y.backward(gradient.double())
    grads = {"x": inputs.grad, "left": a.grad, "right": b.grad}
    return {"y": y.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("path", ["auto", "activations", "weight"])
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (3, 67)])
@pytest.mark.parametrize("shape", ["balanced", "thin", "pissa", {"n": 8, "p": 4}])
@pytest.mark.parametrize("sizes", [(48, 96), (128, 64)])
def test_outputs_and_gradients_are_those_of_the_formula(
    path: str, tokens: tuple[int, ...], shape: Any, sizes: tuple[int, int]
) -> None:
    model, layer = adapted_layer(sizes, factor_shape=shape, path=path)
    x = torch.randn(*tokens, sizes[1], requires_grad=True)
    y = model(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected = reference(layer, x, gradient)
    assert x.grad is not None
    assert distance(y.detach(), expected["y"]) < FLOAT32
    assert distance(x.grad, expected["x"]) < FLOAT32
    assert distance(layer.kpsvd_left["default"].grad, expected["left"]) < FLOAT32
    assert distance(layer.kpsvd_right["default"].grad, expected["right"]) < FLOAT32


@pytest.mark.parametrize("sizes", [(576, 576), (1536, 576), (576, 1536), (1024, 1024)])
@pytest.mark.parametrize("shape", ["balanced", "thin"])
def test_the_sizes_of_real_layers(shape: str, sizes: tuple[int, int]) -> None:
    """Training sizes, where the chunked gradients and the weight path are chosen."""
    model, layer = adapted_layer(sizes, factor_shape=shape, rank=4)
    x = torch.randn(4, 40, sizes[1], requires_grad=True)
    y = model(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected = reference(layer, x, gradient)
    assert x.grad is not None
    assert distance(y.detach(), expected["y"]) < FLOAT32
    assert distance(x.grad, expected["x"]) < FLOAT32
    assert distance(layer.kpsvd_left["default"].grad, expected["left"]) < FLOAT32
    assert distance(layer.kpsvd_right["default"].grad, expected["right"]) < FLOAT32


@pytest.mark.parametrize("path", ["auto", "activations", "weight"])
def test_inference_gives_what_training_gives_and_follows_the_factors(path: str) -> None:
    model, layer = adapted_layer((48, 96), bias=True, path=path)
    x = torch.randn(2, 5, 96)
    for _ in range(2):
        with torch.no_grad():
            layer.kpsvd_left["default"].mul_(2)  # what is kept for inference must not be stale
        expected = model(x).detach()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    model, layer = adapted_layer((48, 96))
    x = torch.randn(7, 96)
    gradient = torch.randn(7, 48)
    model(x).backward(gradient)
    expected = reference(layer, x, gradient)
    assert distance(layer.kpsvd_right["default"].grad, expected["right"]) < FLOAT32
    assert x.grad is None


@pytest.mark.parametrize("shape", ["balanced", "thin"])
@pytest.mark.parametrize("path", ["activations", "weight"])
@pytest.mark.parametrize("differentiated", [True, False])
def test_autocast_applies_the_update(path: str, shape: str, differentiated: bool) -> None:
    model, layer = adapted_layer((64, 96), factor_shape=shape, path=path)
    x = torch.randn(33, 96)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(differentiated):
        adapted = model(x)
        with model.disable_adapter():
            plain = model(x)
    assert adapted.dtype == torch.bfloat16
    delta = layer.get_delta_weight("default").double()
    update = (adapted.double() - plain.double()).detach()
    # The sum is a bf16 number, so single entries round; the projection on the update survives.
    wanted = x.double() @ delta.T
    assert float((update * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.02)


def test_gradients_under_autocast() -> None:
    model, layer = adapted_layer((64, 96))
    x = torch.randn(40, 96, requires_grad=True)
    gradient = torch.randn(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.backward(gradient.to(y.dtype))
    expected = reference(layer, x, gradient)
    assert x.grad is not None
    # bf16 has 8 bits: about 4e-3 for each product.
    assert distance(x.grad, expected["x"]) < 2e-2
    assert distance(layer.kpsvd_left["default"].grad, expected["left"]) < 2e-2
    assert distance(layer.kpsvd_right["default"].grad, expected["right"]) < 2e-2
    assert layer.kpsvd_left["default"].grad.dtype == torch.float32


def test_gradients_of_a_bf16_base() -> None:
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(96, 64, bias=True)).to(torch.bfloat16)
    model: Any = get_peft_model(base, KpsvdConfig(target_modules=["0"], rank=3))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.kpsvd_left["default"].normal_(std=0.05)
    x = torch.randn(9, 96, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    gradient = torch.randn(9, 64)
    y.backward(gradient.to(y.dtype))
    expected = reference(layer, x, gradient)
    assert y.dtype == torch.bfloat16
    assert distance(y.detach(), expected["y"]) < 1e-2
    assert distance(layer.kpsvd_right["default"].grad, expected["right"]) < 1e-2


def test_two_active_adapters_add_up() -> None:
    model, layer = adapted_layer((48, 96))
    model.add_adapter("second", KpsvdConfig(target_modules=["0"], rank=1, factor_shape="thin"))
    with torch.no_grad():
        layer.kpsvd_right["second"].normal_(std=0.05)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(5, 96)
    weight = layer.get_base_layer().weight + sum(
        layer.get_delta_weight(name) for name in ("default", "second")
    )
    torch.testing.assert_close(model(x), x @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_hooked_base_layer_is_still_called() -> None:
    """Offloading moves weights in hooks: the base layer may then not be bypassed."""
    model, layer = adapted_layer((48, 96))
    calls = []
    layer.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 96)
    expected = x @ (layer.get_base_layer().weight + layer.get_delta_weight("default")).T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_dropout_drops_inputs_of_the_update_only() -> None:
    model, layer = adapted_layer((48, 96), dropout=0.5)
    model.train()
    x = torch.randn(200, 96)
    base = layer.base_layer(x).detach()
    updates = torch.stack([(model(x) - base).detach() for _ in range(64)]).mean(0)
    wanted = x @ layer.get_delta_weight("default").T
    # Dropout scales what is kept, so the mean of many draws is the update without it.
    assert distance(updates, wanted.double()) < 0.25


# Dynamo itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_compile_has_no_graph_break() -> None:
    model, _ = adapted_layer((48, 96))
    x = torch.randn(4, 96)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
