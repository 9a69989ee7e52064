"""What may be spent: trainable parameters, time, or money."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import read_number_of_parameters

_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", re.ASCII)
_SECONDS = {"min": 60, "mins": 60, "minutes": 60, "h": 3600, "hours": 3600, "hour": 3600}
_EXPECTED = (
    "expected a number of trainable parameters such as 0.6M, a time such as 30min or 2h, or money "
    "such as 5USD"
)


@dataclass(frozen=True)
class Budget:
    """One limit of a run; the others are None."""

    parameters: int | None = None
    seconds: float | None = None
    money: float | None = None
    currency: str = "USD"

    def time_limit(self, price_per_hour: float | None) -> float | None:
        """Seconds that may be spent; None where time is not limited.

        Raises:
            InputError: Money is the limit, and nobody said what an hour costs.
        """
        if self.money is None:
            return self.seconds
        if price_per_hour is None:
            raise InputError(
                f"a budget of {self.money:g} {self.currency} needs the price of an hour of this "
                "machine: --price 1.20"
            )
        return 3600 * self.money / price_per_hour


def read_budget(text: str) -> Budget:
    """Read `0.6M`, `30min`, `2h` or `5USD`.

    Raises:
        InputError: It is none of them.
    """
    given = text.strip()
    if found := _AMOUNT.fullmatch(given):
        amount, unit = float(found[1]), found[2]
        if amount > 0 and unit.lower() in _SECONDS:
            return Budget(seconds=amount * _SECONDS[unit.lower()])
        # The three capital letters of a currency.
        if amount > 0 and len(unit) == 3 and unit.isupper():
            return Budget(money=amount, currency=unit)
        if unit == "m":
            # Minutes to some, millions to the recipe.
            raise InputError(
                f"budget: got {given!r}, which may mean minutes or millions; write {found[1]}min "
                f"or {found[1]}M"
            )
    try:
        return Budget(parameters=read_number_of_parameters(given))
    except ValueError:
        raise InputError(f"budget: got {given!r}; {_EXPECTED}") from None
