"""Processes that run trial after trial: each with its GPU, and the base model loaded once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils.logging import disable_progress_bar

from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.comparison.score import Scoring, score_model
from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.comparison.trial import Material, measure_base, run_trial
from kpsvd_tune.errors import FolderInUseError, KpsvdTuneError, ResourceError, StoppedBySignal
from kpsvd_tune.events import Events, Silence
from kpsvd_tune.phase import training_cures
from kpsvd_tune.processes import how_it_ended
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.comparison import Trial, TrialRow, TrialScore
from kpsvd_tune.report.results import StepMetrics
from kpsvd_tune.signals import StopSignals
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.storage.memory import explained_memory
from kpsvd_tune.units import counted

Stepped = Callable[[Trial, int, int, float], None]
# What a worker is given to do: a trial, a scoring, or the measurement of the base model.
Task = Setup | Scoring | None
# A trial that was asked to stop saves first; then it is killed, and has its last checkpoint.
GRACE_SECONDS = 60.0
# A trial or scoring whose parent was killed notices at its next step or batch of answers, and gives
# its folder back then.
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class _Answered:
    """What a scoring tells after each batch: how many answers it has, and of how many.

    It also tells a worker whose parent is gone, for then it cannot be sent.
    """

    done: int
    total: int


@dataclass
class _Worker:
    """A process, and what it does now."""

    process: ForkServerProcess
    slot: int
    task: Task = None
    is_busy: bool = False


class Workers(AbstractContextManager["Workers", None]):
    """At most ``jobs`` processes that take trials in turn; they end with the context.

    They share the threads, and take the GPUs in turn; ``stepped`` is called after each step. On
    SIGINT or SIGTERM here running trials save and end, and StoppedBySignal is raised. When a trial
    raises, the others are stopped and saved. A ResourceError says that a process was killed, most
    likely for its memory.
    """

    def __init__(self, material: Material, recipe: Recipe, jobs: int, stepped: Stepped) -> None:
        self._material, self._recipe, self._stepped = material, recipe, stepped
        self._jobs, self._workers = jobs, dict[Connection, _Worker]()
        # Told now and then how many tasks run.
        self.tick: Callable[[int], None] = lambda _: None
        # Told each trial as it is given to a process.
        self.begun: Callable[[Trial], None] = lambda _: None
        # Told after each batch of answers how many a scoring has, and of how many.
        self.answered: Callable[[Scoring, int, int], None] = lambda *_: None
        # Asked before each trial, and before each trial's model is scored.
        self.may_start: Callable[[Trial], bool] = lambda _: True
        self.may_score: Callable[[], bool] = lambda: True
        # Trials that had not saved in time when they were stopped.
        self.unsaved: list[Trial] = []

    def __exit__(self, *_: object) -> None:
        killed = _stop(self._workers)
        self.unsaved = [task.trial for task in killed if isinstance(task, Setup)]

    @staticmethod
    def warm_up() -> None:
        """Let the libraries of later processes be loaded in the background meanwhile."""
        with _outside_ctrl_c():
            forkserver.set_forkserver_preload(["kpsvd_tune.comparison.workers"])
            forkserver.ensure_running()

    @staticmethod
    def cool_down() -> None:
        """End what loads the libraries, which would outlive a command that ends before it has."""
        pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
        with suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
                # Waits for its end, so that the next one is not asked of it.
                forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def base(self, file: Path, events: Events) -> dict[str, float | None]:
        """The base model's losses, measured once for a comparison and kept in ``file``."""
        if file.exists():
            cure = "remove it, and the base model is measured again"
            known = read_json(file, dict[str, float | None], cure=cure)
            if {"validation_loss", "test_loss", "forgetting_loss"} <= known.keys():
                return known
        events.stage("measuring the base model")
        ((_, found),) = self._run([None])
        replace_file(file, to_json(found))
        base: dict[str, float | None] = found
        return base

    def rows(self, setups: Sequence[Setup]) -> Iterator[TrialRow]:
        """Run trials in order, and give each row as its trial ends.

        Where ``may_start`` says no while nothing runs, the rest is not run.
        """
        for _, row in self._run(setups):
            yield row

    def scores(self, scorings: Sequence[Scoring]) -> Iterator[tuple[Scoring, TrialScore]]:
        """Score models, and give each with its score as that is found.

        Where ``may_score`` says no while nothing runs, the rest is not scored.
        """
        yield from self._run(scorings)

    def _run(self, tasks: Sequence[Task]) -> Iterator[tuple[Any, Any]]:
        """Have tasks done in order, and give each with its result as that is found."""
        waiting = deque(tasks)
        signals = StopSignals(
            self._outlook,
            lambda: "running trials go back to their last checkpoints, finished ones are kept",
        )
        with signals:
            while waiting or self._busy():
                if signals.requested:
                    raise StoppedBySignal(signals.requested)
                self.tick(len(self._busy()))
                while waiting and len(self._busy()) < self._jobs:
                    if not self._may_start(waiting[0]):
                        if not self._busy():
                            waiting.clear()
                        break
                    self._give(waiting.popleft())
                # Looks up now and then, for a signal may have come while it slept.
                for end in wait(self._busy(), timeout=0.5):
                    assert isinstance(end, Connection)
                    message = _receive(end, self._workers[end])
                    if isinstance(message, tuple):
                        self._stepped(*message)
                    elif isinstance(message, _Answered):
                        scoring = self._workers[end].task
                        assert isinstance(scoring, Scoring)
                        self.answered(scoring, message.done, message.total)
                    elif isinstance(message, BaseException):
                        raise message
                    else:
                        self._workers[end].is_busy = False
                        yield self._workers[end].task, message

    def _may_start(self, task: Task) -> bool:
        if isinstance(task, Setup):
            return self.may_start(task.trial)
        return self.may_score() if task is not None and task.setup is not None else True

    def _outlook(self) -> str:
        """What a signal leads to now; asked by another thread."""
        tasks = [worker.task for worker in list(self._workers.values()) if worker.is_busy]
        if any(isinstance(task, Setup) for task in tasks):
            what = counted(len(tasks), "trial")
            return (
                f"waiting for {what} to save after the running step, at most "
                f"{GRACE_SECONDS:.0f} s; one that takes longer goes back to its last checkpoint"
            )
        if any(isinstance(task, Scoring) for task in tasks):
            return f"stopping {counted(len(tasks), 'scoring')}; finished answers are kept"
        if tasks:
            return "stopping the measurement of the base model, which is done again next time"
        if self._workers:
            return "stopping; finished trials are kept"
        return "stopping as soon as the libraries of the trials' process are loaded"

    def _busy(self) -> list[Connection]:
        return [end for end, worker in self._workers.items() if worker.is_busy]

    def _give(self, task: Task) -> None:
        """Give a task to a worker that has none, or to a new one."""
        idle = (end for end, worker in self._workers.items() if not worker.is_busy)
        end = next(idle, None) or self._start()
        worker = self._workers[end]
        worker.task, worker.is_busy = task, True
        if isinstance(task, Setup):
            self.begun(task.trial)
        # One that has died meanwhile says nothing any more, which is seen when it is listened to.
        with suppress(BrokenPipeError, ConnectionResetError):
            end.send(task)

    def _start(self) -> Connection:
        # Forked from a process that has the libraries and nothing else: a worker starts at once,
        # and no thread or GPU context is forked.
        self.warm_up()
        context = multiprocessing.get_context("forkserver")
        own, other = context.Pipe()
        slot, threads = len(self._workers), max(1, torch.get_num_threads() // self._jobs)
        arguments = (self._material, self._recipe, slot, threads, self._jobs, other)
        process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            with _outside_ctrl_c():
                process.start()
        except (EOFError, ConnectionError) as error:
            raise ResourceError(
                "the process that starts trials was killed; run the same command again: finished "
                "trials are kept"
            ) from error
        finally:
            other.close()
        self._workers[own] = _Worker(process, slot)
        return own


@contextmanager
def _outside_ctrl_c() -> Iterator[None]:
    """Start processes that never see the terminal's Ctrl-C."""
    # Running already it leaves the mask alone; started by the server it would lift it.
    resource_tracker.ensure_running()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


class _Answering(Silence):
    """Tells the parent how many answers there are, after each batch of them."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Send it; BrokenPipeError where nobody listens any more."""
        self._send(_Answered(done, total))


def _receive(end: Connection, worker: _Worker) -> Any:
    """The next message of a worker that has something to do."""
    try:
        return end.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        name = "the base model's measurement" if worker.task is None else _name(worker.task)
        raise ResourceError(
            f"{name} {how_it_ended(worker.process)}. Run the same command again, with fewer "
            "--jobs: finished trials are kept"
        ) from None


def _name(task: Setup | Scoring) -> str:
    return task.trial.folder_name if isinstance(task, Setup) else task.name


def _stop(workers: dict[Connection, _Worker]) -> list[Task]:
    """Ask what still runs to save, and end all; gives the tasks of those that had to be killed."""
    killed = list[Task]()
    try:
        _ask_to_end(workers)
    finally:
        # Also where a second signal ends the waiting.
        for worker in workers.values():
            if worker.process.is_alive():
                worker.process.kill()
                killed.append(worker.task)
            worker.process.join()
        workers.clear()
    return killed


def _ask_to_end(workers: dict[Connection, _Worker]) -> None:
    """Ask, and wait until all have ended or the time is over."""
    for end, worker in workers.items():
        if not worker.is_busy:
            end.close()  # which tells it that there is no more to do
        elif worker.process.is_alive() and worker.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for end, worker in workers.items():
        # A full pipe would keep a trial from ending.
        while worker.process.is_alive() and time.monotonic() < deadline:
            with suppress(EOFError, OSError):
                if end.poll(0.1):
                    if not isinstance(end.recv(), tuple | _Answered):
                        end.close()  # it ended before it could hear, and waits for more
                    continue
            worker.process.join(0.1)


def _work(
    material: Material, recipe: Recipe, slot: int, threads: int, jobs: int, parent: Connection
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
    base = KeptBase(material.source, recipe)
    # The parent is gone, or has no more to do; what a trial saved is kept.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = parent.recv()
            answer = _answer(task, material, recipe, base, parent.send, jobs=jobs)
            if answer is None:
                return
            parent.send(answer)
            if isinstance(answer, BaseException):
                return


def _answer(
    task: Task,
    material: Material,
    recipe: Recipe,
    base: KeptBase,
    send: Callable[[Any], None],
    *,
    jobs: int = 1,
) -> Any:
    """What came of a task: its result, or the error that ended it; None where it was stopped."""

    def report(metrics: StepMetrics, total: int) -> None:
        assert isinstance(task, Setup)
        send((task.trial, metrics.step, total, metrics.loss))

    doing = "measuring the base model" if task is None else f"running {_name(task)}"
    own = task.recipe if isinstance(task, Setup) else recipe
    cures = ["fewer --jobs: trials at a time", *training_cures(own)]
    try:
        with explained_memory(doing, *cures):
            if task is None:
                return measure_base(material, recipe, base)
            if isinstance(task, Scoring):
                answering = _Answering(send)
                return _patiently(lambda: score_model(task, material, base, answering))
            return _patiently(lambda: run_trial(task, material, base, report, jobs=jobs))
    except StoppedBySignal:
        return None
    except (BrokenPipeError, ConnectionResetError):
        raise
    except KpsvdTuneError as error:
        return error
    except Exception as error:
        error.add_note("in a trial:\n" + traceback.format_exc())
        return error
    finally:
        # The trial's model, in whose modules and hooks there are circles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _patiently(function: Callable[[], Any]) -> Any:
    """Run again while a folder is still held by a worker whose parent was killed."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return function()
        except FolderInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
