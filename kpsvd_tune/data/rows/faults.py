"""Faulty rows that are left out: counted by reason, with the first of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kpsvd_tune.data.encode.chat import TemplateError
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.errors import DataError

_SHOWN = 3
_LONGEST = 240


class Faults:
    """Collects the faults of one source.

    Attributes:
        num_rows: Rows read so far, faulty ones among them.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._reasons: Counter[str] = Counter()
        self._first: list[tuple[int, str]] = []
        self._of_template = 0

    def add(self, row: Row, error: DataError) -> None:
        """Count a row that is left out."""
        # The source's name may be another when the stored rows are found again.
        text = str(error).removeprefix(f"{row.where}: ")
        self._reasons[_reason(text)] += 1
        self._of_template += isinstance(error, TemplateError)
        if len(self._first) < _SHOWN:
            self._first.append((row.number, text))

    def facts(self) -> dict[str, Any]:
        """What to keep with the stored rows, as JSON values."""
        return {
            "rows": self.num_rows,
            "faulty": self._reasons.total(),
            "reasons": self._reasons.most_common(),
            "first": self._first,
            "of_template": self._of_template,
        }


def faulty_rows_note(
    facts: Mapping[str, Any], label: str, unit: str, max_share: float
) -> str | None:
    """Say which rows of a source were left out; None where none were.

    Args:
        facts: From :meth:`Faults.facts`.
        label: The source.
        unit: What its rows are numbered by.
        max_share: The recipe's max_bad_rows.

    Raises:
        TemplateError: They are a larger share of the rows, by the chat template's fault alone:
            another template may do.
        DataError: They are a larger share of the rows.
    """
    rows, faulty = int(facts["rows"]), int(facts["faulty"])
    if not faulty:
        return None
    reasons = [f"{number} x {reason}" for reason, number in facts["reasons"][:5]]
    if more := len(facts["reasons"]) - len(reasons):
        reasons.append(f"{more} more reasons")
    first = " | ".join(f"{label}, {unit} {number}: {_cut(text)}" for number, text in facts["first"])
    found = (
        f"{faulty} of {rows} rows of {label} {'are' if faulty > 1 else 'is'} faulty: "
        f"{'; '.join(reasons)}. First: {first}"
    )
    if faulty > max_share * rows:
        is_template = int(facts["of_template"]) > max_share * rows
        raise (TemplateError if is_template else DataError)(
            f"{found}. That is {100 * faulty / rows:.3g} % of them and dataset.max_bad_rows is "
            f"{max_share:g} ({100 * max_share:g} %); mend the rows, or raise it if so many may be "
            "left out"
        )
    return f"LEFT OUT, as dataset.on_bad_row says: {found}"


def _reason(text: str) -> str:
    """The kind of a fault: its message without what differs from row to row."""
    text = re.sub(r"\s*\([^()]*\)", "", text)
    text = re.split(r"[;:] ", text, maxsplit=1)[0]
    return re.sub(r"\d+", "N", text)[:100]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
