"""Rows that the tokenizer's own chat template cannot train, and one of ours in its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import prepare
from kpsvd_tune.data.encode.chat_program import TemplateError
from kpsvd_tune.data.encode.templates import shipped_name, shipped_template
from kpsvd_tune.data.rows.prepare import PreparedData
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

# As Phi 3 has it: an end token behind the whole chat, so no turn but the last begins alike.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{# <|user|>\n #}"
)
# As Qwen 3 has it, without its tools.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TOKENS = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|assistant|>"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    tokens = [*TOKENS, "<start_of_turn>", "<end_of_turn>"]
    changed.add_special_tokens({"additional_special_tokens": tokens})
    changed.chat_template = template
    return changed


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages}


def write(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(data: PreparedData, which: str = "train") -> list[list[str]]:
    return [
        [text for text, is_trained in data.encoder.pieces(row) if is_trained]
        for row in getattr(data, which)
    ]


def test_ours_is_used_where_the_own_cannot_be_trained_and_asks_alike(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q", "a"), chat("q1", "a1", "q2", "a2", system="s"))
    changed = with_template(tokenizer, PHI)
    data = prepare(DatasetRecipe(path=path, validation=0), changed, seed=0)
    assert texts(data) == [["a<|end|>"], ["a1<|end|>", "a2<|end|>"]]
    assert shipped_name(changed.chat_template) == "phi3"
    (note,) = [each for each in data.report.warnings if "phi3" in each]
    assert "own chat template cannot be trained on these rows (" in note
    assert "line 2: the chat template changes earlier turns" in note
    assert "asks as the own one does in every row" in note
    # The second time everything is found, and the note is said again.
    again = prepare(DatasetRecipe(path=path, validation=0), with_template(tokenizer, PHI), seed=0)
    assert again.report.warnings == data.report.warnings
    assert again.sha256 == data.sha256


def test_the_own_template_is_kept_where_it_can_be_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q1", "a1", "q2", "a2"))
    changed = with_template(tokenizer, PHI)
    data = prepare(DatasetRecipe(path=path, validation=0, learn="last"), changed, seed=0)
    assert changed.chat_template == PHI
    assert not any("phi3" in each for each in data.report.warnings)


def test_a_system_message_is_folded_where_the_own_template_takes_none(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q", "a"), chat("q", "a", system="s"))
    changed = with_template(tokenizer, GEMMA)
    data = prepare(DatasetRecipe(path=path, validation=0), changed, seed=0)
    asked = [data.encoder.pieces(row)[0][0] for row in data.train]
    assert asked == [
        f"<s><start_of_turn>user\n{lead}q<end_of_turn>\n<start_of_turn>model\n"
        for lead in ("", "s\n\n")
    ]
    assert any("System role not supported" in each for each in data.report.warnings)


@pytest.mark.parametrize(
    ("own", "difference"),
    [
        ("{{ 'x' }}" + PHI, "it asks with .* where the tokenizer's own asks with 'x"),
        (
            PHI.replace("m.content", "('=' if m.role == 'assistant' else '') + m.content"),
            r"it writes 'a1<\|end\|>' where the tokenizer's own writes '=a1",
        ),
    ],
)
def test_one_that_asks_otherwise_is_never_used(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, own: str, difference: str
) -> None:
    path = write(tmp_path, chat("q1", "a1", "q2", "a2"))
    changed = with_template(tokenizer, own)
    with pytest.raises(
        DataError,
        match=r"(?s)changes earlier turns.*dataset\.learn: each.*The template phi3 .* was tried "
        f"in its place and does not do: .*{difference}",
    ):
        prepare(DatasetRecipe(path=path, validation=0), changed, seed=0)
    assert shipped_name(changed.chat_template) is None


def test_a_template_that_is_ours_already_is_not_said_to_be_tried(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q1", "a1", "q2", "a2"))
    broken = with_template(tokenizer, shipped_template("phi3"))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "n"},
           {"role": "assistant", "content": "a"}]}  # fmt: skip
    Path(path).write_text(json.dumps(row))
    with pytest.raises(TemplateError) as caught:
        prepare(DatasetRecipe(path=path, validation=0), broken, seed=0)
    assert "was tried in its place" not in str(caught.value)


def test_nothing_else_is_tried_where_the_recipe_names_one_or_rows_are_compared(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q1", "a1", "q2", "a2"))
    file = tmp_path / "phi.jinja"
    file.write_text(PHI)
    for recipe, keeps in (
        (DatasetRecipe(path=path, validation=0, chat_template=str(file)), False),
        (DatasetRecipe(path=path, validation=0), True),
    ):
        with pytest.raises(DataError) as caught:
            prepare(recipe, with_template(tokenizer, PHI), seed=0, keeps_template=keeps)
        assert "was tried in its place" not in str(caught.value)


def test_each_turn_is_a_row_behind_what_the_model_sees_before_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, chat("q1", "a1", "q2", "a2"), {"messages": []}, chat("q", "a"))
    changed = with_template(tokenizer, QWEN)
    with pytest.raises(DataError, match=r"dataset\.learn: each\), or the last turn only"):
        prepare(DatasetRecipe(path=path, validation=0), changed, seed=0)
    changed = with_template(tokenizer, QWEN)
    data = prepare(DatasetRecipe(path=path, validation=0, learn="each"), changed, seed=0)
    think = "<think>\n\n</think>\n\n"
    assert texts(data) == [[f"{think}{answer}<|im_end|>"] for answer in ("a1", "a2", "a")]
    asked = [data.encoder.pieces(row)[0][0] for row in data.train]
    assert asked[1] == changed.apply_chat_template(
        chat("q1", "a1", "q2")["messages"], tokenize=False, add_generation_prompt=True
    )
    # Rows keep their number in the file.
    assert [row.row for row in data.train] == [1, 1, 3]
    assert data.report.num_rows == 3
    assert any(
        "3 rows from 2 rows of the data" in each and "dataset.learn: each" in each
        for each in data.report.warnings
    )


@pytest.mark.parametrize("share", [0.3, 5])
def test_turns_of_one_chat_are_all_learnt_or_all_held_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, share: float | int
) -> None:
    rows = [chat(*("q", f"{n}") * (n % 4 + 1)) for n in range(17)]
    path = write(tmp_path, *rows)
    recipe = DatasetRecipe(path=path, validation=share, learn="each")
    data = prepare(recipe, with_template(tokenizer, QWEN), seed=3)
    train, held_out = ({row.row for row in part} for part in (data.train, data.validation))
    assert not train & held_out
    assert train | held_out == set(range(1, 18))
    assert len(held_out) == 5
    assert len(data.train) + len(data.validation) == sum(n % 4 + 1 for n in range(17))
