"""`model.device_map: auto` from the command line, with the processor standing in for the card."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.launch import launch
from kpsvd_tune.models import offload
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.training import device_map
from kpsvd_tune.training.device_map import check_device_map, check_place

OFFLOADED = "0 of 2 decoder blocks are on cpu; the weights of 2, "
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], rows_file: Path) -> Path:
    task = {"path": str(rows_file), "columns": {"prompt": "question", "completion": "answer"}}
    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={
            "max_steps": 4,
            "eval_every": 2,
            "save_every": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": True,
        },
        evaluation=[{**task, "task": "exact_match", "before": True, "max_new_tokens": 4}],
    )


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with room for one decoder block of the tiny model beside all else."""
    monkeypatch.setattr(offload, "free_bytes", lambda device: 180_000)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def said(run: Path) -> list[str]:
    file = run / "evaluation" / "after" / "exact_match" / "completions.jsonl"
    return sorted(file.read_text().splitlines())


@pytest.mark.slow
def test_a_run_is_the_one_of_a_card_that_holds_the_base(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train, score before and after, stop by Ctrl-C, go on, generate and score: equal bytes."""
    whole, run = tmp_path / "whole", tmp_path / "offloaded"
    assert cli.run(["train", str(recipe), f"output_dir={whole}"]) == 0
    capsys.readouterr()
    questions = ["--task", "exact_match", "--json"]
    assert cli.run(["generate", str(whole), "Tom has", "--max-new-tokens", "5"]) == 0
    assert cli.run(["eval", str(whole), *questions]) == 0
    expected = capsys.readouterr().out

    monkeypatch.setattr(offload, "free_bytes", lambda device: 180_000)
    train = ["train", str(recipe), f"output_dir={run}", "model.device_map=auto"]
    original = ConsoleEvents.step

    def interrupt(self: ConsoleEvents, step: Any, total: int) -> None:
        original(self, step, total)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleEvents, "step", interrupt)
        assert cli.run(train) == 130
    assert OFFLOADED in capsys.readouterr().err
    assert cli.run(train) == 0
    assert "continuing from" in capsys.readouterr().err
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert metrics(run) == metrics(whole)
    assert said(run) == said(whole)

    assert cli.run(["generate", str(run), "Tom has", "--max-new-tokens", "5"]) == 0
    assert cli.run(["eval", str(run), *questions]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(OFFLOADED) == 2
    assert captured.out.replace(str(run), str(whole)) == expected

    # The base alone, whose weights come as if they were trained.
    monkeypatch.setattr(offload, "free_bytes", lambda device: 140_000)
    assert cli.run(["generate", str(run), "Tom has", "--base-only", "--max-new-tokens", "5"]) == 0
    assert "stay in the host's memory" in capsys.readouterr().err

    monkeypatch.setattr(offload, "num_processes", lambda: 2)
    assert cli.run(["eval", str(run), *questions]) == 2
    assert "to score a run leave --gpus and --processes out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("small_card")
def test_a_run_goes_on_with_and_without(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    """The key moves weights and no bits, so that a run may go on under the other value."""
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe), "train.max_steps=4"]) == 0
    (run / "results.json").unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    before = (run / ADAPTER).read_bytes()
    (run / ADAPTER).unlink()
    assert cli.run(["train", str(recipe), "model.device_map=auto"]) == 0
    assert OFFLOADED in capsys.readouterr().err
    assert (run / ADAPTER).read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_card")
def test_probes_are_offloaded_too(recipe: Path, capsys: Any, monkeypatch: Any) -> None:
    seen: list[int] = []
    original = offload.offload

    def count(*args: Any) -> Any:
        found = original(*args)
        seen.append(found.num_offloaded)
        return found

    monkeypatch.setattr(offload, "offload", count)
    options = ["model.device_map=auto", "adapter.rank.energy=auto", "evaluation=[]"]
    assert cli.run(["train", str(recipe), *options]) == 0
    assert len(seen) > 1
    assert set(seen) == {2}
    # The run tells it once.
    assert capsys.readouterr().err.count(OFFLOADED) == 1


def parsed(**sections: Any) -> Recipe:
    content: dict[str, Any] = {"model": {"path": "m", "device_map": "auto"}, "output_dir": "x"}
    content["train"] = {"gradient_checkpointing": True, **sections.get("train", {})}
    content["model"] |= sections.get("model", {})
    return Recipe.model_validate(content)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"parallel": "fsdp"}}, "on several GPUs, or ddp on one"),
        ({"model": {"quantization": "nf4"}}, "packed weights are not copied"),
        (
            {"train": {"gradient_checkpointing": False}},
            "nothing would be saved; set train.gradient_checkpointing: true",
        ),
    ],
)
def test_keys_that_exclude_each_other(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_device_map(parsed(**sections))
    check_device_map(
        parsed(**sections, model={"device_map": None})
        if "model" not in sections
        else parsed(model={**sections["model"], "device_map": None})
    )


def test_processes_that_are_planned_are_refused() -> None:
    with pytest.raises(RecipeError, match="got 2 processes; expected one"):
        check_device_map(parsed(), 2)
    check_device_map(parsed(model={"device_map": None}), 2)


@pytest.mark.parametrize("command", [["plan"], ["train", "--dry-run"]])
def test_a_plan_refuses_what_a_training_does(
    command: list[str], recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*command, str(recipe), "model.device_map=auto"]
    for key, message in (
        ("train.gradient_checkpointing=false", "would be kept on the card until"),
        ("model.quantization=nf4", "packed weights are not copied"),
        ("train.parallel=fsdp", "on several GPUs, or ddp on one"),
        ("--processes=2", "got 2 processes; expected one"),
    ):
        assert cli.run([*asked, key]) == 2, key
        assert message in capsys.readouterr().err
    monkeypatch.setattr("kpsvd_tune.estimate.plan.own_device", lambda _: torch.device("mps"))
    assert cli.run(asked) == 2
    assert "Apple's mps has no memory of its own" in capsys.readouterr().err


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    check_place(parsed(), accelerator)
    monkeypatch.setattr(device_map, "zero_stage", lambda _: 1)
    with pytest.raises(RecipeError, match="model.device_map: auto and DeepSpeed"):
        check_place(parsed(), accelerator)
    check_place(parsed(model={"device_map": None}), accelerator)


def test_refusals_of_commands(recipe: Path, capsys: Any) -> None:
    assert (
        cli.run(
            ["train", str(recipe), "model.device_map=auto", "train.gradient_checkpointing=false"]
        )
        == 2
    )
    assert "would be kept on the card until the backward pass" in capsys.readouterr().err
    assert cli.run(["compare", str(recipe), "model.device_map=auto"]) == 2
    assert "`compare` keeps one base on the card" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("warm_ranks")
def test_several_processes_are_refused(recipe: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["train", str(recipe), "model.device_map=auto", "--processes", "2"]
    assert launch(arguments, 2, use_cpu=True) == 2
    told = capfd.readouterr().err
    assert told.count("error: model.device_map: auto: got 2 processes; expected one") == 1
    assert "set train.parallel: fsdp" in told
    assert not (tmp_path / "run").exists()
