"""The validation loss: every row once, every supervised token with equal weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.training import make_accelerator
from kpsvd_tune.training.batches import make_micro_batch
from kpsvd_tune.training.loss import SummedTokenLoss, validation_loss


def mean_loss(model, rows):
    """One row at a time, without padding."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:].tolist())
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_equals_one_row_at_a_time_for_every_batch_size(
    start_training, lora_model, rows, batch_size
):
    model = lora_model(dropout=0.5)
    accelerator = make_accelerator(start_training()._recipe)
    loss = SummedTokenLoss(model)
    loss.train()
    state = torch.get_rng_state()
    value = validation_loss(
        loss, rows, batch_size, accelerator, lambda part: make_micro_batch(part, 0)
    )
    assert model.training, "the model comes back in training mode"
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    assert value == pytest.approx(mean_loss(model.eval(), rows), rel=1e-5)


def test_a_run_validates_before_on_time_and_at_its_end(start_training, lora_model, rows):
    model = lora_model()
    before = mean_loss(model.eval(), rows[:3])
    training = start_training(model=model, validation=rows[:3], eval_every=4)
    metrics = list(training.steps())
    assert [m.step for m in metrics if m.validation_loss is not None] == [4, 6]
    result = training.result()
    assert result.validation_loss_before == pytest.approx(before, rel=1e-5)
    assert result.validation_loss == metrics[-1].validation_loss
    assert result.validation_loss == pytest.approx(mean_loss(model.eval(), rows[:3]), rel=1e-5)
    assert result.validation_loss < before


@pytest.mark.slow
def test_validation_does_not_change_the_training(start_training, lora_model, rows):
    results = []
    for folder, validation in (("with", rows[:3]), ("without", None)):
        model = lora_model(dropout=0.2)
        training = start_training(folder, model=model, validation=validation, eval_every=1)
        results.append([metrics.loss for metrics in training.steps()])
    assert results[0] == results[1]


def test_a_run_without_held_out_rows_has_no_validation_loss(start_training):
    training = start_training()
    assert {metrics.validation_loss for metrics in training.steps()} == {None}
    assert training.result().validation_loss is None


def test_result_counts_steps_parameters_tokens_memory_and_time(start_training, lora_model, rows):
    model = lora_model()
    training = start_training(model=model, train=rows[:2], max_steps=3)
    metrics = list(training.steps())
    assert {each.tokens for each in metrics} == {sum(len(row.input_ids) for row in rows[:2])}
    assert [each.epoch for each in metrics] == [1.0, 2.0, 3.0]
    result = training.result()
    assert result.steps == 3
    assert result.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert result.train_loss == pytest.approx(sum(each.loss for each in metrics) / 3, rel=1e-6)
    assert 50e6 < result.peak_memory_bytes < 50e9
    assert metrics[-1].seconds <= result.wall_seconds < 60


def test_epochs_set_the_number_of_steps(start_training):
    assert start_training(max_steps=None, epochs=1.5, batch_size=4).num_steps == 4


def test_a_validation_loss_that_is_no_number_ends_the_run(
    start_training, lora_model, rows, monkeypatch
):
    training = start_training(model=lora_model(), validation=rows[:3], eval_every=2, save_every=1)
    values = iter([1.0, float("nan")])
    monkeypatch.setattr("kpsvd_tune.training.loop.validation_loss", lambda *_: next(values))
    with pytest.raises(NonFiniteError, match=r"step 2: the validation loss is nan .* lower"):
        list(training.steps())
    assert [folder.name for folder in training._run.checkpoints.iterdir()] == ["step-000001"]
