"""A run's cost in results.json, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.units import duration, energy, money

# Keys of results.json that these words stand for.
_KEYS = ("device_seconds", "earlier_device_seconds", "cost", "currency", "energy_joules")


def cost_in_words(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with texts for what the run cost; without a price only its energy is named.

    `cost` becomes "0.42 EUR: 12 min 36 s of a device at 2.00 EUR an hour" and `energy` "12 Wh".
    """
    shown = {key: value for key, value in results.items() if key not in _KEYS}
    cost, seconds = results.get("cost"), results.get("device_seconds")
    if isinstance(cost, int | float) and isinstance(seconds, int | float) and seconds > 0:
        currency = str(results.get("currency", ""))
        price = f"{money(cost / seconds * 3600)} {currency}".rstrip()
        amount = f"{money(cost)} {currency}".rstrip()
        shown["cost"] = f"{amount}: {duration(seconds)} of a device at {price} an hour"
    if isinstance(joules := results.get("energy_joules"), int | float):
        shown["energy"] = energy(joules)
    return shown
