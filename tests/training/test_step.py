"""One step against plain torch: the loss, its normalisation, clipping, precision, memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import nn

from kpsvd_tune.data import StatelessSampler, TokenizedRow
from kpsvd_tune.errors import AdapterError, RecipeError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.accelerator import make_accelerator
from kpsvd_tune.training.batches import make_micro_batch
from kpsvd_tune.training.engines.sharded import check_shardable
from kpsvd_tune.training.loss import SummedTokenLoss


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def row_loss(model: nn.Module, row: TokenizedRow) -> tuple[torch.Tensor, int]:
    """Summed loss and supervised tokens of one row without padding: slow and obvious."""
    logits = model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0]
    total, count = torch.zeros(()), 0
    for position in range(len(row.input_ids) - 1):
        label = int(row.labels[position + 1])
        if label != -100:
            total = total - F.log_softmax(logits[position].float(), dim=-1)[label]
            count += 1
    return total, count


def reference_run(model, rows, sampler, num_steps, rate, max_norm, weight_decay):
    """Row by row, written-out AdamW, constant rate: what the loop has to amount to."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    losses, norms = [], []
    for step in range(num_steps):
        sums = [
            row_loss(model, rows[index])
            for micro_step in range(sampler.gradient_accumulation)
            for index in sampler.batch(step, micro_step, 0)
        ]
        total = torch.stack([each for each, _ in sums]).sum()
        loss = total / sum(count for _, count in sums)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * factor
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                p.mul_(1 - rate * weight_decay)
                p.sub_(rate * m_hat / (v_hat.sqrt() + 1e-8))
        losses.append(loss.item())
        norms.append(float(norm))
    return losses, norms


def test_three_steps_equal_plain_torch(lora_model, start_training, rows):
    model, expected = lora_model(), lora_model()
    sampler = StatelessSampler(10, 2, 1, 1, seed=0)
    # Random weights, and so norms, differ between kinds of machines: one step is to be clipped and
    # another not on all of them.
    _, unclipped = reference_run(lora_model(), rows, sampler, 3, 1e-2, math.inf, 0.1)
    clip = (min(unclipped) + max(unclipped)) / 2
    training = start_training(
        model=model, max_steps=3, scheduler="constant", weight_decay=0.1, max_grad_norm=clip
    )
    metrics = list(training.steps())
    losses, norms = reference_run(expected, rows, sampler, 3, 1e-2, clip, 0.1)
    assert min(norms) < clip < max(norms), "one step is clipped and another is not"
    assert [each.loss for each in metrics] == pytest.approx(losses, rel=1e-5)
    assert [each.grad_norm for each in metrics] == pytest.approx(norms, rel=1e-4)
    for name, tensor in trained(expected).items():
        # Adam divides by the root of the second moment: where it is tiny, rounding is amplified.
        torch.testing.assert_close(trained(model)[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(lora_model, start_training):
    results = {}
    for folder, sizes in {
        "whole": {"batch_size": 4, "gradient_accumulation": 1},
        "split": {"batch_size": 2, "gradient_accumulation": 2},
        "single": {"batch_size": 1, "gradient_accumulation": 4},
    }.items():
        model = lora_model()
        metrics = list(start_training(folder, model=model, max_steps=3, **sizes).steps())
        results[folder] = [each.loss for each in metrics], trained(model)
    for folder in ("split", "single"):
        assert results[folder][0] == pytest.approx(results["whole"][0], abs=1e-6)
        for name, tensor in results["whole"][1].items():
            torch.testing.assert_close(results[folder][1][name], tensor, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_float16_base_loses_nothing_of_a_step_of_many_tokens(lora_model, start_training):
    moves = {}
    for dtype in (torch.float32, torch.float16):
        model = lora_model()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                # The same values in both types.
                parameter.data = parameter.data.half().to(dtype)
        before = trained(model)
        training = start_training(
            str(dtype),
            model=model,
            max_steps=1,
            batch_size=10,
            gradient_accumulation=160,
            optimizer="sgd",
            learning_rate=1.0,
            max_grad_norm=None,
        )
        (metrics,) = training.steps()
        after = trained(model)
        moves[dtype] = torch.cat([(after[name] - before[name]).flatten() for name in before])
        # Without a bound the step is the gradient itself: that of the mean, not of the sum.
        assert float(moves[dtype].norm()) == pytest.approx(metrics.grad_norm, rel=1e-3)
    exact, half = moves.values()
    assert float(half.norm()) == pytest.approx(float(exact.norm()), rel=2e-3)
    # 0.9987 where the mean's share of each token passes through float16.
    assert float(torch.nn.functional.cosine_similarity(exact, half, dim=0)) > 0.9999


def test_loss_needs_no_logits_beyond_supervised_positions(tiny_model, rows):
    seen = []
    tiny_model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1]))
    batch = make_micro_batch(rows[:3], pad_token_id=0)
    expected = sum(row_loss(tiny_model, row)[0] for row in rows[:3])
    seen.clear()
    torch.testing.assert_close(SummedTokenLoss(tiny_model)(**batch.inputs), expected)
    assert seen == [(1, batch.num_supervised)]
    assert not tiny_model.lm_head._forward_pre_hooks, "the hook must not stay on the model"


class _HidesProjection(nn.Module):
    """A model whose output projection is not known: all logits come back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_loss_is_the_same_where_the_projection_is_unknown(tiny_model, rows, num_rows):
    batch = make_micro_batch(rows[:num_rows], pad_token_id=0)
    direct = SummedTokenLoss(tiny_model)(**batch.inputs)
    torch.testing.assert_close(
        SummedTokenLoss(_HidesProjection(tiny_model))(**batch.inputs), direct
    )


def test_padding_token_and_width_change_nothing(tiny_model, rows):
    loss = SummedTokenLoss(tiny_model)
    narrow = loss(**make_micro_batch(rows[:3], pad_token_id=0).inputs)
    wide = loss(**make_micro_batch(rows[:3], pad_token_id=7, pad_to_multiple_of=64).inputs)
    torch.testing.assert_close(wide, narrow)


def test_rows_without_labels_have_no_loss_and_a_gradient_of_zero(lora_model):
    model = lora_model()
    row = TokenizedRow((1, 2, 3), (-100, -100, -100), row=0)
    loss = SummedTokenLoss(model)(**make_micro_batch([row], pad_token_id=0).inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_label_of_the_first_token_is_never_predicted():
    row = TokenizedRow((5, 6, 7), (5, 6, 7), row=0)
    batch = make_micro_batch([row, row], pad_token_id=0)
    assert batch.inputs["targets"].tolist() == [6, 7, 6, 7]
    assert batch.inputs["positions"].tolist() == [0, 1, 3, 4]
    assert (batch.num_supervised, batch.num_tokens) == (4, 6)


def test_gradient_checkpointing_changes_no_gradient(lora_model, start_training):
    results = []
    for checkpointing in (False, True):
        model = lora_model(dropout=0.1)
        training = start_training(
            str(checkpointing), model=model, max_steps=2, gradient_checkpointing=checkpointing
        )
        list(training.steps())
        results.append(trained(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor)


def test_bf16_stays_near_fp32_with_fp32_weights(lora_model, start_training):
    model = lora_model()
    losses = {}
    for precision in ("no", "bf16"):
        training = start_training(precision, model=copy.deepcopy(model), precision=precision)
        losses[precision] = [each.loss for each in training.steps()]
        dtypes = {tensor.dtype for tensor in trained(training._stepper.token_loss).values()}
        assert dtypes == {torch.float32}
        # Accelerate keeps one precision a process.
        AcceleratorState._reset_state(True)
    assert losses["bf16"] == pytest.approx(losses["no"], rel=2e-2)
    assert losses["bf16"] != losses["no"], "autocast must be at work"


def test_a_model_without_trainable_parameters_is_refused(start_training, tiny_model):
    tiny_model.requires_grad_(False)
    with pytest.raises(AdapterError, match="no trainable parameter; expected an adapter"):
        start_training(model=tiny_model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "train.precision: fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_done_is_refused(start_training, changes, message):
    with pytest.raises(RecipeError, match=message):
        start_training(**changes)


@pytest.mark.parametrize(
    ("changes", "modules_to_save", "message"),
    [
        ({"precision": "fp16"}, None, "train.precision: fp16 needs a loss scaler"),
        (
            {},
            ["lm_head"],
            r"one type for all that is trained, got torch.bfloat16 and torch.float32",
        ),
    ],
)
def test_what_shared_out_weights_cannot_do_is_refused(
    lora_model, changes, modules_to_save, message
):
    model = lora_model(modules_to_save=modules_to_save)
    if modules_to_save:
        model.get_output_embeddings().to(torch.bfloat16)
    with pytest.raises(RecipeError, match=message):
        check_shardable(model, TrainRecipe.model_validate({"parallel": "fsdp"} | changes))


def test_one_process_shares_nothing_out(start_training):
    assert not start_training(parallel="fsdp")._stepper.token_loss.is_sharded


def test_a_missing_tracker_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("kpsvd_tune.training.accelerator.get_available_trackers", list)
    with pytest.raises(RecipeError, match="pip install tensorboard"):
        make_accelerator(TrainRecipe(), ["tensorboard"])
