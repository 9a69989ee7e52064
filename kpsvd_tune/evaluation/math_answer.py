r"""Answers of competition mathematics: the last \boxed{} of a solution and when two are equal.

By spelling: the string rules of the MATH benchmark (Hendrycks et al. 2021), in our own words. For
them "0.5", "1/2" and "\frac12" are one answer, "1/2" and "2/4" are two.

By value: the package math-verify, in processes that can be killed. It limits its own time with an
alarm signal, which works only in the main thread of a process and not inside symbolic algebra
written in C; so each worker is a process, and one that takes too long is killed and replaced.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import selectors
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kpsvd_tune.errors import InputError, ResourceError

INSTALL = (
    "The scorer math_verify needs the package math-verify, which is not installed. Run: pip "
    "install 'kpsvd-tune[math]'"
)
_START_SECONDS = 120.0
_ANSWER_MARK = "The answer is: "
_BOX = re.compile(r"\\(?:boxed|fbox)(?=[{ ])")
# Spellings that mean nothing, in the order in which the rules take them away or replace them.
_SPELLINGS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{}, braces matched; None where it never closes.

    ``\boxed 5$`` without braces is read up to the next dollar sign.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start] == " ":
        return text[start + 1 :].split("$")[0]
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    return None


def stated_answer(text: str) -> str | None:
    """What stands behind the last "The answer is: ", up to the end of its sentence.

    Source: MetaMath's evaluation of MATH (Yu et al. 2023).
    """
    _, mark, answer = text.rpartition(_ANSWER_MARK)
    return answer.split(".\n")[0].strip().removesuffix(".") or None if mark else None


def is_equiv(first: str, second: str) -> bool:
    """Whether two answers are spelled alike once `normalize` has unified them.

    Where the rules do not apply to one of them, the spellings as given decide.
    """
    try:
        return normalize(first) == normalize(second)
    except ValueError:
        return first == second


def normalize(answer: str) -> str:
    r"""One spelling for many of an answer: units, spaces, degree signs and short fractions unified.

    ValueError: a unit stands in the middle, or a root or a fraction has no argument.
    """
    for spelling, replacement in _SPELLINGS:
        answer = answer.replace(spelling, replacement)
    answer, *others = answer.split(_UNIT)
    if len(others) > 1:
        raise ValueError(f"several units behind {answer!r}")
    answer = answer.replace("\\%", "")
    answer = answer.replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    # "x = 5" and "k=5" give 5; a longer left side is part of the answer.
    sides = answer.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        answer = sides[1]
    answer = _braced_roots(answer).replace(" ", "")
    answer = _braced_fractions(answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    return _slash_as_fraction(answer)


def _braced_roots(answer: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``."""
    first, *roots = answer.split("\\sqrt")
    if "" in roots:
        raise ValueError(f"a root of nothing in {answer!r}")
    return first + "".join(
        "\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots
    )


def _braced_fractions(answer: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``; a braced numerator is left as it is."""
    first, *fractions = answer.split("\\frac")
    return first + "".join("\\frac" + _braced_arguments(fraction) for fraction in fractions)


def _braced_arguments(arguments: str) -> str:
    if arguments.startswith("{"):
        return arguments
    if len(arguments) < 2:
        raise ValueError(f"a fraction of {arguments!r}")
    numerator, denominator, rest = arguments[0], arguments[1], arguments[2:]
    if denominator == "{":
        return f"{{{numerator}}}{{{rest}"
    return f"{{{numerator}}}{{{denominator}}}{rest}"


def _slash_as_fraction(answer: str) -> str:
    """Two whole numbers with a slash between them, and nothing else, as a fraction."""
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", answer)
    if match is None:
        return answer
    numerator, denominator = int(match[1]), int(match[2])
    # "04/2" is left alone: it is not how its numbers are written.
    if answer != f"{numerator}/{denominator}":
        return answer
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def math_verify_available() -> bool:
    """Whether the extra package of this scorer is installed."""
    return importlib.util.find_spec("math_verify") is not None


def judge_by_value(
    pairs: Sequence[tuple[str, str]], *, seconds: float = 10.0, num_workers: int | None = None
) -> list[tuple[bool, bool]]:
    r"""For each (gold, completion): whether an answer was found, and whether it is right in value.

    The gold is a solution with a \boxed{} or the bare answer. More than `seconds` counts as wrong.
    InputError: math-verify is missing; ResourceError: a worker did not start.
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
        self._process: Any = None  # with pipes of text, from the first pair on

    def judge(self, gold: str, completion: str, seconds: float) -> tuple[bool, bool]:
        if self._process is None:
            self._start()
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

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import answer_questions as f; f()"],
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

    def _ask(self, question: dict[str, str], seconds: float) -> dict[str, bool] | None:
        """The answer, or None where the worker died or took too long."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def answer_questions() -> None:  # pragma: no cover  # the processes that run it are killed
    """What a worker process does: judge {"gold", "answer"} line by line, until the input ends."""
    from math_verify import parse, verify  # type: ignore[import-not-found,unused-ignore]

    # A dependency may print to standard output: the answers get a copy of it that only we know.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = parse(question["answer"])
            is_correct = bool(answer) and bool(verify(parse(question["gold"]), answer))
            verdict = {"extracted": bool(answer), "correct": is_correct}
        except Exception:  # an answer that symbolic algebra cannot read is not right
            verdict = {"extracted": False, "correct": False}
        print(json.dumps(verdict), file=answers, flush=True)
