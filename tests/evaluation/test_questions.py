"""Rows of the tasks, and the prompts made of them; all texts are our own."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.data import Encoder, read_examples
from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.evaluation.evaluate import as_trained, check_tasks
from kpsvd_tune.evaluation.generation import without_tail
from kpsvd_tune.evaluation.questions import (
    Question,
    answer_tail,
    build_prompts,
    num_shots,
    read_questions,
    read_shots,
    stop_strings,
)
from kpsvd_tune.evaluation.scoring import score_completions
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe

CODE_ROWS = [
    {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"def add(x):\r\n    return x + {number}",
        "test_list": [f"assert add({i}) == {i + number}" for i in range(3)],
        "test_setup_code": "",
    }
    for number in (1, 2, 3, 4, 5, 11, 12, 510, 511, 601)
]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(task: Any, path: str, **keys) -> EvaluationRecipe:
    return EvaluationRecipe(task=task, path=path, **keys)


@pytest.fixture
def code_file(tmp_path: Path) -> str:
    return write(tmp_path / "code.jsonl", CODE_ROWS)


def test_gsm8k_rows_are_questions_and_answers(rows_file: Path):
    questions = read_questions(recipe("gsm8k", str(rows_file)))
    assert len(questions) == 8
    assert questions[0] == Question(
        0, "Tom has 1 nuts and finds 2 more. How many?", "3 nuts", "3 nuts"
    )
    assert [each.id for each in questions] == list(range(8))


@pytest.mark.parametrize("answer", ["nobody knows", "about 3 #### ", "3 #### none", ""])
def test_a_gold_answer_without_a_number_is_refused_with_its_row(tmp_path: Path, answer: str):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 1?", "answer": answer}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read_questions(recipe("gsm8k", path))


def test_limit_takes_the_first_rows(rows_file: Path):
    assert len(read_questions(recipe("gsm8k", str(rows_file), limit=3))) == 3


def test_math_and_other_columns(tmp_path: Path):
    path = write(
        tmp_path / "m.jsonl", [{"problem": "1 + 1?", "solution": "\\boxed{2}", "level": 1}]
    )
    assert read_questions(recipe("math", path))[0].gold == "\\boxed{2}"
    path = write(tmp_path / "o.jsonl", [{"id": "a7", "q": "1 + 1?", "a": "2"}])
    columns = {"prompt": "q", "completion": "a"}
    assert read_questions(recipe("exact_match", path, columns=columns)) == [
        Question("a7", "1 + 1?", "2", "2")
    ]


def test_a_missing_column_is_told_by_the_key_that_eval_takes(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"q": "1 + 1?", "a": "2"}])
    with pytest.raises(DataError) as got:
        read_questions(recipe("gsm8k", path))
    assert str(got.value).endswith("for example 'columns={prompt: q, completion: a}'")


def test_rows_that_share_an_id_are_numbered(tmp_path: Path):
    rows = [{"id": 5, "prompt": "a", "completion": "b"}] * 2
    questions = read_questions(recipe("exact_match", write(tmp_path / "r.jsonl", rows)))
    assert [each.id for each in questions] == [0, 1]


def test_a_conversation_is_asked_for_its_last_answer(tmp_path: Path):
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    (question,) = read_questions(recipe("exact_match", path))
    assert (question.prompt, question.gold) == (tuple(messages[:3]), "d")


def test_the_last_answer_is_one_that_would_be_learnt(tmp_path: Path):
    def row(*said: tuple[str, str, int]) -> dict[str, Any]:
        keys = ("role", "content", "weight")
        messages = [dict(zip(keys, each, strict=True)) for each in said]
        return {
            "messages": [m if m["role"] == "assistant" else {**m, "weight": 0} for m in messages]
        }

    begin = ("user", "a", 0), ("assistant", "b", 1), ("user", "c", 0)
    path = write(
        tmp_path / "chat.jsonl",
        [row(*begin, ("assistant", "bad", 0)), row(*begin, ("assistant", "", 1))],
    )
    found = read_questions(recipe("exact_match", path))
    assert [each.gold for each in found] == ["b", "b"]
    assert [len(each.prompt) for each in found] == [1, 1]


@pytest.mark.parametrize("text", ["", "I look it up."])
def test_a_last_answer_that_calls_a_tool_is_refused(tmp_path: Path, text: str):
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": text, "tool_calls": [call]},
    ]
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    with pytest.raises(
        DataError, match=r"chat\.jsonl, line 1: the last answer calls the tool"
    ) as got:
        read_questions(recipe("exact_match", path))
    assert "measure them with the task loss" in str(got.value)


@pytest.mark.parametrize(
    ("split", "ids"),
    [("test", [11, 12, 510]), ("prompt", [1, 2, 3, 4, 5]), ("validation", [511]), ("train", [601])],
)
def test_local_mbpp_rows_are_split_by_their_ids(code_file: str, split: str, ids: list[int]):
    assert [each.id for each in read_questions(recipe("mbpp", code_file, split=split))] == ids


def test_mbpp_gold_holds_all_a_test_needs(tmp_path: Path):
    sanitized = {
        "task_id": 20,
        "prompt": "Add one.",
        "code": "def f(x): return x + 1",
        "test_imports": ["import math"],
        "test_list": ["assert f(1) == 2"],
    }
    (question,) = read_questions(recipe("mbpp", write(tmp_path / "s.jsonl", [sanitized])))
    assert question.prompt == "Add one."
    assert question.gold == {
        "test_list": ["assert f(1) == 2"],
        "test_setup_code": "",
        "test_imports": ["import math"],
    }


def test_rows_that_are_no_code_are_refused(rows_file: Path):
    with pytest.raises(DataError, match="line 1 is no row of MBPP: got the columns question"):
        read_questions(recipe("mbpp", str(rows_file)))


def test_an_empty_split_is_refused(tmp_path: Path):
    path = write(tmp_path / "code.jsonl", CODE_ROWS[:2])
    with pytest.raises(DataError, match="holds no row of the split 'test'"):
        read_questions(recipe("mbpp", path))


@pytest.mark.parametrize("template", ["Question: {prompt}\nAnswer: {completion}", "chat"])
def test_a_prompt_is_that_of_training(tokenizer, rows_file: Path, template: str):
    questions = read_questions(recipe("gsm8k", str(rows_file)))
    task = recipe("gsm8k", str(rows_file))
    prompts, ends = build_prompts(questions, tokenizer, template, task)
    encoder = Encoder(tokenizer, template, 512)
    for prompt, question in zip(prompts, questions, strict=True):
        row = encoder.encode(Pair(str(question.prompt), question.answer), 0)
        trained = next(i for i, label in enumerate(row.labels) if label >= 0)
        assert list(prompt.input_ids) == row.input_ids[:trained].tolist()
        assert prompt.text == encoder.decode(prompt.input_ids)
    assert tokenizer.eos_token_id in ends


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": text}
                for place, text in enumerate(("1 + 1?", "2", "2 + 3?", "5"))
            ],
            "tools": [{"name": "add"}],
        },
        {"instruction": "2 + 3?", "output": "5", "history": [["1 + 1?", "2"]],
         "tools": [{"name": "add"}]},
        {"instruction": "2 + 3?", "output": "5", "tools": [{"name": "add"}]},
    ],
)  # fmt: skip
def test_tools_and_earlier_rounds_are_asked_with_as_in_training(
    tokenizer, tmp_path: Path, row: dict[str, Any]
):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    path = write(tmp_path / "rows.jsonl", [row])
    task = recipe("exact_match", path)
    ((prompt,), _) = build_prompts(read_questions(task), changed, "chat", task)
    ((_, example),) = read_examples(path)
    assert example is not None
    trained = Encoder(changed, "chat", 512).encode(example, 0)
    assert list(prompt.input_ids) == trained.input_ids[: len(prompt.input_ids)].tolist()
    assert prompt.text.startswith('[{"name": "add"}]')
    assert prompt.text.endswith("<|user|>2 + 3?</s><|assistant|>")
    assert ("1 + 1?" in prompt.text) == (len(row) > 3 or "messages" in row)


SHIPPED_ROWS: dict[str, dict[str, object]] = {
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "math": {"problem": "1 + 1?", "solution": "\\boxed{2}", "level": "1"},
    "mbpp": dict(CODE_ROWS[5]),
}


@pytest.mark.parametrize("task", ["gsm8k", "math", "mbpp"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_the_default_prompt_is_what_the_shipped_recipe_trains_on(
    tokenizer, tmp_path: Path, task: str, is_chat: bool
):
    from kpsvd_tune.recipe import load_recipe, shipped_recipes

    dataset = load_recipe(shipped_recipes()[f"{task}_llama2"]).dataset
    assert dataset is not None
    assert (dataset.template, dataset.path) == (TASKS[task].template, TASKS[task].path)
    path = write(tmp_path / "rows.jsonl", [SHIPPED_ROWS[task]])
    template = "chat" if is_chat else dataset.template
    columns = {role: str(name) for role, name in dataset.columns.items()}
    ((_, example),) = read_examples(path, columns=columns, template=template)
    assert example is not None
    row = Encoder(tokenizer, template, 512).encode(example, 0)
    trained = next(i for i, label in enumerate(row.labels) if label >= 0)
    section = recipe(task, path)
    ((prompt,), _) = build_prompts(read_questions(section), tokenizer, template, section)
    assert list(prompt.input_ids) == row.input_ids[:trained].tolist()


def test_worked_examples_stand_before_the_question(tokenizer, rows_file: Path, tmp_path: Path):
    shots_file = write(tmp_path / "shots.jsonl", [{"question": "0 + 0?", "answer": "0"}] * 5)
    task = recipe("gsm8k", str(rows_file), limit=1, shots=2, shots_path=shots_file)
    shots = read_shots(task, read_questions(task))
    text = TASKS["gsm8k"].template
    ((prompt,), _) = build_prompts(read_questions(task), tokenizer, text, task, shots)
    example = "Question: 0 + 0?\nAnswer: 0\n\n"
    assert prompt.text == (
        example * 2 + "Question: Tom has 1 nuts and finds 2 more. How many?\nAnswer:"
    )
    ((chat,), _) = build_prompts(read_questions(task), tokenizer, "chat", task, shots)
    assert chat.text.count("<|user|>0 + 0?</s><|assistant|>0</s>") == 2


def test_worked_examples_are_never_the_rows_that_are_scored(rows_file: Path):
    for keys in ({"shots": 2}, {"prompt": "lm-eval"}):
        with pytest.raises(InputError, match="must be other rows than those that are scored"):
            read_shots(recipe("gsm8k", str(rows_file), **keys), [])


@pytest.mark.parametrize("path", ["list", "other spelling", "folder"])
def test_a_worked_example_that_is_scored_is_refused_however_its_file_is_named(
    tmp_path: Path, path: str
):
    (tmp_path / "rows").mkdir()
    rows = [{"id": f"n{n}", "prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(3)]
    file = write(tmp_path / "rows" / "a.jsonl", rows)
    other = write(tmp_path / "b.jsonl", [{"prompt": "9 + 1?", "completion": "10"}])
    keys: dict[str, dict[str, Any]] = {
        "list": {"path": [file, other]},
        "other spelling": {"path": file, "shots_path": f"{tmp_path}/rows/../rows/a.jsonl"},
        "folder": {"path": file, "shots_path": str(tmp_path / "rows")},
    }
    task = EvaluationRecipe(task="exact_match", shots=2, **keys[path])
    with pytest.raises(InputError) as got:
        read_shots(task, read_questions(task))
    assert "is the row" in str(got.value)
    assert "its right answer would stand in the prompt" in str(got.value)
    # Rows that are not asked may be shown.
    fewer = EvaluationRecipe(task="exact_match", path=other, shots=2, shots_path=file)
    assert [each.id for each in read_shots(fewer, read_questions(fewer))] == ["n0", "n1"]


def test_worked_examples_stand_before_a_conversation_too(tokenizer, tmp_path: Path):
    def chat(*said: str) -> dict[str, Any]:
        roles = ["system", *["user", "assistant"] * len(said)]
        return {"messages": [{"role": r, "content": t} for r, t in zip(roles, said, strict=False)]}

    shots_file = write(tmp_path / "shots.jsonl", [chat("other", "a", "b", "c", "d")])
    path = write(tmp_path / "rows.jsonl", [chat("be brief", "e", "f", "g", "h")])
    task = recipe("exact_match", path, shots=1, shots_path=shots_file)
    shots = read_shots(task, read_questions(task))
    ((prompt,), _) = build_prompts(read_questions(task), tokenizer, "chat", task, shots)
    assert prompt.text == (
        "<|system|>be brief</s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>d</s>"
        "<|user|>e</s><|assistant|>f</s><|user|>g</s><|assistant|>"
    )


def test_too_few_worked_examples_are_refused(rows_file: Path, tmp_path: Path):
    shots_file = write(tmp_path / "shots.jsonl", [{"question": "0 + 0?", "answer": "0"}])
    task = recipe("gsm8k", str(rows_file), shots=2, shots_path=shots_file)
    with pytest.raises(DataError, match="holds 1 worked examples, but 2 are wanted: set shots to"):
        read_shots(task, [])


def test_a_harness_has_its_own_number_of_worked_examples():
    assert num_shots(EvaluationRecipe(task="gsm8k", prompt="lm-eval")) == 5
    assert num_shots(EvaluationRecipe(task="mbpp", prompt="lm-eval")) == 3
    assert num_shots(EvaluationRecipe(task="mbpp", prompt="lm-eval", shots=0)) == 0
    assert num_shots(EvaluationRecipe(task="mbpp", prompt="bigcode")) == 0


def test_the_prompts_of_other_harnesses(tokenizer, code_file: str):
    text = TASKS["mbpp"].template

    def prompt(style: str) -> str:
        task = recipe("mbpp", code_file, limit=1, prompt=style)
        shots = read_shots(task, read_questions(task))
        return build_prompts(read_questions(task), tokenizer, text, task, shots)[0][0].text

    tests = "assert add(0) == 11\nassert add(1) == 12\nassert add(2) == 13"
    assert prompt("template") == (f"Task: Write a function that adds 11.\n\n{tests}\nPython:\n")
    assert prompt("bigcode") == ('"""\nWrite a function that adds 11.\nassert add(0) == 11\n"""\n')
    parts = prompt("lm-eval").split("\n\nYou are an expert")
    assert len(parts) == 4  # three worked examples, the ids 2, 3 and 4, and the question
    for number, part in zip((2, 3, 4), parts, strict=False):
        assert part.endswith(f"\n[BEGIN]\ndef add(x):\r\n    return x + {number}\n[DONE]")
    assert parts[3].endswith(f"should pass these tests:\n\n{tests}\n[BEGIN]\n")


@pytest.mark.parametrize(
    ("keys", "template", "expected"),
    [
        ({"task": "gsm8k"}, "Question: {prompt}\nAnswer: {completion}", ("\nQuestion:",)),
        ({"task": "gsm8k"}, "{prompt}\n{completion}", ()),
        ({"task": "gsm8k"}, "chat", ()),
        ({"task": "gsm8k", "stop": ["x"]}, "Question: {prompt}{completion}", ("x",)),
        ({"task": "gsm8k", "stop": []}, "Question: {prompt}{completion}", ()),
        ({"task": "mbpp", "prompt": "lm-eval"}, "chat", ("[DONE]",)),
        ({"task": "gsm8k", "prompt": "lm-eval"}, "chat", ("Question:",)),
    ],
)
def test_stop_strings(keys: dict[str, Any], template: str, expected: tuple[str, ...]):
    assert stop_strings(EvaluationRecipe(**keys), template) == expected


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"context": "Bob is 5."}, "input: context"),
        ({"system": "Answer in French."}, "system: system"),
    ],
)
@pytest.mark.parametrize("task", ["exact_match", "loss"])
def test_rows_are_not_asked_without_a_part_of_their_question(
    tmp_path: Path, more: dict[str, str], told: str, task: Any
):
    rows = [
        {"prompt": "How old?", "completion": "5"},
        {**more, "prompt": "and?", "completion": "5"},
    ]
    section = recipe(task, write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError) as caught:
        check_tasks([section], None)
    said = str(caught.value)
    name = next(iter(more))
    assert f"rows.jsonl, line 2: the column {name!r} looks like a part of the prompt" in said, said
    assert told in said, said
    assert f"leave it out with ignore_columns=[{name}]" in said, said
    check_tasks([section.model_copy(update={"ignore_columns": [name]})], None)
    check_tasks([section.model_copy(update={"columns": {"completion": "completion"}})], None)


def test_plain_text_asks_nothing(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"text": "The sky is blue."}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the row is plain text, which asks"):
        read_questions(recipe("text", path))
    check_tasks([recipe("loss", path)], None)


def test_rows_numbered_by_numbers_and_by_texts_are_all_counted(tmp_path: Path):
    paths = [
        write(tmp_path / "a.jsonl", [{"id": "1", "prompt": "a", "completion": "x"}]),
        write(tmp_path / "b.jsonl", [{"id": 1, "prompt": "b", "completion": "y"}]),
    ]
    questions = read_questions(EvaluationRecipe(task="exact_match", path=paths))
    assert [each.id for each in questions] == [0, 1]
    # Stored answers that have such ids are two questions all the same.
    answers = [Completion(1, "", "x", "x"), Completion("1", "", "x", "y")]
    score = score_completions("exact_match", answers)[0]
    assert (score.value, score.n) == (0.5, 2)


@pytest.mark.parametrize("answer", ["5 apples", "1/2", "5 %", "+5"])
def test_a_gold_answer_of_gsm8k_is_a_number_alone(tmp_path: Path, answer: str):
    rows = [{"question": "q", "answer": f"So it is.\n#### {answer}"}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="which is no number alone, so that every answer"):
        read_questions(recipe("gsm8k", path))
    for fine in ("-5", "$1,200.", ".5", "1200.50"):
        rows = [{"question": "q", "answer": f"So it is.\n#### {fine}"}]
        assert read_questions(recipe("gsm8k", write(tmp_path / "rows.jsonl", rows)))


def test_scores_take_the_form_that_the_training_names(tmp_path: Path):
    rows = [{"instruction": "I", "output": "O", "prompt": "P", "completion": "C"}]
    section = recipe("exact_match", write(tmp_path / "rows.jsonl", rows))
    for form, asked in (("auto", "I"), ("alpaca", "I"), ("prompt-completion", "P")):
        dataset = DatasetRecipe.model_validate({"path": "rows.jsonl", "format": form})
        assert read_questions(as_trained(section, dataset))[0].prompt == asked, form


def test_what_a_template_writes_behind_answers_is_no_part_of_them():
    section = recipe("json", "rows.jsonl")
    assert answer_tail(section, "Q: {prompt}\nA: {completion}\n### End\n") == "### End"
    assert answer_tail(section, "Q: {prompt}\nA: {completion}") == ""
    assert answer_tail(section, "chat") == ""
    assert without_tail(' {"a": 1}\n### End', "### End") == ' {"a": 1}'
    assert without_tail("3.5.\n", ".") == "3.5"
    assert without_tail(" 3 ", "") == " 3 "
    assert without_tail(" 3 ### End of it", "### End") == " 3 ### End of it"


@pytest.mark.parametrize("test", ["add(1) == 2", "add(1) == 2 and True", "not add(1)", "", "True"])
def test_a_test_that_asserts_nothing_is_refused(tmp_path: Path, test: str):
    row = {**CODE_ROWS[0], "task_id": 11}
    path = write(tmp_path / "code.jsonl", [{**row, "test_list": ["assert add(1) == 2", test]}])
    with pytest.raises(DataError, match=r"code\.jsonl, line 1: the test .* asserts nothing, so"):
        read_questions(recipe("mbpp", path))
    for fine in ("check(add)", "x = add(1)\nassert x == 2", "if add(1) != 2: raise ValueError"):
        path = write(tmp_path / "code.jsonl", [{**row, "test_list": [fine]}])
        assert read_questions(recipe("mbpp", path))
