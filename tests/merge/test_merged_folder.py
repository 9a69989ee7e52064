"""A merged model keeps how the rows of its training were asked, and is asked in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation.completions import read_completions
from kpsvd_tune.evaluation.evaluate import as_trained
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe
from kpsvd_tune.runs.find import find
from kpsvd_tune.runs.merged_folder import kept_training, trained_as

TEMPLATE = "Q: {prompt}\nA: {completion}"
COLUMNS = {"prompt": "question", "completion": "answer"}
KEPT = {
    "template": TEMPLATE,
    "columns": COLUMNS,
    "ignore_columns": [],
    "learn": "all",
    "asked_with": TEMPLATE,
}


def dataset(**keys: Any) -> DatasetRecipe:
    return DatasetRecipe.model_validate({"path": "rows.jsonl", "columns": COLUMNS, **keys})


def test_what_is_kept_is_what_all_runs_have_in_common() -> None:
    own = dataset(template=TEMPLATE, max_length=9)
    run = (own, TEMPLATE)
    assert trained_as([run]) == KEPT
    assert trained_as([run, (dataset(template=TEMPLATE, validation=3), TEMPLATE)]) == KEPT
    assert trained_as([run, (dataset(template="chat"), "chat")]) == {}
    assert trained_as([run, (own, "{prompt}{completion}")]) == {}
    # An adapter without its run.
    assert trained_as([run, (None, None)]) == {}
    assert trained_as([(None, None)]) == {}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    # Columns of a source are those of the rows beside it.
    source = {"path": "rows.jsonl", "columns": COLUMNS, "ignore_columns": ["system"]}
    own = DatasetRecipe.model_validate({"path": source, "template": "chat", "learn": "last"})
    report = tmp_path / "merge_report.json"
    kept = trained_as([(own, "{prompt}{completion}")])
    report.write_text(json.dumps({"trained_as": kept}))
    found = find(str(tmp_path))
    assert found.template == "{prompt}{completion}"
    task = EvaluationRecipe(task="text", path="other.jsonl")
    assert as_trained(task, found.dataset) == as_trained(task, own)
    assert trained_as([(found.dataset, found.template)]) == kept


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "merge_report.json is not JSON"),
        ('{"trained_as": ["chat"]}', r"trained_as is \['chat'\]; expected template and columns"),
        ('{"trained_as": {"template": "chat", "learn": "some"}}', "trained_as.learn: Input should"),
        ('{"trained_as": {"asked_with": 3}}', "trained_as.asked_with: 3 is no template"),
        ('{"trained_as": {"tempalte": "chat"}}', "trained_as.tempalte: Extra inputs are not"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "merge_report.json").write_text(content)
    with pytest.raises(InputError, match=told) as got:
        find(str(tmp_path))
    assert str(got.value).endswith("or remove the file and give template and columns")


def test_a_folder_that_keeps_nothing_says_nothing(tmp_path: Path) -> None:
    assert kept_training(tmp_path) == (None, None)
    for content in ('{"passed": true}', '{"trained_as": {}}'):  # the first of an older version
        (tmp_path / "merge_report.json").write_text(content)
        found = find(str(tmp_path))
        assert (found.dataset, found.template, found.asked_by) == (None, None, None)


@pytest.mark.slow
def test_a_merged_model_is_scored_and_asked_like_its_run(
    write_recipe: Callable[..., Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(dataset={"template": TEMPLATE}, train={"max_steps": 2})
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert cli.run(["train", str(recipe)]) in (0, 4)
    assert cli.run(["merge", str(run), "--output", str(merged), "--proof", "tensors"]) == 0
    report = merged / "merge_report.json"
    content = json.loads(report.read_text())
    assert content["trained_as"] == KEPT
    capsys.readouterr()

    asked = ["--task", "text", "--path", str(rows_file), "--max-new-tokens", "4", "--json"]
    told = f"asked as it was trained: template and columns are those in {report}"

    def scored(source: Path, *more: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / f"scores-{len(list(tmp_path.iterdir()))}"
        assert cli.run(["eval", str(source), *asked, "-o", str(output), *more]) == 0
        said = capsys.readouterr()
        found = json.loads(said.out)
        prompts = {each.id: each.prompt for each in read_completions(Path(found["completions"]))}
        return {**found, "prompts": prompts}, said.err

    of_run, said = scored(run)
    assert told not in said
    of_merged, said = scored(merged)
    assert told in said
    assert of_merged["prompts"] == of_run["prompts"]
    assert of_merged["conditions"] == of_run["conditions"]
    assert of_merged["prompts"][0] == "Q: Tom has 1 nuts and finds 2 more. How many?\nA:"
    # What is typed wins.
    other = "{prompt: answer, completion: question}"
    typed, _ = scored(merged, "template=chat", f"columns={other}")
    assert typed["prompts"][0] == "<|user|>3 nuts</s><|assistant|>"

    answers = []
    for source in (run, merged):
        assert cli.run(["generate", str(source), "Tom has", "--max-new-tokens", "4"]) == 0
        shown = capsys.readouterr()
        answers.append(shown.out)
        assert (told in shown.err) == (source == merged)
    assert answers[0] == answers[1]

    # A folder of an older version needs the columns, as any model does.
    del content["trained_as"]
    report.write_text(json.dumps(content))
    assert cli.run(["eval", str(merged), *asked, "-o", str(tmp_path / "older")]) == 2
    assert "'columns={prompt: question, completion: answer}'" in capsys.readouterr().err
