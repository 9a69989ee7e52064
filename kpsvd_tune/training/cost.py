"""What a run of `train` took of its devices, and what that costs."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.processes import gather_numbers, gpu_identity
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.usage import Usage


def start_usage(accelerator: Accelerator) -> Usage:
    """Count from now on what this process uses; the main one counts the host's processors too."""
    return Usage(gpu_identity(accelerator.device), has_host=accelerator.is_main_process)


def run_cost(
    usage: Usage, accelerator: Accelerator, recipe: Recipe, seconds_before: float
) -> dict[str, Any]:
    """What results.json says of the cost; every process must ask.

    Args:
        usage: Of this process since the command began.
        accelerator: Gathers what the processes used.
        recipe: Holds the price of an hour of one device.
        seconds_before: Seconds of the training loop in earlier calls of this run, of which nothing
            else is known.

    Returns:
        `device_seconds`, `cost` and `currency` with a price, and `energy_joules` where every
        process tells its own for the whole run.
    """
    joules = usage.joules()
    told = gather_numbers(accelerator, [usage.seconds(), math.nan if joules is None else joules])
    # One device a process, from the first call of the command to the end of the last process.
    longest = max(seconds for seconds, _ in told)
    device_seconds = len(told) * (longest + seconds_before)
    found: dict[str, Any] = {"device_seconds": device_seconds}
    price = recipe.compare.price_per_hour
    if price is not None:
        found |= {"cost": device_seconds / 3600 * price, "currency": recipe.compare.currency}
    energy = sum(each for _, each in told)
    if seconds_before == 0 and math.isfinite(energy):
        found["energy_joules"] = energy
    return found
