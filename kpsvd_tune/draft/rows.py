"""Look at the rows: their form and columns, what their answers are, and which to hold out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from kpsvd_tune.data.encode.format import Chat, Pair, RowFormat, find_format
from kpsvd_tune.data.read.columns import advised_columns
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.read.sources import RowSource, open_sources
from kpsvd_tune.data.rows.batches import permutation
from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.doubt import doubt

# Rows to look at for the form and for the answers.
_LOOKED_AT = 1000
# Held-out rows: a share of the rows, and no more than answering them is quick.
_SHARE, _MOST = 0.1, 200
# A set of so few answers, each seen so often on average, is one of labels.
_MOST_LABELS, _LEAST_REPEATS = 20, 5
_LONGEST_LABEL = 60
# Answers of so few words are right or wrong as a whole.
_SHORT = 5


class UnnamedColumns(DataError):
    """Nothing tells which column is what."""

    def __init__(self, message: str, names: Sequence[str], guess: Mapping[str, str]) -> None:
        """Take the columns there are, and those by role that their order suggests, if any."""
        super().__init__(message, tuple(names), dict(guess))
        self.names, self.guess = tuple(names), dict(guess)

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])


@dataclass(frozen=True)
class LookedAt:
    """What was found in the rows."""

    path: str  # as it was typed
    form: RowFormat
    columns: Mapping[str, str]  # that the recipe has to name; empty where the rows do themselves
    num_rows: int  # distinct ones with something to learn
    num_all: int  # those that repeat one counted too
    held_out: tuple[Mapping[str, Any], ...]  # rows that are not to be trained on
    task: str | None  # that suits the answers; None: score nothing but the loss
    reason: str  # why that task
    examples: tuple[Pair | Chat, ...]  # of the first rows, those with something to learn
    labels: tuple[str, ...]  # the few answers there are, where the held-out rows lack some of them


def look_at(path: str, columns: Mapping[str, str]) -> LookedAt:
    """Read all rows once, and hold some of them out.

    Args:
        path: File, folder, pattern or hub id.
        columns: Column of each role, where the user said so.

    Raises:
        UnnamedColumns: No form fits, and no columns were named.
        DataError: There are no rows, those columns do not fit, or a row cannot be read.
    """
    sources = open_sources(path)
    first = list(islice(_rows(sources), _LOOKED_AT))
    if not first:
        raise DataError(f"{path}: holds no rows; expected at least two, each with an answer")
    form, columns = _form(first, columns)
    examples = tuple(each for row in first if (each := form.example(row)) is not None)
    task, reason = suited_task([answer_of(each) for each in examples], form)
    has_few = len({answer_of(each).strip() for each in examples}) <= _MOST_LABELS
    counts: Counter[bytes] = Counter()
    labels: dict[bytes, str] = {}  # of each distinct row; the same for all where there are none
    for example, _, key in _keyed(sources, form):
        counts[key] += 1
        if isinstance(example, Chat) and example.last_called is not None:
            # The scorers compare texts, and refuse such rows.
            task, reason = "loss", "some last answers call tools, which no scorer compares"
        labels[key] = answer_of(example).strip() if has_few else ""
    keys = list(counts)
    if len(keys) < 2:
        raise DataError(
            f"{path}: holds {len(keys)} distinct rows with an answer; expected at least two, one "
            "to learn from and one to judge by: are the columns right "
            f"({', '.join(f'{role}: {name}' for role, name in form.columns.items())})?"
        )
    chosen = {keys[place] for place in _drawn(list(labels.values()))}
    held_out = tuple(row.values for row, key in _distinct(sources, form) if key in chosen)
    known, asked = set(labels.values()), {labels[key] for key in chosen}
    lacking = tuple(sorted(known)) if has_few and known != asked else ()
    return LookedAt(
        path, form, columns, len(keys), counts.total(), held_out, task, reason, examples, lacking
    )


def _drawn(labels: Sequence[str]) -> list[int]:
    """Places to hold out: of every label its share, rounded up or down.

    The places are shuffled, then sorted by label, and taken at equal distances.
    """
    order = sorted(permutation(len(labels), "held out by init"), key=labels.__getitem__)
    number = min(_MOST, max(1, round(_SHARE * len(labels))))
    return [order[(2 * each + 1) * len(labels) // (2 * number)] for each in range(number)]


def suited_task(answers: Sequence[str], form: RowFormat) -> tuple[str | None, str]:
    """The task that scores such answers, and why; None where there is nothing to answer."""
    if form.name == "text":
        return "loss", "the rows are plain text, so there is no question to answer"
    if answers and all(_is_json(answer) for answer in answers):
        return "json", "every answer is a JSON object or list"
    distinct = {answer.strip() for answer in answers}
    is_labels = (
        1 < len(distinct) <= min(_MOST_LABELS, len(answers) / _LEAST_REPEATS)
        and max(map(len, distinct)) <= _LONGEST_LABEL
    )
    if is_labels:
        return "label", f"the answers are {len(distinct)} labels"
    words = sorted(len(answer.split()) for answer in answers)
    if not words or words[len(words) // 2] > _SHORT:
        return "text", "the answers are texts"
    if found := doubt("exact_match", answers, is_sample=False):
        return "text", f"the answers are a few words, but for exact_match {found.reason}"
    return "exact_match", "the answers are a few words or a number"


def _form(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[RowFormat, Mapping[str, str]]:
    """The form of the rows, with the columns that have to be named for it."""
    setting = "--columns"
    for row in rows:
        if row.fault is not None:
            raise row.fault
    try:
        return find_format(rows, "auto", columns, setting=setting), columns
    except DataError as error:
        if columns:
            raise
        filled = next((row for row in rows if any(row.values.values())), rows[0])
        advice = advised_columns(filled)
        if advice is None and setting not in str(error):
            raise  # other names would not help
        if advice is None or advice[1]:
            guess = {} if advice is None else advice[0]
            raise UnnamedColumns(str(error), list(filled.values), guess) from None
        form = find_format(rows, "auto", advice[0], setting=setting)
        named = " and ".join(f"{name} as {role}" for role, name in advice[0].items())
        return replace(form, reason=f"takes {named}"), advice[0]


def _rows(sources: Sequence[RowSource]) -> Iterator[Row]:
    for source in sources:
        for row in source.read():
            if row.fault is not None:
                raise row.fault
            yield row


def _distinct(sources: Sequence[RowSource], form: RowFormat) -> Iterator[tuple[Row, bytes]]:
    """The first of equal rows that have something to learn, each with its key."""
    seen: set[bytes] = set()
    for _, row, key in _keyed(sources, form):
        if key not in seen:
            seen.add(key)
            yield row, key


def _keyed(
    sources: Sequence[RowSource], form: RowFormat
) -> Iterator[tuple[Pair | Chat, Row, bytes]]:
    """The rows that have something to learn: each as an example, itself, and a key of it."""
    for row in _rows(sources):
        example = form.example(row)
        if example is not None:
            content = repr(example).encode("utf-8", "backslashreplace")
            yield example, row, hashlib.sha256(content).digest()[:16]


def answer_of(example: Pair | Chat) -> str:
    """The answer that is learnt of a row; of a chat the last one."""
    if isinstance(example, Pair):
        return example.completion
    return str(example.messages[example.learnt[-1]]["content"])


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
