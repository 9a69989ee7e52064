"""A whole evaluation: scores, resume after a kill, and never a score of two models' answers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation import evaluate as module
from kpsvd_tune.evaluation.completions import append_completion, read_completions
from kpsvd_tune.evaluation.evaluate import as_trained, weights_fingerprint
from kpsvd_tune.evaluation.scoring import score_completions
from kpsvd_tune.recipe import Columns, DatasetRecipe, EvaluationRecipe


class Notes:
    """Events of which only the notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def evaluate(model, tokenizer, recipe, folder, events: Any = None, **options):
    place = torch.device("cpu")
    scorer = module.Scorer(tokenizer, None, place, events or Notes(), None)
    return scorer.score(model, recipe, folder, **options)


@pytest.fixture
def recipe(rows_file: Path) -> EvaluationRecipe:
    columns: Columns = {"prompt": "question", "completion": "answer"}
    return EvaluationRecipe(
        task="exact_match", path=str(rows_file), columns=columns, max_new_tokens=6, batch_size=3
    )


def test_a_chat_model_that_is_asked_in_plain_text_is_told(
    tiny_model, tokenizer, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def notes(name: str, **changes: Any) -> list[str]:
        told = Notes()
        evaluate(tiny_model, tokenizer, recipe.model_copy(update=changes), tmp_path / name, told)
        return [note for note in told.notes if "give template=chat" in note]

    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert not notes("plain")
    template = "{% for each in messages %}{{ each.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert notes("asked plainly")
    assert not notes("asked as a chat", template="chat")
    assert not notes("asked on purpose", template="Q {prompt} A {completion}")


def test_an_evaluation_answers_every_row_and_can_be_scored_again(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    told = Notes()
    scores = evaluate(tiny_model, tokenizer, recipe, tmp_path / "eval", told)
    assert [(each.scorer, each.n) for each in scores] == [("exact_match", 8), ("exact_text", 8)]
    file = tmp_path / "eval" / "completions.jsonl"
    assert sorted(each.id for each in read_completions(file)) == list(range(8))
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    # A model that learnt nothing does not end its answers.
    assert set(row) == {"id", "prompt", "completion", "gold", "is_cut"}
    cut = (
        "8 of 8 answers had not ended after 6 tokens or at the end of the model's context, and are "
        "judged as far as they go (max_new_tokens gives more room)"
    )
    assert [each for each in told.notes if "had not ended" in each] == [cut]
    assert score_completions("exact_match", read_completions(file)) == scores
    assert {each.name for each in (tmp_path / "eval").iterdir()} == {
        "completions.jsonl",
        "evaluation.json",
        "points.json",
    }
    kept = json.loads((tmp_path / "eval" / "points.json").read_text(encoding="utf-8"))
    assert kept["scorer"] == "exact_match"
    assert set(kept["points"]) == {str(row) for row in range(8)}
    assert sum(kept["points"].values()) / 8 == scores[0].value


def test_the_template_of_the_dataset_is_used_where_the_section_has_none(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    dataset = DatasetRecipe(path="rows.jsonl", template="Say: {prompt}|{completion}")
    evaluate(tiny_model, tokenizer, as_trained(recipe, dataset), tmp_path / "a")
    first = read_completions(tmp_path / "a" / "completions.jsonl")[0]
    assert first.prompt.startswith("Say: Tom")
    own = recipe.model_copy(update={"template": "My: {prompt}|{completion}"})
    evaluate(tiny_model, tokenizer, as_trained(own, dataset), tmp_path / "b")
    assert read_completions(tmp_path / "b" / "completions.jsonl")[0].prompt.startswith("My: Tom")


def test_what_the_template_writes_behind_answers_is_not_scored(
    tiny_model, tokenizer, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate(tiny_model, tokenizer, recipe, tmp_path / "a")
    wrote = {
        each.id: each.completion for each in read_completions(tmp_path / "a/completions.jsonl")
    }
    # As of a model that ends its answers as it was trained to.
    tail = wrote[0][-2:]
    section = recipe.model_copy(
        update={"template": "Question: {prompt}\nAnswer: {completion}" + tail}
    )
    evaluate(tiny_model, tokenizer, section, tmp_path / "b")
    kept = {each.id: each.completion for each in read_completions(tmp_path / "b/completions.jsonl")}
    assert tail.strip()
    assert kept[0] == wrote[0].removesuffix(tail)
    assert kept != wrote
    # Answers of an earlier version still have it: they are not mixed with these.
    settings = json.loads((tmp_path / "b/evaluation.json").read_text())
    assert settings.pop("tail") == tail.strip()
    (tmp_path / "b/evaluation.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="made with tail None, but now it is"):
        evaluate(tiny_model, tokenizer, section, tmp_path / "b")


def test_system_prompts_that_a_template_does_not_write_are_told(
    tiny_model, tokenizer, tmp_path: Path
):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"system": "S", "prompt": "p", "completion": "c"}\n', encoding="utf-8")
    columns: Columns = {"prompt": "prompt", "completion": "completion", "system": "system"}
    task = EvaluationRecipe(task="exact_match", path=str(file), columns=columns, max_new_tokens=2)
    for number, template in enumerate((None, "{system} {prompt} {completion}", "chat")):
        told = Notes()
        section = task.model_copy(update={"template": template})
        evaluate(tiny_model, tokenizer, section, tmp_path / str(number), told)
        is_told = any("system prompts of the rows are not used" in note for note in told.notes)
        assert is_told == (template is None), template


def test_right_answers_that_no_answer_can_equal_are_told(tiny_model, tokenizer, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    for number, (answer, is_told) in enumerate((("<pad>", True), ("pad", False))):
        row = {"prompt": "p", "completion": answer}
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        told = Notes()
        task = EvaluationRecipe(task="exact_match", path=str(file), max_new_tokens=4)
        evaluate(tiny_model, tokenizer, task, tmp_path / str(number), told)
        assert any("holds the special token '<pad>'" in n for n in told.notes) == is_told, answer


def test_a_stop_that_was_not_read_as_a_line_break_is_told(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    for number, stop in enumerate((r"\n", "\n")):
        told = Notes()
        section = recipe.model_copy(update={"stop": [stop]})
        evaluate(tiny_model, tokenizer, section, tmp_path / str(number), told)
        is_told = any(note.startswith("stop holds a backslash and 'n'") for note in told.notes)
        assert is_told == (number == 0), told.notes


def test_answers_are_not_ended_at_what_right_ones_hold(tiny_model, tokenizer, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "List two.", "completion": "these:\n- one\n- two"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = EvaluationRecipe(
        task="exact_match", path=str(file), template="- {prompt}\n{completion}", max_new_tokens=9
    )
    told = Notes()
    evaluate(tiny_model, tokenizer, task, tmp_path / "a", told)
    assert json.loads((tmp_path / "a/evaluation.json").read_text())["stop"] == []
    assert [note for note in told.notes if "right answer" in note] == [
        "right answers hold '\\n-', the beginning of the template, so answers are not ended at it; "
        "stop names texts that end them",
        "1 of 1 right answers have more tokens than max_new_tokens (9; the longest 18): a model "
        "that answers as they do is cut off, and maybe wrong for that alone",
    ]
    told = Notes()
    wanted = task.model_copy(update={"stop": ["\n-"], "max_new_tokens": 18})
    evaluate(tiny_model, tokenizer, wanted, tmp_path / "b", told)
    assert json.loads((tmp_path / "b/evaluation.json").read_text())["stop"] == ["\n-"]
    assert not [note for note in told.notes if "right answer" in note]


@pytest.mark.parametrize("task", ["exact_match", "label"])
def test_a_right_answer_that_was_corrected_counts_and_no_answer_is_made_twice(
    tiny_model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any
):
    def write(*golds: str) -> str:
        rows = [{"prompt": f"Is {n} odd?", "completion": gold} for n, gold in enumerate(golds)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    section = EvaluationRecipe(task=task, path=write("no", "yes", "no"), max_new_tokens=4)
    evaluate(tiny_model, tokenizer, section, tmp_path / "eval")
    file = tmp_path / "eval" / "completions.jsonl"
    before = read_completions(file)
    write("no", before[1].completion, "never")

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("answered again")

    monkeypatch.setattr(module, "append_completion", fails)
    told = Notes()
    scores = evaluate(tiny_model, tokenizer, section, tmp_path / "eval", told)
    after = read_completions(file)
    assert [each.completion for each in after] == [each.completion for each in before]
    assert scores[0].points == {"0": 0.0, "1": 1.0, "2": 0.0}
    assert score_completions(task, after) == scores
    number = 2 if task == "exact_match" else 3  # a label's gold holds all labels
    assert any(f"another right answer than {number} answers" in note for note in told.notes)
    again = Notes()
    assert evaluate(tiny_model, tokenizer, section, tmp_path / "eval", again) == scores
    assert not any("another right answer" in note for note in again.notes)


class Killed(BaseException):
    """Stands for a kill: nothing in between handles it."""


@pytest.mark.parametrize("torn", ["", '{"id": 7, "prompt": "To'])
def test_a_killed_evaluation_goes_on_and_generates_nothing_twice(
    tiny_model, tokenizer, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
):
    whole = evaluate(tiny_model, tokenizer, recipe, tmp_path / "whole")
    folder = tmp_path / "killed"
    written: list[int | str] = []

    def append_some(path, completion):
        if len(written) == 4:
            raise Killed
        written.append(completion.id)
        append_completion(path, completion)

    monkeypatch.setattr(module, "append_completion", append_some)
    with pytest.raises(Killed):
        evaluate(tiny_model, tokenizer, recipe, folder)
    monkeypatch.undo()
    file = folder / "completions.jsonl"
    with file.open("a") as stream:
        stream.write(torn)
    prefix = file.read_bytes().removesuffix(torn.encode())

    asked: list[int] = []
    forward = tiny_model.forward

    def counting(*args, **kwargs):
        if kwargs.get("past_key_values") is None:
            asked.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    tiny_model.forward = counting
    assert evaluate(tiny_model, tokenizer, recipe, folder) == whole
    assert sum(asked) == 4
    assert file.read_bytes().startswith(prefix)
    expected = read_completions(tmp_path / "whole" / "completions.jsonl")
    assert {e.id: e for e in read_completions(file)} == {e.id: e for e in expected}
    # A third time there is nothing left to ask.
    assert evaluate(tiny_model, tokenizer, recipe, folder) == whole
    assert sum(asked) == 4


def test_a_larger_limit_adds_rows_and_a_smaller_one_scores_fewer(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    for limit, num_stored in [(3, 3), (6, 6), (2, 6)]:
        limited = recipe.model_copy(update={"limit": limit, "batch_size": limit})
        assert evaluate(tiny_model, tokenizer, limited, tmp_path)[0].n == limit
        assert len(read_completions(tmp_path / "completions.jsonl")) == num_stored


def test_another_model_does_not_continue_the_completions(
    model_factory, tokenizer, recipe, tmp_path: Path
):
    evaluate(model_factory(0), tokenizer, recipe, tmp_path)
    evaluate(model_factory(0), tokenizer, recipe, tmp_path)
    with pytest.raises(InputError, match="completions made with weights .* choose another folder"):
        evaluate(model_factory(1), tokenizer, recipe, tmp_path)


def test_other_settings_do_not_continue_the_completions(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    evaluate(tiny_model, tokenizer, recipe, tmp_path)
    longer = recipe.model_copy(update={"max_new_tokens": 7})
    with pytest.raises(InputError, match="made with max_new_tokens 6, but now it is 7"):
        evaluate(tiny_model, tokenizer, longer, tmp_path)
    other = recipe.model_copy(update={"template": "Question: {prompt} {completion}"})
    with pytest.raises(DataError, match="answers another prompt under the id"):
        evaluate(tiny_model, tokenizer, other, tmp_path)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(InputError, match="but no evaluation.json, so nobody knows"):
        evaluate(tiny_model, tokenizer, recipe, tmp_path)


@pytest.mark.slow
def test_completions_of_another_model_can_be_set_aside(
    model_factory, tokenizer, recipe, tmp_path: Path
):
    evaluate(model_factory(0), tokenizer, recipe, tmp_path)
    first = (tmp_path / "completions.jsonl").read_bytes()
    expected = evaluate(model_factory(1), tokenizer, recipe, tmp_path / "fresh")
    assert evaluate(model_factory(1), tokenizer, recipe, tmp_path, set_aside=True) == expected
    assert (tmp_path / "previous-1" / "completions.jsonl").read_bytes() == first
    evaluate(model_factory(1), tokenizer, recipe, tmp_path, set_aside=True)
    assert not (tmp_path / "previous-2").exists()


def test_going_on_says_how_many_answers_are_there(tiny_model, tokenizer, recipe, tmp_path: Path):
    told = Notes()
    changed = {"template": "Question: {prompt}\nAnswer: {completion}", "max_new_tokens": 8}
    recipe = recipe.model_copy(update=changed)
    some = recipe.model_copy(update={"limit": 3})
    evaluate(tiny_model, tokenizer, some, tmp_path, events=told)
    assert not [each for each in told.notes if "already" in each]
    evaluate(tiny_model, tokenizer, recipe, tmp_path, events=told)
    known = [note for note in told.notes if "already" in note]
    assert [note.startswith("3 of 8 answers are in") for note in known] == [True]


def test_loss_and_forgetting_are_tasks_too(tiny_model, tokenizer, recipe, tmp_path: Path):
    rows = recipe.model_copy(update={"task": "loss"})
    loss, perplexity = evaluate(tiny_model, tokenizer, rows, tmp_path)
    assert (loss.scorer, perplexity.scorer) == ("loss", "perplexity")
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    assert perplexity.stderr == pytest.approx(perplexity.value * loss.stderr)
    text = tmp_path / "text.txt"
    text.write_text("A plain text. " * 20, encoding="utf-8")
    plain = EvaluationRecipe(task="loss", path=str(text), window=64)
    assert evaluate(tiny_model, tokenizer, plain, tmp_path)[0].n == 280 - 5
    few = plain.model_copy(update={"limit": 2})
    assert evaluate(tiny_model, tokenizer, few, tmp_path)[0].n == 126
    forgetting = EvaluationRecipe(task="forgetting", path=str(text))
    with pytest.raises(InputError, match="no adapter, so there is nothing"):
        evaluate(tiny_model, tokenizer, forgetting, tmp_path)


@pytest.mark.parametrize("task", ["gsm8k", "loss", "forgetting"])
def test_missing_files_are_found_before_the_work(task, tmp_path: Path):
    recipe = EvaluationRecipe(task=task, path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        module.check_tasks([recipe], None)


def test_the_conditions_name_all_that_changes_a_score():
    greedy = EvaluationRecipe(task="gsm8k", limit=5)
    assert module.conditions(greedy) == (
        "openai/gsm8k (test), the first 5, template 'Question: {prompt}\\nAnswer: {completion}', "
        "0 worked examples, greedy, at most 256 new tokens"
    )
    assert module.conditions(greedy, 5) == module.conditions(greedy)
    # A file that has fewer rows than the limit is asked in full.
    assert module.conditions(greedy, 3).startswith("openai/gsm8k (test), all 3, template")
    sampled = EvaluationRecipe(
        task="mbpp", prompt="lm-eval", path=["a.jsonl", "b.jsonl"], temperature=0.8, samples=5
    )
    assert module.conditions(sampled) == (
        "a.jsonl, b.jsonl, lm-eval prompt, 3 worked examples, 5 samples at temperature 0.8, seed "
        "0, at most 256 new tokens"
    )
    text = EvaluationRecipe(task="forgetting", path="t.txt", window=64)
    assert module.conditions(text) == "t.txt, 64 tokens at a time"


def test_one_step_of_one_parameter_changes_the_fingerprint(model_factory):
    model = model_factory(0)
    before = weights_fingerprint(model)
    assert weights_fingerprint(model_factory(0)) == before
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1 + 1e-4)
    assert weights_fingerprint(model) != before


def test_samples_of_a_prompt_count_as_one_question(tiny_model, tokenizer, recipe, tmp_path: Path):
    sampled = recipe.model_copy(update={"temperature": 1.0, "samples": 2, "sampling_seed": 3})
    scores = evaluate(tiny_model, tokenizer, sampled, tmp_path)
    assert scores[0].n == 8
    assert len(read_completions(tmp_path / "completions.jsonl")) == 16


def test_processes_share_the_prompts_between_them(
    tiny_model, tokenizer, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = evaluate(tiny_model, tokenizer, recipe, tmp_path / "whole")
    monkeypatch.setattr(module, "num_processes", lambda: 3)
    for rank, num_stored in [(0, 3), (1, 6), (2, 8)]:
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        scores = evaluate(tiny_model, tokenizer, recipe, tmp_path / "shared")
        assert len(read_completions(tmp_path / "shared" / "completions.jsonl")) == num_stored
    assert scores == whole


def test_code_is_refused_before_the_data_is_read(tiny_model, tokenizer, tmp_path: Path):
    recipe = EvaluationRecipe(task="mbpp", path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match="Type --allow-code-execution"):
        evaluate(tiny_model, tokenizer, recipe, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


@pytest.mark.slow
def test_scoring_again_needs_no_torch():
    code = (
        "import sys; from kpsvd_tune.evaluation.scoring import score_completions;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    package = str(Path(module.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": package}
    )


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import make_model, make_tokenizer
from kpsvd_tune.evaluation.evaluate import Scorer
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import EvaluationRecipe

class Silent(Events):
    pass

rank = int(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method="file://{folder}/meeting", rank=rank, world_size=2
)
tokenizer = make_tokenizer()
recipe = EvaluationRecipe(
    task="exact_match", path={rows!r}, max_new_tokens=6, batch_size=3,
    columns={{"prompt": "question", "completion": "answer"}},
)
scorer = Scorer(tokenizer, None, torch.device("cpu"), Silent(), None)
scores = scorer.score(make_model(tokenizer), recipe, Path({folder!r}) / "eval")
(Path({folder!r}) / f"scores-{{rank}}").write_text(repr(scores))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_give_the_same_scores(
    tiny_model, tokenizer, recipe, tmp_path: Path
):
    alone = evaluate(tiny_model, tokenizer, recipe, tmp_path / "alone")
    tests = str(Path(__file__).parents[1])
    code = TWO_PROCESSES.format(tests=tests, folder=str(tmp_path), rows=recipe.path)
    package = str(Path(module.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package}
    processes = [
        warm.Popen([sys.executable, "-c", code, str(rank)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(2):
        assert (tmp_path / f"scores-{rank}").read_text() == repr(alone)
    shared = read_completions(tmp_path / "eval" / "completions.jsonl")
    expected = read_completions(tmp_path / "alone" / "completions.jsonl")
    assert {each.id: each for each in shared} == {each.id: each for each in expected}
