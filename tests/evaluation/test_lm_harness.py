"""The task lm_eval: a local task of the harness on a run, before and after, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation import lm_harness
from kpsvd_tune.evaluation.evaluate import check_tasks
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.run import as_mapping, score_text

TASK = """\
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["even", "odd"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "parity.jsonl"
    lines = [{"question": f"{n} is", "label": n % 2} for n in range(6)]
    rows.write_text("".join(json.dumps(each) + "\n" for each in lines))
    (folder / "parity.yaml").write_text(TASK.format(rows=rows))
    return folder


def test_what_the_harness_found_is_read() -> None:
    scores, left_out = lm_harness._read(
        {
            "results": {
                "a": {"alias": "a", "acc,none": 0.25, "acc_stderr,none": 0.1},
                "b": {
                    "exact_match,strict": 1.0,
                    "exact_match_stderr,strict": "N/A",
                    "perplexity,none": 12.5,
                    "perplexity_stderr,none": 0.5,
                },
            },
            "n-samples": {"a": {"effective": 8}, "b": {"effective": 4}},
        }
    )
    assert [(each.scorer, each.value, each.n, each.stderr) for each in scores] == [
        ("a: acc", 0.25, 8, 0.1),
        ("b: exact_match (strict)", 1.0, 4, 0.0),
    ]
    assert left_out == ("b: perplexity 12.5",)
    # A group has a figure, and no number of its own.
    grouped = {
        "results": {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "n-samples": {"a": {"effective": 8}, "b": {"effective": 4}},
        "group_subtasks": {"all": ["a", "some"], "some": ["b"]},
    }
    ((only,), rest) = lm_harness._read(grouped)
    assert (only.scorer, only.n, rest) == ("all: acc", 12, ())
    said = score_text("a: acc", as_mapping(scores)["a: acc"])
    assert said.startswith("mean 25.0 % over 8 (95 % interval 5.4 % to 44.6 %)")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_harness, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[lm-eval\]'"):
        check_tasks([EvaluationRecipe(task="lm_eval", name="parity")], None)
    with pytest.raises(ValueError, match="lm_eval needs the names of its tasks"):
        EvaluationRecipe(task="lm_eval")


@pytest.mark.slow
def test_a_local_task_scores_a_run_before_and_after(
    write_recipe: Callable[..., Path],
    task_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    task = {"task": "lm_eval", "name": "parity", "path": str(task_folder), "before": True}
    recipe = write_recipe(train={"max_steps": 2}, evaluation=[task])
    assert cli.run(["train", str(recipe)]) in (0, 4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for place in ("base_scores", "scores"):
        found = results[place]["lm_eval"]
        assert set(found) == {"parity: acc", "parity: acc_norm"}
        assert found["parity: acc"]["n"] == 6
        assert 0 <= found["parity: acc"]["value"] <= 1
    capsys.readouterr()
    assert cli.run(["report", str(tmp_path / "run")]) == 0
    assert "adapter, lm_eval, parity: acc: mean " in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know_is_refused(task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    unknown = EvaluationRecipe(task="lm_eval", name="perity", path=str(task_folder))
    with pytest.raises(InputError, match="knows no task perity, nor in"):
        check_tasks([unknown], None)
