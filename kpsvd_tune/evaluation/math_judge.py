"""Judge mathematical answers by value with math-verify, in processes that can be killed.

math-verify limits its own time with an alarm signal, which works in the main thread of a process
alone and not inside symbolic algebra written in C; so each worker is a process, and one that
overruns is ended and replaced.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import selectors
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.evaluation.math_answer import boxed_answer

INSTALL = (
    "The scorer math_verify needs the package math-verify, which is not installed. Run: pip "
    "install 'kpsvd-tune[math]'"
)
_START_SECONDS = 120.0


def math_verify_available() -> bool:
    """Whether the extra package of this scorer is installed."""
    return importlib.util.find_spec("math_verify") is not None


def judge_by_value(
    pairs: Sequence[tuple[str, str]], *, seconds: float = 10.0, num_workers: int | None = None
) -> list[tuple[bool, bool]]:
    r"""Whether answers equal their gold answers in value.

    Args:
        pairs: (gold, completion); the gold is a solution with a \boxed{} or the bare answer.
        seconds: the longest a judgement may take; one that takes longer counts as wrong.
        num_workers: processes; the number of processors by default.

    Returns:
        For each pair (an answer was found in the completion, it is right).

    Raises:
        InputError: math-verify is not installed.
        ResourceError: a worker process could not be started.
    """
    if not math_verify_available():
        raise InputError(INSTALL)
    if not pairs:
        return []
    num_workers = min(num_workers or os.cpu_count() or 1, len(pairs))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker() for _ in range(num_workers)]
    for worker in workers:
        idle.put(worker)

    def judge(pair: tuple[str, str]) -> tuple[bool, bool]:
        worker = idle.get()
        try:
            return worker.judge(*pair, seconds)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(num_workers) as threads:
            return list(threads.map(judge, pairs))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process that judges one pair at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def judge(self, gold: str, completion: str, seconds: float) -> tuple[bool, bool]:
        if self._process is None:
            self._process = self._start()
        boxed = gold if boxed_answer(gold) is not None else f"\\boxed{{{gold}}}"
        answer = self._ask({"gold": boxed, "answer": completion}, seconds)
        if answer is None:
            self.stop()
            return False, False
        return answer["extracted"], answer["correct"]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("math_verify_program.py").read_text(encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        # Imports take seconds; the first question is not to pay for them.
        if self._ask({"gold": "1", "answer": "1"}, _START_SECONDS) is None:
            self.stop()
            raise ResourceError(
                "a worker process of the scorer math_verify ended or hung at its start. Check "
                "that `python -c 'import math_verify'` works."
            )
        return self._process

    def _ask(self, question: dict[str, str], seconds: float) -> dict[str, bool] | None:
        """The answer, or None where the worker died or took too long."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = process.stdout.readline()
        return json.loads(line) if line else None
