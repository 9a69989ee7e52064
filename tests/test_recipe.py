"""The recipe: every fault at once with its place and cure, safe reading, exact round trips."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from kpsvd_tune.commands import main
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.linalg import choose_shape
from kpsvd_tune.recipe import (
    DatasetRecipe,
    EvaluationRecipe,
    RankRecipe,
    Recipe,
    SourceRecipe,
    TrainRecipe,
    evaluation_section,
    files,
    load_recipe,
    recipe_to_yaml,
    shipped_recipes,
)
from kpsvd_tune.recipe.faults import LEVELS, message_of
from kpsvd_tune.recipe.reference import MODELINE, SCHEMA_NAME, reference_page, schema_text
from kpsvd_tune.recipe.split_words import unsplit

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = "model: {path: some/model}\noutput_dir: runs/x\n"
SECTIONS = """\
model:
  path: some/model
dataset:
  path: rows.jsonl
  columns: {prompt: question, completion: answer}
adapter:
  rank:
    min: 1
    max: 4
train:
  learning_rate: 1e-3
evaluation:
  - task: gsm8k
output_dir: runs/x
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a recipe as x.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str | bytes) -> str:
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / "x.yaml").write_bytes(content)
        return "x.yaml"

    return write_text


@pytest.fixture
def faults(write):
    """The lines of the error that a recipe and overrides give."""

    def lines(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as refused:
            load_recipe(write(text), overrides)
        return str(refused.value).split("\n")

    return lines


def one_fault(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


# Shipped recipes


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_opens_with_purpose_needs_command(path: Path):
    load_recipe(path)
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert opening.startswith(f"{MODELINE}\n# Purpose: ")
    assert "\n# Needs: " in opening
    assert "\n# Command: " in opening
    assert all(line.startswith("#") for line in opening.splitlines())


def test_the_recipes_of_the_papers_tasks_share_its_model_and_budget():
    names = {"gsm8k_llama2", "math_llama2", "mbpp_llama2"}
    recipes = [load_recipe(path) for path in SHIPPED if path.stem in names]
    assert len(recipes) == 3
    for recipe in recipes:
        assert recipe.model.path == "meta-llama/Llama-2-7b-hf"
        assert (recipe.model.dtype, recipe.train.precision) == ("auto", "auto")
        assert (recipe.adapter.rank.budget, recipe.adapter.rank.min) == (990_000, 1)
        # One term in each of the 2 x 32 weights named, of 11008 x 4096.
        assert recipe.adapter.target_modules == ["gate_proj", "up_proj"]
        assert recipe.adapter.factor_shape == "balanced"
        shape = choose_shape(11008, 4096, "balanced").shape
        assert 64 * (shape.m * shape.n + shape.p * shape.q) == 876_544 <= 990_000


def test_a_checkout_finds_its_recipes_and_loads_them_by_bare_name(write):
    shipped = shipped_recipes()
    assert list(shipped.values()) == SHIPPED
    assert {"quickstart", "smollm2_gsm8k"} <= set(shipped)
    assert load_recipe("quickstart") == load_recipe(shipped["quickstart"])
    assert load_recipe("quickstart.yaml", ["train.seed=5"]).train.seed == 5


def test_a_file_of_that_name_comes_before_the_shipped_recipe(write, tmp_path: Path):
    (tmp_path / "quickstart").write_text(MINIMAL)
    assert load_recipe("quickstart").output_dir == "runs/x"


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "site" / "kpsvd_tune"
    (package / "recipes" / "slurm").mkdir(parents=True)
    (package / "recipes" / "slurm" / "long.yaml").write_text(MINIMAL)
    (package / "recipes" / "note.txt").write_text("not a recipe")
    monkeypatch.setattr(files, "_PACKAGE", package)
    return package


def test_an_installed_wheel_finds_the_recipes_inside_the_package(fake_package: Path):
    assert shipped_recipes() == {"slurm/long": fake_package / "recipes" / "slurm" / "long.yaml"}
    assert load_recipe("slurm/long").model.path == "some/model"


def test_a_recipes_folder_of_another_package_is_left_alone(fake_package: Path):
    (fake_package / "recipes").rename(fake_package.parent / "recipes")
    assert shipped_recipes() == {}
    (fake_package.parent / "pyproject.toml").touch()
    assert list(shipped_recipes()) == ["slurm/long"]


# Values


def test_defaults_fill_what_the_recipe_leaves_out(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.dataset is None
    assert recipe.adapter.rank.method == "energy+elbow"
    assert (recipe.adapter.rank.energy, recipe.adapter.rank.window) == (0.5, 32)
    assert recipe.train.learning_rate == 1e-3
    assert recipe.evaluation == []


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("train.learning_rate='2.5e-4'", "train.learning_rate", 2.5e-4),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.seed=00", "train.seed", 0),
        ("train.seed=0x10", "train.seed", 16),
        ("train.precision=no", "train.precision", "no"),
        ("train.precision=fp16", "train.precision", "fp16"),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.max_grad_norm=", "train.max_grad_norm", None),
        ("train.gradient_checkpointing=yes", "train.gradient_checkpointing", True),
        ("train.early_stopping.patience=3", "train.early_stopping.patience", 3),
        ("adapter.rank.max=2", "adapter.rank.max", 2),
        ("adapter.rank.budget=0.99M", "adapter.rank.budget", 990_000),
        ("adapter.rank.budget=300k", "adapter.rank.budget", 300_000),
        ("adapter.rank.budget=1.5e6", "adapter.rank.budget", 1_500_000),
        ("adapter.rank.budget=1200", "adapter.rank.budget", 1200),
        ("adapter.rank.budget=1200.0", "adapter.rank.budget", 1200),
        ("adapter.rank.budget=null", "adapter.rank.budget", None),
        ("adapter.factor_shape=thin", "adapter.factor_shape", "thin"),
        ("adapter.factor_shape={n: 8, p: 2}", "adapter.factor_shape", {"n": 8, "p": 2}),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("adapter.target_modules=.*_proj", "adapter.target_modules", ".*_proj"),
        ("adapter.exclude_modules=lm_head", "adapter.exclude_modules", "lm_head"),
        ("adapter.rank.overrides={q_proj: 3}", "adapter.rank.overrides", {"q_proj": 3}),
        ("adapter.rank.overrides.q_proj={rank: 3}", "adapter.rank.overrides", {"q_proj": 3}),
        (
            "adapter.rank.overrides.q_proj={min: 2, energy: 9e-1}",
            "adapter.rank.overrides",
            {"q_proj": {"min": 2, "energy": 0.9}},
        ),
        ("dataset.validation=0.1", "dataset.validation", 0.1),
        ("dataset.validation=1e-2", "dataset.validation", 0.01),
        ("dataset.validation=200", "dataset.validation", 200),
        ("dataset.validation='200'", "dataset.validation", 200),
        ("dataset.validation=held/out.jsonl", "dataset.validation", "held/out.jsonl"),
        ("dataset.path=[a.jsonl, b.jsonl]", "dataset.path", ["a.jsonl", "b.jsonl"]),
        ("dataset.template=chat", "dataset.template", "chat"),
        ("model.revision=2024-01-01", "model.revision", "2024-01-01"),
        ("evaluation.0.limit=5", "evaluation.0.limit", 5),
        ("evaluation[0].limit=5", "evaluation.0.limit", 5),
        ("tracking=[tensorboard]", "tracking", ["tensorboard"]),
    ],
)
def test_an_override_sets_the_value(write, override: str, path: str, expected: object):
    value: object = load_recipe(write(SECTIONS), [override])
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else getattr(value, step)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_replace_sections_and_the_last_one_wins(write):
    overrides = [
        "adapter.rank={method: fixed, max: 9}",
        "adapter.rank.max=3",
        "adapter.factor_shape.n=8",
        "adapter.factor_shape.p=2",
        "train.seed=1",
        "train.seed=2",
        "dataset=null",
    ]
    recipe = load_recipe(write(SECTIONS), overrides)
    assert (recipe.adapter.rank.method, recipe.adapter.rank.max) == ("fixed", 3)
    assert recipe.adapter.factor_shape == {"n": 8, "p": 2}
    assert recipe.train.seed == 2
    assert recipe.dataset is None


def test_an_override_builds_a_section_that_the_file_leaves_out(write):
    recipe = load_recipe(write(MINIMAL), ["dataset.path=rows.jsonl"])
    assert recipe.dataset is not None
    assert recipe.dataset.path == "rows.jsonl"


# Faults: unknown keys


def test_three_typos_at_three_depths_give_three_lines_with_the_right_advice(faults):
    lines = faults(
        "modle:\n"
        "  path: some/model\n"
        "train:\n"
        "  learning_rat: 1e-3\n"
        "adapter:\n"
        "  rank:\n"
        "    enregy: 0.5\n"
        "output_dir: runs/x\n"
    )
    assert lines == [
        "x.yaml:1: modle: unknown key; did you mean model?",
        "x.yaml:4: train.learning_rat: unknown key; did you mean learning_rate?",
        "x.yaml:7: adapter.rank.enregy: unknown key; did you mean energy?",
    ]


def test_what_a_misspelt_section_holds_is_checked_too(faults):
    lines = faults(MINIMAL + "trian:\n  lernning_rate: 1\n  seed: x\n")
    assert lines == [
        "x.yaml:3: trian: unknown key; did you mean train?",
        "x.yaml:4: trian.lernning_rate: unknown key; did you mean learning_rate?",
        "x.yaml:5: trian.seed: got 'x'; expected a whole number",
    ]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            "init: gradient",
            "adapter.init: gradient was removed: it trained to a higher validation loss (0.8486 "
            "against 0.8041); use weight, or random to compare with; a run that began with it is "
            "finished by the version that began it",
        ),
        (
            "gradient_batches: 8",
            "adapter.gradient_batches: this key was removed (got 8): it belonged to adapter.init: "
            "gradient, which is gone; leave it out; a run that began with it is finished by the "
            "version that began it",
        ),
        (
            "rate_ratio: 2",
            "adapter.rate_ratio: this key was removed (got 2): a ratio of 4 raised the validation "
            "loss (0.8154 against 0.8041); leave it out and choose train.learning_rate, or "
            "adapter.rate: relative; a run that began with it is finished by the version that "
            "began it",
        ),
        (
            "factor_shape: auto",
            "adapter.factor_shape: auto was removed: no gain of it was ever measured; use "
            "balanced, thin, pissa or {n, p}; a run that began with it is finished by the version "
            "that began it",
        ),
    ],
)
def test_what_was_removed_is_refused_with_what_to_use(faults, write, adapter, message):
    text = f"{MINIMAL}adapter: {{{adapter}}}\n"
    assert faults(text) == [f"x.yaml:3: {message}"]
    # The adapter of a run that ended is what it is, however it was made.
    of_run = load_recipe(write(text), of_run=True)
    assert of_run.adapter == load_recipe(write(MINIMAL)).adapter


def test_a_removed_value_on_the_command_line_is_refused_by_its_words(write):
    with pytest.raises(RecipeError, match=r"adapter\.init=gradient.*: gradient was removed"):
        load_recipe(write(MINIMAL), ["adapter.init=gradient"])


@pytest.mark.parametrize(
    ("text", "lines", "key", "of_run"),
    [
        (
            "train:\n  optimizer: rmsprop\n",
            [
                "x.yaml:4: train.optimizer: rmsprop was removed: write torch.optim.RMSprop, which "
                "is the same optimiser; a run that began with the short name goes on with "
                "--allow-change train.optimizer (with train.parallel: fsdp only where it is Adam "
                "or RMSprop)"
            ],
            "train",
            "torch.optim.RMSprop",
        ),
        (
            "train:\n  optimizer: rprop\n",
            [
                "x.yaml:4: train.optimizer: rprop was removed: it follows no schedule of the "
                "learning rate; use adamw or sgd; a run that began with it is finished by the "
                "version that began it"
            ],
            "train",
            "torch.optim.Rprop",
        ),
        (
            "tracking: [mlflow, wandb, aim]\n",
            [
                f"x.yaml:3: tracking: {name} was removed: it is not among the trackers that the "
                "tests run; use tensorboard or wandb, or read metrics.jsonl in the run's folder, "
                "which holds the same numbers"
                for name in ("mlflow", "aim")
            ],
            "tracking",
            ["wandb"],
        ),
    ],
)
def test_an_optimiser_or_tracker_that_was_removed_is_refused_with_what_to_use(
    faults, write, text, lines, key, of_run
):
    assert faults(MINIMAL + text) == lines
    found = getattr(load_recipe(write(MINIMAL + text), of_run=True), key)
    assert (found.optimizer if key == "train" else found) == of_run


def test_a_recipe_that_an_earlier_version_wrote_down_is_read(write):
    """Every run has all keys in its recipe.yaml, those that are gone at their defaults."""
    earlier = "adapter: {init: weight, gradient_batches: 4, rate_ratio: 1.0, rate: factors}\n"
    assert load_recipe(write(MINIMAL + earlier)) == load_recipe(write(MINIMAL))


def test_a_section_of_another_kind_holds_nothing_that_was_removed(faults):
    lines = faults(MINIMAL + "adapter: [rate_ratio]\n")
    assert lines[0].startswith("x.yaml:3: adapter: got a list; expected a mapping")


def test_the_rank_section_is_the_rank_rule():
    """The recipe, a configuration and the mathematics share one rule, field by field."""
    from dataclasses import fields

    from kpsvd_tune.linalg.rule import ENERGY_OF, METHODS, OVERRIDE_KEYS, RankRule
    from kpsvd_tune.recipe.adapter import Method, RankOverride, RankRecipe

    rule = RankRule()
    assert {field.name: getattr(rule, field.name) for field in fields(RankRule)} == (
        RankRecipe().model_dump()
    )
    assert get_args(Method) == METHODS
    assert get_args(RankRecipe.model_fields["energy_of"].annotation) == ENERGY_OF
    assert set(RankOverride.__annotations__) == {"rank", *OVERRIDE_KEYS}


def test_a_misspelt_key_beside_the_right_one_is_one_fault(faults):
    lines = faults(MINIMAL + "train:\n  seed: 1\n  sead: x\n")
    assert lines == ["x.yaml:5: train.sead: unknown key; did you mean seed?"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {rank: 4}", "train.rank: unknown key; did you mean adapter.rank?"),
        ("train: {lr: 0.1}", "train.lr: unknown key; did you mean learning_rate?"),
        ("lr: 0.1", "lr: unknown key; did you mean train.learning_rate?"),
        ("Seed: 1", "Seed: unknown key; did you mean train.seed?"),
        ("train: {learning-rate: 0.1}", "train.learning-rate: unknown key; did you mean "
         "learning_rate?"),
        ("train: {output_dir: y}", "train.output_dir: unknown key; did you mean output_dir at the "
         "top level?"),
        ("train: {columns: {}}", "train.columns: unknown key; did you mean dataset.columns or "
         "evaluation.columns?"),
        ("train: {max_lenght: 9}", "train.max_lenght: unknown key; did you mean "
         "dataset.max_length?"),
        ("dataset: {path: a, columns: {promt: q}}", "dataset.columns.promt: unknown key; did you "
         "mean prompt?"),
        ("adapter: {factor_shape: {n: 1, p: 1, zz: 1}}", "adapter.factor_shape.zz: unknown key; "
         "expected n or p"),
        ("adapter: {rank: {overrides: {q: {mxa: 1}}}}", "adapter.rank.overrides.q.mxa: unknown "
         "key; did you mean max?"),
        ("evaluation: [{task: math, limt: 3}]", "evaluation[0].limt: unknown key; did you mean "
         "limit?"),
        ("<<: 1", "<<: unknown key; expected extends, model, dataset, adapter, "
         "train, restrain, evaluation, compare, output_dir or tracking"),
        ('"a\\nb": 1', "'a\\nb': unknown key; expected extends, model, dataset, adapter, "
         "train, restrain, evaluation, compare, output_dir or tracking"),
        ("model.revision: x", "'model.revision': unknown key; dots are for overrides; in a file "
         "nest the keys"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_advice(faults, text: str, expected: str):
    lines = faults(f"output_dir: runs/x\n{text}\nmodel: {{path: some/model}}\n")
    assert f"x.yaml:2: {expected}" in lines


def test_a_missing_key_is_named_with_its_meaning(faults):
    assert faults("train: {seed: 1}\nevaluation: [{}]\nadapter: {factor_shape: {n: 2}}\n") == [
        "x.yaml:1: model: missing; expected the base model, at least {path: ...}",
        "x.yaml:1: output_dir: missing; expected folder of the run, such as runs/my_run",
        "x.yaml:2: evaluation[0].task: missing; expected scorer and prompt",
        "x.yaml:3: adapter.factor_shape.p: missing; expected rows of the right factor; divides "
        "`out`",
    ]


# Faults: values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.factor_shape=blanced", "adapter.factor_shape: got 'blanced'; expected balanced, "
         "thin or pissa; did you mean balanced?"),
        ("adapter.factor_shape=3", "adapter.factor_shape: got 3; expected balanced, thin, pissa "
         "or a mapping such as {n: 8, p: 2}"),
        ("adapter.factor_shape={n: 0, p: 1}", "adapter.factor_shape.n: got 0; expected a number of "
         "at least 1"),
        ("adapter.rank=4", "adapter.rank: got 4; expected a mapping with the keys method, energy, "
         "energy_of, ..."),
        ("adapter.rank.method=magic", "adapter.rank.method: got 'magic'; expected energy, elbow, "
         "energy+elbow, noise_edge or fixed"),
        ("adapter.rank.energy=0", "adapter.rank.energy: got 0; expected a share above 0, "
         "up to 1, or auto"),
        ("adapter.rank.energy=1.01", "adapter.rank.energy: got 1.01; expected a share above "
         "0, up to 1, or auto"),
        ("adapter.rank.energy=true", "adapter.rank.energy: got true; expected a share above "
         "0, up to 1, or auto"),
        ("adapter.rank.energy=high", "adapter.rank.energy: got 'high'; expected a share above "
         "0, up to 1, or auto"),
        ("adapter.rank.energy=.nan", "adapter.rank.energy: got nan; expected a finite number"),
        ("adapter.rank.energy=1e999", "adapter.rank.energy: got inf; expected a finite number"),
        ("adapter.rank.energy=[]", "adapter.rank.energy: got an empty list; expected a share above "
         "0, up to 1, or auto"),
        ("adapter.rank.budget=0.99", "adapter.rank.budget: got 0.99; expected a whole number of "
         "trainable parameters of at least 1, such as 990000, 0.99M or 300k, or null for no "
         "budget"),
        ("adapter.rank.budget=true", "adapter.rank.budget: got true; expected a whole number of "
         "trainable parameters of at least 1, such as 990000, 0.99M or 300k, or null for no "
         "budget"),
        ("adapter.rank.overrides=[]", "adapter.rank.overrides: got an empty list; expected a "
         "mapping"),
        ("adapter.rank.overrides.q={}", "adapter.rank.overrides: 'q': got an empty mapping; "
         "expected rank alone, or some of method, min, max and energy"),
        ("adapter.rank.overrides.q={rank: 2, max: 3}", "adapter.rank.overrides: 'q': got rank, "
         "max; expected rank alone, or some of method, min, max and energy"),
        ("adapter.rank.overrides.q={min: 5}", "adapter.rank.overrides: 'q': max, 4, is below min, "
         "5; lower min or raise max"),
        ("adapter.rank.overrides.q=99", "adapter.rank.overrides: 'q': 99 is above window, 32: only "
         "the window's terms are computed; lower it or raise window"),
        ("adapter.rank.overrides.q(=1", "adapter.rank.overrides.q(: got 'q('; expected a regular "
         "expression: missing ), unterminated subpattern at position 1"),
        ("adapter.rank.overrides.q=x", "adapter.rank.overrides.q: got 'x'; expected a whole "
         "number"),
        ("adapter.target_modules=all_linear", "adapter.target_modules: got 'all_linear'; did you "
         "mean all-linear?"),
        ("adapter.target_modules=[]", "adapter.target_modules: got an empty list; expected at "
         "least 1 item"),
        ("adapter.target_modules=5", "adapter.target_modules: got 5; expected text; put it in "
         "quotes"),
        ("adapter.target_modules=[q, 5]", "adapter.target_modules[1]: got 5; expected text; put it "
         "in quotes"),
        ("adapter.dropout=1", "adapter.dropout: got 1; expected a number below 1"),
        ("adapter.modules_to_save=lm_head", "adapter.modules_to_save: got 'lm_head'; expected a "
         "list"),
        ("model.path=", "model.path: got null; expected text"),
        ("model.path=' '", "model.path: got ' '; expected text that is not blank"),
        ("model.path=package:smol", "model.path: got 'package:smol'; expected "
         "package:NAME/FILE.gguf"),
        ("model.dtype=bf16", "model.dtype: got 'bf16'; expected auto, float32, bfloat16 or "
         "float16; did you mean bfloat16?"),
        ("dataset.template=caht", "dataset.template: got 'caht'; expected chat, or text that holds "
         '{completion}, such as "Question: {prompt}\\nAnswer: {completion}"'),
        ("dataset.validation=true", "dataset.validation: got true; expected a share of the rows "
         "such as 0.02, a number of rows such as 200, or the path of a file"),
        ("dataset.validation=1.5", "dataset.validation: got 1.5; expected a share of the rows "
         "such as 0.02, a number of rows such as 200, or the path of a file"),
        ("dataset.validation=-1", "dataset.validation: got -1; expected a share of the rows "
         "such as 0.02, a number of rows such as 200, or the path of a file"),
        ("dataset.columns={prompt: no}", "dataset.columns.prompt: got false; expected text; put it "
         "in quotes"),
        ("dataset.path=[{path: a, weight: 0}]", "dataset.path[0].weight: got 0; expected a number "
         "above 0"),
        ("dataset.path=[{path: a, weight: 2000}]", "dataset.path[0].weight: got 2000; expected a "
         "number of at most 1000"),
        ("dataset.path=[{path: a, wieght: 2}]", "dataset.path[0].wieght: unknown key; did you mean "
         "weight?"),
        ("dataset.path=[a, {weight: 2}]", "dataset.path[1].path: missing; expected hub id, or a "
         "local .jsonl, .json, .csv or .parquet file"),
        ("dataset.path=[]", "dataset.path: got an empty list; expected at least 1 item"),
        ("dataset.min_length=600", "dataset.min_length: is 600 and max_length is 512, so no row "
         "would be left; lower min_length or raise max_length"),
        ("dataset.too_long=split", "dataset.too_long: got 'split'; expected cut or drop"),
        ("dataset.learn=first", "dataset.learn: got 'first'; expected all, last or each"),
        ("dataset.columns=x", "dataset.columns: got 'x'; expected a mapping with the keys prompt, "
         "completion, system, ..."),
        ("train.learning_rate=1e-", "train.learning_rate: got '1e-'; expected a number"),
        ("train.batch_size=1.5", "train.batch_size: got 1.5; expected a whole number"),
        ("train.batch_size=yes", "train.batch_size: got true; expected a whole number"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing: got 1; expected true or "
         "false"),
        ("train.precision=yes", "train.precision: got true; expected auto, no, bf16 or fp16"),
        ("train.seed=0x" + "f" * 20, "train.seed: is an integer of more than 64 bits"),
        ("train.seed=0x_", "train.seed: is not a number that can be read"),
        ("train=", "train: got null; expected a mapping with the keys max_steps, epochs, "
         "batch_size, ..."),
        ("evaluation=[{task: exact_match}]", "evaluation[0].path: exact_match has no data of its "
         "own; give a path"),
        ("evaluation.3.limit=1", "evaluation: is a list of 1; expected a number below that, got 3"),
        ("tracking=[tensorbord]", "tracking[0]: got 'tensorbord'; expected tensorboard or wandb; "
         "did you mean tensorboard?"),
        ("output_dir={a: 1}", "output_dir: got a mapping; expected text"),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_with_the_override(faults, override: str, expected: str):
    line = one_fault(faults(SECTIONS, override))
    assert line == f"override {override}: {expected}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.scheduler=greedy", "got 'greedy', which sets the rate by the losses it sees"),
        (
            "train.optimizer_args={betas: {a: 1}}",
            "expected a number, true or false, text, or a list",
        ),
    ],
)
def test_schedules_and_arguments_that_cannot_be(faults, override: str, message: str):
    assert message in one_fault(faults(SECTIONS, override))


def test_a_long_value_is_cut_in_the_message(faults):
    line = one_fault(faults(SECTIONS, "train.optimizer=" + "x" * 1000))
    assert line.startswith("override train.optimizer=xxxx")
    assert "...: train.optimizer: got 'xxxx" in line
    assert len(line) < 350


def test_a_value_in_the_file_is_refused_with_its_line(faults):
    text = SECTIONS.replace("learning_rate: 1e-3", "learning_rate: -1")
    assert faults(text, "train.seed=-1") == [
        "x.yaml:11: train.learning_rate: got -1; expected a number above 0",
        "override train.seed=-1: train.seed: got -1; expected a number of at least 0",
    ]


def test_limits_that_contradict_each_other_are_refused_where_the_later_one_was_set(faults):
    below = "adapter.rank.max: 4 is below min, 9; lower min or raise max"
    assert faults(SECTIONS, "adapter.rank.min=9") == [f"override adapter.rank.min=9: {below}"]
    assert faults(SECTIONS.replace("min: 1", "min: 9")) == [f"x.yaml:9: {below}"]
    above = (
        "adapter.rank.max: 16 is above window, 8: only the window's terms are computed; "
        "lower max or raise window"
    )
    assert faults(MINIMAL + "adapter:\n  rank:\n    window: 8\n") == [f"x.yaml:5: {above}"]


def test_a_size_of_the_trained_factor_needs_a_form_and_no_other_shape(faults):
    size = "adapter:\n  form: left\n  factor_size: [32, 16]\n"
    line = one_fault(faults(MINIMAL + size.replace("left", "core")))
    assert "the forms left and right train, and form is core; set factor_shape instead" in line
    line = one_fault(faults(MINIMAL + size + "  factor_shape: thin\n"))
    assert "factor_shape is 'thin', and each decides the sizes; keep one of the two" in line
    line = one_fault(faults(MINIMAL + size.replace("[32, 16]", "[32]")))
    assert "adapter.factor_size: got a list; expected at least 2 items" in line


def test_halving_a_single_row_is_refused(faults):
    line = one_fault(faults(SECTIONS, "train.on_oom=halve", "train.batch_size=1"))
    assert "train.on_oom: halve needs a batch_size of 2 or more, for one row cannot be" in line


def test_a_template_argument_has_a_name_that_templates_can_use(faults):
    line = one_fault(faults(SECTIONS, "dataset.template_arguments={'a b': 1}"))
    assert "got 'a b'; expected a name of letters, digits and underscores" in line


def test_template_arguments_may_nest(write):
    text = SECTIONS.replace("rows.jsonl", "rows.jsonl\n  template_arguments: {a: [1, {b: null}]}")
    dataset = load_recipe(write(text)).dataset
    assert dataset is not None
    assert dataset.template_arguments == {"a": (1, {"b": None})}


def test_a_fallback_that_contradicts_another_key_is_refused(faults):
    line = one_fault(faults(SECTIONS, "train.fallback=[skip_batch]", "train.on_nonfinite=retry"))
    assert "train.fallback: on_nonfinite is retry, and both decide what follows" in line
    assert "leave on_nonfinite out, and name lower_rate here" in line
    line = one_fault(faults(SECTIONS, "train.fallback=[keep_best]", "train.eval_every=0"))
    assert "train.fallback: keep_best needs validations during the run" in line
    line = one_fault(faults(SECTIONS, "train.fallback=[lower_rate, lower_rate]"))
    assert "one stands there twice; name each once" in line
    line = one_fault(faults(SECTIONS, "train.fallback=[smaller_rank]"))
    assert "smaller_rank is none of them: another rank is another adapter" in line
    line = one_fault(faults(SECTIONS, "train.fallback=[lower_rates]"))
    assert "lower_rate" in line
    line = one_fault(faults(SECTIONS, "train.fallback=[keep_best]", "dataset.validation=0"))
    assert "fallback: keep_best needs held-out rows; set dataset.validation above 0" in line


def test_early_stopping_without_validation_is_refused(faults):
    stop = "train.early_stopping={patience: 2}"
    line = one_fault(faults(SECTIONS, stop, "train.eval_every=0"))
    assert line == (
        "override train.eval_every=0: train.early_stopping: needs validations during the run; "
        "set eval_every"
    ) or line.startswith(f"override {stop}: ")
    line = one_fault(faults(SECTIONS, stop, "dataset.validation=0"))
    assert "early_stopping needs held-out rows; set dataset.validation above 0" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed", "has no '='; expected key=value, for example train.learning_rate=1e-3"),
        ("", "has no '='; expected key=value, for example train.learning_rate=1e-3"),
        ("=4", "has an empty key; expected key=value, for example train.learning_rate=1e-3"),
        ("train..seed=4", "has an empty key; expected key=value, for example "
         "train.learning_rate=1e-3"),
        ("train.seed=[1", "begins with [ and is not closed: write the ], and quotes around the "
             "whole word, which a shell splits at spaces: 'train.seed=[1 ...]'"),
        ("train.seed=]", "not valid YAML: expected the node content, but found ']'; text "
             "with colons, braces or hashes: 'train.seed=\"...\"'"),
        ("train.seed=!!python/name:os.system", "tags such as "
         "'tag:yaml.org,2002:python/name:os.system' are not allowed; write a plain value"),
        ("train.seed=" + " " * 2**20 + "1", "is longer than 1048576 characters"),
        ("train.sed=4", "train.sed: unknown key; did you mean seed?"),
        ("trian.seed=4", "trian: unknown key; did you mean train?"),
        ("train={seed: 1, seed: 2}", "train.seed: given twice, on lines 1 and 1; keep one"),
        ("train.max_steps=0100", "train.max_steps: got 0100, which YAML reads as 64 (in base 8); "
         "expected a number in base 10, such as 64, or text in quotes"),
        ("train.save_every=1:30", "train.save_every: got 1:30, which YAML reads as 90 (in base "
         "60); expected a number in base 10, such as 90, or text in quotes"),
        ("train.learning_rate=0:0.5", "train.learning_rate: got 0:0.5, which YAML reads as 0.5 "
         "(in base 60); expected a number in base 10, such as 0.5, or text in quotes"),
        ("train={seed: 0_17}", "train.seed: got 0_17, which YAML reads as 15 (in base 8); "
         "expected a number in base 10, such as 15, or text in quotes"),
    ],
)  # fmt: skip
def test_a_broken_override_is_refused(faults, override: str, expected: str):
    line = one_fault(faults(SECTIONS, override))
    assert line.startswith("override " + override[:20])
    assert line.endswith(f": {expected}")


# Faults: the file itself


def test_a_value_that_cannot_be_read_is_one_fault(faults):
    assert faults(MINIMAL + "train:\n  seed: 0x_\n  epochs: 0\n") == [
        "x.yaml:4: train.seed: is not a number that can be read",
        "x.yaml:5: train.epochs: got 0; expected a number above 0",
    ]


def test_duplicate_keys_are_refused_with_both_lines_beside_other_faults(faults):
    assert faults(MINIMAL + "train:\n  seed: 1\n  sed: 2\n  seed: 3\n") == [
        "x.yaml:5: train.sed: unknown key; did you mean seed?",
        "x.yaml:6: train.seed: given twice, on lines 4 and 6; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml: got nothing; expected a mapping with the keys model, dataset, adapter, ..."),
        ("# only a comment\n", "x.yaml: got nothing; expected a mapping with the keys model, "
         "dataset, adapter, ..."),
        ("\n- a\n- b\n", "x.yaml:2: got a list; expected a mapping with the keys model, dataset, "
         "adapter, ..."),
        ("hello", "x.yaml:1: got 'hello'; expected a mapping with the keys model, dataset, "
         "adapter, ..."),
        ("model:\n\tpath: x\n", "x.yaml:2: not valid YAML: found character '\\t' that cannot start "
         "any token; indent with spaces, not with tabs"),
        ("model: {path: x\noutput_dir: y\n", "x.yaml:1: not valid YAML: expected ',' or '}', but "
         "got ':' on line 2"),
        ("a: &x [1]\nb: *x\n", "x.yaml:2: aliases (*name) are not allowed; write the value out"),
        ("a: !!python/object/apply:os.system [echo]\n", "x.yaml:1: tags such as "
         "'tag:yaml.org,2002:python/object/apply:os.system' are not allowed; write a plain value"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: not valid YAML: but found another document"),
        ("a: " + "[" * 200, "x.yaml:1: nested more than 20 levels deep"),
        ("a: 1\nb: \x00\n", "x.yaml:2: holds the character U+0000, which YAML does not allow"),
        ('a: "\\UFFFFFFFF"\n', "x.yaml: not valid YAML: "),
        (b"a: 1\nb: \xff\xfe\n", "x.yaml:2: not UTF-8 text (invalid start byte); save the file as "
         "UTF-8"),
        (b"#" * (2**20 + 1), "x.yaml: larger than 1 MiB, the limit for a recipe"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused_in_one_line(faults, text: str | bytes, expected: str):
    assert one_fault(faults(text)).startswith(expected)


def test_keys_and_values_that_are_not_text_are_refused_with_their_lines(faults):
    text = MINIMAL + '? [a]\n: 1\ntrain:\n  "\\ud800": 1\n  optimizer: "\\udfff"\n'
    assert faults(text) == [
        "x.yaml:3: holds a key that is not plain text",
        "x.yaml:6: train: holds a key that is not plain text",
        "x.yaml:7: train.optimizer: holds half of a surrogate pair, which is no character",
    ]


def test_a_flood_of_faults_is_cut(faults):
    lines = faults("".join(f"key{number}: 1\n" for number in range(1000)))
    assert len(lines) == 101
    assert lines[-1] == "x.yaml: and 902 more faults; is this a recipe?"
    lines = faults(MINIMAL + "seed: 1\n" * 300)
    assert lines[-1] == "x.yaml: and 199 more faults; is this a recipe?"


def test_a_fault_of_a_kind_not_foreseen_keeps_its_message():
    error = {"type": "new_kind", "loc": (), "msg": "Input is odd", "input": 1}
    assert message_of(error, ()) == "Input is odd"  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_fault(write):
    assert load_recipe(write(b"\xef\xbb\xbf" + MINIMAL.encode())).output_dir == "runs/x"


def test_a_missing_file_lists_the_shipped_recipes_and_the_nearest(write):
    with pytest.raises(RecipeError) as refused:
        load_recipe("somewhere/quikstart.yaml")
    message = str(refused.value)
    assert message.startswith("somewhere/quikstart.yaml: not found; expected a recipe file, ")
    assert "or one of the shipped recipes gsm8k_llama2, " in message
    assert message.endswith("; did you mean quickstart?")


def test_a_recipe_of_nearly_this_name_beside_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mood.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"mood\.yml: not found; .*; did you mean mood\.yaml\?$"):
        load_recipe(tmp_path / "mood.yml")
    with pytest.raises(RecipeError, match=r"; did you mean quickstart\?$"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_a_folder_is_refused_and_named_relative_to_here(write, tmp_path: Path):
    (tmp_path / "zzz").mkdir()
    with pytest.raises(RecipeError, match="^zzz: is a folder; expected a recipe file; shipped"):
        load_recipe(tmp_path / "zzz")


def test_a_file_that_cannot_be_read_is_refused(write, monkeypatch: pytest.MonkeyPatch):
    def deny(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(MINIMAL)
    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(RecipeError, match="^x.yaml: cannot be read: Permission denied$"):
        load_recipe(path)


def test_a_name_that_is_no_name_is_refused():
    with pytest.raises(RecipeError, match=r"^'a\\x00b': not found"):
        load_recipe("a\0b")


# Properties


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_comes_back_equal_from_yaml(write, path: Path):
    recipe = load_recipe(path)
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "\x85",
        "\u2028",
        "\ufeff",
        "tab\t",
        " #",
        "- a",
        "no",
        "1e-3",
        "1:30",
        "=",
        "~",
        "\U0001f600",
    ],
)
def test_awkward_text_comes_back_equal_from_yaml(write, text: str):
    content = {
        "model": {"path": "m" + text, "revision": text + "x"},
        "output_dir": "x" + text + "y",
    }
    recipe = Recipe.model_validate(content)
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


# The one recipe file is written anew for every example.
FUZZ = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.text(min_size=1, max_size=20).filter(lambda t: t.strip() and "\0" not in t)
RATES = st.floats(0, 1, exclude_min=True)


def test_epochs_beside_max_steps_are_refused_where_they_would_not_count(write):
    path = write(MINIMAL + "train:\n  max_steps: 40\n  epochs: 3\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(refused.value).endswith(
        "x.yaml:5: train.epochs: is 3 and train.max_steps is 40, which alone would count; for "
        "epochs set train.max_steps=null, else leave train.epochs out"
    )
    assert load_recipe(path, ["train.max_steps=null"]).train.max_steps is None
    # What a run wrote down is read whatever stands in it.
    assert load_recipe(path, of_run=True).train.epochs == 3
    # A long recipe is tried out with a few steps, and its written form can be read.
    tried = load_recipe(path, ["train.max_steps=2"])
    assert tried.train.max_steps == 2
    assert load_recipe(write(recipe_to_yaml(tried))).train.max_steps == 2


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_typed_epochs_are_refused_beside_steps_of_the_file(write, epochs: str):
    path = write(MINIMAL + "train: {max_steps: 40}\n")
    with pytest.raises(RecipeError, match="override train.epochs=.*set train.max_steps=null"):
        load_recipe(path, [f"train.epochs={epochs}"])
    assert load_recipe(path, [f"train.epochs={epochs}", "train.max_steps="]).train.max_steps is None


def test_the_best_step_needs_validations(write):
    path = write(MINIMAL + "train: {keep: best, eval_every: 0}\n")
    with pytest.raises(RecipeError, match="best needs validations during the run"):
        load_recipe(path)
    path = write(MINIMAL + "dataset: {path: d, validation: 0}\ntrain: {keep: best}\n")
    with pytest.raises(RecipeError, match="keep: best needs held-out rows; set dataset.validation"):
        load_recipe(path)


RECIPES = st.builds(
    lambda path, revision, columns, template, validation, rate, energy, budget, overrides, shape: {
        "model": {"path": "m/" + path, "revision": revision},
        "dataset": {
            "path": [path],
            "columns": columns,
            "template": template + "{completion}",
            "validation": validation,
        },
        "adapter": {
            "factor_shape": shape,
            "rank": {"energy": energy, "budget": budget, "overrides": overrides},
        },
        "train": {"learning_rate": rate, "precision": "no"},
        "output_dir": path,
    },
    path=NAMES,
    revision=st.none() | NAMES,
    columns=st.dictionaries(st.sampled_from(["prompt", "completion", "system"]), NAMES),
    template=st.text(max_size=40),
    validation=st.floats(0, 1, exclude_max=True) | st.integers(0, 2**40) | NAMES.map("f".__add__),
    rate=RATES,
    energy=RATES,
    budget=st.none() | st.integers(1, 2**40),
    overrides=st.dictionaries(
        st.sampled_from([r"layers\.0\..*", "q_proj$", "1", "no", "x" * 200]),
        st.integers(0, 32) | st.fixed_dictionaries({"energy": RATES}),
    ),
    shape=st.sampled_from(["balanced", "pissa", {"n": 3, "p": 1}]),
)


@pytest.mark.slow
@FUZZ
@given(content=RECIPES)
def test_any_recipe_comes_back_equal_from_yaml(write, content: dict[str, object]):
    recipe = Recipe.model_validate(content)
    text = recipe_to_yaml(recipe)
    read = load_recipe(write(text))
    assert read == recipe
    assert recipe_to_yaml(read) == text


SCRAPS = st.sampled_from(
    ["\t", "{", "}", "[", "]", ":", ": ", "\n", "- ", "&a ", "*a", "!!int ", "|", ">", "'", '"',
     "%", "@", "`", "? ", "---\n", "...\n", "1:30", "0b_", "0x_", "=", "<<: ", "~", ".inf", "1e-3",
     "!", "2001-01-01", '"\\ud800"', '"\\U00110000"', "\x85", "\ufeff", "null", "yes", "{}", "[]",
     "rank: ", "  ", "[[", "(?i)", "overrides: {'[[': 1}", "9" * 5000, "0x" + "f" * 5000]
)  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(
    base=st.sampled_from([SECTIONS, (ROOT / "recipes" / "math_llama2.yaml").read_text("utf-8")]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), SCRAPS | st.text(max_size=5)), max_size=6
    ),
    override=st.text(max_size=20)
    | st.builds(
        "{}={}".format,
        st.sampled_from(["train.seed", "adapter.rank", "evaluation.0", "dataset", "a.b", "train"]),
        SCRAPS | st.text(max_size=10),
    ),
)
def test_no_mutation_of_a_recipe_escapes_as_anything_but_a_recipe_error(
    write, base: str, edits, override: str
):
    for place, length, scrap in edits:
        start = int(place * len(base))
        base = base[:start] + scrap + base[start + length :]
    for overrides in ([], [override]):
        try:
            recipe = load_recipe(write(base.encode("utf-8", "surrogatepass")), overrides)
        except RecipeError as error:
            lines = str(error).split("\n")
            assert all(line.startswith(("x.yaml", "override ")) for line in lines)
            str(error).encode()
        else:
            assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


KEYS = sorted(
    ".".join([*level, key]).replace("*", "q_proj").replace("evaluation.", "evaluation.0.", 1)
    for level, keys in LEVELS.items()
    for key in keys
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "n", "rank", "modle"]) | st.text(max_size=3), inner
        )
    ),
    max_leaves=6,
)


@pytest.mark.slow
@FUZZ
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_no_value_of_any_key_escapes_as_anything_but_a_recipe_error(write, key: str, value: object):
    path = write(SECTIONS)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    try:
        recipe = load_recipe(path, [f"{key}={text}"])
    except RecipeError:
        return
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


@pytest.mark.slow
@pytest.mark.parametrize("value", ["[]", "[1, x]", "{}", "{a: 1}", "-1", "''", "null", "[[1]]"])
def test_every_key_refuses_or_takes_every_kind_of_value(write, value: str):
    path = write(SECTIONS)
    refused = []
    for key in KEYS:
        try:
            load_recipe(path, [f"{key}={value}"])
        except RecipeError as error:
            refused.append(str(error).startswith(f"override {key}={value}: "))
    assert refused
    assert all(refused)


@pytest.mark.slow
def test_importing_the_recipe_loads_neither_torch_nor_transformers():
    code = (
        "import sys, kpsvd_tune.recipe, kpsvd_tune.errors, kpsvd_tune.report.results;"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({}, [], "task: missing; expected scorer and prompt"),
        ({"task": "loss"}, [], "--task: loss has no data of its own; give a path"),
        ({"task": "forgetting"}, ["path=[a.txt]"], "path: forgetting reads one text file"),
        ({"task": "forgetting", "path": "a"}, ["before=true"], "before: forgetting is measured"),
        ({"task": "gsm8k"}, ["prompt=bigcode"], "prompt: there is no bigcode prompt for gsm8k; "
         "expected template or lm-eval"),
        ({"task": "gsm8k", "samples": 2}, [], "--samples: at temperature 0 all samples"),
        ({"task": "gsm8k", "max_new_tokens": 0}, [], "--max-new-tokens: got 0; expected a number"),
        ({"task": "gsm8k"}, ["ignore_columns=[id]"], "ignore_columns: gsm8k reads the columns"),
        ({"task": "gsm8k"}, ["shots"], "shots: has no '='"),
        ({"task": "gsm8k"}, ["=1"], "=1: has an empty key"),
        ({"task": "gsm8k"}, ["stop=['']"], "stop[0]: "),
        ({"task": "gsm9k"}, ["shot=1"], "shot: unknown key; did you mean shots?"),
        ({"task": "gsm8k"}, ["columns={prompt:", "a,", "completion:", "b}"],
         "columns={prompt:: a shell has split this word: put quotes around it, as in "
         "'columns={prompt: a, completion: b}'"),
    ],
)  # fmt: skip
def test_faults_of_an_evaluation_are_told_in_the_words_of_the_command_line(
    options: dict[str, object], overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        evaluation_section({}, options, overrides)
    assert any(line.startswith(message) for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("where", "columns", "limit"),
    [
        ("", "columns", "limit"),
        ("evaluation.1.", "evaluation.1.columns", "evaluation.1.limit"),
        ("--", "columns", "--limit"),
        ("dataset.", "dataset.columns", "evaluation.limit"),
    ],
)
def test_a_section_knows_how_its_keys_are_written(where: str, columns: str, limit: str) -> None:
    section = evaluation_section({"task": "gsm8k"}, {}, [])
    section.stands_at(where)
    assert (section.written("columns"), section.written("limit")) == (columns, limit)


def test_an_evaluation_is_keys_then_options_then_overrides() -> None:
    keys = {"task": "gsm8k", "limit": 5, "shots": 1, "split": "train"}
    section = evaluation_section(keys, {"limit": 6, "shots": 2}, ["shots=3", "temperature=1e-1"])
    assert (section.split, section.limit, section.shots, section.temperature) == (
        "train", 6, 3, 0.1,
    )  # fmt: skip


def test_sources_keep_their_settings_in_the_yaml_that_a_run_keeps(write):
    sources = "[{path: a.jsonl, weight: 2, columns: {prompt: q}}, b.jsonl]"
    recipe = load_recipe(write(MINIMAL), [f"dataset.path={sources}"])
    assert recipe.dataset is not None
    assert isinstance(recipe.dataset.path, list)
    first, second = recipe.dataset.path
    assert isinstance(first, SourceRecipe)
    assert (first.path, first.weight, first.columns) == ("a.jsonl", 2.0, {"prompt": "q"})
    assert second == "b.jsonl"
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("rows.jsonl", "a file of rows in dataset.path"),
        ("rows.csv.gz", "a file of rows in dataset.path"),
        ("m.gguf", "a model in model.path"),
        ("model.safetensors", "the folder of a model in model.path"),
    ],
)
def test_a_file_that_goes_into_a_recipe_is_none(tmp_path, name, use):
    file = tmp_path / name
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(RecipeError, match=f"is no recipe; expected a YAML file, which names {use}"):
        load_recipe(file)


def test_every_synonym_names_a_key_that_exists():
    from kpsvd_tune.recipe.faults import _SYNONYMS, key_like

    for name, key in _SYNONYMS.items():
        place, _, last = key.rpartition(".")
        assert last in LEVELS[tuple(place.split(".")) if place else ()], name
        assert key_like(name) in (name, key)


def test_text_that_is_no_yaml_on_the_command_line_is_answered_with_its_quotes(write):
    with pytest.raises(RecipeError, match="""'dataset.template="...\\"'$"""):
        load_recipe(write(MINIMAL), ["dataset.template=Q: {question} A: {answer}"])


# The reference, for editors and for people


def test_the_committed_reference_is_that_of_the_recipe():
    schema = (ROOT / "recipes" / SCHEMA_NAME).read_text("utf-8")
    assert json.loads(schema) == json.loads(schema_text()), (
        f"stale: kpsvd-tune recipes schema --output recipes/{SCHEMA_NAME}"
    )
    page = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    assert page == reference_page(), "stale: kpsvd-tune recipes docs --output docs/recipe.md"


def test_every_key_is_on_the_page():
    page = reference_page()
    for section in (Recipe, TrainRecipe, DatasetRecipe, EvaluationRecipe, RankRecipe):
        for name, field in section.model_fields.items():
            assert f"| `{field.alias or name}` | " in page


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_editors_accept_the_shipped_recipes(path: Path):
    Draft202012Validator(json.loads(schema_text())).validate(yaml.safe_load(path.read_text()))


def test_editors_flag_a_key_that_does_not_exist_and_take_a_budget_as_it_is_written():
    validator = Draft202012Validator(json.loads(schema_text()))
    recipe = yaml.safe_load(MINIMAL)
    recipe["adapter"] = {"rank": {"budget": "0.6M", "enregy": 0.5}}
    faults = [error.message for error in validator.iter_errors(recipe)]
    assert len(faults) == 1
    assert "'enregy' was unexpected" in faults[0]


@pytest.mark.slow
def test_schema_and_page_are_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for verb, text in (("schema", schema_text()), ("docs", reference_page())):
        assert main.run(["recipes", verb]) == 0
        assert capsys.readouterr().out == text
        assert main.run(["recipes", verb, "--output", str(tmp_path / verb)]) == 0
        assert (tmp_path / verb).read_text("utf-8") == text
        assert main.run(["recipes", verb, "-o", str(tmp_path / "no" / verb)]) == 2
        assert "cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (
            ["dataset.columns={prompt:", "a,", "completion:", "b}"],
            "'dataset.columns={prompt: a, completion: b}'",
        ),
        (
            ["dataset.columns=prompt:a", "dataset.columns=completion:b"],
            "'dataset.columns={prompt: a, completion: b}'",
        ),
        (
            ["adapter.target_modules=[q_proj,", "v_proj]"],
            "'adapter.target_modules=[q_proj, v_proj]'",
        ),
    ],
)
def test_words_that_a_shell_has_split_are_one_fault_with_the_quoted_word(
    faults, write, words: list[str], quoted: str
):
    others = ["train.seed=3", *words, "train.log_every=2"]
    line = one_fault(faults(SECTIONS, *others))
    assert line == (
        f"override {words[0]}: a shell has split this word: put quotes around it, as in {quoted}"
    )
    # Which is taken as it stands.
    load_recipe(write(SECTIONS), shlex.split(quoted))


def test_a_word_with_braces_that_is_whole_is_left_alone():
    words = ["a={b: 1}", "c=[1, 2]", "d=x:y", "e='{'", 'f={g: "{"}', "h={i: [}", "j=3"]
    found = dict(unsplit(words))
    assert list(found) == words
    assert [word for word, fault in found.items() if fault] == ["h={i: [}"]
