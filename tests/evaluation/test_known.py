"""Rows that are scored and trained on are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.data import prepare
from kpsvd_tune.evaluation.known import known_rows
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(file)


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Is {number} odd?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": "yes" if number % 2 else "no"},
    ]


@pytest.mark.parametrize("task", ["exact_match", "label", "loss"])
@pytest.mark.parametrize("learn", ["all", "last", "each"])
def test_rows_that_are_trained_on_are_counted(
    tmp_path: Path, tokenizer: Any, task: Any, learn: str
) -> None:
    pairs = [{"prompt": f"Is {n} odd?", "completion": "yes" if n % 2 else "no"} for n in range(6)]
    chats = [{"messages": chat(number)} for number in range(6)]
    for rows, template in ((pairs, "Q: {prompt}\nA: {completion}"), (chats, "chat")):
        keys = {"path": written(tmp_path / "train.jsonl", rows[:4]), "template": template}
        dataset = DatasetRecipe.model_validate({**keys, "validation": 0, "learn": learn})
        data = prepare(dataset, tokenizer, seed=0)
        section = EvaluationRecipe(task=task, path=written(tmp_path / "test.jsonl", rows[2:]))
        (told,) = known_rows([section], dataset, data)
        assert told.startswith(
            f"KNOWN ROWS: 2 of the 4 rows that evaluation of {task} scores are trained on"
        ), told
        fine = section.model_copy(update={"path": written(tmp_path / "fine.jsonl", rows[4:])})
        assert known_rows([fine], dataset, data) == []
        # Held-out rows of the training file are not trained on.
        held = DatasetRecipe.model_validate({**keys, "validation": fine.path, "learn": learn})
        assert known_rows([fine], held, prepare(held, tokenizer, seed=0)) == []


def test_running_texts_are_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    rows = written(tmp_path / "rows.jsonl", [{"text": "Some text."}])
    dataset = DatasetRecipe(path=rows, validation=0)
    data = prepare(dataset, tokenizer, seed=0)
    tasks = [
        EvaluationRecipe(task="forgetting", path=str(text)),
        EvaluationRecipe(task="loss", path=str(text)),
    ]
    assert known_rows(tasks, dataset, data) == []
    assert len(known_rows([EvaluationRecipe(task="loss", path=rows)], dataset, data)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_training_and_its_plan_tell_of_them(
    command: str,
    write_recipe: Callable[..., Path],
    rows_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = {"task": "exact_match", "path": str(rows_file), "max_new_tokens": 2}
    recipe = write_recipe(train={"max_steps": 1}, evaluation=[task])
    assert cli.run([command, str(recipe)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "KNOWN ROWS: 6 of the 8 rows that evaluation of exact_match scores" in said, said
