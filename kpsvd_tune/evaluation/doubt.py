"""Right answers that do not look like those of the task that is to score them."""

from __future__ import annotations

from collections.abc import Sequence

from kpsvd_tune.evaluation.numeric_answer import last_number

# Labels repeat: fewer answers than these say nothing about that.
_LEAST = 5
# Of all rows at most this share have a label of their own.
_MOST_DIFFERENT = 0.9
# Labels and short answers have about so many words, or fewer.
_LABEL_WORDS, _SHORT_WORDS = 5, 12
_SHOWN = 40


def doubt(task: str, answers: Sequence[str], *, is_sample: bool) -> str | None:
    """What speaks against scoring such right answers with a task, in words; None where nothing.

    Args:
        task: Its name.
        answers: The right answers of rows, in any order.
        is_sample: Whether the rows are a few of many. A few rows may well have a label each, so
            that only answers longer than labels are doubted.
    """
    found = [answer.strip() for answer in answers]
    if len(found) < _LEAST:
        return None
    num, different = len(found), len(set(found))
    example = min(found, key=len)
    shown = example if len(example) <= _SHOWN else example[:_SHOWN].rstrip() + "..."
    if task == "label" and different >= _MOST_DIFFERENT * num:
        if is_sample and _median_words(found) <= _LABEL_WORDS:
            return None
        return (
            f"there are {different:,} different answers in {num:,} rows, such as {shown!r}, while "
            "labels are a few that repeat"
        )
    texts = [answer for answer in found if last_number(answer) is None]
    if task == "exact_match" and 2 * len(texts) > num and _median_words(texts) > _SHORT_WORDS:
        return (
            f"most of the {num:,} answers are texts of more than {_SHORT_WORDS} words, and "
            "hardly any model writes such a text word for word"
        )
    return None


def _median_words(texts: Sequence[str]) -> int:
    return sorted(len(text.split()) for text in texts)[len(texts) // 2]
