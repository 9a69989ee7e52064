"""The command line itself: options that stand, help without torch, JSON on stdout only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from kpsvd_tune import __version__
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import NonFiniteError, StoppedBySignal

# New knobs go into the recipe; an option that joins here is a decision.
OPTIONS = {
    "train": {
        "--gpus",
        "--processes",
        "--accelerate-config",
        "--resume",
        "--allow-change",
        "--allow-other-base",
        "--allow-code-execution",
        "--sandbox",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "init": {
        "--model",
        "--data",
        "--columns",
        "--task",
        "--budget",
        "--price",
        "--yes",
        "-y",
        "--offline",
        "--debug",
    },
    "doctor": {"--quick", "--offline", "--json", "--debug"},
    "plan": {"--gpus", "--processes", "--without-rows", "--offline", "--json", "--debug"},
    "compare": {
        "--methods",
        "--budgets",
        "--learning-rates",
        "--seeds",
        "--plan",
        "--money",
        "--score",
        "--jobs",
        "--shared",
        "--trials",
        "--ray",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "init-only": {
        "--gpus",
        "--processes",
        "--sweep",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "merge": {
        "--output",
        "-o",
        "--weights",
        "--dtype",
        "--proof",
        "--base",
        "--allow-other-base",
        "--tolerance",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "eval": {
        "--base",
        "--allow-other-base",
        "--task",
        "--path",
        "--limit",
        "--shots",
        "--temperature",
        "--samples",
        "--max-new-tokens",
        "--batch-size",
        "--output",
        "-o",
        "--base-only",
        "--dtype",
        "--rescore",
        "--allow-code-execution",
        "--sandbox",
        "--gpus",
        "--processes",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "generate": {
        "--max-new-tokens",
        "--temperature",
        "--seed",
        "--raw",
        "--base-only",
        "--base",
        "--allow-other-base",
        "--offline",
        "--json",
        "--debug",
    },
    "export": {
        "--to",
        "--output",
        "-o",
        "--max-rank",
        "--dtype",
        "--lossy",
        "--metadata-from",
        "--base",
        "--allow-other-base",
        "--dry-run",
        "--offline",
        "--json",
        "--debug",
    },
    "chat": {
        "--max-new-tokens",
        "--temperature",
        "--seed",
        "--base-only",
        "--base",
        "--allow-other-base",
        "--offline",
        "--debug",
    },
    "validate": {"--json", "--debug"},
    "push": {
        "--repo",
        "--merged",
        "--lora",
        "--public",
        "--update",
        "--revision",
        "--message",
        "-m",
        "--dry-run",
        "--json",
        "--debug",
    },
    "runs": {"--sort", "--reverse", "--json", "--debug"},
    "report": {"--layers", "--price-per-hour", "--html", "--output", "-o", "--json", "--debug"},
    "recipes list": {"--model", "--task", "--machine", "--size", "--memory", "--json"},
    "recipes show": set(),
    "recipes copy": {"--resolved"},
    "recipes convert": {"--json"},
    "recipes schema": {"--output", "-o"},
    "recipes docs": {"--output", "-o"},
}


def options() -> dict[str, set[str]]:
    found = {}
    commands = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]
    recipes = commands.pop("recipes")
    commands |= {f"recipes {name}": each for name, each in recipes.commands.items()}
    for name, command in commands.items():
        found[name] = {
            option for each in command.params for option in each.opts if option.startswith("-")
        }
    return found


def test_the_options_are_those_decided_on() -> None:
    assert options() == OPTIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["validate", "smollm2_gsm8k"], ["recipes", "list"]],
)
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from kpsvd_tune.commands import main as cli; code = cli.run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"kpsvd-tune {__version__}\n"


def test_validate_prints_the_resolved_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["validate", "smollm2_gsm8k", "train.max_steps=7"]) == 0
    captured = capsys.readouterr()
    assert "smollm2_gsm8k: valid" in captured.err
    copied = tmp_path / "resolved.yaml"
    copied.write_text(captured.out, encoding="utf-8")
    assert cli.run(["validate", str(copied), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["max_steps"] == 7


def test_three_typos_at_three_depths_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "modle: {}\nmodel:\n  path: m\n  dtpye: float32\nadapter:\n  rank:\n    enregy: 0.5\n"
        "output_dir: run\n",
        encoding="utf-8",
    )
    assert cli.run(["validate", str(recipe)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 3
    assert "r.yaml:1:" in captured.err
    assert all(f"did you mean {name}?" in captured.err for name in ("model", "dtype", "energy"))
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_recipes_list_gives_each_purpose_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "list", "--json"]) == 0
    purposes = json.loads(capsys.readouterr().out)
    assert purposes["mbpp_llama2"] == (
        "LLaMA2-7B learns to write short Python functions (MBPP) with at most 0.99M trained "
        "parameters."
    )
    assert all(purpose.endswith(".") for purpose in purposes.values())


def test_recipes_copy_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "copy", "quickstart", str(tmp_path)]) == 0
    assert (tmp_path / "quickstart.yaml").is_file()
    assert cli.run(["recipes", "copy", "quickstart", str(tmp_path)]) == 2
    assert "exists: name another file" in capsys.readouterr().err
    assert cli.run(["recipes", "copy", "quickstart", str(tmp_path / "no" / "x.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_rescoring_stored_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": 0, "prompt": "2 + 3?", "completion": "So it is\n#### 5", "gold": "#### 5"},
        {"id": 1, "prompt": "2 + 2?", "completion": "five", "gold": "#### 4"},
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.run(["eval", "--rescore", str(file), "--task", "gsm8k", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"scores"}
    scores = printed["scores"]
    assert scores["strict"].keys() == {"value", "n", "stderr", "unextractable", "interval"}
    assert scores["strict"]["value"] == 0.5
    assert scores["flexible"]["unextractable"] == 1
    # The evaluation that wrote the file says which task it was.
    assert cli.run(["eval", "--rescore", str(file)]) == 2
    assert "say whose scorers to use" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text('{"task": "gsm8k"}')
    assert cli.run(["eval", "--rescore", str(file)]) == 0
    assert "gsm8k, strict: 50.0 % of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "eval needs a RUN_OR_MODEL, or --rescore FILE"),
        (["eval", "m"], "say what to score, as in --task gsm8k"),
        (["eval", "m", "--task", "gsm9k"], "--task: got 'gsm9k'; expected gsm8k, math, mbpp"),
        (["eval", "m", "--task", "gsm8k", "shot=5"], "shot: unknown key; did you mean shots?"),
        (["eval", "m", "--task", "gsm8k", "--samples", "4"], "--samples: at temperature 0 all"),
        (["eval", "m", "--task", "math", "prompt=bigcode"], "no bigcode prompt for math"),
        (["eval", "m", "--task", "gsm8k", "limit=0"], "limit: got 0; expected a number of at"),
        (["eval", "m", "--task", "forgetting", "--path", __file__], "give a run or an adapter"),
        (["eval", "m", "--task", "forgetting", "--path", "t.txt"], "--path: there is no file t"),
        (["eval", __file__, "--task", "gsm8k"], "is a file; expected a run, an adapter or a model"),
        (["eval", "m", "--task", "gsm8k"], "so say where completions go: --output DIR"),
        (["eval", "m", "--task", "mbpp"], "--allow-code-execution"),
        (["eval", "m", "--sandbox", "docker"], "'docker' is not one of 'bwrap', 'none'"),
        (["eval", "m", "--task", "exact_match"], "path"),
    ],
)
def test_mistakes_in_scoring(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NonFiniteError("step 3: the loss is nan"), 3, "error: step 3: the loss is nan"),
        (StoppedBySignal(15), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped"),
        (PermissionError(13, "Permission denied", "out"), 1, "Permission denied (out); choose"),
        (ZeroDivisionError("oops"), 1, "This is a bug in kpsvd-tune"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("kpsvd_tune.commands.validate.load_recipe", fail)
    assert cli.run(["validate", "smollm2_gsm8k"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert ("Traceback" in captured.err) is isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train", "r", "--train.max_steps", "20"], "write train.max_steps=20"),
        (["train", "r", "--learning_rate=1e-4"], "write train.learning_rate=1e-4"),
        (["train", "r", "--gradient-checkpointing"], "write train.gradient_checkpointing=true"),
        (["train", "r", "--num_train_epochs", "3"], "write train.epochs=3"),
        (["validate", "r", "--cutoff_len", "64"], "write dataset.max_length=64"),
        (["compare", "r", "--zzz"], "are changed without dashes: train.max_steps=40"),
    ],
)
def test_a_key_that_was_written_as_an_option(capsys, arguments, advice):
    assert cli.run(arguments) == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "r", "--gpus", "0,1"], "got '0,1'; to choose GPUs: CUDA_VISIBLE_DEVICES=0,1"),
        (["train", "r", "--gpus=0"], "Input should be greater than or equal to 1; got '0'"),
        (["compare", "r", "--seeds", "many"], "unable to parse string as an integer; got 'many'"),
    ],
)
def test_an_invalid_value_of_an_option_is_named(capsys, arguments, told):
    assert cli.run(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["finetune", "r"], "train"), (["recipes", "ls"], "list, show, copy")],
)
def test_an_unknown_command_is_answered_with_those_there_are(capsys, arguments, told):
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert "No such command" in err
    assert told in err.partition("Expected one of ")[2]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--epochs", "--epochs; to change that key of the recipe write train.epochs=1"),
        ("--resum", "--resum (Possible options: --resume)"),
        ("--sharing", "--sharing; keys of the recipe are changed without dashes: "),
    ],
)
def test_an_unknown_option_is_answered_with_what_is_near_it_alone(capsys, option, told):
    assert cli.run(["train", "r", option, "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: No such option: {told}"), said
    assert said.count("; ") + said.count(" (") == 1, said


def test_an_option_that_is_unknown_to_a_command_without_a_recipe(capsys):
    assert cli.run(["report", "r", "--layer"]) == 2
    assert "No such option: --layer" in capsys.readouterr().err


def test_an_option_without_its_value_is_not_taken_for_a_key(capsys):
    assert cli.run(["train", "r", "--resume"]) == 2
    assert capsys.readouterr().err == "error: Option '--resume' requires an argument.\n"


def test_ctrl_c_while_the_program_is_loaded():
    code = (
        "import builtins, sys; real = builtins.__import__\n"
        "def stopped(name, *rest):\n"
        "    if name == 'kpsvd_tune.commands.main': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stopped\n"
        "from kpsvd_tune.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_recipes_are_listed_within_the_width_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    # Names in one column, texts in another, and no line broken before its room is used.
    (first,) = [line for line in lines if line.startswith("quickstart ")]
    assert first.endswith("learns to solve")
    said = ("Parts, of which", "What fits where")  # between and below the lists
    pairs = [each for each in lines if each and not each.startswith(said)]
    assert len(pairs) > 20
    assert all(line[26] == " " for line in pairs)


def test_errors_break_between_words_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["validate", "no-such-recipe-as-this-one"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).startswith("error: no-such-recipe-as-this-one: not")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["validate", "nothing-like-this", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--resume", "never"], ["--resume=runs/x/checkpoints/s"]])
def test_a_stopped_run_says_how_it_goes_on(monkeypatch, capsys, option):
    # A terminal, which is narrower than the command: that stands in one line all the same.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def stop(*_: object, **__: object) -> None:
        raise StoppedBySignal(15)

    monkeypatch.setattr(cli, "app", stop)
    words = ["my run.yaml", "dataset.columns={prompt: q}", "--processes", "2", "--debug"]
    command = "kpsvd-tune train 'my run.yaml' 'dataset.columns={prompt: q}' --processes 2 --debug"
    assert cli.run(["train", *words]) == 143
    said = capsys.readouterr().err
    assert said.endswith(f"\n  {command}\n")
    assert "saved; the same command goes on from there:" in " ".join(said.split())
    # With the option it would begin again where it began.
    for place in range(1 + len(words)):
        if words[place - 1] == "--processes":
            continue  # its number comes next
        assert cli.run(["train", *words[:place], *option, *words[place:]]) == 143
        said = capsys.readouterr().err
        assert said.endswith(f"\n  {command}\n")
        assert "the same command without --resume goes on from there:" in " ".join(said.split())
    # What was typed to another launcher is not known.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["train", *words]) == 143
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("saved; the same command goes on from there")
    # A rank that this package has started has the words that were typed.
    monkeypatch.setenv("KPSVD_TUNE_PHASE_FILE", "phase")
    assert cli.run(["train", *words]) == 143
    assert capsys.readouterr().err.endswith(f"\n  {command}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "words", "found"),
    [
        ("bash", "kpsvd-tune in", {"init", "init-only"}),
        ("bash", "kpsvd-tune recipes s", {"show", "schema"}),
        ("bash", "kpsvd-tune plan --without", {"--without-rows"}),
        ("bash", "kpsvd-tune eval --task l", {"label", "loss"}),
        ("zsh", "kpsvd-tune init mine --task js", {"json"}),
        ("fish", "kpsvd-tune init-", {"init-only"}),
    ],
)
def test_shells_complete_commands_options_and_tasks(
    shell: str, words: str, found: set[str]
) -> None:
    last = len(words.split()) - 1
    asked = {
        "_KPSVD_TUNE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(last),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    shown = done.stdout.replace('"', " ").replace(":", " ").split()
    assert found <= set(shown), done
    assert done.stderr == ""


@pytest.mark.slow
def test_completion_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "_KPSVD_TUNE_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default" in done.stdout
