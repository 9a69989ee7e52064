"""Times, sizes and counts as people write them; files keep the raw numbers."""

from __future__ import annotations

import math

_SIZES = ("kB", "MB", "GB", "TB")


def duration(seconds: float) -> str:
    """A measured time: 0.4 s, 53 s, 4 min 10 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}".removesuffix(".0") + " s"
    return _whole(seconds)


def time_left(seconds: float | None) -> str:
    """How long something still takes, as every progress line says it.

    Nothing where nobody knows (None), or where it is less than half a second.
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0.5:
        return ""
    return f"{_whole(seconds)} left"


def size(num_bytes: float) -> str:
    """A number of bytes: 512 bytes, 64 kB, 421 MB, 1.2 GB; a kB is 1000 bytes."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    value, unit = num_bytes / 1000, 0
    # What would be rounded to 1000 is one of the next unit.
    while value >= 999.5 and unit < len(_SIZES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.0f} {_SIZES[unit]}" if value >= 9.95 else f"{value:.1f} {_SIZES[unit]}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: 1 step, 1,200 steps; ``plural`` where that is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def energy(joules: float) -> str:
    """Energy in watt-hours, 3600 joules each: 0.42 Wh, 12 Wh, 1.3 kWh."""
    hours = joules / 3600
    if hours >= 999.5:
        return f"{hours / 1000:,.1f} kWh"
    return f"{hours:.0f} Wh" if hours >= 9.95 else f"{hours:.2g} Wh"


def money(amount: float) -> str:
    """Two digits behind the point, or as many as show two of a small amount."""
    digits = 2 if not 0 < abs(amount) < 0.1 else 1 - math.floor(math.log10(abs(amount)))
    return f"{amount:,.{digits}f}"


def _whole(seconds: float) -> str:
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def percent(share: float) -> str:
    """A share, 0 to 1, in per cent; one that is not all of it never looks like all of it."""
    return f"{min(100 * share, 99.99) if share < 1 else 100:.4g} %"
