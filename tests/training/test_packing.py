"""Packed rows: no row sees another, and loss and gradients are those of padded rows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from architectures import CONFIGS, SIZES, make
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
)

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.training.batches import make_micro_batch
from kpsvd_tune.training.loss import SummedTokenLoss
from kpsvd_tune.training.packing import NAME, _blocks_of, attend_by_rows, prove_packing
from kpsvd_tune.training.step import enable_checkpointing

ATTENTIONS = ("eager", "sdpa", NAME)


def byte_rows(lengths: tuple[int, ...] = (9, 1, 14, 2, 6), seed: int = 0) -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(3, 64, (length,), generator=generator).tolist())
        prompt = length // 3
        rows.append(TokenizedRow(ids, (-100,) * prompt + ids[prompt:], number))
    return rows


def model_of(config: PretrainedConfig, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    wanted = "sdpa" if attention == NAME else attention
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=wanted).eval()
    # Small random weights attend so evenly that a leak would hardly show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    if attention == NAME:
        attend_by_rows(model)
        assert model.config._attn_implementation == NAME
    return model


def windowed() -> PretrainedConfig:
    return MistralConfig(**SIZES, sliding_window=4)


ARCHITECTURES = CONFIGS | {"mistral with a window": windowed}


def attentions_of(architecture: str) -> tuple[str, ...]:
    # Gemma 2 caps its attention scores, which torch's attention cannot.
    return ("eager",) if architecture == "gemma2" else ATTENTIONS


CASES = [(name, each) for name in ARCHITECTURES for each in attentions_of(name)]


def loss_and_gradients(model: nn.Module, rows: list[TokenizedRow], packing: bool) -> Any:
    model.zero_grad()
    loss = SummedTokenLoss(model)(**make_micro_batch(rows, 0, packing=packing).inputs)
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_loss_and_gradients_are_those_of_padded_rows(architecture, attention):
    model, rows = model_of(ARCHITECTURES[architecture](), attention), byte_rows()
    padded, expected = loss_and_gradients(model, rows, packing=False)
    packed, gradients = loss_and_gradients(model, rows, packing=True)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_no_logit_of_a_row_changes_with_another_row(architecture, attention):
    model, rows = model_of(ARCHITECTURES[architecture](), attention), byte_rows()

    def logits(rows: list[TokenizedRow]) -> torch.Tensor:
        inputs = make_micro_batch(rows, 0, packing=True).inputs
        output = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=None,
            use_cache=False,
        )
        return cast(torch.Tensor, output.logits[0])

    before = logits(rows)
    start = 0
    for index, row in enumerate(rows):
        changed = TokenizedRow(3 + (row.input_ids + 1) % 61, row.labels, row.row)
        after = logits([*rows[:index], changed, *rows[index + 1 :]])
        end = start + len(row.input_ids)
        assert (after[start:end] != before[start:end]).any(dim=1).all()
        others = torch.ones(len(before), dtype=torch.bool)
        others[start:end] = False
        # Experts take other groups of tokens, which may round otherwise.
        torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=1e-6)
        start = end


def test_the_leak_test_can_fail():
    model, rows = model_of(CONFIGS["llama"](), "sdpa"), byte_rows()
    inputs = make_micro_batch(rows, 0, packing=True).inputs
    # One long row, as it would be with a mask or without positions.
    loss = SummedTokenLoss(model)
    apart = loss(**inputs)
    together = loss(**(inputs | {"position_ids": None}))
    assert abs(apart - together) > 1e-2 * apart


@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_sound_models_pass_the_proof(architecture, attention):
    loss = SummedTokenLoss(model_of(ARCHITECTURES[architecture](), attention))
    prove_packing(loss.train(), byte_rows(), Accelerator(cpu=True))
    assert loss.training


class _IgnoresPositions(nn.Module):
    """A model whose rows are apart but whose positions run on: no leak, other losses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids, position_ids=None, **inputs):
        if position_ids is not None and (position_ids == 0).sum() > 1:
            starts = (position_ids == 0).cumsum(-1)
            position_ids = position_ids + starts  # rows stay apart, each at another place
        return self.inner(input_ids=input_ids, position_ids=position_ids, **inputs)


def test_rows_at_wrong_positions_are_refused():
    loss = SummedTokenLoss(_IgnoresPositions(model_of(CONFIGS["gpt2"]())))
    with pytest.raises(RecipeError, match="gives packed rows other losses than the same rows"):
        prove_packing(loss, byte_rows((5, 6, 7)), Accelerator(cpu=True))


def test_a_single_row_is_packed_with_nothing():
    # Nothing is computed, so nothing of the model is asked.
    prove_packing(SummedTokenLoss(nn.Identity()), byte_rows((5,)), Accelerator(cpu=True))


def causal_blocks(*lengths: int) -> torch.Tensor:
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    mask: torch.Tensor = torch.block_diag(*blocks)[None, None].bool()
    return mask


def test_blocks_of_a_mask():
    assert _blocks_of(causal_blocks(3, 1, 2)) == [(0, 3, True), (3, 4, True), (4, 6, True)]
    window = causal_blocks(4, 2)
    window[..., 3, 0] = False
    assert _blocks_of(window) == [(0, 4, False), (4, 6, True)]
    assert _blocks_of(causal_blocks(5)) == [(0, 5, True)]


def test_masks_of_another_kind_have_no_blocks():
    reaching = causal_blocks(3, 3)
    reaching[..., 5, 0] = True  # a token that sees into the row before, past its own row's start
    forward = causal_blocks(3, 3)
    forward[..., 0, 4] = True
    for mask in (
        None,
        reaching,
        forward,
        causal_blocks(2, 2).float(),
        causal_blocks(2, 2).expand(2, 1, 4, 4),
        causal_blocks(2, 2)[..., :2, :],
    ):
        assert _blocks_of(mask) == []


def test_only_torchs_attention_is_replaced():
    model = model_of(CONFIGS["llama"](), "eager")
    attend_by_rows(model)
    assert model.config._attn_implementation == "eager"
    attend_by_rows(nn.Linear(2, 2))


def test_padded_batches_and_generation_stay_bit_for_bit():
    model = model_of(CONFIGS["llama"](), "sdpa")
    inputs = make_micro_batch(byte_rows(), 0).inputs
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        answer = model.generate(
            prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        return SummedTokenLoss(model)(**inputs), answer

    expected = outcome()
    attend_by_rows(model)
    for found, wanted in zip(outcome(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_gradient_checkpointing_recomputes_the_same():
    rows = byte_rows()
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = get_peft_model(make("llama"), adapter)
        attend_by_rows(model)
        model.train()
        if checkpointing:
            enable_checkpointing(model.get_base_model())
        found.append(loss_and_gradients(model, rows, packing=True)[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.slow
def test_a_packed_run_is_the_padded_run(start_training, rows):
    results = {}
    for packing in (False, True):
        training = start_training(
            str(packing), packing=packing, validation=rows[:3], batch_size=3, eval_every=2
        )
        results[packing] = list(training.steps())
    for key in ("loss", "grad_norm", "tokens", "epoch"):
        numbers = [[getattr(each, key) for each in results[packing]] for packing in (False, True)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    validation = [
        [each.validation_loss for each in results[packing] if each.step % 2 == 0]
        for packing in (False, True)
    ]
    assert validation[1] == pytest.approx(validation[0], rel=1e-5)


def test_a_model_that_cannot_pack_is_refused_before_the_first_step(start_training, monkeypatch):
    training = start_training(packing=True)
    monkeypatch.setattr("kpsvd_tune.training.packing._takes_positions", lambda _: False)
    with pytest.raises(RecipeError, match="takes no position_ids, by which packed rows"):
        next(training.steps())


@pytest.mark.slow
def test_grouped_steps_hold_rows_of_similar_length(start_training):
    lengths = [6 + 7 * index % 40 for index in range(40)]
    rows = byte_rows(tuple(lengths))
    spans = {}
    for grouped in (False, True):
        training = start_training(str(grouped), train=rows, group_by_length=grouped, max_steps=20)
        steps = [training._sampler.batch(step, 0, 0) for step in range(20)]
        own = [[lengths[index] for index in step] for step in steps]
        assert [each.tokens for each in training.steps()] == [sum(each) for each in own]
        spans[grouped] = sum(max(each) - min(each) for each in own)
    assert spans[True] < spans[False] / 2


def test_a_single_row_is_left_as_it_is(start_training, monkeypatch):
    """With nothing to pack, models that take no positions, such as MPT, train too."""
    monkeypatch.setattr("kpsvd_tune.training.batches.pack", None)
    assert len(list(start_training(packing=True, batch_size=1, max_steps=2).steps())) == 2
