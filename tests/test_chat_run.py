"""Chats end to end: one template for training, scores, answers, the saved adapter and the merge."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from kpsvd_tune.commands import main as cli
from kpsvd_tune.data import Encoder
from kpsvd_tune.evaluation import generation as generate

# The end token is behind the whole chat alone, as in Phi 3, which one rendering cannot train.
OWN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{# <|user|>\n #}"
)
# Another way to ask, which no tokenizer here has, with an argument.
FILE = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
    "{% if polite %}{{ 'Well, ' }}{% endif %}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% if polite %}{{ 'Well, ' }}{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def recipe(tmp_path: Path, model_factory: Any, tokenizer: Any) -> Path:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|assistant|>"]})
    changed.chat_template = OWN
    model: LlamaForCausalLM = model_factory()
    model.resize_token_embeddings(len(changed), mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    changed.save_pretrained(tmp_path / "base")
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": f"{n} {i}"} for i in range(4)
            ]
        }
        for n in range(8)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""model: {{path: {tmp_path / "base"}, dtype: float32}}
dataset: {{path: {tmp_path / "rows.jsonl"}, validation: 2}}
adapter: {{rank: {{window: 8, max: 4}}}}
train: {{max_steps: 2, batch_size: 2, precision: "no"}}
evaluation:
  - {{task: exact_match, path: {tmp_path / "rows.jsonl"}, limit: 2, max_new_tokens: 2}}
  - {{task: loss, path: {tmp_path / "rows.jsonl"}, limit: 2}}
output_dir: {tmp_path / "run"}
""",
        encoding="utf-8",
    )
    return path


@dataclass
class Answer:
    completion: str
    is_cut: bool = False


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are put to a model from now on."""
    found: list[str] = []
    encode = Encoder.encode_prompt

    def watched(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        ids = encode(self, *args, **kwargs)
        found.append(self.decode(ids))
        return ids

    monkeypatch.setattr(Encoder, "encode_prompt", watched)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [False, True])
def test_what_is_trained_is_asked_served_and_merged(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_named: bool,
) -> None:
    keys = []
    start, end = "<|user|>\n", "<|assistant|>\n"
    if is_named:
        (tmp_path / "mine.jinja").write_text(FILE)
        keys = [
            f"dataset.chat_template={tmp_path / 'mine.jinja'}",
            "dataset.template_arguments={polite: true}",
        ]
        start, end = "user: ", "assistant: Well, "
    seen = asked(monkeypatch)
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe), *keys, "--json"]) in (0, 4)
    err = capsys.readouterr().err
    assert ("the template phi3 that comes with kpsvd-tune is used" in err.replace("\n", " ")) != (
        is_named
    )
    assert seen
    assert all(prompt.startswith(start) and prompt.endswith(end) for prompt in seen)

    # The saved tokenizer asks so for whoever serves it, without being told of any argument.
    saved: Any = AutoTokenizer.from_pretrained(run / "adapter")
    question = [{"role": "user", "content": "q"}]
    text = saved.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.startswith(start)
    assert text.endswith(end)

    for source in (run, run / "adapter"):
        answered: list[str] = []
        monkeypatch.setattr(
            generate,
            "generate_completions",
            lambda model, tokenizer, questions, options, kept=answered: iter(
                [kept.append(tokenizer.decode(questions[0].input_ids)) or Answer("a")]
            ),
        )
        assert cli.run(["generate", str(source), "q"]) == 0
        assert answered == [text]
    capsys.readouterr()
    merged = tmp_path / "merged"
    assert cli.run(["merge", str(run), "--output", str(merged)]) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == saved.chat_template


@pytest.mark.slow
def test_each_turn_trains_and_is_scored_where_one_rendering_cannot(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    keys = [f"dataset.chat_template={tmp_path / 'own.jinja'}"]
    assert cli.run(["train", str(recipe), *keys, "--dry-run"]) == 2
    assert "dataset.learn: each" in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["train", str(recipe), *keys, "dataset.learn=each", "--json"]) in (0, 4)
    captured = capsys.readouterr()
    assert "12 rows from 6 rows of the data" in captured.err.replace("\n", " ")
    assert json.loads(captured.out)["scores"]["loss"]["loss"]["n"] > 0
