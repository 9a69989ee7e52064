"""`--dry-run` of the commands that work long: what they would take, held against what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kpsvd_tune.commands import main as cli
from kpsvd_tune.estimate import memory, verbs


@pytest.fixture(autouse=True)
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of the machine take time, and what they find is not tested here."""
    monkeypatch.setattr("kpsvd_tune.estimate.passes.PassTimes.seconds", lambda *_: 0.1)
    monkeypatch.setattr("kpsvd_tune.estimate.loading.python_slowness", lambda: (1.0, 1.0))
    monkeypatch.setattr(verbs, "decomposition_seconds", lambda todo, *_: float(len(todo)))


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object) -> dict[str, Any]:
        assert cli.run([*map(str, arguments), "--dry-run", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def files_in(folder: Path) -> set[Path]:
    return {each for each in folder.rglob("*") if each.is_file()}


def test_init_only_would_decompose_what_the_cache_lacks(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kpsvd_tune.decompose.hashes.SETTLED_SECONDS", 0.0)
    recipe = write_recipe()
    before = files_in(tmp_path)
    found = planned("init-only", recipe)
    assert files_in(tmp_path) == before
    assert dict(found["steps"])["target matrices"] == "14, 14 of them not in the cache"
    assert found["seconds"] == [pytest.approx(0.7 * 14), pytest.approx(2.5 * 14)]
    assert found["fits"] is True
    assert planned("init-only", recipe, "--processes", "2")["seconds"][0] == pytest.approx(0.7 * 7)
    assert cli.run(["init-only", str(recipe)]) == 0
    written = sum(each.stat().st_size for each in (tmp_path / "cache").rglob("*.safetensors"))
    assert found["disk"]["needed_bytes"][1] == pytest.approx(written, rel=0.15)
    capsys.readouterr()
    assert dict(planned("init-only", recipe)["steps"])["target matrices"].startswith("14, 0 of")
    assert cli.run(["init-only", str(recipe), "--dry-run", "--sweep", "adapter.rank.max=1,2"]) == 2
    assert "--dry-run plans one recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_the_answers_of_an_offloaded_run_have_its_weights_on_the_host(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    rows_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = ["train.gradient_checkpointing=true", "train.max_steps=1", "model.device_map=auto"]
    assert cli.run(["train", str(write_recipe()), *keys]) in (0, 4)
    capsys.readouterr()
    asked = ("eval", tmp_path / "run", "--task", "exact_match", "--path", rows_file)
    on_cpu = planned(*asked)
    assert memory.OFFLOADED not in on_cpu["host"]["parts"]
    monkeypatch.setattr("kpsvd_tune.hardware.devices.own_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for free in (150_000, 10**9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        found[free] = planned(*asked)
    small, large = found.values()
    # Both blocks of the tiny model, of which one at a time is on the device.
    away = 2 * 4 * (32 * (32 + 2 * 16 + 32 + 3 * 48) + 2 * 32)
    assert small["host"]["parts"][memory.OFFLOADED] == away
    assert memory.OFFLOADED not in large["host"]["parts"]
    weights = [each["on_device"]["parts"]["weights"] for each in (large, small)]
    assert weights[0] - weights[1] == away // 2
    assert ["copying of offloaded" in str(each["basis"]) for each in (small, large)] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_merge_export_and_eval_say_what_they_would_write(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    rows_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cli.run(["train", str(write_recipe()), "train.max_steps=2"]) in (0, 4)
    capsys.readouterr()
    run, merged = tmp_path / "run", tmp_path / "merged"
    before = files_in(tmp_path)
    found = planned("merge", run, "--output", merged)
    assert (dict(found["steps"])["how"], found["fits"]) == ("tensor by tensor", True)
    assert "base in float32, for the proof" in found["host"]["parts"]
    assert "base in float32" not in str(
        planned("merge", run, "--output", merged, "--proof", "tensors")["host"]["parts"]
    )
    narrow = planned("merge", run, "--output", merged, "--dtype", "bfloat16")
    lora = planned("export", run, "--to", "lora", "--output", merged, "--max-rank", "8")
    keys = ("--task", "exact_match", "--path", rows_file, "--max-new-tokens", "5")
    scored = planned("eval", run, *keys)
    assert files_in(tmp_path) == before
    assert scored["seconds"][0] < scored["seconds"][1]
    steps = dict(scored["steps"])
    assert (steps["questions"], steps["answers"]) == ("8, 1 answer each", "at most 40 tokens")
    assert scored["host"]["parts"]["keys and values"] > 0
    assert planned("eval", run, "--task", "loss", "--path", rows_file)["seconds"] is None

    assert cli.run(["merge", str(run), "--output", str(merged)]) == 0
    size = (merged / "model.safetensors").stat().st_size
    assert found["disk"]["needed_bytes"] == [pytest.approx(size, rel=0.05)] * 2
    assert narrow["disk"]["needed_bytes"][1] == pytest.approx(size / 2, rel=0.1)
    low, high = lora["disk"]["needed_bytes"]
    assert high == 8 * low
    capsys.readouterr()
    assert cli.run(["merge", str(run), "--output", str(merged), "--dry-run"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    monkeypatch.setattr(memory, "process_bytes", lambda: 0)
    assert (
        cli.run(["export", str(run), "--to", "lora", "-o", str(tmp_path / "l"), "--dry-run"]) == 0
    )
    shown = capsys.readouterr().out
    assert "it does NOT fit: too little memory" in shown
    assert "the base once more, for the proof" in shown
