"""What errors about the rows of a task advise: keys of its own section, as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.score import scored_task
from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.evaluation.evaluate import as_trained, check_tasks
from kpsvd_tune.evaluation.questions import build_prompts, read_questions
from kpsvd_tune.recipe import EvaluationRecipe, evaluation_section, load_recipe

CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return file


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Rows with other columns than those of the training."""
    return written(tmp_path / "other.jsonl", [{"asked": f"{n}?", "told": "yes"} for n in range(3)])


def test_a_recipe_is_advised_to_change_the_task_that_lacks_a_column(
    write_recipe: Callable[..., Path],
    rows_file: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [{"task": task, "path": str(rows_file)} for task in ("text", "loss")]
    recipe = write_recipe(evaluation=[*tasks, {"task": "label", "path": str(other)}])
    assert cli.run(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    advice = "evaluation.2.columns={prompt: asked, completion: told}"
    assert "the column 'question' for prompt is missing; found " in said
    assert f"'{advice}'" in said
    assert "dataset." not in said
    # What is advised works, as far as the columns go.
    columns = load_recipe(recipe, [advice]).evaluation[2].columns
    assert columns == {"prompt": "asked", "completion": "told"}


def test_eval_is_advised_in_its_own_words(
    tiny_model_dir: Path, tmp_path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny_model_dir), "--task", "text", "-o", str(tmp_path / "out")]
    typed = ["--path", str(other), "columns={prompt: question, completion: answer}"]
    assert cli.run([*command, *typed]) == 2
    said = capsys.readouterr().err
    assert "'columns={prompt: asked, completion: told}'" in said
    assert "dataset." not in said
    assert "evaluation." not in said
    command += ["--path", str(other), "columns={prompt: asked, completion: told}"]
    assert cli.run([*command, "--shots", "3"]) == 2
    assert "Give a file of examples (shots_path), or --shots 0." in capsys.readouterr().err
    examples = tmp_path / "examples.jsonl"
    examples.write_bytes(other.read_bytes())
    assert cli.run([*command, "--shots", "9", f"shots_path={examples}"]) == 2
    said = capsys.readouterr().err
    assert "set --shots to 3 or less, or shots_path to a source with more" in said


@pytest.mark.parametrize(
    ("keys", "rows", "told"),
    [
        ({"split": "test[9:]"}, [{"prompt": "a", "completion": "b"}], "KEY.split 'test[9:]' keeps"),
        (
            {"columns": {"prompt": "prompt", "completion": "prompt"}},
            [{"prompt": "a", "completion": "b"}],
            "KEY.columns names the column 'prompt' for",
        ),
        (
            {},
            [{"messages": CHAT, "tools": [{"name": "add"}], "functions": [{"name": "sub"}]}],
            "leave one out with KEY.ignore_columns=[functions]",
        ),
        (
            {"task": "gsm8k"},
            [
                {
                    "question": "a",
                    "answer": "2",
                    "tools": [{"name": "add"}],
                    "functions": [{"name": "sub"}],
                }
            ],
            "leave one out of the file",
        ),
        (
            {},
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "'KEY.columns={prompt: prompt, completion: chosen}'",
        ),
        ({"task": "label"}, [{"prompt": "a", "completion": "b"}], "name all labels in KEY.labels"),
        (
            {"template": "{prompt}"},
            [{"prompt": "a", "completion": "b"}],
            "KEY.template has {completion} 0 times",
        ),
        (
            {"template": "{asked} {completion}"},
            [{"prompt": "a", "completion": "b"}],
            "{prompt} and 'KEY.columns={prompt: asked}'",
        ),
        (
            {"task": "loss", "columns": {"prompt": "asked", "completion": "told"}},
            [{"prompt": "a", "completion": "b"}],
            "KEY.columns={",
        ),
    ],
)
def test_other_advice_names_the_keys_of_the_task(
    tokenizer: Any, tmp_path: Path, keys: dict[str, Any], rows: list[dict[str, Any]], told: str
) -> None:
    path = str(written(tmp_path / "rows.jsonl", rows))
    section = {"task": "text", "path": path, **keys}
    alone = evaluation_section(section, {})
    in_recipe = load_recipe(_recipe(tmp_path, section)).evaluation[1]
    for task, where in ((in_recipe, "evaluation.1."), (alone, "")):
        with pytest.raises(KpsvdTuneError) as got:
            _ask(task, tokenizer)
        assert told.replace("KEY.", where) in str(got.value)
        assert "dataset." not in str(got.value)


def _recipe(folder: Path, section: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    text = {"model": {"path": "-"}, "output_dir": "-", "evaluation": [section, section]}
    file.write_text(json.dumps(text), encoding="utf-8")
    return file


def _ask(task: EvaluationRecipe, tokenizer: Any) -> None:
    check_tasks([task], None)
    build_prompts(read_questions(task), tokenizer, str(task.template), task)


def test_a_comparison_is_advised_to_change_the_columns_of_the_training(
    write_recipe: Callable[..., Path], other: Path
) -> None:
    recipe = load_recipe(write_recipe(dataset={"validation": str(other)}))
    task = as_trained(scored_task(recipe, "text"), recipe.dataset)
    with pytest.raises(KpsvdTuneError, match=r"'dataset.columns=\{prompt: asked, completion: told"):
        read_questions(task)
