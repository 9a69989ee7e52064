"""Two runs side by side: what differs in what they were made of, in their curves and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.report.results import PairedScore, Result
from kpsvd_tune.report.run import LOSSES, losses, score_lines
from kpsvd_tune.report.run_files import KEPT_TEXT_KEY, RunFiles
from kpsvd_tune.report.run_words import (
    money_spent,
    peak_memory,
    seconds_trained,
    series,
    state_line,
    validations,
)
from kpsvd_tune.units import duration, size

# Steps at which the curves are set side by side.
_MOST_STEPS = 12
# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054
# By task: differences by scorer, or why there are none.
Paired = Mapping[str, Mapping[str, PairedScore] | str]


@dataclass(frozen=True)
class ScoreDifference(Result):
    """One score of two runs."""

    name: str  # the task
    scorer: str
    first: float
    second: float
    difference: float  # second minus first
    stderr: float | None  # of the difference; None where nobody can tell
    n: int  # questions or tokens of each, or of what both answered
    is_paired: bool  # whether the difference was taken question by question
    how: str  # what the difference rests on, in words

    @property
    def is_loss(self) -> bool:
        """Whether it is no share of right answers."""
        return self.scorer in LOSSES

    @property
    def verdict(self) -> str:
        """What the difference and its standard error say together."""
        if self.stderr is None:
            return "its standard error is not known"
        if abs(self.difference) <= _Z * self.stderr or self.stderr == 0 == self.difference:
            return "could be chance (within 1.96 standard errors)"
        return "more than chance (beyond 1.96 standard errors)"


@dataclass(frozen=True)
class Pair(Result):
    """Two runs side by side."""

    first: str  # folders
    second: str
    names: tuple[str, str]
    states: tuple[str, str]
    # (what, of the first, of the second), in words
    figures: tuple[tuple[str, str, str], ...]
    recipe: tuple[tuple[str, str, str], ...]  # dotted keys that differ
    versions: tuple[tuple[str, str, str], ...]  # packages, device and processes that differ
    made_of: tuple[tuple[str, str, str], ...]  # rows and base model: the same, or their hashes
    # (step, loss of the first, of the second) at validations that both made
    curve: tuple[tuple[int, float, float], ...]
    curve_name: str  # which loss that is
    scores: tuple[ScoreDifference, ...]
    notes: tuple[str, ...]  # what a reader must know


def set_side_by_side(first: RunFiles, second: RunFiles, paired: Paired) -> Pair:
    """Compare two runs.

    Args:
        first: A run.
        second: Another.
        paired: Differences question by question, where the answers of both are stored.
    """
    curve_name, curve = _curve(first, second)
    made_of = tuple(_made_of(first, second))
    scores = tuple(_scores(first, second, paired))
    names = (first.name, second.name)
    if names[0] == names[1]:
        names = (str(first.folder), str(second.folder))
    return Pair(
        first=str(first.folder),
        second=str(second.folder),
        names=names,
        states=(state_line(first), state_line(second)),
        figures=tuple(_figures(first, second)),
        recipe=tuple(_different(_flat(first.recipe), _flat(second.recipe), ("output_dir",))),
        versions=tuple(_different(_machine(first), _machine(second))),
        made_of=made_of,
        curve=curve,
        curve_name=curve_name,
        scores=scores,
        notes=tuple(_notes(first, second, made_of)),
    )


def _figures(first: RunFiles, second: RunFiles) -> Iterator[tuple[str, str, str]]:
    sides = (first, second)
    after = [losses(run.results)[1] for run in sides]
    before = [losses(run.results)[0] for run in sides]
    train = [run.results.get("train_loss") for run in sides]
    trained = [None if run.ranks is None else run.ranks.trained_parameters for run in sides]
    rows: list[tuple[str, list[Any], str]] = [
        ("validation loss", after, ".4f"),
        ("the same before training", before, ".4f"),
        ("training loss, mean of the last steps", train, ".4f"),
        ("steps", [run.last_step for run in sides], ","),
        ("trainable parameters", trained, ","),
    ]
    for name, values, form in rows:
        yield _row(name, ["–" if value is None else f"{value:{form}}" for value in values])
    times = [seconds_trained(run) for run in sides]
    yield _row("time of the training", ["–" if t is None else duration(t) for t in times])
    spent = [money_spent(run) for run in sides]
    if any(spent):
        yield _row("cost", ["–" if each is None else each[0] for each in spent])
    peaks = [peak_memory(run) for run in sides]
    yield _row("peak memory of a process", ["–" if p is None else size(p) for p in peaks])


def _row(name: str, values: Sequence[str]) -> tuple[str, str, str]:
    first, second = values
    return name, first, second


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe with dotted keys; lists of sections by their number."""
    found: dict[str, Any] = {}
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, list) and any(isinstance(one, Mapping) for one in each):
            each = {str(place): one for place, one in enumerate(each)}
        if isinstance(each, Mapping) and each:
            found |= _flat(each, f"{name}.")
        else:
            found[name] = each
    return found


def _machine(run: RunFiles) -> dict[str, Any]:
    record = run.record
    other = {key: record[key] for key in ("device", "num_processes") if key in record}
    return {**record.get("versions", {}), **other}


def _different(
    first: Mapping[str, Any], second: Mapping[str, Any], left_out: Sequence[str] = ()
) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        if one != other and key not in left_out:
            yield key, _text(first, key), _text(second, key)


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    value = values[key]
    return "null" if value is None else str(value)


def _made_of(first: RunFiles, second: RunFiles) -> Iterator[tuple[str, str, str]]:
    own, other = (run.record.get("identity", {}) for run in (first, second))
    for name, key in (
        ("rows", "dataset"),
        ("base model", "base"),
        ("adapter begun with", "adapter"),
        ("text of restrain", KEPT_TEXT_KEY),
    ):
        one, two = own.get(key), other.get(key)
        if one is None and two is None:
            continue
        if one == two:
            yield name, "the same", "the same"
        elif isinstance(one, Mapping) and isinstance(two, Mapping):
            differ = [file for file in {**one, **two} if one.get(file) != two.get(file)]
            for file in differ:
                yield f"{name}, {file}", _digest(one.get(file)), _digest(two.get(file))
        else:
            yield name, _digest(one), _digest(two)


def _digest(value: Any) -> str:
    return "not known" if value is None else str(value)[:12]


def _curve(first: RunFiles, second: RunFiles) -> tuple[str, tuple[tuple[int, float, float], ...]]:
    """Losses at steps that both runs logged: of validations, or else of training."""
    ways = {
        "validation loss": [validations(run) for run in (first, second)],
        "training loss": [series(run.metrics, "loss") for run in (first, second)],
    }
    for name, sides in ways.items():
        one, other = (dict(zip(*side, strict=True)) for side in sides)
        shared = [step for step in one if step in other]
        if len(shared) > (name == "validation loss"):
            last = len(shared) - 1
            places = sorted({round(i * last / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)})
            steps = [shared[place] for place in places]
            return name, tuple((int(step), one[step], other[step]) for step in steps)
    return "validation loss", ()


def _scores(first: RunFiles, second: RunFiles, paired: Paired) -> Iterator[ScoreDifference]:
    own, other = (
        {(s.name, s.scorer): s for s in score_lines(run.results) if s.model == "adapter"}
        for run in (first, second)
    )
    for key, one in own.items():
        if key not in other:
            continue
        two, (name, scorer) = other[key], key
        a, b = one.score, two.score
        found = paired.get(name, "no answers are stored")
        pair = found.get(scorer) if isinstance(found, Mapping) else None
        asked = "" if one.conditions == two.conditions else "; they were asked in different ways"
        if pair is not None:
            yield ScoreDifference(
                *(name, scorer, a["value"], b["value"], pair.difference, pair.stderr, pair.n, True),
                how=f"question by question over {pair.n}: the second is better in "
                f"{pair.second_better}, the first in {pair.first_better}{asked}",
            )
            continue
        errors = [float(each["stderr"]) for each in (a, b) if each.get("stderr") is not None]
        stderr = math.hypot(*errors) if len(errors) == 2 else None
        why = found if isinstance(found, str) else f"{scorer} is no mean over questions"
        if scorer in LOSSES:
            why = "losses of single tokens are not stored"
        yield ScoreDifference(
            *(name, scorer, a["value"], b["value"], b["value"] - a["value"], stderr, a["n"], False),
            how=f"as if the two were independent, for {why}{asked}",
        )


def _notes(
    first: RunFiles, second: RunFiles, made_of: Sequence[tuple[str, str, str]]
) -> Iterator[str]:
    if any(name == "rows" and one != "the same" for name, one, _ in made_of):
        yield (
            "the rows differ, and so may the held-out ones: losses of the two are not of the same "
            "text, and their difference says little"
        )
    if any(name.startswith("base model") and one != "the same" for name, one, _ in made_of):
        yield "the base models differ: the losses before training say by how much"
    for run in (first, second):
        if run.state != "finished":
            yield f"{run.name} is not finished: {state_line(run)}"
    yield (
        "a difference of the losses of two single runs has no standard error here: runs of the "
        "same recipe with other seeds show how much chance moves them (`kpsvd-tune compare`)"
    )
