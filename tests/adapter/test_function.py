"""The differentiable operation, each of its ways, against the oracle; what it keeps and rounds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpsvd_tune.adapter import KpsvdLinear, kernel
from kpsvd_tune.adapter.forms import FORMS, Form, Plan, Way
from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.hardware import bf16
from kpsvd_tune.linalg import KroneckerShape

SHAPES = [(12, 2, 2, 12), (6, 4, 4, 6), (8, 1, 5, 7), (5, 7, 1, 8), (1, 3, 9, 4), (1, 1, 6, 5)]
EACH: tuple[Way, ...] = (Flat, Batched, Dense)
WAYS = [Plan(*ways) for ways in itertools.product(EACH, repeat=2)]


def adapted(
    sizes: tuple[int, int, int, int],
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    form: str = "both",
) -> KpsvdLinear:
    """An adapted layer with random non-zero factors, float32 or in the dtype if that is wider."""
    shape = KroneckerShape(*sizes)
    base = nn.Linear(shape.in_features, shape.out_features, bias=bias).requires_grad_(False)
    found = KpsvdLinear(base.to(dtype), "default")
    own = FORMS[form](shape, rank)
    frozen = tuple(torch.randn(own.size(part)) for part in own.frozen)
    found.update_layer("default", own, 0.0, frozen)
    if dtype == torch.float64:
        found.double()
    with torch.no_grad():
        for parameter in trained(found):
            parameter.normal_(std=0.3)
    return found


def trained(module: KpsvdLinear) -> tuple[Tensor, ...]:
    return module.trained("default")


def base_of(module: KpsvdLinear) -> nn.Linear:
    base = module.base_layer
    assert isinstance(base, nn.Linear)
    return base


def assert_to_1e_5(got: Any, expected: np.ndarray) -> None:
    """The layer's own bound in float32, half of what the common table allows."""
    error = np.abs(got.detach().double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, f"relative error {error:.2e}"


def values(module: KpsvdLinear) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in module.tensors("default")]


def oracle_delta(module: KpsvdLinear) -> np.ndarray:
    """Written out from each form's definition, one np.kron a term."""
    found = values(module)
    match module.kpsvd_form["default"].name:
        case "both":
            a, b, left0, right0 = found
            return oracle.delta(left0, right0, a, b)
        case "left":
            pairs = list(zip(*found, strict=True))
        case "right":
            pairs = [(u, b) for b, u in zip(*found, strict=True)]
        case _:
            core, left0, right0 = found
            pairs = [
                (core[k, j] * left0[k], right0[j])
                for k, j in itertools.product(range(len(core)), repeat=2)
            ]
    return np.asarray(sum(np.kron(left, right) for left, right in pairs))


def oracle_gradients(module: KpsvdLinear, x: Tensor, gy: Tensor) -> tuple[np.ndarray, ...]:
    """Contract the whole weight gradient block by block: d Delta[i*p+k, j*q+l] / d A_ij = B_kl."""
    form, found = module.kpsvd_form["default"], values(module)
    whole = (gy.double().flatten(0, -2).T @ x.detach().double().flatten(0, -2)).numpy()
    match form.name:
        case "both":
            return contracted(whole, found[0] + found[2], found[1] + found[3])
        case "left":
            return contracted(whole, *found)[:1]
        case "right":
            return contracted(whole, found[1], found[0])[1:]
    core, left0, right0 = found
    gradient = np.zeros_like(core)
    for k, j in itertools.product(range(len(core)), repeat=2):
        gradient[k, j] = (whole * np.kron(left0[k], right0[j])).sum()
    return (gradient,)


def contracted(
    whole: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    (terms, m, n), (_, p, q) = left.shape, right.shape
    ga, gb = np.zeros_like(left), np.zeros_like(right)
    for term, i, j in itertools.product(range(terms), range(m), range(n)):
        block = whole[i * p : (i + 1) * p, j * q : (j + 1) * q]
        ga[term, i, j] = (block * right[term]).sum()
        gb[term] += block * left[term, i, j]
    return ga, gb


def use(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(Form, "plan", lambda *_: plan)


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("way", [Flat, Batched])
@pytest.mark.parametrize("rows", [(1, 1), (9,), (3, 3), (0, 3)], ids=str)
def test_an_update_kept_for_batches_is_the_oracle(
    rows: tuple[int, ...], way: type[Flat] | type[Batched], is_chunked: bool, monkeypatch: Any
) -> None:
    use(monkeypatch, Plan(way, Dense))
    if is_chunked:
        monkeypatch.setattr(kernel, "CHUNK_TOKENS", 4)
        monkeypatch.setattr(kernel, "CACHED_BYTES", 1)
    module = adapted((6, 4, 4, 6)).requires_grad_(False)
    weight = base_of(module).weight.double().numpy() + oracle_delta(module)
    bias = base_of(module).bias.double().numpy()
    # Turned, too: rows need not lie one behind the other.
    straight = torch.randn(*rows, 24)
    inputs = [straight, straight.transpose(0, 1)] if rows == (3, 3) else [straight]
    for x in inputs:
        for _ in range(2):  # made ready, then kept
            with torch.no_grad():
                y = module(x)
            assert module._ready is not None
            assert y.shape == (*x.shape[:-1], 24)
            if len(y):
                assert_to_1e_5(y, x.double().numpy() @ weight.T + bias)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("plan", WAYS, ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_way_is_the_oracle(
    form: str,
    sizes: tuple[int, int, int, int],
    plan: Plan,
    is_fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, plan)
    # Small pieces, so that their seams are crossed: 27 tokens in chunks of 4, W in rows.
    monkeypatch.setattr(kernel, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(kernel, "CACHED_BYTES", 1)
    monkeypatch.setattr(kernel, "BLOCK_ENTRIES", 100)
    module = adapted(sizes, form=form)
    if not is_fused:
        module.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 9, base_of(module).in_features, requires_grad=True)
    gy = torch.randn(3, 9, base_of(module).out_features)
    y = module(x)
    y.backward(gy)
    weight = base_of(module).weight.double().numpy() + oracle_delta(module)
    bias = base_of(module).bias.double().numpy()
    assert x.grad is not None
    assert_to_1e_5(y, x.detach().double().numpy() @ weight.T + bias)
    assert_to_1e_5(x.grad, gy.double().numpy() @ weight)
    for parameter, wanted in zip(trained(module), oracle_gradients(module, x, gy), strict=True):
        assert_to_1e_5(parameter.grad, wanted)
    with torch.no_grad():
        oracle.assert_close(module(x), y.detach(), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("plan", WAYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, plan)
    module = adapted((3, 2, 2, 4), dtype=torch.float64, form=form)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *_: Tensor) -> Any:
        return module(x)

    assert torch.autograd.gradcheck(function, (x, *trained(module)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", WAYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_only_the_input_is_kept(
    form: str, plan: Plan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plan)
    module = adapted((6, 4, 4, 6), dtype=dtype, form=form)
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: list[Tensor] = []
    x = torch.randn(10, 24, dtype=dtype)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr()}


@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_no_kronecker_product_is_built(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, plan)
    monkeypatch.setattr(torch, "kron", None)
    monkeypatch.setattr(Tensor, "kron", None)
    module = adapted((6, 4, 4, 6))
    module(torch.randn(10, 24)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(module))


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("plan", WAYS[::3], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_bf16_rounds_the_update_no_more_than_lora(
    plan: Plan, scale: float, is_autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of y - Wx, not of y: rounding W + Delta to bf16 would lose small updates."""
    use(monkeypatch, plan)
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", False)
    module = adapted((16, 8, 8, 16), dtype=torch.bfloat16, bias=False)
    with torch.no_grad():
        for parameter in trained(module):
            parameter.mul_(scale)
    delta = torch.from_numpy(oracle_delta(module))
    lora: Any = get_peft_model(
        nn.Sequential(module.base_layer),
        LoraConfig(target_modules=["0"], r=128, lora_alpha=128, init_lora_weights=False),
    )
    with torch.no_grad():
        lora.base_model.model[0].lora_A["default"].weight.copy_(torch.eye(128))
        lora.base_model.model[0].lora_B["default"].weight.copy_(delta)
    x = torch.randn(200, 128, dtype=torch.bfloat16)
    plain = module.base_layer(x).double()
    wanted = x.double() @ delta.T
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        lora_update, inferred_update = (model(x).double() - plain for model in (lora, module))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        update = module(x).detach().double() - plain
    lora_error = float((lora_update - wanted).norm())
    # The same to the last bits: equal sums in another order round a few entries the other way.
    assert float((update - wanted).norm()) <= 1.005 * lora_error
    assert float((inferred_update - wanted).norm()) <= 1.005 * lora_error


@pytest.mark.parametrize("plan", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_zeros_give_the_bits_of_the_base(
    form: str, plan: Plan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plan)
    module = adapted((16, 8, 8, 16), dtype=dtype, form=form)
    with torch.no_grad():
        for parameter in trained(module):
            parameter.zero_()
    x = torch.randn(70, 128, dtype=dtype)
    assert torch.equal(module(x), module.base_layer(x))
    with torch.no_grad():
        assert torch.equal(module(x), module.base_layer(x))


def test_gradients_in_layouts_that_autograd_hands_over() -> None:
    module = adapted((6, 4, 4, 6))
    x = torch.randn(24, 10).T.requires_grad_()
    y = module(x)
    y.sum().backward()  # the gradient of a sum is one number, expanded
    ga, gb = oracle_gradients(module, x, torch.ones_like(y))
    oracle.assert_close(trained(module)[0].grad, ga, "float32")
    oracle.assert_close(trained(module)[1].grad, gb, "float32")


def test_no_tokens() -> None:
    module = adapted((6, 4, 4, 6))
    y = module(torch.randn(2, 0, 24, requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 0, 24)
    assert float(trained(module)[0].grad.abs().sum()) == 0.0  # type: ignore[union-attr]


def test_large_buffers_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one lasting buffer may hold another layer's weight by the time backward runs."""
    monkeypatch.setattr(kernel, "FRESH_BYTES", 16)
    use(monkeypatch, Plan(Dense, Dense))
    first, second = adapted((6, 4, 4, 6)), adapted((6, 4, 4, 6))
    x = torch.randn(10, 24, requires_grad=True)
    gy = torch.randn(10, 24)
    second(first(x)).backward(gy)
    weights = [base_of(m).weight.double().numpy() + oracle_delta(m) for m in (first, second)]
    assert x.grad is not None
    oracle.assert_close(x.grad, gy.double().numpy() @ weights[1] @ weights[0], "float32")


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_bf16_gradients_with_and_without_units_for_it(
    plan: Plan, has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plan)
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", has_units)
    module = adapted((16, 8, 8, 16), dtype=torch.bfloat16)
    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    gy = torch.randn(64, 128, dtype=torch.bfloat16)
    module(x).backward(gy)
    weight = base_of(module).weight.double().numpy() + oracle_delta(module)
    ga, gb = oracle_gradients(module, x, gy)
    assert x.grad is not None
    oracle.assert_close(x.grad, gy.double().numpy() @ weight, "bfloat16")
    left, right = (parameter.grad for parameter in trained(module))
    assert left is not None
    assert left.dtype == torch.float32
    oracle.assert_close(left, ga, "bfloat16")
    oracle.assert_close(right, gb, "bfloat16")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("plan", WAYS[::4], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_no_bit(
    form: str, plan: Plan, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plan)
    module = adapted((6, 4, 4, 6), form=form)
    x = torch.randn(10, 24, requires_grad=True)
    module(x).square().sum().backward()
    expected = [x.grad, *(parameter.grad for parameter in trained(module))]
    x.grad = None
    module.zero_grad()
    y: Any = checkpoint(module, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for found, wanted in zip(
        [x.grad, *(parameter.grad for parameter in trained(module))], expected, strict=True
    ):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)


# Dynamo itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "plan"),
    [
        *(("both", plan) for plan in WAYS[::2]),
        ("left", WAYS[0]),
        ("right", WAYS[4]),
        ("core", WAYS[8]),
    ],
    ids=str,
)
def test_compiled_training_and_inference_have_no_graph_break(
    form: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plan)
    module = adapted((6, 4, 4, 6), form=form)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(10, 24, requires_grad=True)
    gy = torch.randn(10, 24)
    with torch.no_grad():
        kept = module(x)  # what is kept for inference must not leak into the graph
        torch.testing.assert_close(compiled(x), kept, rtol=1e-4, atol=1e-5)
    module(x).backward(gy)
    expected = [x.grad, *(parameter.grad for parameter in trained(module))]
    x.grad = None
    module.zero_grad()
    compiled(x).backward(gy)
    found = [x.grad, *(parameter.grad for parameter in trained(module))]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused() -> None:
    module = adapted((6, 4, 4, 6))
    x = torch.randn(10, 24, requires_grad=True)
    (gx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


def lora_of(module: KpsvdLinear, delta: Tensor) -> Any:
    """PEFT's LoRA with the same update, on the same base."""
    size = delta.shape[1]
    lora: Any = get_peft_model(
        nn.Sequential(module.base_layer),
        LoraConfig(target_modules=["0"], r=size, lora_alpha=size, init_lora_weights=False),
    )
    found = lora.base_model.model[0]
    with torch.no_grad():
        # Balanced factors, as training makes them; both products are rounded.
        u, values, v = torch.linalg.svd(delta)
        found.lora_A["default"].weight.copy_(values.sqrt()[:, None] * v)
        found.lora_B["default"].weight.copy_(u * values.sqrt())
    return lora


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_an_update_in_bf16_errs_no_more_than_loras(
    plan: Plan, scale: float, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole output and the gradient of the input, against float64, in units of LoRA's."""
    use(monkeypatch, plan)
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", True)
    monkeypatch.setattr(kernel, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(kernel, "CACHED_BYTES", 1)
    module = adapted((16, 8, 8, 16), dtype=torch.bfloat16, bias=False)
    if not is_fused:
        module.base_layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for parameter in trained(module):
            parameter.mul_(scale)
    delta = torch.from_numpy(oracle_delta(module))
    weight = base_of(module).weight.double() + delta
    lora = lora_of(module, delta)
    x, gy = (torch.randn(200, 128, dtype=torch.bfloat16) for _ in range(2))
    errors = {}
    for name, model in (("ours", module), ("lora", lora)):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(own)
        y.backward(gy)
        assert own.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inferred = model(x)
        errors[name] = [
            float((got.double() - wanted).norm())
            for got, wanted in (
                (y.detach(), x.double() @ weight.T),
                (inferred, x.double() @ weight.T),
                (own.grad, gy.double() @ weight),
            )
        ]
    for ours, theirs in zip(errors["ours"], errors["lora"], strict=True):
        assert ours <= 1.05 * theirs


@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_gradients_of_factors_in_bf16_err_no_more_than_loras(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the gradient, as LoRA's two factors of a thin update have theirs rounded."""
    use(monkeypatch, plan)
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", True)
    module = adapted((128, 1, 1, 128), rank=4, dtype=torch.bfloat16, bias=False, form="both")
    lora: Any = get_peft_model(
        nn.Sequential(module.base_layer),
        LoraConfig(target_modules=["0"], r=4, lora_alpha=4, init_lora_weights=False),
    )
    found = lora.base_model.model[0]
    a, b, left0, right0 = module.tensors("default")
    with torch.no_grad():
        found.lora_A["default"].weight.copy_((right0 + b).flatten(1))
        found.lora_B["default"].weight.copy_((left0 + a).flatten(1).T)
    x, gy = (torch.randn(300, 128, dtype=torch.bfloat16) for _ in range(2))
    for model in (module, lora):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.backward(gy)
    ga, gb = oracle_gradients(module, x, gy)
    wanted = {"left": torch.from_numpy(ga), "right": torch.from_numpy(gb)}
    left, right = trained(module)
    theirs = {
        "left": found.lora_B["default"].weight.grad.T,
        "right": found.lora_A["default"].weight.grad,
    }
    for name, own in (("left", left.grad), ("right", right.grad)):
        assert own is not None
        assert own.dtype == torch.float32
        size = wanted[name].norm()
        ours = float((own.double() - wanted[name]).norm() / size)
        other = theirs[name].double().reshape(wanted[name].shape)
        assert ours <= 1.05 * float((other - wanted[name]).norm() / size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_zeros_give_the_bits_of_the_base_in_bf16_units(
    form: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", True)
    test_zeros_give_the_bits_of_the_base(form, plan, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("has_units", [True, False])
def test_no_more_bytes_are_kept_than_by_lora_with_16_bit_factors(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", has_units)
    module = adapted((128, 1, 1, 128), rank=4, dtype=torch.bfloat16, bias=False)
    lora: Any = get_peft_model(
        nn.Sequential(nn.Linear(128, 128, bias=False).bfloat16()),
        LoraConfig(target_modules=["0"], r=4, init_lora_weights=False),
        autocast_adapter_dtype=False,
    ).bfloat16()
    kept = {}
    for name, model in (("ours", module), ("lora", lora)):
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, own: Any = own, sizes: Any = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        assert y.requires_grad
        kept[name] = sum(sizes.values())
    assert kept["ours"] <= 1.00 * kept["lora"]
