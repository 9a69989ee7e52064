"""Trials in processes of their own: a few at a time, each with its memory, its GPU and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils.logging import disable_progress_bar

from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.comparison.trial import Material, measure_base, run_trial
from kpsvd_tune.errors import FolderInUseError, KpsvdTuneError, ResourceError, StoppedBySignal
from kpsvd_tune.events import Events
from kpsvd_tune.phase import training_cures
from kpsvd_tune.processes import how_it_ended
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.comparison import Trial, TrialRow
from kpsvd_tune.report.results import StepMetrics
from kpsvd_tune.signals import StopSignals
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.storage.memory import explained_memory

Stepped = Callable[[Trial, int, int, float], None]
# A trial that was asked to stop saves first; then it is killed.
GRACE_SECONDS = 60.0
# A trial whose parent was killed notices at its next step, and gives its folder back then.
_LOCK_SECONDS = 60.0


@dataclass
class _Running:
    """A trial in its process."""

    process: ForkServerProcess
    trial: Trial | None
    slot: int
    is_done: bool = False


def run_base(
    material: Material, recipe: Recipe, file: Path, events: Events
) -> dict[str, float | None]:
    """The base model's losses, measured once for a comparison and kept in ``file``."""
    if file.exists():
        cure = "remove it, and the base model is measured again"
        known = read_json(file, dict[str, float | None], cure=cure)
        if {"validation_loss", "test_loss", "forgetting_loss"} <= known.keys():
            return known
    events.stage("measuring the base model")
    found = next(_run([None], [(measure_base, (material, recipe))], 1, lambda *_: None))
    replace_file(file, to_json(found))
    base: dict[str, float | None] = found
    return base


def run_setups(
    setups: Sequence[Setup], material: Material, jobs: int, stepped: Stepped
) -> Iterator[TrialRow]:
    """Run trials in order, at most ``jobs`` at a time, and give each row as its trial ends.

    Trials share the threads, and take the GPUs in turn; ``stepped`` is called after each step. On
    SIGINT or SIGTERM here running trials save and end, and StoppedBySignal is raised. When a trial
    raises, the others are stopped and saved. A ResourceError says that one was killed, most likely
    for its memory.
    """
    calls = [(run_trial, (setup, material)) for setup in setups]
    yield from _run([setup.trial for setup in setups], calls, jobs, stepped)


def _run(
    trials: Sequence[Trial | None],
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    jobs: int,
    stepped: Stepped,
) -> Iterator[Any]:
    # Forked from a process that has the libraries and nothing else: a trial starts at once, and
    # no thread or GPU context is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kpsvd_tune.comparison.workers"])
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(zip(trials, calls, strict=True))
    running: dict[Connection, _Running] = {}
    signals = StopSignals(
        lambda: f"asking {len(running)} running trials to save, at most {GRACE_SECONDS:.0f} s",
        lambda: "running trials go back to their last checkpoints, finished ones are kept",
    )
    with signals:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not signals.requested:
                    trial, call = waiting.pop(0)
                    taken = {each.slot for each in running.values()}
                    slot = next(each for each in range(jobs) if each not in taken)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_work, args=(*call, slot, threads, sender), daemon=True
                    )
                    _start(process)
                    sender.close()
                    running[receiver] = _Running(process, trial, slot)
                if signals.requested:
                    raise StoppedBySignal(signals.requested)
                # Looks up now and then, for a signal may have come while it slept.
                for end in wait(list(running), timeout=0.5):
                    assert isinstance(end, Connection)
                    message = _receive(end, running[end])
                    if message is None:
                        del running[end]
                    elif isinstance(message, tuple):
                        stepped(*message)
                    elif isinstance(message, BaseException):
                        raise message
                    else:
                        running[end].is_done = True
                        yield message
        finally:
            _stop(running)


def _start(process: ForkServerProcess) -> None:
    """Start a trial; the server that forks it never sees the terminal's Ctrl-C."""
    # Running already it leaves the mask alone; started by the server it would lift it.
    resource_tracker.ensure_running()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    except (EOFError, ConnectionError) as error:
        raise ResourceError(
            "the process that starts trials was killed; run the same command again: finished "
            "trials are kept"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _receive(end: Connection, running: _Running) -> Any:
    """The next message of a trial; None when it has ended as it should."""
    try:
        return end.recv()
    except EOFError:
        running.process.join()
        if running.is_done:
            return None
        name = running.trial.folder_name if running.trial else "the base model's measurement"
        raise ResourceError(
            f"{name} {how_it_ended(running.process)}. Run the same command again, with fewer "
            "--jobs: finished trials are kept"
        ) from None


def _stop(running: dict[Connection, _Running]) -> None:
    """Ask what still runs to save and end; nothing is left behind."""
    for each in running.values():
        if each.process.is_alive() and each.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(each.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for end, each in running.items():
        # A full pipe would keep a trial from ending.
        while each.process.is_alive() and time.monotonic() < deadline:
            with suppress(EOFError, OSError):
                if end.poll(0.1):
                    end.recv()
                    continue
            each.process.join(0.1)
        if each.process.is_alive():
            each.process.kill()
        each.process.join()


def _work(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    slot: int,
    threads: int,
    sender: Connection,
) -> None:
    # Out of the terminal's group: its Ctrl-C reaches the parent alone, which passes it on once.
    os.setsid()
    torch.set_num_threads(threads)
    # Libraries warn about their insides, once for each process.
    warnings.simplefilter("ignore")
    # The bars of libraries would be drawn into the table of trials.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    # Bars would share a lock between processes, which outlives this one as a leaked semaphore.
    tqdm.set_lock(threading.RLock())
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    trial = arguments[0].trial if isinstance(arguments[0], Setup) else None

    def report(metrics: StepMetrics, total: int) -> None:
        sender.send((trial, metrics.step, total, metrics.loss))

    if isinstance(arguments[0], Setup):
        recipe, doing = arguments[0].recipe, f"running the trial {arguments[0].trial.folder_name}"
    else:
        recipe, doing = arguments[1], "measuring the base model"
    cures = ["fewer --jobs: trials at a time", *training_cures(recipe)]
    try:
        with explained_memory(doing, *cures):
            if trial is None:
                sender.send(function(*arguments))
            else:
                sender.send(_patiently(lambda: function(*arguments, report)))
    except BrokenPipeError:
        return  # the parent is gone; what the trial saved is kept
    except StoppedBySignal:
        return
    except KpsvdTuneError as error:
        sender.send(error)
    except Exception as error:
        error.add_note("in a trial:\n" + traceback.format_exc())
        sender.send(error)
    finally:
        sender.close()


def _patiently(function: Callable[[], Any]) -> Any:
    """Run again while a folder is still held by a trial whose parent was killed."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return function()
        except FolderInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
