"""Several processes, and one that is killed, end as one that nothing happened to."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

from kpsvd_tune.commands import main as cli
from kpsvd_tune.storage.commit import read_committed

HERE = Path(__file__).parent
RUNS = HERE.parent / "training" / "two_processes.py"
pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 still asks transformers 5.23 for the old name of a property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def start(device: str, *command: str, **variables: str) -> subprocess.Popen[str]:
    """Start a program of Python on a device.

    On a GPU it is a new process, for CUDA does not work in a fork of one that has used it.
    """
    kind: Any = warm.Popen if device == "cpu" else subprocess.Popen
    process: subprocess.Popen[str] = kind(
        [sys.executable, *command],
        env=warm.unmeasured(**{"OMP_NUM_THREADS": "1", **variables}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


def losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def test_two_ranks_on_one_device_are_one_process(device: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    backend, shared = [], {}
    if device == "cuda":
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        backend, shared = ["gloo"], {"CUDA_VISIBLE_DEVICES": first}
    ranks = [
        start(
            device,
            *(str(HERE / "rank.py"), str(tmp_path), "two", *backend),
            **shared,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            RANK=str(rank),
            # The number of the GPU, too: both ranks are on the first one.
            LOCAL_RANK=str(rank if device == "cpu" else 0),
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    runpy.run_path(str(RUNS))["train"](tmp_path, "one", batch_size=4)
    zero, one, alone = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two-0", "two-1", "one-0")
    )
    assert zero["weights"] == one["weights"]
    for key in ("loss", "grad_norm", "tokens"):
        assert [each[key] for each in zero["metrics"]] == pytest.approx(
            [each[key] for each in alone["metrics"]], rel=1e-5
        )
    assert zero["result"]["validation_loss"] == pytest.approx(
        alone["result"]["validation_loss"], rel=1e-5
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_of_the_command_are_one(
    device: str,
    parallel: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs over NCCL, each process with one of its own."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, and there is one")
    if device == "cpu":
        request.getfixturevalue("warm_ranks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(
        train={"max_steps": 3, "save_every": 0, "eval_every": 0, "batch_size": 1},
        adapter={"rank": {"method": "fixed", "max": 1, "window": 2}},
    )
    several = ["--gpus", "2"] if device == "cuda" else ["--processes", "2"]
    train = ["train", str(recipe)]
    shared = [*train, *several, f"train.parallel={parallel}"]
    monkeypatch.setattr(sys, "argv", ["kpsvd-tune", *shared])  # what the ranks are started with
    assert cli.run(shared) == 0
    assert cli.run([*train, "train.batch_size=2", f"output_dir={tmp_path / 'one'}"]) == 0
    found, wanted = (losses(tmp_path / name / "metrics.jsonl") for name in ("run", "one"))
    assert len(wanted) == 3
    assert found == pytest.approx(wanted, rel=1e-5)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("run", "one")]
    first, second = (each["validation_loss"] for each in results)
    assert first == pytest.approx(second, rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_bytes(
    device: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        train={"max_steps": 8, "save_every": 3, "eval_every": 0, "precision": "no"},
        adapter={"dropout": 0.1, "rank": {"method": "fixed", "max": 1, "window": 2}},
    )
    with start(device, str(HERE / "killed_run.py"), str(recipe), "5") as killed:
        error = killed.communicate(timeout=120)[1]
    assert killed.returncode == -9, error
    run = tmp_path / "run"
    assert [each.name for each in sorted((run / "checkpoints").iterdir())] == ["step-000003"]
    assert not (run / "adapter").exists()
    assert cli.run(["train", str(recipe)]) == 0
    assert cli.run(["train", str(recipe), f"output_dir={tmp_path / 'whole'}"]) == 0
    saved = [
        read_committed(tmp_path / name / "checkpoints" / "step-000008") for name in ("run", "whole")
    ]
    for name in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert saved[0][name] == saved[1][name], name
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "whole")
    ]
    assert adapters[0] == adapters[1]
    found, wanted = (losses(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert found == wanted
