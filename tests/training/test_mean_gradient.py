"""The mean gradient of frozen weights against autograd over all batches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.training.loss import make_micro_batch
from kpsvd_tune.training.mean_gradient import mean_gradients

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def batches(rows: list[TokenizedRow]) -> list[Any]:
    return [make_micro_batch(rows[:3], 0), make_micro_batch(rows[3:8], 0)]


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_it_is_the_gradient_of_the_mean_token_loss(
    group_bytes: int,
    model_factory: Callable[..., Any],
    rows: list[TokenizedRow],
    batches: list[Any],
) -> None:
    model = model_factory().requires_grad_(False)
    passes: list[tuple[int, int]] = []
    found = dict(
        mean_gradients(
            model,
            NAMES,
            batches,
            group_bytes=group_bytes,
            progress=lambda done, total: passes.append((done, total)),
        )
    )
    reference = model_factory()
    loss, count = torch.zeros(()), 0
    for row in rows[:8]:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        logits = reference(input_ids=ids).logits[0, :-1]
        targets = labels[0, 1:]
        loss = loss + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        count += int((targets != -100).sum())
    (loss / count).backward()
    for name in NAMES:
        expected = reference.get_submodule(name).weight.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
    groups = 2 if group_bytes == 1 else 1
    assert passes[-1] == (2 * groups, 2 * groups)


def test_the_model_is_left_as_it_was(model_factory: Callable[..., Any], batches: list[Any]) -> None:
    model = model_factory().train()
    model.lm_head.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    list(mean_gradients(model, NAMES, batches))
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_refused(
    model_factory: Callable[..., Any], batches: list[Any]
) -> None:
    model = model_factory()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"q_proj is not finite .* adapter.init: weight"):
        list(mean_gradients(model, NAMES, batches))
