"""Two machines, made of two groups of processes that meet on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.slow


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def machines(tmp_path: Path, arguments: list[str], **variables: str) -> Iterator[list[warm.Popen]]:
    """Two launchers of accelerate, with one rank each, in folders of their own."""
    port = _port()
    launchers = []
    for number in range(2):
        folder = tmp_path / f"machine-{number}"
        folder.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        words += ["--num_machines", "2", "--machine_rank", str(number), "--num_processes", "2"]
        words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        words += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "kpsvd_tune"]
        launchers.append(
            warm.Popen(
                [*words, *arguments],
                cwd=folder,
                env=os.environ
                | {
                    "ACCELERATE_USE_CPU": "true",
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
                    "XDG_CACHE_HOME": str(tmp_path / f"cache-{number}"),
                    "PYTHONWARNINGS": "ignore",
                    warm.BELOW: "1",
                }
                | variables,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        yield launchers
    finally:
        for each in launchers:
            kill_machine(each)
            each.communicate()


def kill_machine(launcher: warm.Popen) -> None:
    """End a launcher and all below it at once, as a power cut does."""
    pids, found = [launcher.pid], [launcher.pid]
    while found:
        found = [pid for each in found for pid in children(each)]
        pids += found
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(each) for task in tasks for each in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def run_to_the_end(tmp_path: Path, arguments: list[str]) -> list[str]:
    with machines(tmp_path, arguments) as both:
        errors = [each.communicate(timeout=240)[1] for each in both]
        assert [each.returncode for each in both] == [0, 0], "\n".join(errors)
        return errors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lost_machine_is_named_and_the_run_goes_on_to_the_same_bytes(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={
            "max_steps": 60,
            "eval_every": 0,
            "save_every": 5,
            "batch_size": 1,
            "learning_rate": 1e-3,
        },
    )
    lost, whole = tmp_path / "lost", tmp_path / "whole"
    arguments = ["train", str(recipe), f"output_dir={lost}"]
    with machines(tmp_path, arguments) as both:
        deadline = time.monotonic() + 200
        while not list((lost / "checkpoints").glob("step-*")):
            assert both[0].poll() is None, both[0].communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_machine(both[1])
        _, err = both[0].communicate(timeout=120)
        assert both[0].returncode != 0
    told = (
        r"rank 0 lost the connection to rank 1 \(process \d+ on \S+\), which has died, while train"
    )
    assert re.search(told, err), err
    assert "The last checkpoint is whole; the same command goes on from there" in err
    assert not (lost / "results.json").exists()

    run_to_the_end(tmp_path, arguments)
    run_to_the_end(tmp_path, ["train", str(recipe), f"output_dir={whole}"])
    for name in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        files = [run / "checkpoints" / "step-000060" / name for run in (lost, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (lost, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert json.loads((lost / "run.json").read_text())["num_processes"] == 2
    # Nothing was written where the commands were started.
    assert not list((tmp_path / "machine-1").iterdir())
