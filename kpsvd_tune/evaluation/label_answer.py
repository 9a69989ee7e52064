"""Answers that are one of a few labels: which one an answer gives, and how good the answers are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.report.results import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

# In the confusion table, of an answer that gives no label.
NO_LABEL = "(none)"
# More labels than these are a sign of answers that are no labels.
_MOST_LABELS = 200
_RESAMPLES = 1000
# Between the words of a label.
_JOINTS = r"[\s_-]+"
_JOINT = re.compile(rf"(?<=\w){_JOINTS}(?=\w)")


def labels_of(answers: Sequence[str], given: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The labels there are: those that the recipe gives, or the answers of all rows.

    Raises:
        DataError: A right answer is none of those given, or the answers are no labels.
    """
    found = dict.fromkeys(answer.strip() for answer in answers)
    if given is not None:
        if unknown := next((each for each in found if each not in given), None):
            raise DataError(
                f"evaluation of label: {where} holds the right answer {unknown[:60]!r}, which is "
                f"none of evaluation.labels: {', '.join(given)}; add it there, or correct the row"
            )
        return tuple(given)
    if len(found) < 2 or len(found) > _MOST_LABELS:
        cure = (
            "name all labels in evaluation.labels"
            if len(found) < 2
            else "the task exact_match scores short answers, text scores texts"
        )
        raise DataError(
            f"evaluation of label: {where} holds {len(found)} different right answers; expected 2 "
            f"to {_MOST_LABELS} labels: {cure}"
        )
    return tuple(sorted(found))


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives; None where it gives none, or more than one.

    It is the answer itself, or else the only label that occurs in its first line, or in all of it
    where the first line has none. Case does not count, nor which of space, "_" and "-" joins its
    words, unless two labels differ in nothing else. A part of a compound ("non-toxic") or of a
    number ("4.7", "-1") is no label.
    """
    plain = text.strip()
    if plain in labels:
        return plain
    folded: dict[str, str | None] = {}
    for label in labels:
        key = _folded(label)
        folded[key] = None if key in folded else label
    # Of "spam" and "not spam" the longer one is looked for first.
    names = sorted(folded, key=len, reverse=True)
    pattern = re.compile("|".join(map(_as_word, names)))
    for part in (plain.partition("\n")[0], plain):
        found = {_folded(each) for each in pattern.findall(normalize("NFC", part).casefold())}
        if found:
            return folded[found.pop()] if len(found) == 1 else None
    return None


def _folded(label: str) -> str:
    return _JOINT.sub(" ", normalize("NFC", label).casefold())


def _as_word(name: str) -> str:
    """A pattern of a folded label that is no part of a word, a compound or a number."""
    parts = map(re.escape, name.split(" "))
    before = r"(?<!\d[.,])(?<!\W[-+\u2212])(?<!\A[-+\u2212])" if name[:1].isdigit() else ""
    behind = r"(?![.,]\d)" if name[-1:].isdigit() else ""
    return rf"(?<!\w)(?<!\w-){before}{_JOINTS.join(parts)}(?!\w)(?!-\w){behind}"


def given_label(completion: Completion) -> tuple[str, str | None, Sequence[str]]:
    """The right label of a completion, the one that it gives, and all that there are."""
    gold = completion.gold
    if (
        not isinstance(gold, Mapping)
        or not isinstance(gold.get("label"), str)
        or not isinstance(gold.get("labels"), list | tuple)
    ):
        raise DataError(
            f"the gold of the completion with id {completion.id!r} is {str(gold)[:60]!r}. Expected "
            '{"label": ..., "labels": [...]}; was this file written for another task?'
        )
    labels = [str(each) for each in gold["labels"]]
    return gold["label"], read_label(completion.completion, labels), labels


def confusion(completions: Sequence[Completion]) -> dict[str, dict[str, int]]:
    """How often each right label was answered by which label, without the zeros."""
    table: dict[str, dict[str, int]] = {}
    for completion in completions:
        right, given, _ = given_label(completion)
        row = table.setdefault(right, {})
        row[given or NO_LABEL] = row.get(given or NO_LABEL, 0) + 1
    return {right: dict(sorted(row.items())) for right, row in sorted(table.items())}


def macro_f1(completions: Sequence[Completion]) -> Score:
    """The mean of the labels' F1, over the labels that are right or given at least once.

    Its standard error is that of a bootstrap over the questions, 1000 times with one seed.
    """
    import numpy as np  # here, so that looking at the command line stays instant

    found = [given_label(completion) for completion in completions]
    names = sorted({right for right, _, _ in found} | {given for _, given, _ in found if given})
    number = {name: place for place, name in enumerate(names)}
    none = len(names)
    right = np.array([number[each] for each, _, _ in found])
    given = np.array([none if each is None else number[each] for _, each, _ in found])
    questions = list(dict.fromkeys(completion.id for completion in completions))
    place = {identifier: index for index, identifier in enumerate(questions)}
    owner = np.array([place[completion.id] for completion in completions])
    cells = right * (none + 1) + given
    whole = np.ones(len(questions))
    value = _mean_f1(cells, whole[owner], none)
    draw = np.random.default_rng(0)
    values = []
    for _ in range(_RESAMPLES):
        times = np.bincount(
            draw.integers(len(questions), size=len(questions)), minlength=len(questions)
        )
        values.append(_mean_f1(cells, times[owner].astype(float), none))
    return Score(
        scorer="macro_f1",
        value=value,
        n=len(questions),
        stderr=float(np.std(values)),
        unextractable=sum(each is None for _, each, _ in found),
        num_labels=len(names),
    )


def _mean_f1(cells: NDArray[Any], weights: NDArray[Any], num_labels: int) -> float:
    """Of the right and given labels in `cells`, each counted `weights` times."""
    import numpy as np

    size = num_labels + 1
    table = np.bincount(cells, weights=weights, minlength=size * size)[: size * size]
    table = table.reshape(size, size)[:num_labels]
    hits = np.diag(table[:, :num_labels])
    # Twice the hits over all that are right and all that were given: F1.
    total = table.sum(axis=1) + table[:, :num_labels].sum(axis=0)
    seen = total > 0
    return float((2 * hits[seen] / total[seen]).mean()) if seen.any() else 0.0
