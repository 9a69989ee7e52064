"""Held-out rows, scores and answers are put as the training rows were, wherever that was said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.score import scored_task
from kpsvd_tune.data import prepare
from kpsvd_tune.data.read.sources import shared_settings
from kpsvd_tune.evaluation import generation
from kpsvd_tune.evaluation.completions import read_completions
from kpsvd_tune.evaluation.evaluate import as_trained
from kpsvd_tune.evaluation.questions import read_questions
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe, load_recipe
from kpsvd_tune.runs.find import trained_as

OWN = "In: {prompt} Out: {completion}"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Rows to train on, and rows beside them."""
    return (
        write(tmp_path / "t.jsonl", [{"q": f"q{n}", "a": f"a{n}", "b": "x"} for n in range(6)]),
        write(tmp_path / "v.jsonl", [{"q": f"v{n}", "a": f"w{n}", "b": "x"} for n in range(2)]),
    )


COLUMNS = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("of_section", "of_sources", "expected"),
    [
        ({}, [{"template": OWN, "columns": COLUMNS}], "In: v0 Out: w0"),
        ({}, [{"template": OWN, "columns": COLUMNS}] * 2, "In: v0 Out: w0"),
        # What the section says counts, and of sources that disagree nothing does.
        ({"template": "{prompt}: {completion}"}, [{"template": OWN, "columns": COLUMNS}], "v0: w0"),
        (
            {"columns": COLUMNS},
            [{"template": OWN}, {"template": "{prompt} {completion}"}],
            "Question: v0\nAnswer: w0",
        ),
    ],
)
def test_a_file_of_held_out_rows_is_read_as_all_sources_are(
    files: tuple[str, str],
    tokenizer: PreTrainedTokenizerFast,
    of_section: dict[str, Any],
    of_sources: list[dict[str, Any]],
    expected: str,
) -> None:
    sources = [{"path": files[0], "ignore_columns": ["b"], **each} for each in of_sources]
    content = {"path": sources, "validation": files[1], **of_section}
    found = prepare(DatasetRecipe.model_validate(content), tokenizer, seed=0)
    assert tokenizer.decode(found.validation[0].input_ids) == f"{expected}</s>"
    assert found.report.warnings == () or len(of_sources) > 1  # of repeated rows alone


def test_what_all_sources_leave_to_the_section_changes_nothing(files: tuple[str, str]) -> None:
    dataset = DatasetRecipe.model_validate({"path": [files[0], {"path": files[1], "weight": 2}]})
    assert shared_settings(dataset).model_fields_set == dataset.model_fields_set


def test_scores_ask_with_the_template_of_the_source(files: tuple[str, str]) -> None:
    source = {"path": files[0], "template": OWN, "columns": COLUMNS}
    dataset = DatasetRecipe.model_validate({"path": source})
    assert trained_as(dataset, OWN).template == OWN
    assert trained_as(dataset, "chat").template == "chat"
    # Plain text has no prompt, and runs of older versions say nothing.
    assert trained_as(dataset, "{completion}") == trained_as(dataset, None) == dataset
    task = as_trained(EvaluationRecipe(task="exact_match", path=files[1]), trained_as(dataset, OWN))
    assert task.template == OWN
    assert read_questions(task)[0].prompt == "v0"


def test_columns_that_the_training_leaves_out_are_no_part_of_a_question(tmp_path: Path) -> None:
    row = {"id": 7, "instruction": "Add", "input": "noise", "output": "2", "system": "Be rude."}
    path = write(tmp_path / "rows.jsonl", [row])
    ignored = ["system", "input", "id"]
    dataset = DatasetRecipe(path=path, ignore_columns=ignored)

    def question(**keys: Any) -> tuple[Any, ...]:
        task = EvaluationRecipe(task="exact_match", path=path, **keys)
        (found,) = read_questions(as_trained(task, dataset))
        return found.id, found.prompt, found.system

    assert question() == (7, "Add", None)
    assert question(ignore_columns=[]) == (7, "Add\n\nnoise", "Be rude.")
    columns = {"instruction": "instruction", "output": "output", "input": "input"}
    assert question(columns=columns) == (7, "Add\n\nnoise", None)
    task = EvaluationRecipe(task="gsm8k", path=path)
    assert as_trained(task, dataset).ignore_columns is None


def test_a_comparison_scores_rows_as_its_sources_are(
    files: tuple[str, str], write_recipe: Callable[..., Path]
) -> None:
    source = {"path": files[0], "columns": COLUMNS}
    path = write_recipe(dataset={"path": source, "columns": {}, "validation": files[1]})
    assert scored_task(load_recipe(path), "exact_match").columns == COLUMNS


@dataclass
class Answer:
    completion: str
    is_cut: bool = False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "source", "of_task", "of_answer"),
    [
        (
            {"q": "Hi", "a": "Ho"},
            {"template": OWN, "columns": COLUMNS},
            "In: Hi Out:",
            "In: x Out:",
        ),
        ({"text": "once upon"}, {}, None, "x"),
    ],
    ids=["template of the source", "plain text"],
)
def test_a_run_is_asked_as_it_was_trained(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    rows: dict[str, str],
    source: dict[str, Any],
    of_task: str | None,
    of_answer: str,
) -> None:
    file = write(tmp_path / "r.jsonl", [rows] * 4)
    task = {"task": "exact_match", "path": file, "max_new_tokens": 2}
    recipe = write_recipe(
        dataset={"path": {"path": file, **source}, "columns": {}, "validation": 0},
        adapter={"rank": {"window": 4, "max": 2}},
        train={"max_steps": 1},
        evaluation=[task] if of_task else [],
    )
    assert cli.run(["train", str(recipe)]) in (0, 4)
    run = tmp_path / "run"
    if of_task:
        answers = read_completions(
            run / "evaluation" / "after" / "exact_match" / "completions.jsonl"
        )
        assert {each.prompt for each in answers} == {of_task}
    seen: list[str] = []

    def watched(model: Any, tokenizer: Any, prompts: Any, options: Any) -> Any:
        seen.append(tokenizer.decode(prompts[0].input_ids))
        return iter([Answer("a")])

    monkeypatch.setattr(generation, "generate_completions", watched)
    assert cli.run(["generate", str(run), "x"]) == 0
    assert seen == [of_answer]
