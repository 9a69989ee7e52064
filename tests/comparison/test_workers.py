"""What a trial waits for, and what a signal to a comparison waits for."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.comparison import workers
from kpsvd_tune.comparison.score import Scoring
from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.comparison.workers import Workers
from kpsvd_tune.errors import CheckpointError, FolderInUseError
from kpsvd_tune.report.comparison import Trial


def test_a_trial_waits_while_its_folder_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | str] = [FolderInUseError("held"), FolderInUseError("held"), "row"]
    waits: list[float] = []

    def run() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("time.sleep", waits.append)
    assert workers._patiently(run) == "row"
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("error", "seconds"),
    # By the kind of the error and not by its words.
    [(CheckpointError("x is in use by another run"), 60.0), (FolderInUseError("held"), -1.0)],
)
def test_another_error_or_a_long_wait_ends_the_trial(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seconds: float
) -> None:
    def run() -> None:
        raise error

    monkeypatch.setattr(workers, "_LOCK_SECONDS", seconds)
    with pytest.raises(type(error), match=str(error)):
        workers._patiently(run)


class Process:
    """The process of a trial, which ends after so many short waits."""

    pid = None

    def __init__(self, joins: int) -> None:
        self.left, self.was_killed = joins, False

    def is_alive(self) -> bool:
        return self.left > 0

    def join(self, timeout: float | None = None) -> None:
        if timeout is None:
            assert self.was_killed or not self.left, "waits without an end"
        self.left -= 1

    def kill(self) -> None:
        self.was_killed, self.left = True, 0


def working(*processes: Process) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for number, process in enumerate(processes):
        own, _ = Pipe()
        trial = Trial("kpsvd", 100, 1e-3, number)
        task = Setup(trial, None, None, None, Path(), {}, {})  # type: ignore[arg-type]
        found[own] = workers._Worker(process, number, task, is_busy=True)  # type: ignore[arg-type]
    return found


def test_a_trial_that_does_not_save_in_time_is_killed_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    prompt, slow = Process(2), Process(10**6)
    held = working(prompt, slow)
    (killed,) = workers._stop(held)
    assert isinstance(killed, Setup)
    assert killed.trial.seed == 1
    assert (prompt.was_killed, slow.was_killed) == (False, True)
    assert not held


def test_a_second_signal_ends_the_waiting_for_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Process):
        def join(self, timeout: float | None = None) -> None:
            if timeout is not None:
                raise KeyboardInterrupt
            super().join()

    both = Interrupted(5), Process(5)
    with pytest.raises(KeyboardInterrupt):
        workers._stop(working(*both))
    assert [each.was_killed for each in both] == [True, True]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "stopping as soon as the libraries of the trials' process are loaded"),
        ([None], "stopping the measurement of the base model, which is done again next time"),
        (["trial"], "waiting for 1 trial to save after the running step, at most 60 s; one that"),
        (["trial", "trial"], "waiting for 2 trials to save after the running step, at most 60 s;"),
        (["scoring"], "stopping 1 scoring; finished answers are kept"),
    ],
)
def test_a_signal_is_answered_with_what_is_waited_for(tasks: list[Any], words: str) -> None:
    own = Workers(None, None, 1, lambda *_: None)  # type: ignore[arg-type]
    own._workers = working(*(Process(0) for _ in tasks))
    for worker, task in zip(own._workers.values(), tasks, strict=True):
        if task is None:
            worker.task = None
        elif task == "scoring":
            worker.task = Scoring(None, None, Path(), "a score")  # type: ignore[arg-type]
    assert own._outlook().startswith(words)
