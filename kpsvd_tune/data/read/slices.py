"""Splits as the datasets library writes them: `train`, `train[:50%]`, `train[10:20]+train[-5:]`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kpsvd_tune.errors import DataError

_SIDE = r"(?P<{0}>-?\d[\d_]*)(?P<{0}_pct>%)?"
_PART = re.compile(
    r"(?P<name>[^\[\]+()\s]+)"
    rf"(\[\s*({_SIDE.format('start')})?\s*:\s*({_SIDE.format('stop')})?\s*\])?"
    r"(\((?P<rounding>closest|pct1_dropremainder)\))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Part:
    """One split, or a stretch of its rows.

    Attributes:
        name: The split.
        start: First row, or per cent of the rows; negative counts from the end; None: the first.
        stop: One past the last.
        is_percent: Whether the two are per cent.
        drops_remainder: Whether one per cent is a whole number of rows, and the rest left out.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    is_percent: bool = False
    drops_remainder: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole split."""
        return self.start is None and self.stop is None

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """First row and one past the last, counted from 0; None: up to the end.

        Per cent are rounded to the nearest row, as the datasets library does.

        Args:
            count: Gives the number of rows; called where it is needed.
        """
        sides = (self.start, self.stop)
        if not self.is_percent and all(side is None or side >= 0 for side in sides):
            return self.start or 0, self.stop
        number = count()
        start, stop = (None if side is None else self._row(side, number) for side in sides)
        first, last, _ = slice(start, stop).indices(number)
        return first, last

    def _row(self, side: int, number: int) -> int:
        if not self.is_percent:
            return side
        if self.drops_remainder:
            return side * (number // 100)
        return round(side * number / 100)


def parse_split(split: str) -> tuple[Part, ...]:
    """Read the recipe's `split`.

    Raises:
        DataError: It is no name with an optional stretch, nor a sum of these.
    """
    parts = []
    for text in split.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise DataError(f"dataset.split is {split!r}; {_EXPECTED}")
        sides = [match["start"], match["stop"]]
        percent = {bool(match[f"{s}_pct"]) for s in ("start", "stop") if match[s] is not None}
        if len(percent) == 2:
            raise DataError(
                f"dataset.split is {split!r}, which mixes rows and per cent in one stretch; "
                "expected two numbers of rows, or both with %"
            )
        start, stop = (None if side is None else int(side) for side in sides)
        is_percent = percent == {True}
        if is_percent and any(side is not None and abs(side) > 100 for side in (start, stop)):
            raise DataError(f"dataset.split is {split!r}; expected from -100% to 100%")
        rounding = match["rounding"]
        if rounding and not is_percent:
            raise DataError(
                f"dataset.split is {split!r}: ({rounding}) says how per cent are rounded, and "
                "there are none; remove it"
            )
        parts.append(Part(match["name"], start, stop, is_percent, rounding == "pct1_dropremainder"))
    return tuple(parts)


_EXPECTED = (
    "expected a name such as train, a stretch of its rows such as train[:100], train[-100:] or "
    "train[10%:20%], or several joined by +"
)
