"""Scores for rows of one's own: labels, JSON and texts, against answers worked out by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation import json_answer, text_answer
from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.evaluation.doubt import doubt
from kpsvd_tune.evaluation.evaluate import check_tasks
from kpsvd_tune.evaluation.json_answer import parse_answer, same, shared_fields
from kpsvd_tune.evaluation.label_answer import labels_of, read_label
from kpsvd_tune.evaluation.questions import read_questions
from kpsvd_tune.evaluation.room import room, with_room
from kpsvd_tune.evaluation.scoring import missing_scorers, score_completions
from kpsvd_tune.recipe import EvaluationRecipe, load_recipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import as_mapping, score_text
from kpsvd_tune.report.run_files import gold_text


def scores_of(task: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Score]:
    completions = [Completion(i, "", text, gold) for i, (text, gold) in enumerate(pairs)]
    return {each.scorer: each for each in score_completions(task, completions)}


# Answers that do not suit their task


LONG = "It has {} legs, a seat that can be washed, and a back as straight as can be."


@pytest.mark.parametrize(
    ("task", "answers", "is_sample", "told"),
    [
        ("label", [f"a text of its own, number {n}" for n in range(20)], False, "20 different"),
        ("label", [f"a text of its own, number {n}" for n in range(20)], True, "20 different"),
        ("label", [f"P{n}" for n in range(200)], False, "200 different answers in 200 rows"),
        # 20 rows that were drawn of many may well have a label each.
        ("label", [f"P{n}" for n in range(20)], True, None),
        ("label", ["spam", "ham"] * 10, False, None),
        ("label", ["spam", "ham"], False, None),
        ("exact_match", [LONG.format("four")] * 10, True, "texts of more than 12 words"),
        ("exact_match", ["Paris"] * 10, True, None),
        ("text", [LONG.format("four")] * 10, True, None),
    ],
)
def test_answers_that_do_not_suit_a_task_are_doubted(
    task: str, answers: list[str], is_sample: bool, told: str | None
) -> None:
    found = doubt(task, answers, is_sample=is_sample)
    assert (found is None) == (told is None), found
    assert told is None or told in str(found)


SYSTEMS = ["Windows 10", "macOS 14", "Ubuntu 10", "Debian 12", "Fedora 40"]
SOLUTION = "Each of the {} eggs is sold for {} dollars a piece, so she earns {} dollars every day."


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (SYSTEMS, "the right answers 'Windows 10' and 'Ubuntu 10' have the same last number"),
        (["12 Baker Street", "12 Oxford Street"], "'12 Baker Street' and '12 Oxford Street'"),
        (["12 Baker Street, London, United Kingdom", "12 Hill Road, Leeds, United Kingdom"], "and"),
        (["A5", "A6", "B5"], "'A5' and 'B5'"),
        # Numbers that come earlier count like words.
        (["2024-01-05", "2024-02-05"], "'2024-01-05' and '2024-02-05'"),
        (["9:30", "10:30"], "'9:30' and '10:30'"),
        (["7 a.m.", "7 p.m."], "'7 a.m.' and '7 p.m.'"),
        (["The 4 seats can be washed", "All 4 doors are locked"], "count for the other"),
        (["1,5", "2,7", "3,2"], "of the right answer '1,5' only the last number is compared"),
        (["7", "10 000", "9"], "of the right answer '10 000' only the last number is compared"),
        # Long texts with a number somewhere.
        ([LONG.format(n) for n in range(6)], "do not end in one, such as 'It has 0 legs, a"),
        # Nothing but the number differs, or what one alone has.
        (["5 apples", "7 apples"], None),
        (["5 apples", "5 pears"], None),
        (["5", "$5", "5.0", "5 %", "5 €", "5 kg", "The answer is 5.", "the 5"], None),
        (["1,200", "1200.00", "$1200", "-3", "3/4"], None),
        (["Windows 10", "macOS 14", "windows 10."], None),
        # Worked solutions end in their number.
        ([SOLUTION.format(n, 12 // n, 12) for n in (2, 3, 4)], None),
        ([f"2 + {n} = {n + 2}, and {8 - n} more are 10 #### 10" for n in range(5)], None),
        (["She has 2 + 3 = 5", "They buy 1 + 4 = 5"], None),
        (["So 5 of them were left", "In the end she pays 5"], None),
        ([f"{SOLUTION.format(n, n, n * n)} That is all there is. #### 4" for n in (1, 2)], None),
    ],
)
def test_right_answers_whose_last_number_does_not_tell_them_apart(
    answers: list[str], told: str | None
) -> None:
    found = doubt("exact_match", answers * 5, is_sample=True)
    assert (found is None) == (told is None), found
    assert found is None or told is None or told in found.reason


def test_rows_that_look_wrong_are_told_before_the_work_and_stop_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "chairs", "completion": LONG.format(n)} for n in range(9)]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    task = EvaluationRecipe(task="label", path=str(file))
    told = check_tasks([task, task.model_copy(update={"task": "text"})], None)
    assert len(told) == 1, told
    assert "evaluation of label: there are 9 different answers in 9 rows" in told[0]
    assert "are the columns right (columns={...})? If so: " in told[0]
    assert told[0].endswith("If so: the task text scores texts")
    # Who names the labels knows them.
    named = task.model_copy(update={"labels": [LONG.format(n) for n in range(9)]})
    assert check_tasks([named], None) == []
    rows = [{"prompt": "which?", "completion": each} for each in SYSTEMS]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    (said,) = check_tasks([task.model_copy(update={"task": "exact_match"})], None)
    assert "'Windows 10' and 'Ubuntu 10' have the same last number, which alone is compared" in said
    assert "If so: compare by exact_text, which is shown beside it; or the task label" in said


# Labels


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("spam", "spam"),
        (" Spam.\n", "spam"),
        ("not spam", "not spam"),
        ("The message is not spam, I think.", "not spam"),
        ("spam\nQuestion: is the next one not spam?", "spam"),
        ("Well:\nspam", "spam"),
        ("spam or not spam", None),
        ("spammer", None),
        ("", None),
    ],
)
def test_the_label_that_an_answer_gives(answer: str, label: str | None) -> None:
    assert read_label(answer, ["spam", "not spam"]) == label


def test_json_that_gives_a_key_twice_cannot_be_read(tmp_path: Path) -> None:
    twice = '{"a": 1, "a": 2}'
    assert parse_answer(twice) == (False, None)
    assert parse_answer(f"```json\n[{twice}]\n```") == (False, None)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "p", "completion": twice}) + "\n")
    with pytest.raises(DataError, match="is no JSON, or gives a key twice, so that every answer"):
        read_questions(EvaluationRecipe(task="json", path=str(file)))


def test_letters_with_marks_are_the_same_in_both_spellings() -> None:
    one, other = "caf\u00e9", "cafe\u0301"
    assert scores_of("exact_match", [(one, other)])["exact_text"].value == 1
    assert read_label(one, [other, "bar"]) == other
    assert read_label(f"a {other}", [one, "bar"]) == one
    assert same({one: [other]}, {other: [one]})
    assert shared_fields({one: [other], "b": 1}, {other: [one], "b": 2}) == 0.5
    if text_answer.missing() is None:
        assert text_answer.chrf(one, other) == text_answer.rouge_l(one, other) == 1


def test_labels_that_differ_in_case_alone_must_be_met_exactly() -> None:
    assert read_label("a", ["A", "a"]) == "a"
    assert read_label("It is a", ["A", "a"]) is None


@pytest.mark.parametrize(
    ("answer", "labels", "label"),
    [
        ("4.7", "12345", None),
        ("about 4,7", "12345", None),
        ("-1", "01", None),
        ("It is -1.", "01", None),
        ("4.", "12345", "4"),
        ("(4), that is 4, I think", "12345", "4"),
        ("-1", ["-1", "0", "1"], "-1"),
        ("I say -1", ["-1", "0", "1"], "-1"),
        ("1.0", ["0.5", "1.0"], "1.0"),
        ("it is 1.0.", ["0.5", "1.0"], "1.0"),
        ("non-toxic", ["toxic", "benign"], None),
        ("toxic-looking", ["toxic", "benign"], None),
        ("toxic - I think", ["toxic", "benign"], "toxic"),
        ("not entailment", ["entailment", "not_entailment"], "not_entailment"),
        ("It is Not-Entailment.", ["entailment", "not_entailment"], "not_entailment"),
        ("entailment", ["entailment", "not_entailment"], "entailment"),
        ("a_b", ["a_b", "a b"], "a_b"),
        ("it is a_b", ["a_b", "a b"], None),
    ],
)
def test_a_label_is_no_part_of_a_number_or_a_compound(
    answer: str, labels: Sequence[str], label: str | None
) -> None:
    assert read_label(answer, list(labels)) == label


def test_accuracy_macro_f1_and_the_confusion_table() -> None:
    given = ["yes", "yes", "no", "maybe", "no", "what?"]
    right = ["yes", "yes", "yes", "no", "no", "maybe"]
    labels = ["maybe", "no", "yes"]
    pairs = [
        (answer, {"label": gold, "labels": labels})
        for answer, gold in zip(given, right, strict=True)
    ]
    scores = scores_of("label", pairs)
    assert list(scores) == ["accuracy", "macro_f1"]
    accuracy = scores["accuracy"]
    assert (accuracy.value, accuracy.n, accuracy.unextractable) == (0.5, 6, 1)
    assert accuracy.stderr == pytest.approx(math.sqrt(0.25 / 6))
    assert accuracy.confusion == {
        "maybe": {"(none)": 1},
        "no": {"maybe": 1, "no": 1},
        "yes": {"no": 1, "yes": 2},
    }
    # yes: 2 hits of 3 right and 2 given; no: 1 of 2 and 2; maybe: 0 of 1 and 1.
    assert scores["macro_f1"].value == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert 0.05 < scores["macro_f1"].stderr < 0.3
    assert scores["macro_f1"].confusion is None
    found = as_mapping(list(scores.values()))
    assert found["accuracy"]["confusion"]["yes"] == {"no": 1, "yes": 2}
    assert "confusion" not in found["macro_f1"]
    assert found["macro_f1"]["num_labels"] == 3
    assert "num_labels" not in found["accuracy"]
    told = score_text("macro_f1", found["macro_f1"])
    assert told.startswith("43.3 %, mean over 3 labels, 6 questions (95 % interval ")
    # Runs of older versions do not know how many.
    del found["macro_f1"]["num_labels"]
    told = score_text("macro_f1", found["macro_f1"])
    assert told.startswith("43.3 %, mean over the labels, 6 questions (")
    low, high = found["macro_f1"]["interval"]
    assert 0 <= low < found["macro_f1"]["value"] < high <= 1


def test_macro_f1_of_answers_that_are_all_right_has_an_interval_all_the_same() -> None:
    pairs = [(each, {"label": each, "labels": ["a", "b"]}) for each in ("a", "b", "a", "b")]
    found = as_mapping(list(scores_of("label", pairs).values()))["macro_f1"]
    assert (found["value"], found["stderr"]) == (1.0, 0.0)
    assert found["interval"][0] == pytest.approx(0.51, abs=0.01)  # Wilson's


def test_labels_are_those_of_all_rows_or_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"number {n}", "completion": ["even", "odd"][n % 2]} for n in range(6)]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    task = EvaluationRecipe(task="label", path=str(file), limit=1)
    assert [each.gold for each in read_questions(task)] == [
        {"label": "even", "labels": ["even", "odd"]}
    ]
    named = task.model_copy(update={"labels": ["odd", "even", "neither"]})
    assert read_questions(named)[0].gold["labels"] == ["odd", "even", "neither"]
    short = task.model_copy(update={"labels": ["odd", "uneven"]})
    with pytest.raises(DataError, match=r"'even', which is none of .*: odd, uneven"):
        read_questions(short)


def test_answers_that_are_no_labels_are_refused() -> None:
    with pytest.raises(DataError, match="300 different right answers; expected 2 to 200 labels"):
        labels_of([str(n) for n in range(300)], None, "rows.jsonl")
    with pytest.raises(DataError, match=r"holds 1 different .* name all labels in"):
        labels_of(["yes"] * 3, None, "rows.jsonl")


# JSON


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        (" [1, 2]\n", [1, 2]),
        ('{"a": 1} and so on', None),
        ('{"a": NaN}', None),
        ("{'a': 1}", None),
        ("[" * 100_000, None),
    ],
)
def test_answers_are_json_as_a_whole(answer: str, value: Any) -> None:
    assert parse_answer(answer) == (value is not None, value)


def test_values_are_compared_as_json() -> None:
    assert same({"a": 1, "b": [2]}, {"b": [2.0], "a": 1.0})
    assert not same({"a": 1}, {"a": True})
    assert not same([1, 2], [2, 1])
    # Equal are a and the first of b; in one alone are the second of b, and c.
    assert shared_fields({"a": 1, "b": [2, 3]}, {"a": 1, "b": [2], "c": {}}) == 2 / 4
    assert shared_fields({}, {}) == 1.0


def test_scores_of_json_answers() -> None:
    right = {"json": {"city": "Ulm", "size": 3}}
    scores = scores_of(
        "json",
        [
            ('{"size": 3, "city": "Ulm"}', right),
            ('{"city": "Bonn", "size": 3}', right),
            ("Ulm", right),
        ],
    )
    assert {name: round(each.value, 6) for name, each in scores.items()} == {
        "exact": round(1 / 3, 6),
        "fields": 0.5,
        "valid": round(2 / 3, 6),
    }
    assert {each.unextractable for each in scores.values()} == {1}
    assert scores["fields"].stderr == pytest.approx(statistics.stdev([1, 0.5, 0]) / math.sqrt(3))


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    kind = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
    path.write_text(json.dumps(kind))
    return path


@pytest.fixture
def json_rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "How large?", "completion": '{"size": 3}'}) + "\n")
    return path


def test_answers_are_held_against_a_schema(schema: Path, json_rows: Path) -> None:
    task = EvaluationRecipe(task="json", path=str(json_rows), json_schema=str(schema))
    gold = read_questions(task)[0].gold
    assert gold["json"] == {"size": 3}
    pairs = [('{"size": 4}', gold), ('{"size": "4"}', gold), ("4", gold), ("no", gold)]
    scores = scores_of("json", pairs)
    assert (scores["schema"].value, scores["schema"].unextractable) == (0.25, 1)
    assert (scores["exact"].value, scores["valid"].value) == (0.0, 0.75)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ('{"type": "shape"}', "is no JSON schema: 'shape' is not valid"),
        ('{"$ref": "https://example.org/x.json"}', "refers to another schema"),
        ('{"type": "array"}', "the right answer does not follow json_schema "),
    ],
)
def test_schemas_that_cannot_be_used(schema: Path, json_rows: Path, text: str, told: str) -> None:
    schema.write_text(text)
    task = EvaluationRecipe(task="json", path=str(json_rows), json_schema=str(schema))
    with pytest.raises(InputError, match=told):
        read_questions(task)


def test_a_schema_without_the_package_says_what_to_install(
    schema: Path, json_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_answer, "find_spec", lambda _: None)
    task = EvaluationRecipe(task="json", path=str(json_rows), json_schema=str(schema))
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[json\]'"):
        read_questions(task)
    assert read_questions(task.model_copy(update={"json_schema": None}))


def test_a_right_answer_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "How large?", "completion": "three"}) + "\n")
    with pytest.raises(DataError, match="the right answer 'three' is no JSON"):
        read_questions(EvaluationRecipe(task="json", path=str(path)))


@pytest.mark.parametrize("task", ["label", "json"])
def test_golds_of_another_task_are_refused(task: str) -> None:
    with pytest.raises(DataError, match="was this file written for another task"):
        scores_of(task, [("yes", "yes")])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"task": "gsm8k", "labels": ["a", "b"]}, "only the task label uses it, and task is gsm8k"),
        ({"task": "label", "path": "x", "json_schema": "s"}, "only the task json uses it"),
        ({"task": "text"}, "text has no data of its own; give a path"),
    ],
)
def test_keys_belong_to_their_task(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EvaluationRecipe(**keys)


# Texts


def test_chrf_and_rouge_l() -> None:
    right = "the cat sat on the mat"
    scores = scores_of("text", [(right, right), ("the cat lay on a mat", right), ("", right)])
    assert list(scores) == ["chrf", "rouge_l"]
    # Of six words four are in order in both: precision and recall are 4/6.
    rouge = [1, 4 / 6, 0]
    assert scores["rouge_l"].value == pytest.approx(statistics.fmean(rouge))
    assert scores["rouge_l"].stderr == pytest.approx(statistics.stdev(rouge) / math.sqrt(3))
    assert (scores["chrf"].n, scores["chrf"].unextractable) == (3, 1)
    assert 1 / 3 < scores["chrf"].value < 2 / 3
    said = score_text("rouge_l", as_mapping(list(scores.values()))["rouge_l"])
    assert said.startswith("mean 55.6 % over 3 (95 % interval ")
    assert said.endswith("1 without an answer")


def test_rouge_l_knows_other_scripts() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    assert text_answer.rouge_l("Überall blüht Öl", "überall blüht öl") == 1.0
    assert text_answer.rouge_l("кот спит", "кот сидит") == pytest.approx(0.5)
    assert text_answer.rouge_l("我喜欢猫", "我喜欢狗") == pytest.approx(0.75)
    ascii_text = "It's 3 o'clock_now, isn't IT?"
    usual = DefaultTokenizer(use_stemmer=False).tokenize(ascii_text)
    assert text_answer.Words().tokenize(ascii_text) == usual


def test_one_answer_has_the_widest_error_that_its_value_allows() -> None:
    scores = scores_of("text", [("the cat lay on a mat", "the cat sat on the mat")])
    value = scores["rouge_l"].value
    assert scores["rouge_l"].stderr == pytest.approx(math.sqrt(value * (1 - value)))


def test_text_without_its_packages_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, json_rows: Path
) -> None:
    monkeypatch.setattr(text_answer, "find_spec", lambda _: None)
    assert missing_scorers("text") == (text_answer.INSTALL,)
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[text\]'"):
        check_tasks([EvaluationRecipe(task="text", path=str(json_rows))], None)
    with pytest.raises(InputError, match="needs the packages sacrebleu and rouge-score"):
        scores_of("text", [("a", "a")])


def test_samples_of_a_question_share_its_point() -> None:
    completions = [Completion(0, "", "a b", "a b"), Completion(0, "", "c", "a b", sample=1)]
    score = {each.scorer: each for each in score_completions("text", completions)}["rouge_l"]
    assert (score.value, score.n) == (0.5, 1)


# The whole way


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("18", "18"),
        ({"label": "yes", "labels": ["no", "yes"]}, "yes"),
        ({"json": {"size": 3}, "schema": {}}, '{"size": 3}'),
        ({"test_list": ["assert f()"]}, '{"test_list": ["assert f()"]}'),
    ],
)
def test_right_answers_are_shown_without_what_scorers_need(gold: Any, text: str) -> None:
    assert gold_text(gold) == text


@pytest.mark.slow
def test_answers_of_labels_have_room_by_the_longest_label_where_nothing_is_said(
    tiny_model_dir: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder = tmp_path / "labels.jsonl", tmp_path / "scores"
    labels = ["a very long label of many words indeed", "no"]
    lines = [{"prompt": f"row {n}", "completion": labels[n % 2]} for n in range(4)]
    rows.write_text("".join(json.dumps(each) + "\n" for each in lines))
    longest = len(tokenizer(labels[0], add_special_tokens=False)["input_ids"]) + 1
    assert room(3) == 16
    command = ["eval", str(tiny_model_dir), "--task", "label", "--path", str(rows)]
    command += ["-o", str(folder)]
    assert cli.run([*command, "--dry-run"]) == 0
    assert f"at most {room(longest)} new tokens" in " ".join(capsys.readouterr().out.split())
    assert cli.run(command) == 0
    assert f"at most {room(longest)} new tokens" in capsys.readouterr().out
    # What is typed holds, and what was begun goes on as it began.
    other = ["-o", str(tmp_path / "other")]
    assert cli.run([*command, *other, "max_new_tokens=2"]) == 0
    capsys.readouterr()
    assert cli.run([*command, *other]) == 0
    said = capsys.readouterr()
    assert "at most 2 new tokens" in said.out
    assert "4 of 4 answers are in" in said.err
    # Other tasks keep their default.
    task = EvaluationRecipe(task="exact_match", path=str(rows))
    assert with_room(task, None, tokenizer, folder).max_new_tokens == 256


@pytest.mark.slow
def test_a_run_tells_its_labels_before_and_after(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "labels.jsonl"
    lines = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"} for n in range(8)]
    rows.write_text("".join(json.dumps(each) + "\n" for each in lines))
    task = {"task": "label", "path": str(rows), "before": True, "max_new_tokens": 3}
    recipe = write_recipe(dataset={"path": str(rows)}, train={"max_steps": 2}, evaluation=[task])
    assert cli.run(["train", str(recipe)]) in (0, 4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for place in ("base_scores", "scores"):
        found = results[place]["label"]
        assert found["accuracy"]["n"] == 8
        assert sum(sum(row.values()) for row in found["accuracy"]["confusion"].values()) == 8
    capsys.readouterr()
    assert cli.run(["report", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "base model, label, accuracy: " in shown
    assert ", mean over 2 labels, 8 questions (95 % interval " in shown
    # How it was asked is said once, for all four scores.
    assert shown.count("at most 3 new tokens") == 1
    assert "right \\ given" in shown
    assert "label, the first of 8 answers:" in shown
    assert "  asked: Question: Is 0 even?\n" in shown
    assert "  expected: yes" in shown
    assert shown.count("  base model: ") == shown.count("  adapter: ") == 2
    stored = tmp_path / "run" / "evaluation" / "after" / "label" / "completions.jsonl"
    assert cli.run(["eval", "--rescore", str(stored), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["accuracy"] == results["scores"]["label"]["accuracy"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").evaluation[0].labels is None
