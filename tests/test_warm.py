"""A warm process is what subprocess would start, only sooner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import warm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's adoption of orphans"),
]

SEEN = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "variable": os.environ.get("SEEN"),
    "home": "HOME" in os.environ, "parent": os.getppid(), "name": __name__,
    "leads": os.getsid(0) == os.getpid(), "path": sys.path[0], "read": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd"))[:4],
}))
print("said", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("kind", ["program", "file"])
def test_it_is_the_process_that_subprocess_starts(kind: str, session: bool, tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    what = ["-c", SEEN] if kind == "program" else [str(tmp_path / "seen.py")]

    def seen(starter: ModuleType) -> tuple[object, ...]:
        process = starter.Popen(
            [sys.executable, *what, "a", "b c"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={"SEEN": "ü", "PATH": os.environ["PATH"]},
            start_new_session=session,
        )
        output, errors = process.communicate("words", timeout=60)
        return output, errors, process.returncode

    assert seen(warm) == seen(subprocess)


def test_a_module_an_error_and_a_signal_end_as_usual() -> None:
    command = [sys.executable, "-m", "kpsvd_tune", "--version"]
    usual = subprocess.run(command, capture_output=True, text=True)
    done = warm.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (usual.stdout, usual.stderr)
    done = warm.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    with pytest.raises(subprocess.CalledProcessError):
        warm.run([sys.executable, "-c", "raise SystemExit(3)"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    process = warm.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_processes_differ_in_what_is_random_and_share_what_is_imported() -> None:
    program = "import random, sys; print(random.random(), 'torch' in sys.modules)"
    said = {
        warm.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(said) == 2
    assert all(each.endswith(" True\n") for each in said)


BELOW = """
import multiprocessing, os, signal, sys, time
from kpsvd_tune import launch

if __name__ == "__main__":
    assert launch.launch(["--version"], 1, use_cpu=True) == 0
    context = multiprocessing.get_context("forkserver")
    ends, queue = context.Pipe()
    worker = context.Process(target=queue.send, args=("from a worker",))
    worker.start()
    worker.join()
    print(ends.recv(), multiprocessing.forkserver._forkserver._forkserver_pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_warm_process_starts_is_warm_and_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "below.py").write_text(BELOW)
    command = [sys.executable, str(tmp_path / "below.py")]
    environment = warm.unmeasured(**{warm.BELOW: "1"})
    with warm.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        # Gives the end of both streams, which all that it has started has by then closed.
        output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert errors == ""
    version, said = output.splitlines()
    assert version.startswith("kpsvd-tune ")
    assert said.startswith("from a worker ")
    # Nothing is left of the server that forks workers, as soon as init has seen its end.
    server = Path("/proc", said.split()[-1])
    deadline = time.monotonic() + 30
    while server.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


MEASURED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import warm
pids = []
for _ in range(3):
    if (pid := warm.fork_unmeasured()) == 0:
        is_measured = sys.gettrace() is not None
        os.kill(os.getpid(), signal.SIGTERM if is_measured else signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
from kpsvd_tune import errors
"""


def test_a_fork_unmeasured_leaves_the_parent_measured(tmp_path: Path) -> None:
    coverage = pytest.importorskip("coverage")
    (tmp_path / ".coveragerc").write_text(
        "[run]\nsource = kpsvd_tune\nparallel = true\npatch =\n  _exit\n  fork\n  subprocess\n"
    )
    (tmp_path / "program.py").write_text(MEASURED)
    command = [sys.executable, "-m", "coverage", "run", "program.py", str(Path(__file__).parent)]
    environment = warm.unmeasured()
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    (file,) = tmp_path.glob(".coverage.*")
    data = coverage.CoverageData(str(file))
    data.read()
    executed = {Path(each).name for each in data.measured_files() if data.lines(each)}
    assert executed == {"__init__.py", "errors.py"}
