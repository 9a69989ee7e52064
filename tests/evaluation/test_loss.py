"""Loss and forgetting against a token-by-token computation of our own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kpsvd_tune.data import Encoder
from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.loss import (
    TokenLoss,
    completion_loss,
    forgetting,
    score_loss,
    text_loss,
)
from kpsvd_tune.recipe import Columns, EvaluationRecipe

TEMPLATE = "Question: {prompt}\nAnswer: {completion}"


def recipe(rows: Path, **keys: Any) -> EvaluationRecipe:
    columns: Columns = {"prompt": "question", "completion": "answer"}
    return EvaluationRecipe(task="loss", path=str(rows), columns=columns, **keys)


def token_losses(model, ids: list[int]) -> list[float]:
    """The loss of each token from the second on, one forward pass a token."""
    losses = []
    for end in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:end]])).logits[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[ids[end]]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_completion_loss_is_the_mean_over_completion_tokens(
    tiny_model, tokenizer, rows_file: Path, batch_size: int
):
    encoder = Encoder(tokenizer, TEMPLATE, 1024)
    losses: list[float] = []
    for line in rows_file.read_text().splitlines()[:4]:
        row = json.loads(line)
        encoded = encoder.encode(Pair(row["question"], row["answer"]), 0)
        each = token_losses(tiny_model, encoded.input_ids.tolist())
        losses += each[-encoded.num_supervised :]
    loss = completion_loss(
        tiny_model,
        tokenizer,
        recipe(rows_file, batch_size=batch_size, limit=4),
        TEMPLATE,
    )
    assert loss.n == len(losses)
    assert loss.value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    spread = torch.tensor(losses).std().item()
    assert loss.stderr == pytest.approx(spread / math.sqrt(len(losses)), rel=1e-4)


def test_text_loss_reads_windows_and_counts_all_but_their_first_tokens(
    tiny_model, tokenizer, tmp_path: Path
):
    file = tmp_path / "text.txt"
    file.write_text("One line of our own.\nAnother one.", encoding="utf-8")
    ids = list(tokenizer(file.read_text())["input_ids"])
    losses = [
        loss
        for start in range(0, len(ids), 10)
        for loss in token_losses(tiny_model, ids[start : start + 10])
    ]
    seen: list[tuple[int, int]] = []
    loss = text_loss(
        tiny_model, tokenizer, file, window=10, batch_size=3, progress=lambda *d: seen.append(d)
    )
    assert loss.n == len(losses)
    assert loss.value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert seen[-1] == (4, 4)


def test_a_byte_order_mark_is_no_part_of_a_text(tiny_model, tokenizer, tmp_path: Path):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("One line of our own.", encoding="utf-8")
    marked.write_text("One line of our own.", encoding="utf-8-sig")
    found = [text_loss(tiny_model, tokenizer, file) for file in (plain, marked)]
    assert found[0] == found[1]


def test_rows_that_are_not_measured_are_told(tiny_model, tokenizer, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [("a", "b"), ("a" * 90, "b"), ("a", "b" * 90)]
    text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
    file.write_text(text, encoding="utf-8")
    told: list[str] = []
    for window in (60, 1024):
        task = EvaluationRecipe(task="loss", path=str(file), window=window)
        score_loss(tiny_model, tokenizer, task, "Q {prompt} A {completion}", note=told.append)
    assert told == [
        "of 3 rows 1 are not measured, for their prompts alone fill window (60 tokens), and 1 are "
        "cut to it"
    ]


def test_perplexity():
    assert TokenLoss(math.log(7), 5, 0.1).perplexity == pytest.approx(7)
    assert TokenLoss(1e6, 5, 0.1).perplexity == math.inf


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in peft
def test_forgetting_is_the_change_against_the_base(tiny_model, tokenizer, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    file = tmp_path / "text.txt"
    file.write_text("Some text that was never trained on. " * 4, encoding="utf-8")
    before = text_loss(tiny_model, tokenizer, file, window=32)
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    untrained = forgetting(adapted, tokenizer, file, window=32)
    assert (untrained.change, untrained.stderr, untrained.base) == (0.0, 0.0, before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    trained = forgetting(adapted, tokenizer, file, window=32)
    after = text_loss(adapted, tokenizer, file, window=32)
    assert trained.base == before
    assert trained.adapted == after
    assert trained.change == pytest.approx(after.value - before.value, rel=1e-9)
    assert trained.change != 0
    assert trained.stderr > 0


def test_a_model_without_an_adapter_has_nothing_to_forget(tiny_model, tokenizer, tmp_path: Path):
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapter"):
        forgetting(tiny_model, tokenizer, tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("content", "window", "error", "message"),
    [
        (b"", 8, DataError, "holds 0 tokens; expected at least 2"),
        (b"a", 8, DataError, "holds 1 token; expected at least 2"),
        (b"\xff\xfe", 8, DataError, "as UTF-8 text"),
        (None, 8, DataError, "cannot read .*gone.txt as UTF-8 text"),
        (b"some text", 1, InputError, "window must be 2 tokens or more, got 1"),
    ],
)
def test_texts_without_a_loss_are_refused(
    tiny_model,
    tokenizer,
    tmp_path: Path,
    content: bytes | None,
    window: int,
    error: type[Exception],
    message: str,
):
    file = tmp_path / "gone.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        text_loss(tiny_model, tokenizer, file, window=window)


def test_rows_without_a_completion_are_refused(tiny_model, tokenizer, rows_file: Path):
    with pytest.raises(DataError, match="holds no completion .* within the first 4 tokens"):
        completion_loss(tiny_model, tokenizer, recipe(rows_file, window=4), TEMPLATE)
