"""The sandbox against hostile programs: none succeeds, nothing is left over.

Needs bubblewrap; where it is missing only the refusal and the run without protection are tested.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.evaluation.sandbox import run as module
from kpsvd_tune.evaluation.sandbox.capture import Limits
from kpsvd_tune.evaluation.sandbox.run import (
    Program,
    RunResult,
    Sandbox,
    check_sandbox,
    run_program,
    run_programs,
    sandbox_fault,
)

needs_bubblewrap = pytest.mark.skipif(sandbox_fault() is not None, reason="needs bubblewrap")
SHORT = Limits(cpu_seconds=1, wall_seconds=1.5)


def run(source: str, *tests: str, limits: Limits | None = None) -> RunResult:
    return run_program(Program(textwrap.dedent(source), tests), limits=limits or Limits())


def num_processes_holding(word: str) -> int:
    """Processes of this machine with a word in their environment or command line."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        count += word.encode() in text
    return count


@pytest.fixture
def marker() -> Iterator[str]:
    """A word that a program puts on the command line of what it starts; none may outlive it."""
    word = f"left-over-{os.urandom(8).hex()}"
    yield word
    deadline = time.monotonic() + 5
    while num_processes_holding(word) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert num_processes_holding(word) == 0


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "tests", "status"),
    [
        ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 3"], "passed"),
        ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 4"], "failed"),
        ("def f(x): return y", ["assert f(1) == 2"], "failed"),
        ("", ["assert f(1) == 2"], "failed"),
        ("", [], "passed"),
        ("def f(x) return x", ["assert True"], "invalid"),
        ("\0", ["assert True"], "invalid"),
        ("x = '\ud800'", ["assert True"], "invalid"),
        ("def f(x): return x", ["assert f("], "failed"),
        ("raise SystemExit", ["assert True"], "failed"),
        ("raise KeyboardInterrupt", ["assert True"], "failed"),
        ("x = 1\r\ndef f():\r\n\treturn x", ["assert f() == 1"], "passed"),
        ("import math, re, collections, heapq, itertools, ctypes, decimal", [], "passed"),
        ("if __name__ == '__main__': raise ValueError", ["assert True"], "passed"),
        ("import numpy", ["assert True"], "failed"),
        ("import kpsvd_tune", ["assert True"], "failed"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n a: int", ["A(1)"], "passed"),
        ("import pickle\nclass A: pass", ["pickle.loads(pickle.dumps(A()))"], "passed"),
        ("def f(): f()", ["f()"], "failed"),
        ("open('/tmp/a', 'w').write('x')", ["assert open('/tmp/a').read() == 'x'"], "passed"),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", [], "passed"),
        ("print('noise')", ["assert True"], "passed"),
    ],
)
def test_verdicts(source: str, tests: list[str], status: str):
    result = run_program(Program(source, tuple(tests)))
    assert result.status == status, result


@needs_bubblewrap
def test_the_error_and_the_output_are_told():
    result = run("print('hello')\nraise ValueError('two\\nlines')")
    assert result == RunResult("failed", "ValueError: two lines", "hello\n")


@needs_bubblewrap
def test_the_network_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert result.status == "failed"
        assert "Connection refused" in result.detail or "unreachable" in result.detail
        result = run("import socket\nsocket.getaddrinfo('localhost.example', 80)")
        assert result.status == "failed"
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_bubblewrap
def test_abstract_sockets_of_this_machine_cannot_be_reached():
    name = f"\0kpsvd-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        result = run(f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({name!r})")
        assert "ConnectionRefusedError" in result.detail


@needs_bubblewrap
def test_home_and_other_files_are_not_there(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    hidden = [str(secret), str(Path.home() / ".bashrc"), "/etc/passwd", "/etc/shadow", "/proc/1"]
    hidden += [str(Path(__file__)), "/root/.bashrc", "/sys/kernel", "/dev/tty", "/var"]
    result = run(f"import os\nassert not [p for p in {hidden} if os.path.exists(p)]")
    assert result.passed, result


@needs_bubblewrap
def test_the_environment_is_cleared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    result = run("import os\nprint(sorted(os.environ))")
    assert result.output.strip() == "['HOME', 'LANG', 'PATH', 'PWD', 'PYTHONHASHSEED']"


@needs_bubblewrap
def test_the_program_is_not_root():
    result = run(
        """
        import os
        assert 0 not in {*os.getresuid(), *os.getresgid(), *os.getgroups()}
        for change in (os.setuid, os.setgid):
            try:
                change(0)
            except OSError:
                continue
            raise AssertionError("became root")
        """
    )
    assert result.passed, result


@needs_bubblewrap
@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/usr/x",
        "/lib/x",
        "/dev/x",
        "/etc/x",
        "/root/x",
        "/home/x",
        "/usr/bin/env",
        "/tmp/../x",
    ],
)
def test_nothing_outside_tmp_can_be_written(path: str):
    assert run(f"open({path!r}, 'a')").status == "failed"


@needs_bubblewrap
def test_python_itself_is_read_only():
    assert run("import os\nopen(os.__file__, 'a')").status == "failed"
    assert run("import os\nos.chmod(os.__file__, 0o777)").status == "failed"


@needs_bubblewrap
def test_what_is_written_is_gone_afterwards():
    name = f"kpsvd-{os.urandom(8).hex()}"
    assert run(f"open('/tmp/{name}', 'w').write('x')", f"open('/tmp/{name}')").passed
    assert not (Path(tempfile.gettempdir()) / name).exists()
    assert run(f"open('/tmp/{name}')").status == "failed"


@needs_bubblewrap
def test_a_fork_bomb_is_stopped(marker: str):
    result = run(f"import os\nmarker = '{marker}'\nwhile True: os.fork()", limits=SHORT)
    assert not result.passed
    counted = run(
        """
        import os, time
        children = 0
        try:
            while children < 100:
                if os.fork() == 0:
                    time.sleep(60)
                children += 1
        except OSError:
            pass
        assert children < 8, children
        """,
        limits=Limits(num_processes=8),
    )
    assert counted.passed, counted


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "x = bytearray(2**30)",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "x = 'a' * 10**10",
        "import mmap\nx = mmap.mmap(-1, 2**30)",
    ],
)
def test_memory_is_limited(source: str):
    result = run(source)
    assert result.status == "failed"
    assert "MemoryError" in result.detail or "Cannot allocate memory" in result.detail


@needs_bubblewrap
def test_files_and_tmp_are_limited():
    large = run("open('/tmp/a', 'wb').write(bytes(2**25))", limits=Limits(file_bytes=2**20))
    assert "File too large" in large.detail
    many = run(
        "for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(2**20))",
        limits=Limits(scratch_bytes=2**22),
    )
    assert "No space left on device" in many.detail


@needs_bubblewrap
def test_files_are_limited_in_number():
    # The bomb ends by itself at 100,000 files, so that a sandbox without the limit does no harm.
    result = run(
        "import os\nfor i in range(100_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))",
        limits=Limits(num_files=2000),
    )
    assert result.status == "files", result
    assert run("for i in range(1000): open(f'/tmp/{i}', 'w')", limits=Limits(num_files=2000)).passed


@needs_bubblewrap
def test_folders_and_links_count_as_files():
    for make in ("os.mkdir(f'/tmp/{i}')", "os.symlink('a', f'/tmp/{i}')", "os.mkfifo(f'/tmp/{i}')"):
        source = f"import os\nfor i in range(50_000): {make}"
        assert run(source, limits=Limits(num_files=1000)).status == "files", make


_FORKS = """
import os, time
{before}
for i in range(4):
    if os.fork() == 0:
        {inside}
        time.sleep(60)
time.sleep({seconds})
"""


@pytest.mark.slow
@needs_bubblewrap
def test_memory_is_counted_for_all_processes_together():
    limits = Limits(total_bytes=128 * 2**20)
    apart = _FORKS.format(before="", inside="x = b'a' * (40 * 2**20)", seconds=30)
    assert run(apart, limits=limits).status == "memory"
    # What the processes share is there once.
    shared = _FORKS.format(before="_x = b'a' * (60 * 2**20)", inside="pass", seconds=0.5)
    assert run(shared, limits=limits).passed


@needs_bubblewrap
def test_files_in_tmp_count_as_memory():
    source = "import time\nfor i in range(4): open(f'/tmp/{i}', 'wb').write(bytes(12 * 2**20))\n"
    result = run(source + "time.sleep(30)", limits=Limits(total_bytes=40 * 2**20))
    assert result.status == "memory", result


@needs_bubblewrap
def test_what_the_tests_use_is_counted_too():
    # Tests come from a data set, and nobody has looked at each of them.
    bomb = "import os\nfor i in range(50_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))"
    assert run("", bomb, limits=Limits(num_files=1000)).status == "files"
    limits = Limits(total_bytes=128 * 2**20)
    source = _FORKS.format(before="", inside="x = b'a' * (40 * 2**20)", seconds=30)
    assert run("", source, limits=limits).status == "memory"


@pytest.mark.slow
@needs_bubblewrap
def test_a_judge_that_is_kept_busy_is_a_time_out():
    result = run("x = 1", "while True: pass", limits=Limits(cpu_seconds=1))
    assert result.status == "timeout", result


@needs_bubblewrap
def test_little_is_imported_before_the_program():
    heavy = "{'typing', 'threading', 'pickle', 'socket', 'asyncio', 'copy', 'contextlib'}"
    result = run(f"import sys\nassert not {heavy} & set(sys.modules), sorted(sys.modules)")
    assert result.passed, result


_THREADS = """
import threading
def f(count):
    done = []
    threads = [threading.Thread(target=done.append, args=(i,)) for i in range(count)]
    for each in threads: each.start()
    for each in threads: each.join()
    return len(done)
"""


@pytest.mark.parametrize(
    "sandbox", [pytest.param("bwrap", marks=needs_bubblewrap), pytest.param("none")]
)
def test_what_the_user_runs_otherwise_leaves_room_for_threads(sandbox: Sandbox):
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(40)]
    try:
        result = run_program(Program(_THREADS, ("assert f(4) == 4",)), sandbox)
    finally:
        for each in others:
            each.kill()
            each.wait()
    assert result.passed, result


def test_the_limit_on_processes_counts_from_what_the_user_runs(monkeypatch: pytest.MonkeyPatch):
    def most(sandbox: Sandbox) -> int:
        return int(module._process_limits(Limits(), sandbox)["limits"]["RLIMIT_NPROC"])

    monkeypatch.setattr(module, "is_root", lambda: False)
    assert most("none") > module._num_own_threads() >= threading.active_count()
    assert most("bwrap") == 16
    monkeypatch.setattr(module, "_kernel_version", lambda: (5, 10))
    assert most("bwrap") >= 17


def test_no_more_programs_run_at_a_time_than_memory_is_there_for():
    assert module._num_workers(Limits(total_bytes=2**60)) == 1
    assert module._num_workers(Limits(total_bytes=1, memory_bytes=1)) == os.cpu_count()


@needs_bubblewrap
def test_only_sockets_of_ordinary_families_can_be_made():
    result = run(
        """
        import errno, socket
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            socket.socket(family).close()
        socket.socketpair()
        for family in range(64):
            if family in (1, 2, 10):
                continue
            for make in (socket.socket, socket.socketpair):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try:
                        made = make(family, kind)
                    except OSError as error:
                        assert error.errno == errno.EAFNOSUPPORT, (family, error)
                    else:
                        raise AssertionError((family, made))
        """
    )
    assert result.passed, result


@needs_bubblewrap
def test_kernel_memory_without_limit_is_refused():
    result = run(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.semget(0, 1, 0o1600) == -1
        assert libc.msgget(0, 0o1600) == -1
        assert libc.shmget(0, 4096, 0o1600) == -1
        """
    )
    assert result.passed, result


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass",
        "import ctypes, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])\n"
        "while True: pass",
    ],
)
@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
def test_an_overrun_with_the_signal_ignored_is_a_time_out(source: str, sandbox: Sandbox):
    limits = Limits(cpu_seconds=1, wall_seconds=60)
    assert run_program(Program(source, ("assert True",)), sandbox, limits).status == "timeout"


@needs_bubblewrap
def test_a_kill_without_an_overrun_is_no_time_out():
    result = run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "assert True")
    assert result.status == "crashed"


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(600)",
        "10 ** 10 ** 10",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "try:\n while True: pass\nexcept BaseException: pass",
        "import os\nos.closerange(0, 64)\nwhile True: pass",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(600)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n1 / 0",
    ],
)
def test_endless_programs_end(source: str):
    start = time.monotonic()
    assert not run(source, limits=SHORT).passed
    assert time.monotonic() - start < 20


@pytest.mark.slow
@needs_bubblewrap
def test_processor_time_is_limited_on_a_busy_machine_too():
    limits = Limits(cpu_seconds=1, wall_seconds=60)
    assert run("while True: pass", limits=limits).status == "timeout"


@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "while True: print('a' * 1000)",
        "import os\nwhile True: os.write(2, b'a' * 65536)",
    ],
)
def test_an_output_flood_is_cut_off(source: str):
    result = run(source)
    assert result.status == "output"
    assert len(result.output) <= Limits().output_bytes


@needs_bubblewrap
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import os\nprint('passed', flush=True)\nos._exit(0)",
        "import os\nfor fd in range(64):\n"
        " try: os.write(fd, b'\\npassed \\n' + b'0' * 32 + b' passed \\n')\n"
        " except OSError: pass\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nif os.fork(): os._exit(0)",
        "import builtins\nbuiltins.exec = lambda *_: None\nraise ValueError",
        "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    ],
)
def test_an_early_exit_is_no_success(source: str):
    assert not run(source, "assert False").passed


@needs_bubblewrap
def test_killing_the_parent_kills_nothing_of_ours():
    result = run(
        """
        import os, signal
        for pid in (os.getppid(), 1, -1):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        """,
        "assert False",
        limits=SHORT,
    )
    assert not result.passed
    assert run("x = 1", "assert x").passed


@needs_bubblewrap
@pytest.mark.parametrize("ending", ["", "raise ValueError", "import os; os._exit(0)"])
def test_no_child_is_left_behind(marker: str, ending: str):
    source = f"""
    import subprocess, sys
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)", "{marker}"],
        start_new_session=True,
    )
    print(child.poll())
    """
    result = run(textwrap.dedent(source) + ending)
    assert result.output == "None\n", result
    assert result.passed is (not ending)


@needs_bubblewrap
def test_no_new_namespace_and_no_debugger():
    result = run(
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x10000000) == -1
        assert libc.ptrace(0, 0, 0, 0) == -1
        assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1
        try:
            os.memfd_create("a")
        except OSError:
            pass
        else:
            raise AssertionError("memory without limit")
        """
    )
    assert result.passed, result


@pytest.mark.slow
@needs_bubblewrap
def test_a_killed_evaluation_leaves_no_program_running(marker: str):
    code = textwrap.dedent(
        f"""
        from kpsvd_tune.evaluation.sandbox.run import Program, run_program
        source = '''
        import subprocess, sys
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(600)", "{marker}"])
        '''
        import textwrap
        run_program(Program(textwrap.dedent(source), ()))
        """
    )
    package = str(Path(module.__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": package}
    )
    deadline = time.monotonic() + 30
    # The word stands in this process's command line and, once it runs, in its program's child's.
    while num_processes_holding(marker) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_processes_holding(marker) >= 2
    process.kill()
    process.wait()


@needs_bubblewrap
def test_results_come_in_order_with_progress():
    seen: list[tuple[int, int]] = []
    programs = [Program(f"x = {i}", ("assert x in {0, 3}",)) for i in range(4)]
    results = run_programs(programs, num_workers=2, progress=lambda *done: seen.append(done))
    assert [each.passed for each in results] == [True, False, False, True]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@needs_bubblewrap
def test_a_sandbox_that_does_not_start_scores_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_interpreter", lambda: ["/no/such/python"])
    with pytest.raises(ResourceError, match="sandbox did not start: bwrap.*Nothing was scored"):
        run("x = 1")


def test_without_bubblewrap_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    module.sandbox_fault.cache_clear()
    try:
        assert sandbox_fault() is not None
        with pytest.raises(InputError) as caught:
            run_programs([Program("", ())])
    finally:
        module.sandbox_fault.cache_clear()
    for part in ("found no bwrap", "sudo apt-get install bubblewrap", "--sandbox none"):
        assert part in str(caught.value)


def test_another_sandbox_is_refused():
    with pytest.raises(InputError, match="--sandbox must be bwrap or none, got 'docker'"):
        check_sandbox("docker")


@pytest.mark.slow
def test_without_a_sandbox_programs_run_under_the_limits_alone():
    programs = [
        Program("def f(x): return x + 1", ("assert f(1) == 2",)),
        Program("def f(x): return x", ("assert f(1) == 2",)),
        Program("while True: pass", ()),
        Program("import os\nos._exit(0)", ()),
        Program("x = bytearray(2**30)", ()),
    ]
    limits = Limits(cpu_seconds=1)
    results = run_programs(programs, sandbox="none", limits=limits, num_workers=1)
    assert [each.status for each in results] == ["passed", "failed", "timeout", "crashed", "failed"]


def test_without_a_sandbox_a_child_that_holds_the_streams_does_not_hang_the_run():
    start = time.monotonic()
    source = "import os, time\nif os.fork() == 0:\n time.sleep(600)"
    result = run_program(Program(source, ("assert True",)), "none", Limits(wall_seconds=30))
    assert result.passed
    assert time.monotonic() - start < 20


def test_an_interrupt_starts_no_further_program(monkeypatch: pytest.MonkeyPatch):
    started: list[str] = []
    gate = threading.Event()

    def slow(program: Program, *_) -> RunResult:
        started.append(program.source)
        gate.wait(0.05)
        return RunResult("passed")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_program", slow)
    programs = [Program(str(i), ()) for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        run_programs(programs, sandbox="none", num_workers=1, progress=interrupt)
    assert len(started) < 10
