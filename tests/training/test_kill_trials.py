"""Runs that are killed at seeded moments go on to the bytes of a run that never was."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import warm

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_trials.py"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        "--trials 20",
        "--trials 4 --processes 2 --seed 7",
        "--trials 15 --signal TERM",
        "--trials 15 --signal TERM --processes 2",
    ],
)
def test_every_killed_run_goes_on_to_the_same_bytes(options: str):
    done = warm.run(
        [sys.executable, str(SCRIPT), *options.split()],
        capture_output=True,
        text=True,
        env=warm.unmeasured(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    number = options.split()[1]
    assert f"{number} of {number} went on to the same bytes" in last
    if "TERM" not in options:
        saves, epochs = (int(n) for n in re.findall(r"(\d+) (?:inside a save|mid-epoch)", last))
        assert saves >= int(number) / 3
        assert epochs >= int(number) / 5
