"""The handlers: one request, repeated requests, and who else must not see the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest

from kpsvd_tune.data import StatelessSampler, TokenizedRow
from kpsvd_tune.training import signals, stream
from kpsvd_tune.training.loss import make_micro_batch
from kpsvd_tune.training.signals import StopSignals, ignore_signals

# Loads the one module by its path: the package around it would take seconds to import.
PROGRAM = f"""
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
sys.modules["signals"] = signals
spec.loader.exec_module(signals)
with signals.StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.requested, flush=True)
    time.sleep(1.05)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""


def test_a_second_signal_ends_the_process_at_once_but_an_echo_of_the_first_does_not():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "15\n", done.stderr
    assert done.returncode == 130


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

    monkeypatch.setattr(stream, "ignore_signals", ignore_late)
    rows = [TokenizedRow((1, 2, n), (-100, 2, n), n) for n in range(4)]
    sampler = StatelessSampler(4, 2, 1, 1, 0)
    make_batch = partial(make_micro_batch, pad_token_id=0)
    steps = list(stream.stream_steps(rows, sampler, range(3), 0, make_batch, num_workers=2))
    assert [len(batches) for batches in steps] == [1, 1, 1]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
