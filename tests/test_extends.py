"""`extends`: what a recipe is made of, in which order, and where its faults are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import load_recipe, recipe_to_yaml
from kpsvd_tune.recipe.extending import takes_null
from kpsvd_tune.recipe.reference import schema_text

WHOLE = "model: {path: some/model}\noutput_dir: runs/x\n"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file below the current folder."""
    monkeypatch.chdir(tmp_path)

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def faults(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, overrides)
    return str(refused.value).split("\n")


def test_the_later_one_wins_mappings_merge_and_lists_are_replaced(write: Write) -> None:
    write(
        "a.yaml",
        "train: {epochs: 2, batch_size: 8, optimizer_args: {eps: 1e-6}}\ntracking: [wandb]",
    )
    write(
        "b.yaml", "train: {batch_size: 2, optimizer_args: {amsgrad: true}}\ntracking: [tensorboard]"
    )
    write("x.yaml", f"extends: [a.yaml, b.yaml]\n{WHOLE}train: {{seed: 7}}")
    recipe = load_recipe("x.yaml", ["train.log_every=3"])
    train = recipe.train
    assert (train.epochs, train.batch_size, train.seed, train.log_every) == (2, 2, 7, 3)
    assert train.optimizer_args == {"eps": 1e-6, "amsgrad": True}
    assert recipe.tracking == ["tensorboard"]
    assert recipe.extends == ["a.yaml", "b.yaml"]


def test_a_single_part_needs_no_list_and_kinds_of_value_replace_each_other(write: Write) -> None:
    write("a.yaml", "adapter: {factor_shape: {n: 8, p: 2}, rank: {overrides: {q: 3}}}")
    write("x.yaml", f"extends: a.yaml\n{WHOLE}adapter: {{factor_shape: thin, rank: {{min: 2}}}}")
    recipe = load_recipe("x.yaml")
    assert recipe.adapter.factor_shape == "thin"
    assert (recipe.adapter.rank.overrides, recipe.adapter.rank.min) == ({"q": 3}, 2)


def test_own_parts_are_looked_for_beside_the_file_that_names_them(write: Write) -> None:
    write("team/parts/a.yaml", "extends: ../common.yaml\ntrain: {seed: 2}")
    write("team/common.yaml", "train: {seed: 1, epochs: 4}")
    path = write("team/x.yaml", f"extends: parts/a.yaml\n{WHOLE}")
    recipe = load_recipe(path)
    assert (recipe.train.seed, recipe.train.epochs) == (2, 4)
    assert recipe.extends == ["team/common.yaml", "team/parts/a.yaml"]


def test_a_part_that_two_others_share_counts_once_where_it_comes_first(write: Write) -> None:
    write("base.yaml", "train: {seed: 1, batch_size: 1}")
    write("a.yaml", "extends: base.yaml\ntrain: {seed: 2}")
    write("b.yaml", "extends: base.yaml\ntrain: {batch_size: 2}")
    write("x.yaml", f"extends: [a.yaml, b.yaml]\n{WHOLE}")
    recipe = load_recipe("x.yaml")
    assert (recipe.train.seed, recipe.train.batch_size) == (2, 2)
    assert recipe.extends == ["base.yaml", "a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    ("below", "above", "key", "expected"),
    [
        ("train: {max_grad_norm: 0.5}", "train: {max_grad_norm: null}", "max_grad_norm", None),
        ("train: {batch_size: 9}", "train: {batch_size: null}", "batch_size", 4),
        ("train: {batch_size: 9}", "train: null", "batch_size", 4),
        ("train: {optimizer_args: {a: 1, b: 2}}", "train: {optimizer_args: {a: null}}",
         "optimizer_args", {"a": None, "b": 2}),
    ],
)  # fmt: skip
def test_null_is_a_value_where_the_key_takes_it_and_else_takes_the_key_away(
    write: Write, below: str, above: str, key: str, expected: object
) -> None:
    write("a.yaml", below)
    write("x.yaml", f"extends: a.yaml\n{WHOLE}{above}")
    assert getattr(load_recipe("x.yaml").train, key) == expected


def test_null_takes_a_column_and_a_pattern_away(write: Write) -> None:
    write(
        "a.yaml",
        "dataset: {path: rows.jsonl, columns: {prompt: q, completion: a}}\n"
        "adapter: {rank: {overrides: {q: 3, v: 2}}}",
    )
    write(
        "x.yaml",
        f"extends: a.yaml\n{WHOLE}adapter: {{rank: {{overrides: {{q: null}}}}}}\n"
        "dataset: {columns: {prompt: null, completion: null, messages: chat}}",
    )
    recipe = load_recipe("x.yaml")
    assert recipe.dataset is not None
    assert recipe.dataset.columns == {"messages": "chat"}
    assert recipe.adapter.rank.overrides == {"v": 2}


def test_null_of_what_no_part_has_set_is_the_fault_it_always_was(write: Write) -> None:
    write("a.yaml", "train: {seed: 1}")
    write("x.yaml", f"extends: a.yaml\n{WHOLE}train: {{batch_size: null}}")
    assert faults("x.yaml") == ["x.yaml:4: train.batch_size: got null; expected a whole number"]


def test_which_keys_take_null() -> None:
    assert takes_null(("dataset",))
    assert takes_null(("train", "max_steps"))
    assert takes_null(("adapter", "rank", "budget"))
    assert takes_null(("dataset", "template_arguments", "anything"))
    assert not takes_null(("adapter",))
    assert not takes_null(("dataset", "columns", "prompt"))
    assert not takes_null(("adapter", "form"))
    assert not takes_null(("adapter", "nonsense"))


@pytest.mark.parametrize(
    ("below", "above", "key", "expected"),
    [
        ("train: {epochs: 3}", "train: {max_steps: 5}", "train.max_steps", 5),
        ("train: {max_steps: 5}", "train: {epochs: 3}", "train.epochs", 3),
        ("train: {warmup_steps: 9}", "train: {warmup_ratio: 0.1}", "train.warmup_steps", None),
        ("adapter: {factor_shape: thin}", "adapter: {form: left, factor_size: 8}",
         "adapter.factor_size", 8),
    ],
)  # fmt: skip
def test_of_two_ways_to_set_one_thing_the_later_one_counts(
    write: Write, below: str, above: str, key: str, expected: object
) -> None:
    write("a.yaml", below)
    write("x.yaml", f"extends: a.yaml\n{WHOLE}{above}")
    section, name = key.split(".")
    recipe = load_recipe("x.yaml")
    assert getattr(getattr(recipe, section), name) == expected
    Path("again.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe("again.yaml").train == recipe.train


def test_a_fault_is_told_with_the_file_and_line_it_came_from(write: Write) -> None:
    write("a.yaml", "train:\n  batch_size: 0\n  sede: 4\n")
    write("b.yaml", "# nothing wrong\nadapter: {rank: {min: 9}}\n")
    write("x.yaml", f"extends: [a.yaml, b.yaml]\n{WHOLE}adapter: {{rank: {{max: 4}}}}\nreciepe: 1")
    assert faults("x.yaml", "train.epochs=-1") == [
        "x.yaml:4: adapter.rank.max: 4 is below min, 9; lower min or raise max",
        "x.yaml:5: reciepe: unknown key; expected extends, model, dataset, adapter, train, "
        "restrain, evaluation, compare, output_dir or tracking",
        "a.yaml:2: train.batch_size: got 0; expected a number of at least 1",
        "a.yaml:3: train.sede: unknown key; did you mean seed?",
        "override train.epochs=-1: train.epochs: got -1; expected a number above 0",
    ]


def test_parts_that_cannot_be_used_are_told_where_they_are_named(
    write: Write, tmp_path: Path
) -> None:
    write("list.yaml", "- 1\n")
    write("empty.yaml", "")
    write("broken.yaml", "train:\n  seed: [1\n")
    write("rows.jsonl", "{}\n")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    names = ["absent.yaml", "tasks/chta", "list.yaml", "empty.yaml", "broken.yaml", "rows.jsonl"]
    listed = "".join(f"\n  - {name}" for name in [*names, "bytes.yaml", "5", "{a: 1}"])
    write("x.yaml", f"extends:{listed}\n{WHOLE}")
    lines = faults("x.yaml")
    assert lines[0].startswith(
        "x.yaml:2: extends[0]: absent.yaml: not found; expected a recipe file, or one of the "
        "shipped parts"
    )
    assert lines[1].startswith("x.yaml:3: extends[1]: tasks/chta: not found")
    assert lines[2].startswith("x.yaml:7: extends[5]: rows.jsonl: is no recipe")
    assert lines[3].startswith("x.yaml:8: extends[6]: bytes.yaml:1: not UTF-8 text")
    told = "expected the path of a recipe, or the name of a shipped part"
    assert lines[4:] == [
        f"x.yaml:9: extends[7]: got 5; {told}",
        f"x.yaml:10: extends[8]: got a mapping; {told}",
        "list.yaml:1: got a list; expected a mapping with some keys of a recipe",
        "empty.yaml:1: got nothing; expected a mapping with some keys of a recipe",
        next(line for line in lines if line.startswith("broken.yaml:2: not valid YAML")),
    ]


def test_circles_are_refused_with_their_way(write: Write) -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "train: {seed: 1}\nextends: [a.yaml]\n")
    write("x.yaml", f"extends: a.yaml\n{WHOLE}")
    assert faults("x.yaml") == [
        "b.yaml:2: extends[0]: a circle, which has no end: a.yaml extends b.yaml extends a.yaml; "
        "take one of them out"
    ]
    write("self.yaml", f"extends: ./self.yaml\n{WHOLE}")
    assert "self.yaml extends self.yaml" in faults("self.yaml")[0]


def test_too_many_parts_are_refused(write: Write) -> None:
    for number in range(102):
        write(f"p{number}.yaml", "train: {seed: 1}")
    listed = ", ".join(f"p{number}.yaml" for number in range(102))
    write("x.yaml", f"extends: [{listed}]\n{WHOLE}")
    assert "more than 100 parts in all" in faults("x.yaml")[0]


def test_an_empty_list_or_null_extends_nothing(write: Write) -> None:
    for value in ("[]", "null"):
        write("x.yaml", f"extends: {value}\n{WHOLE}")
        assert load_recipe("x.yaml").extends == []


@pytest.mark.parametrize("typed", ["extends=a.yaml", "extends.0=a.yaml", " extends[0]=a"])
def test_extends_is_refused_on_the_command_line(write: Write, typed: str) -> None:
    write("x.yaml", WHOLE)
    (line,) = faults("x.yaml", typed)
    assert "stands in a recipe's file and not on the command line" in line


def test_parts_joined_by_plus_are_one_recipe(write: Write) -> None:
    write("a.yaml", "model: {path: some/model}\ntrain: {seed: 1}")
    write("b.yaml", "output_dir: runs/x\ntrain: {seed: 2}")
    recipe = load_recipe("a.yaml + b.yaml", ["train.epochs=2"])
    assert (recipe.model.path, recipe.train.seed, recipe.train.epochs) == ("some/model", 2, 2)
    assert recipe.extends == ["a.yaml", "b.yaml"]
    assert faults("a.yaml+no.yaml")[0].startswith(
        "a.yaml+no.yaml:1: extends[1]: no.yaml: not found"
    )
    assert "a.yaml+: " not in faults("a.yaml+")[0]
    # A file of that very name is a recipe like any other.
    write("c+d.yaml", WHOLE)
    assert load_recipe("c+d.yaml").extends == []


def test_a_part_alone_is_no_recipe() -> None:
    (line,) = faults("tasks/chat")
    assert line.startswith("tasks/chat: is a part of a recipe; expected a whole one")


def test_validate_shows_the_resolved_recipe_and_its_parts(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.yaml", "train: {seed: 5}")
    write("x.yaml", f"extends: a.yaml\n{WHOLE}")
    assert cli.run(["validate", "x.yaml"]) == 0
    out = capsys.readouterr()
    shown = yaml.safe_load(out.out)
    assert shown["train"]["seed"] == 5
    assert "extends" not in shown
    assert "made of a.yaml and x.yaml" in out.err
    Path("again.yaml").write_text(out.out)
    same = load_recipe("again.yaml")
    assert same.model_dump() == load_recipe("x.yaml").model_dump()


def test_editors_take_a_file_that_leaves_to_its_parts_what_they_give() -> None:
    validator = Draft202012Validator(json.loads(schema_text()))
    assert validator.is_valid({"extends": ["tasks/chat"], "dataset": {"max_length": 9}})
    assert validator.is_valid({"extends": "tasks/chat", "restrain": {"limit": 0.1}})
    assert not validator.is_valid({"dataset": {"path": "a"}})
    assert not validator.is_valid({"extends": [], "evaluation": [{"limit": 5}]})
    assert not validator.is_valid({"extends": [], "train": {"sede": 5}})


def test_a_run_keeps_the_resolved_recipe_and_goes_on_although_a_part_changed(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("train: {max_steps: 2, learning_rate: 2e-3}\n")
    recipe = write_recipe(extends=["part.yaml"])
    assert cli.run(["train", str(recipe)]) == 0
    run: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe_parts"] == [str(part)]
    assert run["identity"]["recipe"]["train"]["learning_rate"] == 2e-3
    assert "extends" not in run["identity"]["recipe"]
    kept = tmp_path / "run" / "recipe.yaml"
    assert "extends" not in yaml.safe_load(kept.read_text())
    before = load_recipe(kept)
    part.unlink()
    assert load_recipe(kept) == before
    # The resolved recipe is the same run, which is finished.
    capsys.readouterr()
    assert cli.run(["train", str(kept)]) == 0
    # A changed part is a changed recipe, and is refused by the key.
    part.write_text("train: {max_steps: 2, learning_rate: 5e-3}\n")
    assert cli.run(["train", str(recipe)]) == 1
    assert "train.learning_rate: 0.002 in the run, 0.005 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "below", "arguments", "above"),
    [
        ("scheduler", "cosine_with_min_lr", "{min_lr_rate: 0.1}", "linear"),
        ("optimizer", "adamw", "{betas: [0.9, 0.99]}", "sgd"),
    ],
)
def test_arguments_of_another_choice_are_not_kept(
    choice: str, below: str, arguments: str, above: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {path: a/b}\noutput_dir: r\n"
        f"train: {{{choice}: {below}, {choice}_args: {arguments}}}\n"
    )
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: base.yaml\ntrain: {{{choice}: {above}}}\n")
    assert getattr(load_recipe(file).train, f"{choice}_args") == {}
    file.write_text(f"extends: base.yaml\ntrain: {{{choice}: {below}}}\n")
    assert getattr(load_recipe(file).train, f"{choice}_args") != {}


def test_a_part_of_very_many_keys_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    many = "".join(f"  k{index}: 1\n" for index in range(20_000))
    file.write_text(f"extends: adapters/equal-ranks\nmodel: {{path: a/b}}\ntrain:\n{many}")
    with pytest.raises(RecipeError, match=r"mine.yaml:4: train.k0: unknown key"):
        load_recipe(file)
