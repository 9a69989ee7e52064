"""Several processes from one command: exit codes, a dead rank, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kpsvd_tune import launch


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Ranks run this script instead of the package; the test writes it."""
    path = tmp_path / "rank.py"
    original = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return original([sys.executable, str(path), *command[3:]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(launch.subprocess, "Popen", start)  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    return path


def test_every_rank_gets_its_place(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "import os, sys, pathlib\n"
        "names = ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'ACCELERATE_USE_CPU')\n"
        "text = ' '.join([os.environ[name] for name in names] + sys.argv[1:])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(text)\n"
    )
    assert launch.launch(["train", "r.yaml"], 2, use_cpu=True) == 0
    assert (tmp_path / "rank0").read_text() == "2 0 127.0.0.1 true train r.yaml"
    assert (tmp_path / "rank1").read_text() == "2 1 127.0.0.1 true train r.yaml"


def test_the_first_failure_is_the_exit_code(program: Path) -> None:
    program.write_text("import os, sys\nsys.exit(3 if os.environ['RANK'] == '1' else 0)\n")
    assert launch.launch([], 2, use_cpu=True) == 3


def test_a_killed_rank_ends_those_that_wait_for_it(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    assert launch.launch([], 2, use_cpu=True) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 30
    err = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in err
    assert "stopping rank 0, which still waits" in err


def test_a_signal_reaches_every_rank_once(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        f"    path = pathlib.Path({str(tmp_path)!r}, 'got' + os.environ['RANK'])\n"
        "    with path.open('a') as file:\n        file.write('x')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    handler = signal.getsignal(signal.SIGTERM)
    assert launch.launch([], 2, use_cpu=True) == 143
    sender.join()
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == ["x", "x"]
    assert signal.getsignal(signal.SIGTERM) == handler
