"""Everything that the folder of a run holds for its report, read back leniently.

A report is most wanted where something went wrong, so what one file lacks does not hide the others:
what cannot be read is told among the faults. Runs of older versions lack some of the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kpsvd_tune.errors import InputError, KpsvdTuneError
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.question import question_in
from kpsvd_tune.report.results import Event, LearnedReport, PreflightReport, RankReport
from kpsvd_tune.report.run import MEANS, read_run
from kpsvd_tune.storage.json_files import parse_json, read_bytes, read_json
from kpsvd_tune.storage.locks import is_shared

T = TypeVar("T")
Step = Mapping[str, Any]  # a line of metrics.jsonl, as StepMetrics has it
_CURE = "the report does without it"
# Where run.json keeps what this package was installed from, as `runs/installed.py` finds it.
INSTALLED_KEY = "installed_from"
# Where a run's identity keeps the sha256 of the text of `restrain`. A change is accepted with that
# of the key above it.
KEPT_TEXT_KEY = "restrain.text.sha256"
# Where run.json keeps the commands that the run took, each with when it `started`, its
# device-seconds so far, and when it `ended`, which one that was killed does not say.
SESSIONS_KEY, SECONDS_KEY = "sessions", "device_seconds"


@dataclass(frozen=True)
class RunFiles:
    """What a run has written so far."""

    folder: Path
    record: Mapping[str, Any]  # run.json; empty where there is none
    results: Mapping[str, Any]  # results.json; empty before the end
    ranks: RankReport | None
    metrics: Sequence[Step]  # by step; a step that was done twice is there once
    preflight: PreflightReport | None
    learned: LearnedReport | None
    events: Sequence[Event]
    recipe_text: str  # recipe.yaml
    faults: Sequence[str]  # files, or parts of them, that could not be read
    # Of an hour of a device, where it was given for this look at the run; else the recipe's holds.
    price_per_hour: float | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe; empty where no run.json says it."""
        found = self.record.get("identity", {}).get("recipe", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def currency(self) -> str:
        """What prices are in."""
        return str(self.recipe.get("compare", {}).get("currency", "USD"))

    def at_price(self, price_per_hour: float) -> RunFiles:
        """The run with its cost at another price of an hour of a device; its files stay."""
        results, seconds = self.results, self.results.get("device_seconds")
        if isinstance(seconds, int | float):
            cost = {"cost": seconds / 3600 * price_per_hour, "currency": self.currency}
            results = {**results, **cost}
        return replace(self, results=results, price_per_hour=price_per_hour)

    @property
    def name(self) -> str:
        """The folder's name, whatever path was typed for it."""
        return Path(os.path.realpath(self.folder)).name

    @property
    def state(self) -> str:
        """finished, running, stopped, failed or initialised."""
        return run_state(self.folder, self.record)

    @property
    def last_step(self) -> int:
        """Optimiser steps done, as far as the log tells."""
        logged = self.metrics[-1]["step"] if self.metrics else 0
        return int(self.results.get("steps", logged))


def read_run_files(folder: Path) -> RunFiles:
    """Read what a run has written.

    Raises:
        InputError: The folder is not that of a run.
    """
    faults: list[str] = []
    record = _lenient(folder / "run.json", dict[str, Any], faults) or {}
    if record:
        ranks = _ranks(folder / "init" / "rank_report.json", faults)
        results = None
        if is_finished(record):
            results = _lenient(folder / "results.json", dict[str, Any], faults)
        elif (folder / "results.json").exists():
            faults.append("results.json and learned.json are of an earlier end: the run went on")
    else:
        found = read_run(folder)
        ranks, results = found["ranks"], found["results"]
    events: tuple[Event, ...] = ()
    try:
        events = read_events(folder)
    except KpsvdTuneError as error:
        faults.append(str(error))
    return RunFiles(
        folder=folder,
        record=record,
        results=results or {},
        ranks=ranks,
        metrics=_metrics(folder / "metrics.jsonl", faults),
        preflight=_lenient(folder / "preflight.json", PreflightReport, faults),
        learned=_lenient(folder / "learned.json", LearnedReport, faults) if results else None,
        events=events,
        recipe_text=_text(folder / "recipe.yaml"),
        faults=faults,
    )


def is_finished(record: Mapping[str, Any]) -> bool:
    """Whether results.json is of this end of the run; it stays when a finished run goes on."""
    return record.get("status") == "finished"


def run_state(folder: Path, record: Mapping[str, Any]) -> str:
    """How a run stands, by its run.json and by whether a process holds its folder."""
    status = record.get("status")
    if status is None:
        return "initialised"
    lock = folder / ".lock"
    # The holder empties the file when it ends; one that was killed leaves its name, and no lock.
    if status == "running" and _text(lock).strip() and is_shared(lock):
        return "running"
    return str(status) if status in ("finished", "failed") else "stopped"


def json_lines(file: Path) -> Iterator[Mapping[str, Any] | None]:
    """The objects of a file of JSON lines; None for a line that is none.

    A last line that a kill has cut is left out. OSError: the file cannot be read.
    """
    lines = read_bytes(file).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        elif number < len(lines):
            yield None


def _metrics(file: Path, faults: list[str]) -> list[Step]:
    try:
        lines = list(json_lines(file)) if file.exists() else []
    except OSError as error:
        faults.append(f"{file} cannot be read: {error}; {_CURE}")
        return []
    steps: dict[int, Step] = {}
    num_bad = 0
    for line in lines:
        step = line.get("step") if line else None
        if line is None or not isinstance(step, int):
            num_bad += 1
            continue
        # A run that went back to a checkpoint does steps again.
        steps[step] = line
    if num_bad:
        faults.append(f"{file}: {num_bad} lines are no steps and were left out")
    return [steps[step] for step in sorted(steps)]


def _ranks(file: Path, faults: list[str]) -> RankReport | None:
    content = _lenient(file, dict[str, Any], faults)
    try:
        return RankReport.from_dict(content) if content else None
    except InputError as error:
        faults.append(f"{file}: {error}")
        return None


def _lenient(file: Path, expected: type[T], faults: list[str]) -> T | None:
    if not file.exists():
        return None
    try:
        return read_json(file, expected, error=InputError, cure=_CURE)
    except InputError as error:
        faults.append(str(error))
        return None


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8", errors="replace")
    except OSError:
        return ""


def completions_file(folder: Path, task: str) -> Path | None:
    """The adapter's stored answers to a task, by the name of its scores; None where there are none.

    Those of a later `eval` on the same rows replace the scores, and lie beside those of `train`.
    """
    name = re.sub(r"[^\w.-]+", "-", task)
    for place in (name, f"after/{name}"):
        file = folder / "evaluation" / place / "completions.jsonl"
        if file.is_file():
            return file
    return None


@dataclass(frozen=True)
class Answers:
    """Answers of one task to a few questions."""

    task: str
    num_questions: int  # that were answered after training, or before it
    # prompt, the question in it, gold, and the answers before and after, or None
    shown: Sequence[Mapping[str, Any]]
    wrong: Sequence[Mapping[str, Any]]  # the same of questions with a wrong answer after training
    num_wrong: int | None  # all of those; None where no scorer says which are wrong
    scorer: str  # that says it


def gold_text(gold: Any) -> str:
    """The right answer as a person reads it, without what scorers need besides."""
    if isinstance(gold, Mapping):
        for key in ("label", "json"):
            if key in gold:
                gold = gold[key]
                break
    return gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)


def read_answers(folder: Path, most: int) -> list[Answers]:
    """The first ``most`` questions of every task, with the answers before and after training.

    They are the first by row, of those answered both times where there are such: none is chosen
    for what was answered. Beside them the first wrong ones, where a scorer told right from wrong.
    Several samples of an answer are shown by the first.
    """
    # A later `eval` replaces the scores, so its answers come first, as in `completions_file`.
    places = {"before": ("base-{}", "before/{}"), "after": ("{}", "after/{}")}
    root = folder / "evaluation"
    if not root.is_dir():
        return []
    names = {
        each.name
        for part in (root, root / "before", root / "after")
        if part.is_dir()
        for each in part.iterdir()
        if (each / "completions.jsonl").is_file()
    }
    names = {n.removeprefix("base-") if (root / n).is_dir() else n for n in names}
    found = []
    for name in sorted(names):
        before, after = (_answered(root, name, patterns) for patterns in places.values())
        if one := _answers(name, before, after, most):
            found.append(one)
    return found


def _answered(root: Path, name: str, patterns: Sequence[str]) -> Path | None:
    """The first folder with answers to a task."""
    folders = [root / each.format(name) for each in patterns]
    return next((each for each in folders if (each / "completions.jsonl").is_file()), None)


def _answers(task: str, before: Path | None, after: Path | None, most: int) -> Answers | None:
    """Those of one task in the folders before and after training; None without a question."""
    first, second = (
        {} if folder is None else _first_samples(folder / "completions.jsonl")
        for folder in (before, after)
    )

    prompts = {
        key: str(asked.get("prompt", "")) for side in (first, second) for key, asked in side.items()
    }
    show = question_in(list(prompts.values()))

    def one(key: str) -> dict[str, Any]:
        asked = second.get(key) or first.get(key) or {}
        answers = {
            name: str(side[key].get("completion", "")) if key in side else None
            for name, side in (("before", first), ("after", second))
        }
        return {
            "row": key,
            "prompt": prompts.get(key, ""),
            "question": show(prompts.get(key, "")),
            "gold": asked.get("gold"),
        } | answers

    keys = sorted(first.keys() & second.keys() or second or first, key=_by_row)
    if not keys:
        return None
    shown = keys[:most]
    scorer, points = _points(after)
    wrong = sorted((key for key in second if points.get(key, 1.0) < 1.0), key=_by_row)
    return Answers(
        task=task,
        num_questions=len(second or first),
        shown=[one(key) for key in shown],
        wrong=[one(key) for key in wrong[:most]],
        num_wrong=len(wrong) if points else None,
        scorer=scorer,
    )


def _points(folder: Path | None) -> tuple[str, Mapping[str, float]]:
    """What a scorer that tells right from wrong gave each answer, by the question's id."""
    content: Any = None
    if folder is not None and (folder / "points.json").is_file():
        with suppress(OSError, ValueError):
            content = parse_json(read_bytes(folder / "points.json"))
    if not isinstance(content, dict):
        return "", {}
    scorer, points = content.get("scorer"), content.get("points")
    if not isinstance(scorer, str) or scorer in MEANS or not isinstance(points, dict):
        return "", {}
    return scorer, {key: each for key, each in points.items() if isinstance(each, int | float)}


def _first_samples(file: Path) -> dict[str, Mapping[str, Any]]:
    """The first answer to every question, by the question's id."""
    found: dict[str, Mapping[str, Any]] = {}
    try:
        for number, line in enumerate(json_lines(file)):
            if line is not None:
                found.setdefault(str(line.get("id", number)), line)
    except OSError:
        return {}
    return found


def _by_row(key: str) -> tuple[int, int, str]:
    return (0, int(key), "") if key.isascii() and key.isdigit() else (1, 0, key)
