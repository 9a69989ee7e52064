"""No way through the layer assumes contiguous tensors, and what it returns may be changed in place.

Every layout, factor shape and way against the dense formula in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdLinear
from kpsvd_tune.adapter.forms import Both, Plan, Way
from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.linalg import KroneckerShape, kron_sum

WIDTH, OUT = 24, 12
SHAPES = {
    "balanced": KroneckerShape(4, 6, 3, 4),
    "thin": KroneckerShape(12, 2, 1, 12),
    "pissa": KroneckerShape(12, 1, 1, 24),
    "right-heavy": KroneckerShape(1, 2, 12, 12),
}
EACH: tuple[Way, ...] = (Flat, Batched, Dense)
WAYS = [Plan(*ways) for ways in itertools.product(EACH, repeat=2)]
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 5, WIDTH),
    "1-D": lambda: torch.randn(WIDTH),
    "1-D strided": lambda: torch.randn(2 * WIDTH)[::2],
    "batch of one": lambda: torch.randn(1, WIDTH),
    "one token, strided": lambda: torch.randn(1, 2, WIDTH, 3)[:, :1, :, 1],
    "4-D": lambda: torch.randn(2, 3, 2, WIDTH),
    "4-D permuted": lambda: torch.randn(2, WIDTH, 3, 2).permute(0, 3, 2, 1),
    "first token of each row": lambda: torch.randn(3, 5, WIDTH)[:, 0],
    "slice of a sequence": lambda: torch.randn(3, 5, WIDTH)[:, 1:4],
    "slice of the width": lambda: torch.randn(3, 5, 2 * WIDTH)[..., 7 : 7 + WIDTH],
    "every second entry": lambda: torch.randn(3, 5, 2 * WIDTH)[..., ::2],
    "transposed matrix": lambda: torch.randn(WIDTH, 7).T,
    "transposed sequence": lambda: torch.randn(5, 3, WIDTH).transpose(0, 1),
    "transposed width": lambda: torch.randn(3, WIDTH, 5).transpose(1, 2),
    "expanded batch": lambda: torch.randn(1, 5, WIDTH).expand(4, 5, WIDTH),
    "expanded tokens": lambda: torch.randn(3, 1, WIDTH).expand(3, 5, WIDTH),
    "expanded width": lambda: torch.randn(3, 5, 1).expand(3, 5, WIDTH),
    "transposed batch of one": lambda: torch.randn(WIDTH, 4, 1).permute(2, 1, 0),
    "flipped": lambda: torch.randn(3, 5, WIDTH).flip(1),
    "offset": lambda: torch.randn(4 * WIDTH + 3)[3:].view(4, WIDTH),
    "empty batch": lambda: torch.randn(0, 5, WIDTH),
    "no tokens": lambda: torch.randn(3, 0, WIDTH).transpose(0, 1),
}
# Of the largest entry, or where products cancel of a tenth of what they add up to without their
# signs: float32 sums of a few hundred products; bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def adapted(shape: KroneckerShape, dtype: torch.dtype = torch.float32) -> KpsvdLinear:
    """A layer with random factors on a base whose weight is a transposed matrix."""
    base = nn.Linear(WIDTH, OUT)
    base.weight = nn.Parameter(torch.randn(WIDTH, OUT).T)
    found = KpsvdLinear(base.to(dtype).requires_grad_(False), "default")
    factors = torch.randn(2, shape.m, shape.n), torch.randn(2, shape.p, shape.q)
    found.update_layer("default", Both(shape, 2), 0.0, factors)
    with torch.no_grad():
        for factor in offsets(found):
            factor.normal_(std=0.3)
    return found


def offsets(module: KpsvdLinear) -> tuple[nn.Parameter, nn.Parameter]:
    return module.kpsvd_left["default"], module.kpsvd_right["default"]


def dense(module: KpsvdLinear, x: Tensor, gy: Tensor, unsigned: bool = False) -> list[Tensor]:
    """y and the gradients of x, a and b in float64, with Delta built whole.

    `unsigned` takes all numbers without their signs, so that nothing cancels: rounding errors are
    in proportion to that (Higham, Accuracy and Stability of Numerical Algorithms, section 3.5).
    """

    def given(tensor: Tensor) -> Tensor:
        exact = tensor.detach().double()
        return exact.abs() if unsigned else exact

    x = given(x).contiguous().requires_grad_()
    a, b = (given(factor).requires_grad_() for factor in offsets(module))
    left0, right0 = given(module.kpsvd_left0["default"]), given(module.kpsvd_right0["default"])
    base: Any = module.base_layer
    delta = kron_sum(left0 + a, right0 + b) - kron_sum(left0, right0)
    y = x @ (given(base.weight) + delta).T + given(base.bias)
    y.backward(given(gy))
    found = [y.detach(), x.grad, a.grad, b.grad]
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None]


def assert_close(
    got: Tensor | None, expected: Tensor, tolerance: float, what: str, unsigned: Tensor
) -> None:
    assert got is not None, what
    assert got.shape == expected.shape, what
    if expected.numel():
        size = torch.maximum(expected.abs().max(), unsigned.max() / 10).clamp_min(1e-9)
        error = (got.double() - expected).abs().max() / size
        assert float(error) <= tolerance, f"{what}: relative error {float(error):.2e}"


def check(module: KpsvdLinear, x: Tensor, gy: Tensor) -> None:
    """Outputs and gradients, differentiated, without gradients, and kept ready for inference."""
    tolerance = TOLERANCE[x.dtype]
    expected, unsigned = dense(module, x, gy), dense(module, x, gy, unsigned=True)
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(gy)
    left, right = offsets(module)
    for got, wanted, what, size in zip(
        (y.detach(), x.grad, left.grad, right.grad),
        expected,
        ("y", "gradient of x", "gradient of a", "gradient of b"),
        unsigned,
        strict=True,
    ):
        assert_close(got, wanted, tolerance, what, size)
    with torch.no_grad():
        # The second call is answered by what the first one kept.
        for what in ("y without gradients", "y again"):
            assert_close(module(x), expected[0], tolerance, what, unsigned[0])
    with torch.inference_mode():
        assert_close(module(x), expected[0], tolerance, "y in inference mode", unsigned[0])


@pytest.mark.slow
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [None, *WAYS], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_is_the_dense_formula(
    shape: str,
    plan: Plan | None,
    dtype: torch.dtype,
    is_fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plan is not None:
        monkeypatch.setattr(Both, "plan", lambda *_: plan)
    module = adapted(SHAPES[shape], dtype)
    if not is_fused:
        module.base_layer.register_forward_hook(lambda *_: None)
    for number, (layout, make) in enumerate(LAYOUTS.items()):
        x = make().to(dtype)
        gy = torch.randn(*x.shape[:-1], OUT, dtype=dtype)
        if number % 2 and gy.numel():
            gy = gy.flatten()[:1].expand(gy.shape)  # as sum() sends it
        try:
            check(module, x, gy)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"{layout}: {error}") from error


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_strides_are_the_dense_formula(data: st.DataObject) -> None:
    torch.manual_seed(0)  # the same numbers when a failure is tried again
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=3), label="sizes")
    order = data.draw(st.permutations(range(len(sizes) + 1)), label="order in memory")
    steps = data.draw(
        st.lists(st.integers(0, 2), min_size=len(sizes) + 1, max_size=len(sizes) + 1),
        label="steps (0 is expanded)",
    )
    shape = data.draw(st.sampled_from(sorted(SHAPES)), label="shape")
    path = data.draw(st.sampled_from(["auto", "activations", "weight"]), label="path")
    x = strided([*sizes, WIDTH], list(order), steps)
    assert list(x.shape) == [*sizes, WIDTH]
    module = adapted(SHAPES[shape])
    module.kpsvd_path["default"] = path
    gy = strided([*sizes, OUT], list(order), steps)
    check(module, x, gy)


def strided(sizes: list[int], order: list[int], steps: list[int]) -> Tensor:
    """A tensor whose dimensions lie in memory in an order, with steps; 0 for an expanded one."""
    held = [1 if steps[i] == 0 else sizes[i] * steps[i] for i in order]
    x = torch.randn(held).permute([order.index(i) for i in range(len(order))])
    for dimension, step in enumerate(steps):
        if step:
            x = x[(slice(None),) * dimension + (slice(None, None, step),)]
    return x.expand(sizes)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("plan", WAYS[::3], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_outputs_may_be_changed_in_place(
    dimensions: int, plan: Plan, has_bias: bool, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Both, "plan", lambda *_: plan)
    module = adapted(SHAPES["balanced"])
    base: Any = module.base_layer
    if not has_bias:
        base.bias = None
    if not is_fused:
        base.register_forward_hook(lambda *_: None)
    x = torch.randn(*[3] * (dimensions - 1), WIDTH)
    gradients = []
    for in_place in (False, True):
        module.zero_grad()
        y = module(x)
        if in_place:
            y += 1
            y.mul_(2)
            y = nn.ReLU(inplace=True)(y)
        else:
            y = torch.relu((y + 1) * 2)
        y.square().sum().backward()
        gradients.append([factor.grad for factor in offsets(module)])
    for without, within in zip(*gradients, strict=True):
        assert without is not None
        assert torch.equal(without, within)
        assert without.any()


def test_outputs_without_gradients_may_be_changed_with_gradients_later() -> None:
    for (shape, make), dtype in itertools.product(
        itertools.product(SHAPES.values(), (LAYOUTS["contiguous"], LAYOUTS["1-D"])),
        (torch.float32, torch.bfloat16),
    ):
        module = adapted(shape, dtype)
        base: Any = module.base_layer
        base.bias = None  # torch's own layer returns a view here when it has a bias
        bias = torch.zeros(OUT, dtype=dtype, requires_grad=True)
        x = make().to(dtype)
        for _ in range(2):
            with torch.no_grad():
                y = module(x)
            y += bias
            y.sum().backward()
        assert bias.grad is not None
