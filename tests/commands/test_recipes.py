"""The commands `recipes list`, `show` and `copy`, of whole recipes, parts and what they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpsvd_tune.commands import main as cli
from kpsvd_tune.recipe import load_recipe
from kpsvd_tune.recipe.heads import combinations

JOINED = "models/qwen3-0.6b+tasks/maths+machines/several-gpus"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `recipes` in an empty folder, and give the code, the output and the errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(["recipes", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_list_shows_recipes_and_parts_with_their_purposes(say: Any) -> None:
    _, out, _ = say("list")
    lines = out.splitlines()
    assert lines[0].startswith("gsm8k_llama2")
    assert "machines/gpu-24gb" in out[out.index("Parts, of which a recipe is made") :]
    assert "kpsvd-tune recipes list --machine" in lines[-1]


def test_list_filters_combinations(say: Any) -> None:
    code, out, _ = say(
        *("list", "--task", "chat", "--machine", "machines/gpu-24gb", "--size", "1.5B", "--json")
    )
    assert code == 0
    found = json.loads(out)["combinations"]
    assert found
    assert {(each["task"], each["machine"]) for each in found} == {("chat", "gpu-24gb")}
    assert all(each["parameters"] <= 1.5e9 for each in found)
    assert {"smollm2-135m", "llama-3.2-1b"} <= {each["model"] for each in found}
    code, out, _ = say("list", "--memory", "8GB", "--model", "llama-3.1-8b", "--json")
    assert json.loads(out)["combinations"] == []
    _, out, _ = say("list", "--memory", "500M", "--model", "llama-3.1-8b")
    assert out == "no combination of shipped parts is like that; leave a filter out\n"


def test_list_shows_a_table_with_memory_and_how_to_go_on(say: Any) -> None:
    _, out, _ = say("list", "--model", "qwen3-0.6b", "--machine", "several-gpus", "--task", "code")
    assert out.splitlines()[0].split() == [
        *("model", "task", "machine", "parameters", "trained", "memory", "options")
    ]
    assert "--allow-code-execution --gpus 4" in out
    assert "0.60B" in out
    assert "kpsvd-tune recipes copy models/MODEL" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--task", "chta"), "--task: got 'chta'; expected one of chat, classification"),
        (("--machine", "gpu-25gb"), "did you mean gpu-24gb?"),
        (("--size", "big"), "--size: got 'big'; expected a number above 0 with its unit: 2B"),
        (("--memory", "0GB"), "--memory: got '0GB'; expected a number above 0"),
    ],
)
def test_list_refuses_filters_that_are_none(say: Any, words: Any, expected: str) -> None:
    code, _, err = say("list", *words)
    assert code == 2
    assert expected in err


def test_show_prints_a_part_and_what_parts_give_together(say: Any) -> None:
    _, out, _ = say("show", "tasks/maths")
    assert out.startswith("# Purpose: word problems")
    _, out, _ = say("show", JOINED)
    shown = yaml.safe_load(out)
    assert "extends" not in shown
    assert shown["output_dir"] == "runs/qwen3-0.6b-maths"
    # The comments of the parts, and the meaning of a key where a part has none.
    assert "max_length: 512                 # tokens; hardly any row is longer" in out
    assert "scheduler: cosine               # learning-rate schedule of transformers" in out
    code, _, err = say("show", "tasks/chta")
    assert code == 2
    assert "no shipped recipe 'tasks/chta'" in err
    assert "did you mean tasks/chat?" in err


def test_copy_writes_a_file_that_extends_or_a_whole_one(say: Any, tmp_path: Path) -> None:
    code, out, _ = say("copy", JOINED)
    assert (code, out) == (0, "qwen3-0.6b-maths.yaml\n")
    text = (tmp_path / "qwen3-0.6b-maths.yaml").read_text("utf-8")
    assert "extends:\n  - models/qwen3-0.6b\n  - tasks/maths\n  - machines/several-gpus\n" in text
    assert "# Command: kpsvd-tune train qwen3-0.6b-maths.yaml --gpus 4" in text
    assert "# Memory:  " in text
    assert (tmp_path / "recipe.schema.json").is_file()
    assert say("copy", JOINED)[0] == 2
    assert say("copy", JOINED, "whole.yaml", "--resolved")[0] == 0
    whole = load_recipe("whole.yaml")
    assert whole.extends == []
    # But for the folder they are the same recipe, and that of the parts themselves.
    same = ["output_dir=runs/x"]
    dumped = load_recipe("whole.yaml", same).model_dump()
    assert dumped == load_recipe("qwen3-0.6b-maths.yaml", same).model_dump()
    assert dumped == load_recipe(JOINED, same).model_dump()


def test_copy_takes_own_parts_along_by_their_path(say: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "team.yaml").write_text("train:\n  seed: 4\n")
    parts = "models/gemma-3-1b+tasks/chat+team.yaml"
    assert say("copy", parts, "mine/x.yaml")[0] == 0
    text = (tmp_path / "mine" / "x.yaml").read_text("utf-8")
    assert "  - ../team.yaml\n" in text
    assert "  path: rows.jsonl                # your rows" in text
    assert load_recipe("mine/x.yaml").train.seed == 4
    assert say("copy", parts, "whole.yaml", "--resolved")[0] == 0
    assert load_recipe("whole.yaml").train.seed == 4
    assert say("copy", "tasks/chat", "own.yaml")[0] == 0
    assert (tmp_path / "own.yaml").read_text("utf-8").startswith("# Purpose: conversations")


@pytest.mark.parametrize("parts", ["tasks/chat+machines/gpu-24gb", "tasks/chat+no"])
@pytest.mark.parametrize("more", [(), ("--resolved",)])
def test_copy_refuses_what_is_no_whole_recipe(say: Any, parts: str, more: Any) -> None:
    code, _, err = say("copy", parts, "x.yaml", *more)
    assert code == 2
    assert f"{parts}:1: " in err
    assert not Path("x.yaml").exists()


def test_a_single_part_cannot_be_resolved(say: Any) -> None:
    code, _, err = say("copy", "tasks/chat", "x.yaml", "--resolved")
    assert code == 2
    assert "is a part of a recipe" in err


@pytest.mark.slow
def test_every_part_is_copied_whole_and_resolved_in_some_combination(say: Any) -> None:
    seen: set[str] = set()
    for each in combinations():
        if seen >= set(each.name.split("+")):
            continue
        seen |= set(each.name.split("+"))
        code, out, err = say("show", each.name)
        assert code == 0, err
        Path("again.yaml").write_text(out)
        same = ["output_dir=runs/x"]
        again = load_recipe("again.yaml", same)
        assert again.model_dump() == load_recipe(each.name, same).model_dump()


def test_a_whole_recipe_is_resolved_with_its_own_comments(say: Any) -> None:
    assert say("copy", "smollm2_gsm8k", "x.yaml", "--resolved")[0] == 0
    assert load_recipe("x.yaml") == load_recipe("smollm2_gsm8k")
    assert "max_steps: 40                   # 160 rows" in Path("x.yaml").read_text("utf-8")


def test_a_part_of_an_odd_name_is_resolved_without_its_comments(say: Any, tmp_path: Path) -> None:
    (tmp_path / "te\tam.yaml").write_text("train:\n  seed: 4  # ours\n")
    parts = "models/gemma-3-1b+tasks/chat+te\tam.yaml"
    assert say("copy", parts, "x.yaml", "--resolved")[0] == 0
    assert load_recipe("x.yaml").train.seed == 4


def test_without_the_table_nothing_is_offered(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpsvd_tune.recipe.heads.shipped_folder", lambda: tmp_path)
    _, out, _ = say("list", "--task", "chat", "--json")
    assert json.loads(out) == {"combinations": []}
