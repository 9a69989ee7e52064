"""Paths that are wrong: each with its key and line, what lies there, and a cure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from trial_rows import row

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Comparison, read_comparison
from kpsvd_tune.runs.identity import changes
from kpsvd_tune.storage.paths import check_writable, expand, kind_of

RECIPE = """\
model:
  path: ./modle
dataset:
  path:
    - owner/name
    - rows/trian.jsonl
    - {path: rows/gone.parquet, weight: 2}
    - "rows/*.csv"
  validation: rows/held.jsonl
adapter:
  rank: {max: 4}
  from: runs/gone
evaluation:
  - {task: gsm8k}
  - {task: exact_match, path: rows/test.jsonl, shots_path: rows/shots.jsonl}
  - {task: forgetting, path: letters}
compare:
  test: /nowhere/test.csv
  forgetting: letters
output_dir: run
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one of each kind of thing in it."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "rows/train.jsonl",
        "model/config.json",
        "merged/config.json",
        "merged/merge_report.json",
        "adapter/adapter_config.json",
        "run/run.json",
        "done/run.json",
        "done/adapter/adapter_config.json",
        "compared/compare.json",
        "empty/x",
        "tiny.gguf",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}", encoding="utf-8")
    os.mkfifo("pipe.jsonl")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(list(arguments)) == 2
    return capsys.readouterr().err


def test_every_missing_path_is_told_at_once_with_its_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    looked = f"(looked from {here})"
    assert refused(capsys, "validate", "r.yaml").splitlines() == [
        f"error: r.yaml:2: model.path: there is no folder or file ./modle {looked}; did you mean "
        "model?",
        f"r.yaml:6: dataset.path[1]: there is no file rows/trian.jsonl {looked}; did you mean "
        "rows/train.jsonl?",
        f"r.yaml:7: dataset.path[2].path: there is no file rows/gone.parquet {looked}",
        f"r.yaml:8: dataset.path[3]: no file matches rows/*.csv {looked}",
        f"r.yaml:9: dataset.validation: there is no file rows/held.jsonl {looked}",
        # Before what would be wrong with it if it were there.
        f"r.yaml:12: adapter.from: there is no folder runs/gone {looked}; there is no folder runs "
        "either",
        "r.yaml:12: adapter.from: the adapter there has its rank; take that key out of this "
        "section",
        f"r.yaml:15: evaluation[1].path: there is no file rows/test.jsonl {looked}",
        f"r.yaml:15: evaluation[1].shots_path: there is no file rows/shots.jsonl {looked}",
        f"r.yaml:16: evaluation[2].path: there is no file letters {looked}",
        "r.yaml:18: compare.test: there is no file /nowhere/test.csv; there is no folder /nowhere "
        "either",
        f"r.yaml:19: compare.forgetting: there is no file letters {looked}",
    ]


def test_a_command_looks_at_the_paths_that_it_uses(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(RECIPE.replace("  from: runs/gone\n", ""), encoding="utf-8")
    shown = refused(capsys, "train", "r.yaml")
    assert "evaluation[1].path" in shown
    assert "compare." not in shown
    assert "dataset.path" not in refused(capsys, "init-only", "r.yaml")
    assert "compare.test" in refused(capsys, "compare", "r.yaml")
    shown = refused(capsys, "eval", "done", "--task", "exact_match", "--path", "rows/test.jsonl")
    assert "--path: there is no file rows/test.jsonl" in shown


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.path=run", "run is the folder of a run, not a model; to train on from its adapter"),
        ("model.path=adapter", "merge it first: kpsvd-tune merge adapter --output FOLDER"),
        ("model.path=compared", "compared is the folder of a comparison; expected a folder with"),
        ("model.path=rows/train.jsonl", "is a file of rows; expected a folder with config.json"),
        ("model.path=model/config.json", "is a file of a model; name its folder, model"),
        ("model.path=pipe.jsonl", "is a named pipe, socket or device"),
        ("model.path=empty", "empty is a folder; expected a folder with config.json"),
        ("model.path='~nobody-here/m'", "there is no folder or file ~nobody-here/m"),
        ("dataset.path=run", "run is the folder of a run; expected rows"),
        ("dataset.path=pipe.jsonl", "pipe.jsonl is a named pipe, socket or device; expected rows"),
        ("dataset.path=rows/train.jsonl/x.csv", "rows/train.jsonl is a file"),
        ("dataset.path='~nobody-here/a.csv'", "there is no file ~nobody-here/a.csv"),
        (f"dataset.path={'x' * 300}.csv", "there is no file xxx"),
        ("adapter.from=run", "the run in run has no finished adapter; train it to its end first"),
        ("adapter.from=merged", "merged is a merged model; to train a new adapter on it, name it"),
        ("adapter.from=compared", "name one of its trials: compared/trials/..."),
        ("adapter.from=empty", "empty is a folder; expected a finished run, or a folder with"),
        ("compare.forgetting=rows", "rows is a folder; expected a file"),
        ('dataset.path="a\\0b.csv"', "holds a NUL character"),
        ('output_dir="a\\0b"', "holds a NUL character"),
        ("output_dir='~nobody-here/x'", "'~nobody-here'; there is no such user here"),
    ],
)
def test_a_path_of_the_wrong_kind_is_named_with_the_cure(
    here: Path, capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    Path("r.yaml").write_text("model: {path: o/m}\noutput_dir: x\n", encoding="utf-8")
    assert expected in refused(capsys, "validate", "r.yaml", setting)


@pytest.mark.parametrize(
    "setting",
    [
        "model.path=owner/name",
        "model.path=gpt2",
        "model.path=model",
        "model.path=merged",
        "model.path=tiny.gguf",
        "model.path=package:some_package/x.gguf",
        "dataset.path=owner/rows",
        "dataset.path=rows",
        "dataset.path=rows/*.jsonl",
        "dataset.path=https://example.org/x.jsonl",
        "dataset.validation=20",
        "dataset.validation=0.5",
        "adapter.from=adapter",
        "adapter.from=done",
        "evaluation=[{task: gsm8k}]",
    ],
)
def test_hub_ids_and_paths_that_are_right_pass(here: Path, setting: str) -> None:
    Path("r.yaml").write_text(
        "model: {path: o/m}\ndataset: {path: o/n}\noutput_dir: x\n", encoding="utf-8"
    )
    assert cli.run(["validate", "r.yaml", setting]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train run", "run: is the folder of a run; expected a recipe file; that of the run is"),
        ("init-only run", "run: is the folder of a run; expected a recipe file"),
        ("compare run", "run: is the folder of a run; expected a recipe file"),
        ("compare compared", "to see it: kpsvd-tune report compared"),
        ("train model", "model: is a model; expected a recipe file, which names it in model.path"),
        ("train adapter", "to train on from an adapter, name it in adapter.from"),
        ("train pipe.jsonl", "pipe.jsonl: is a named pipe, socket or device; expected a recipe"),
        ("eval compared --task gsm8k", "to see it, kpsvd-tune report compared; to use one of its"),
        ("generate rows/train.jsonl hello", "is a file of rows; expected a run, an adapter or a"),
        ("generate compared hello", "compared is the folder of a comparison"),
        ("merge merged --output o", "merged is a model, with plain weights: there is no adapter"),
        ("merge compared --output o", "compared is the folder of a comparison"),
        ("merge r.yaml --output o", "r.yaml is a recipe; expected the run it made: its output_dir"),
        ("merge . --output o", ". is a folder with adapter, done, run in it: name one of them"),
        ("generate . hello", ". is a folder with adapter, done, run in it: name one of them"),
        ("report model", "it is a model; expected the output_dir of a recipe"),
        ("report gone", "nothing lies there; expected the output_dir of a recipe"),
        ("report dome", "or `compare` (looked from "),
        ("report dome", "); did you mean done?\n"),
        ("report .", "it is a folder with compared, done, run in it: name one of them"),
        ("eval rums/a --task exact_match", "no run is in rums/a (looked from "),
        ("train rows/train.jsonl", "rows/train.jsonl: is no recipe; expected a YAML file, which"),
        ("report compared", "without a verdict yet: run the command `kpsvd-tune compare` again"),
    ],
)
def test_a_command_knows_what_it_was_given(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    Path("r.yaml").write_text("model: {path: o/m}\noutput_dir: x\n", encoding="utf-8")
    assert expected in refused(capsys, *arguments.split())


def test_a_comparison_is_shown_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = compare_rows(
        [row("kpsvd", seed=seed, loss=1.0 + seed / 100) for seed in range(3)]
        + [row("lora", seed=seed, loss=1.1 + seed / 100) for seed in range(3)],
        model="o/m",
        steps=10,
        base={"validation_loss": 2.0, "test_loss": None, "forgetting_loss": None},
        num_warmup=0,
        max_grad_norm=1.0,
        price_per_hour=None,
        currency="USD",
        num_missing=0,
        jobs=1,
    )
    Path("compared/comparison.json").write_text(json.dumps(verdict.to_dict()), encoding="utf-8")
    found = read_comparison(Path("compared"))
    assert isinstance(found, Comparison)
    assert found == verdict
    assert cli.run(["report", "compared"]) == 0
    assert "kpsvd minus lora at 100" in capsys.readouterr().out
    assert cli.run(["report", "compared", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "o/m"
    broken: dict[str, Any] = {**verdict.to_dict(), "steps": "many"}
    Path("compared/comparison.json").write_text(json.dumps(broken), encoding="utf-8")
    shown = refused(capsys, "report", "compared")
    assert "comparison.json holds something unexpected (steps: input should be a valid int" in shown
    assert 'got "many"); write it again with `kpsvd-tune compare` and --plan done' in shown


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model:\n  path: a\ndataset\n  path: x\n", 3, "a space after the key; got 'dataset'"),
        ("model:\n  path: a\noutput_dir\ntrain:\n  a: 1\n", 3, "got 'output_dir'"),
        ("model:\n  path:a\n  dtype: x\n", 2, "got 'path:a'"),
        ('model:\n  path: "a\n  dtype: float32\n', 2, "these quotes are never closed"),
        ("train:\n  a: [1, 2\n  b: 3\n", 2, "expected ',' or ']', but got ':' on line 3"),
        (
            "train:\n  a: 1\n    b: 2\n",
            3,
            "check the indentation, or put a text that holds a colon",
        ),
        ("train:\n    a: 1\n  b: 2\n", 3, "check the indentation and the quotes"),
        ("model:\n  path: a: b\n", 2, "put a text that holds a colon in quotes"),
        ("a: b: c\n", 1, "put a text that holds a colon in quotes"),
    ],
)
def test_the_line_of_a_syntax_error_is_the_line_of_the_fault(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, said: str
) -> None:
    Path("r.yaml").write_text(text, encoding="utf-8")
    shown = refused(capsys, "validate", "r.yaml")
    assert shown.startswith(f"error: r.yaml:{line}: not valid YAML: ")
    assert said in shown


def test_an_output_that_cannot_be_written_is_found_before_the_work(here: Path) -> None:
    check_writable(Path("new/folder"))
    assert not Path("new").exists()
    for bad in ("tiny.gguf/merged", "x" * 300, "a\0b", "/proc/merged"):
        with pytest.raises(InputError, match=r"cannot be written: .*; name another folder"):
            check_writable(Path(bad))


@pytest.mark.parametrize("target", ["/proc/x.yaml", "x" * 300])
def test_a_recipe_that_cannot_be_copied_is_told_in_words(
    here: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    shown = refused(capsys, "recipes", "copy", "quickstart", target)
    assert "cannot be written: " in shown
    assert "Errno" not in shown


def test_settings_that_change_nothing_computed_keep_a_run() -> None:
    old = {"recipe": {"compare": {"price_per_hour": None, "currency": "USD"}, "seed": 1}}
    new = {"recipe": {"compare": {"price_per_hour": 2.0, "currency": "EUR"}, "seed": 1}}
    assert changes(old, new) == {}


def test_what_cannot_be_looked_at_holds_nothing(here: Path) -> None:
    for path in ("a\0b", "x" * 300, "~nobody-here", "gone"):
        assert kind_of(path) is None
    assert expand("~nobody-here/x") == Path("~nobody-here/x")
    assert kind_of("pipe.jsonl") == "special"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "Give the place where it lies now with --base"),
        (["--base", "./elsewhere"], "error: --base: "),
    ],
)
def test_a_base_that_moved_is_told_with_the_option_that_names_it(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    from kpsvd_tune.adapter import KpsvdConfig

    KpsvdConfig(base_model_name_or_path="/gone/base").save_pretrained("adapter")
    assert told in refused(capsys, "merge", "adapter", "--output", "o", *options)
    assert not Path("o").exists()
