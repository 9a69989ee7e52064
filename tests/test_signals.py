"""The handlers: one request, repeated requests, and who else must not see the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from kpsvd_tune import errors, signals
from kpsvd_tune.data import StatelessSampler, TokenizedRow
from kpsvd_tune.signals import StopSignals, ignore_signals
from kpsvd_tune.training import batches
from kpsvd_tune.training.batches import make_micro_batch

# Loads the one module by its path: the package around it would take seconds to import.
PROGRAM = f"""
import importlib.util, os, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
sys.modules["signals"] = signals
spec.loader.exec_module(signals)
def busy(seconds):
    # A computation in which Python runs no handler, as a backward pass is one.
    from hashlib import pbkdf2_hmac
    began = time.monotonic()
    pbkdf2_hmac("sha256", b"x", b"y", 50_000)
    rounds = int(50_000 * seconds / (time.monotonic() - began))
    print("busy", flush=True)
    pbkdf2_hmac("sha256", b"x", b"y", rounds)
"""

GRACEFUL = """
with signals.StopSignals(lambda: "finishing step 3", lambda: "2 steps are lost") as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.requested, flush=True)
    time.sleep(1.05)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
    print("still here", flush=True)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once_but_an_echo_of_the_first_does_not():
    done = run(GRACEFUL)
    assert done.stdout == "15\n", done.stderr
    assert done.returncode == errors.UNSAVED_EXIT_CODE == 5
    assert done.stderr == (
        "SIGTERM: finishing step 3; again to stop now\n"
        "stopped at once by a second SIGINT: 2 steps are lost\n"
    )


@pytest.mark.slow
def test_of_several_processes_the_first_alone_answers():
    done = run(GRACEFUL, RANK="1")
    assert (done.returncode, done.stderr) == (5, "")


@pytest.mark.slow
def test_both_signals_are_answered_while_a_computation_keeps_python_busy():
    program = """
with signals.StopSignals(lambda: "finishing step 3") as stop:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    busy(60)
"""
    began = time.monotonic()
    done = run(program)
    assert time.monotonic() - began < 30
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == "SIGINT: finishing step 3; again to stop now"
    assert "a second SIGINT: what was not saved is lost" in done.stderr


IMMEDIATE = """
began = time.monotonic()
try:
    with signals.StopSignals(lambda: "stopping soon", is_immediate=True) as stop:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        WORK
except KeyboardInterrupt:
    print("interrupted", stop.requested, flush=True)
"""


@pytest.mark.slow
def test_where_nothing_is_to_be_finished_a_signal_interrupts_at_once():
    done = run(IMMEDIATE.replace("WORK", "time.sleep(20)"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 15\n", "")


@pytest.mark.slow
def test_an_interruption_that_takes_a_while_is_told_of():
    done = run(IMMEDIATE.replace("WORK", "busy(3)"))
    assert (done.returncode, done.stdout) == (0, "busy\ninterrupted 15\n")
    assert done.stderr == "SIGTERM: stopping soon; again to stop now\n"


def test_a_block_inside_another_takes_over_and_gives_back():
    seen = []
    with StopSignals(is_immediate=True) as outer:
        with StopSignals() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append((outer.requested, inner.requested))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert seen == [(0, signal.SIGINT)]
    assert outer.requested == signal.SIGTERM
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_on_a_terminal_the_line_takes_the_place_of_a_progress_bar():
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM + GRACEFUL], stderr=theirs) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(ours, 1000):
                said += part
    os.close(ours)
    assert process.returncode == 5
    assert said.startswith(b"\r\x1b[2KSIGTERM: finishing step 3; again to stop now\r\n")
    assert said.endswith(b"2 steps are lost\x1b[?25h\r\n")  # a cursor that the bar hid


def test_the_first_signal_counts_and_the_handlers_come_back():
    earlier = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert stop.requested == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == earlier


def test_outside_the_main_thread_nothing_is_taken_over():
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_workers_ignore_both(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    ignore_signals(0)
    assert calls == [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_IGN)]


def test_a_signal_to_a_worker_that_is_just_starting_is_ignored(monkeypatch: pytest.MonkeyPatch):
    def ignore_late(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # torch has given it handlers that end it by now
        ignore_signals(worker)

    monkeypatch.setattr(batches, "ignore_signals", ignore_late)
    rows = [TokenizedRow((1, 2, n), (-100, 2, n), n) for n in range(4)]
    sampler = StatelessSampler(4, 2, 1, 1, 0)
    make_batch = partial(make_micro_batch, pad_token_id=0)
    steps = list(batches.stream_steps(rows, sampler, range(3), 0, make_batch, num_workers=2))
    assert [len(batches) for batches in steps] == [1, 1, 1]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
