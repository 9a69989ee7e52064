"""Trained models judged by a task's score, and a comparison within a budget of money."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison import score as module
from kpsvd_tune.comparison.account import recorded_seconds
from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.comparison.money import Forecast, Purse
from kpsvd_tune.comparison.score import scored_task
from kpsvd_tune.comparison.trial import _Losses
from kpsvd_tune.comparison.trial_log import open_results, read_results
from kpsvd_tune.comparison.workers import Workers, _answer, _Answered
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe, load_recipe
from kpsvd_tune.report import live
from kpsvd_tune.report.comparison import TrialRow
from kpsvd_tune.report.events import read_events
from kpsvd_tune.training import make_accelerator

COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture
def recipe(tmp_path: Path, rows_file: Path, write_recipe: Callable[..., Path]) -> Path:
    task = {"task": "exact_match", "path": str(rows_file), "max_new_tokens": 3, "columns": COLUMNS}
    return write_recipe(
        adapter={"rank": {"window": 4, "max": 4}},
        train={"max_steps": 4, "eval_every": 2},
        compare={"price_per_hour": 36, "currency": "EUR"},
        evaluation=[task],
        output_dir=str(tmp_path / "comparison"),
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trials and scorings run here, one after the other; how many were given at a time."""
    together: list[int] = []

    def run(workers: Any, tasks: Any) -> Iterator[Any]:
        material, recipe = workers._material, workers._recipe
        base = KeptBase(material.source, recipe)
        together.append(len(tasks))
        for task in tasks:
            if not workers._may_start(task):
                return

            def send(message: Any, task: Any = task) -> None:
                if isinstance(message, _Answered):
                    workers.answered(task, message.done, message.total)
                else:
                    workers._stepped(*message)

            answer = _answer(task, material, recipe, base, send)
            if isinstance(answer, BaseException):
                raise answer
            workers.tick(1)
            yield task, answer

    monkeypatch.setattr(Workers, "_run", run)
    return together


def command(recipe: Path, methods: str, *more: str) -> list[str]:
    arguments = ["compare", str(recipe), "--offline", "--methods", methods, "--budgets", "3k"]
    return [*arguments, "--learning-rates", "1e-2", "--seeds", "1", *more]


@pytest.mark.slow
def test_the_model_that_is_scored_is_the_one_that_was_trained(
    recipe: Path, tmp_path: Path, in_this_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[str, float | None] = {}
    trained = module._trained

    def measure(setup: Any, material: Any, base: Any) -> Any:
        model = trained(setup, material, base)
        losses = _Losses(model, material, setup.recipe, make_accelerator(setup.recipe.train))
        measured[setup.trial.method] = losses.of(material.validation)
        return model

    monkeypatch.setattr(module, "_trained", measure)
    # PiSSA changes the base that its file belongs to; VeRA and RandLoRA draw what they do not keep.
    methods = "kpsvd,kpsvd:init=random:form=left,lora,lora-fa,pissa,vera,randlora,ia3"
    assert cli.run(command(recipe, methods, "--score", "exact_match")) == 0
    rows = {row.method: row for row in read_results(tmp_path / "comparison")}
    assert measured == {name: row.validation_loss for name, row in rows.items()}
    assert len(measured) == 8


def test_questions_are_told_apart_by_all_that_a_model_is_given(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    dataset = DatasetRecipe(path=str(rows), columns={"system": "system"})

    def asked(system: str, **keys: Any) -> str:
        row = {"instruction": "1 + 1?", "output": "2", "system": system}
        rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
        task = EvaluationRecipe(task="exact_match", path=str(rows), **keys)
        return module.make_questions(task, dataset, None).asked

    first = asked("Be brief.")
    assert asked("Be brief.") == first
    assert asked("Explain.") != first
    assert asked("Be brief.", stop=["\n"]) not in (first, asked("Be brief.", stop=["."]))


@pytest.mark.slow
def test_scores_are_kept_paired_and_not_made_twice(
    recipe: Path,
    tmp_path: Path,
    in_this_process: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "TRIAL_SECONDS", 0.0)
    folder = tmp_path / "comparison"
    words = command(recipe, "kpsvd,lora", "--score", "exact_match")
    assert cli.run([*words, "--json"]) == 0
    captured = capsys.readouterr()
    verdict = json.loads(captured.out)
    assert "scoring the base model on exact_match" in captured.err
    assert "  answering 8 of 8\n" in captured.err
    # Of both models.
    assert "  answers 16 of 16\n" in captured.err
    assert "scored 2 of 2: lora at 3,000" in captured.err
    # Models are given to the workers together, as trials are: the base, and then the best two.
    assert in_this_process[-1] == 2
    rows = read_results(folder)
    assert len(rows) == 2
    for row in rows:
        assert row.score is not None
        assert len(row.score.shares) == 8
        assert (folder / "trials" / row.trial.folder_name / "score" / "completions.jsonl").exists()
    assert verdict["task"].startswith("exact_match, ")
    assert {each["num_questions"] for each in verdict["score_differences"]} == {8}
    assert all(each["score"] is not None for each in verdict["summaries"])

    # Nothing is left to be answered, and the account goes on.
    def fails(*_: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr("kpsvd_tune.comparison.workers.score_model", fails)
    before = json.loads((folder / "account.json").read_text())["device_seconds"]
    assert cli.run([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["summaries"] == verdict["summaries"]
    assert again["spent"]["device_seconds"] >= before
    # Without --score the verdict is drawn by the loss, and the scores stay.
    assert cli.run([*command(recipe, "kpsvd,lora"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] is None
    assert all(row.score is not None for row in read_results(folder))


@pytest.mark.slow
def test_money_stops_the_trials_and_more_of_it_goes_on(
    recipe: Path, tmp_path: Path, in_this_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "comparison"
    words = command(recipe, "kpsvd,lora", "--seeds", "3", "--plan", "full")
    assert cli.run([*words, "--money", "0.0001"]) == 2
    assert "buys no trial" in capsys.readouterr().err
    spent = recorded_seconds(folder, [])
    assert spent > 0
    # A dry run counts what was spent, and writes nothing.
    assert cli.run([*words, "--money", "1000", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["trials_bought"], plan["trials_left_out"]) == (6, 0)
    assert recorded_seconds(folder, []) == spent
    assert not (folder / "results.jsonl").exists()

    # Enough for some of six: the forecast is made to take a third of what is left.
    class Third(Forecast):
        def seconds(self, method: str, budget: int) -> float:
            return 1000.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kpsvd_tune.comparison.compare.Forecast", Third)
        assert cli.run([*words, "--money", "25", "--json"]) == 0
    captured = capsys.readouterr()
    # 25 EUR are 2500 s: two trials of 1000 s as foreseen; they take less, so a third may start
    # while 1000 s are left, which they are until the plan is done.
    verdict = json.loads(captured.out)
    assert "the money buys 2 of the 6 trials to come" in captured.err
    assert verdict["spent"]["money"] == 25
    assert len(read_results(folder)) == 6

    class Dear(Forecast):
        def seconds(self, method: str, budget: int) -> float:
            return 1e6

    more = command(recipe, "kpsvd,lora", "--seeds", "4", "--plan", "full", "--money", "25")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kpsvd_tune.comparison.compare.Forecast", Dear)
        assert cli.run([*more, "--json"]) == 0
    captured = capsys.readouterr()
    verdict = json.loads(captured.out)
    assert len(read_results(folder)) == 6
    assert "the money buys 0 of the 2 trials to come" in captured.err
    assert any(
        each.startswith("trials: 2 are left out for want of money; --money of about 20,000")
        for each in verdict["recommendation"]["missing"]
    )


def rows_with(recipe: Path, *overrides: str) -> Any:
    return load_recipe(recipe, list(overrides))


def test_what_is_asked_is_the_recipes_own_task_or_held_out_rows(
    recipe: Path, rows_file: Path
) -> None:
    own = scored_task(rows_with(recipe), "exact_match")
    assert own.max_new_tokens == 3
    test = scored_task(
        rows_with(recipe, "evaluation=[]", f"compare.test={rows_file}"), "exact_match"
    )
    assert (test.path, test.max_new_tokens) == (str(rows_file), 256)
    held_out = scored_task(
        rows_with(recipe, "evaluation=[]", f"dataset.validation={rows_file}"), "exact_match"
    )
    assert held_out.path == str(rows_file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactmatch", r"--score: got 'exactmatch'; expected one of gsm8k, math, exact_match"),
        ("loss", r"--score: got 'loss'; expected one of"),
        ("mbpp", r"it runs programs: score the adapter of one trial with `kpsvd-tune eval`"),
        ("exact_match", r"--score exact_match: no rows to ask; name a file of rows"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(recipe: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored_task(rows_with(recipe, "evaluation=[]"), name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--money", "0"], "--money: got 0; expected an amount above 0"),
        (["--money", "nan"], "--money: got nan; expected an amount above 0"),
        (
            ["--money", "5", "compare.price_per_hour=null"],
            "--money needs a price: set what an hour of one device costs, as in",
        ),
        (["--score", "exactmatch"], "--score: got 'exactmatch'; expected one of gsm8k"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    arguments: list[str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(recipe, "lora", *arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_second_line_of_a_trial_replaces_the_first(tmp_path: Path) -> None:
    from trial_rows import row

    first = row(seed=0)
    other = TrialRow(**{**first.__dict__, "rank": "9"})
    lines = [json.dumps(each.to_dict()) for each in (first, row(seed=1), other)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"half')
    found = read_results(tmp_path)
    assert [(each.seed, each.rank) for each in found] == [(0, "9"), (1, "2")]
    assert read_results(tmp_path / "nowhere") == []


@pytest.mark.slow
def test_money_stops_the_processes_that_run_trials(
    recipe: Path,
    tmp_path: Path,
    warm_below: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def two(self: Purse, trial: Any) -> bool:
        asked.append(trial)
        self.refused = trial if len(set(asked)) > 2 else None
        return self.refused is None

    monkeypatch.setattr(Purse, "may_start", two)
    arguments = command(recipe, "lora,lora-fa", "--jobs", "2", "--money", "1000")
    arguments[arguments.index("--learning-rates") + 1] = "1e-3,1e-2"
    assert cli.run(arguments) == 0
    rows = (tmp_path / "comparison" / "results.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert "2 are left out for want of money" in " ".join(capsys.readouterr().out.split())
    spent = json.loads((tmp_path / "comparison" / "account.json").read_text())["device_seconds"]
    assert spent > 1


def test_what_was_measured_of_the_base_goes_with_its_settings(tmp_path: Path) -> None:
    open_results(tmp_path, {"recipe": {"model": "a"}}, {})
    for name in ("base.json", "base_score.json"):
        (tmp_path / name).write_text("{}")
    open_results(tmp_path, {"recipe": {"model": "b"}}, {})
    assert not (tmp_path / "base.json").exists()
    assert not (tmp_path / "base_score.json").exists()


@pytest.mark.slow
def test_a_killed_scoring_goes_on_and_ends_the_same(
    recipe: Path, tmp_path: Path, warm_below: None
) -> None:
    """Two models are scored at a time; kill -9 while both answer."""
    folder = tmp_path / "comparison"
    words = command(recipe, "lora,lora-fa", "--score", "exact_match", "--jobs", "2")
    # One answer a batch and answers of many tokens, so that there is a moment to kill at.
    text = recipe.read_text().replace("max_new_tokens: 3", "max_new_tokens: 100\n  batch_size: 1")
    recipe.write_text(text)
    program = [sys.executable, "-m", "kpsvd_tune", *words]
    answers = "trials/*/score/completions.jsonl"
    process = warm.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len([file for file in folder.glob(answers) if file.stat().st_size]) < 2:
        assert process.poll() is None, "the comparison ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert all(each.score is None for each in read_results(folder))
    done = warm.run([*program, "--json"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for file in folder.glob(answers):
        keys = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        # The workers of the killed call gave the folder back before others wrote into it.
        assert len(keys) == len(set(keys)) == 8
    assert all(each.score is not None for each in read_results(folder))


@pytest.mark.slow
def test_a_trial_is_watched_and_what_looked_wrong_is_told(
    recipe: Path,
    tmp_path: Path,
    in_this_process: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(recipe, "lora")
    words[words.index("--learning-rates") + 1] = "1e-3,1e-2"
    # A gradient that is clipped in every step, and a rate that rises in nearly all of them.
    changes = ["train.max_steps=52", "train.max_grad_norm=1e-4", "train.warmup_ratio=0.9"]
    assert cli.run([*words, *changes, "train.eval_every=26", "--json"]) == 0
    captured = capsys.readouterr()
    rows = read_results(tmp_path / "comparison")
    assert [list(row.warnings) for row in rows] == [["clipping"], ["clipping"]]
    for row in rows:
        trial = tmp_path / "comparison" / "trials" / row.trial.folder_name
        (told,) = [each for each in read_events(trial) if each.kind == "warning"]
        assert (told.code, told.text) == ("clipping", row.warnings["clipping"])
        assert told.step == 50
        assert told.cure
        assert f"{row.trial}: clipping: The gradient was clipped in 100 %" in captured.err
    verdict = json.loads(captured.out)
    taken = verdict["summaries"][0]["learning_rate"]
    (other,) = {1e-3, 1e-2} - {taken}
    page = (tmp_path / "comparison" / "comparison.html").read_text(encoding="utf-8")
    for note in (
        f"lora at 3,000, rate {taken:g}: clipping in 1 of 1 seed: The gradient was clipped in",
        f"clipping in 1 of 1 trial at rates not taken: lora at {other:g}",
        "The rate rises in 47 of the 52 steps.",
    ):
        assert any(each.startswith(note) for each in verdict["notes"]), note
        assert note in page
