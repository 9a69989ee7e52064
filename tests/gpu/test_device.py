"""What a GPU must do as the CPU does; the same tests run on the CPU, so that they stay true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kpsvd_tune.adapter import KpsvdLinear
from kpsvd_tune.adapter.forms import Both
from kpsvd_tune.commands import main as cli
from kpsvd_tune.linalg import KroneckerShape, kpsvd, kron_sum

SHAPE = KroneckerShape(16, 8, 8, 16)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("path", ["activations", "weight"])
def test_a_layer_is_exact(device: str, dtype: torch.dtype, bound: float, path: str) -> None:
    base = nn.Linear(SHAPE.in_features, SHAPE.out_features).requires_grad_(False).to(dtype)
    layer = KpsvdLinear(base, "default")
    factors = torch.randn(2, SHAPE.m, SHAPE.n), torch.randn(2, SHAPE.p, SHAPE.q)
    layer.update_layer("default", Both(SHAPE, 2), 0.0, factors, path=path)
    layer.to(device)
    x = torch.randn(70, SHAPE.in_features).to(device, dtype).requires_grad_()
    assert torch.equal(layer(x), base(x)), "zero offsets give the base's bits"
    with torch.no_grad():
        for parameter in layer.trained("default"):
            parameter.normal_(std=0.05)
    y = layer(x)
    y.float().sum().backward()
    left, right = (each.detach().cpu().double() for each in layer.terms("default"))
    weight = base.weight.detach().cpu().double() + kron_sum(left, right)
    assert base.bias is not None
    wanted = x.detach().cpu().double() @ weight.T + base.bias.detach().cpu().double()
    assert x.grad is not None
    for got, expected in ((y, wanted), (x.grad, weight.sum(0).expand_as(x))):
        error = (got.detach().cpu().double() - expected).norm() / expected.norm()
        assert float(error) <= bound
    assert all(each.grad.dtype == torch.float32 for each in layer.trained("default"))  # type: ignore[union-attr]


def test_a_decomposition_is_that_of_the_cpu(device: str) -> None:
    weight = torch.randn(SHAPE.out_features, SHAPE.in_features)
    here = kpsvd(weight.to(device), SHAPE, 4, seed=0)
    there = kpsvd(weight, SHAPE, 4, seed=0)
    torch.testing.assert_close(here.values.cpu(), there.values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_goes_on_to_the_same_bytes_and_is_merged(
    device: str, precision: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(
        write_recipe(
            train={"max_steps": 4, "save_every": 2, "eval_every": 0, "precision": precision},
            adapter={"rank": {"method": "fixed", "max": 1, "window": 2}},
        )
    )
    assert cli.run(["train", recipe]) == 0
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    wanted = file.read_bytes()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert cli.run(["train", recipe, "--resume", str(checkpoint)]) == 0
    assert file.read_bytes() == wanted
    merged = ["merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged"), "--proof", "both"]
    assert cli.run(merged) == 0
