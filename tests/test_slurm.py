"""The SLURM example, with stand-ins for SLURM and for the command that it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm" / "train.sbatch"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH whose scontrol writes down what it is asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def command(folder: Path, body: str) -> None:
    program = folder / "kpsvd-tune"
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)


@pytest.mark.slow
def test_a_signal_is_passed_on_and_the_job_is_queued_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # Saves for a while after the signal, as a run does.
    command(
        tmp_path,
        f'echo "$@" > {tmp_path}/arguments\n'
        f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/ready\nwhile true; do sleep 0.05; done",
    )
    job = subprocess.Popen([str(SCRIPT), "r.yaml", "train.seed=1"], env=environment)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists(), "the job must wait until the run has saved"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    assert (tmp_path / "arguments").read_text() == "train r.yaml train.seed=1 --gpus 1 --offline\n"


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_any_other_end_is_the_end(tmp_path: Path, environment: dict[str, str], code: int) -> None:
    command(tmp_path, f"exit {code}")
    done = subprocess.run([str(SCRIPT), "r.yaml"], env=environment, check=False)
    assert done.returncode == code
    assert not (tmp_path / "scontrol.log").exists()
