"""What a run of `train` took of its devices, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.processes import gather_numbers, gpu_identity
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.runs.identity import PROCESSES
from kpsvd_tune.usage import Usage


def start_usage(accelerator: Accelerator) -> Usage:
    """Count from now on what this process uses; the main one counts the host's processors too."""
    return Usage(gpu_identity(accelerator.device), has_host=accelerator.is_main_process)


def earlier_device_seconds(
    changes: Iterable[Mapping[str, Any]], seconds: float, num_processes: int
) -> float:
    """Device-seconds of the earlier calls of a run, whose loop took some seconds until now.

    Args:
        changes: What run.json says was changed, in its order.
        seconds: Of the training loop, over all earlier calls.
        num_processes: Of this call.
    """
    total, since = 0.0, 0.0
    for each in changes:
        if each.get("key") == PROCESSES and "seconds" in each:
            # Going back to an older checkpoint takes time away.
            until = min(each["seconds"], seconds)
            total += each["old"] * max(0.0, until - since)
            since = max(since, until)
    return total + num_processes * (seconds - since)


def run_cost(
    usage: Usage, accelerator: Accelerator, recipe: Recipe, earlier: float
) -> dict[str, Any]:
    """What results.json says of the cost; every process must ask.

    Args:
        usage: Of this process since the command began.
        accelerator: Gathers what the processes used.
        recipe: Holds the price of an hour of one device.
        earlier: Device-seconds of the training loop in earlier calls of this run, of which nothing
            else is known.

    Returns:
        `device_seconds`, of which `earlier_device_seconds` if the run was stopped; `cost` and
        `currency` with a price, and `energy_joules` where every process tells its own for the
        whole run.
    """
    joules = usage.joules()
    told = gather_numbers(accelerator, [usage.seconds(), math.nan if joules is None else joules])
    # One device a process, from the first call of the command to the end of the last process.
    longest = max(seconds for seconds, _ in told)
    device_seconds = len(told) * longest + earlier
    found: dict[str, Any] = {"device_seconds": device_seconds}
    if earlier:
        found["earlier_device_seconds"] = earlier
    price = recipe.compare.price_per_hour
    if price is not None:
        found |= {"cost": device_seconds / 3600 * price, "currency": recipe.compare.currency}
    energy = sum(each for _, each in told)
    if earlier == 0 and math.isfinite(energy):
        found["energy_joules"] = energy
    return found
