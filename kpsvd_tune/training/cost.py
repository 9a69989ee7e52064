"""What a run of `train` took of its devices, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.processes import gather_numbers, gpu_identity
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.run_files import SECONDS_KEY, SESSIONS_KEY
from kpsvd_tune.runs.identity import PROCESSES
from kpsvd_tune.usage import Usage


def start_usage(accelerator: Accelerator, began: float | None) -> Usage:
    """Count what this process uses; the main one counts the host's processors too.

    `began` is when the command began, by `time.monotonic`: its seconds count from then on.
    """
    is_main = accelerator.is_main_process
    return Usage(gpu_identity(accelerator.device), began=began, has_host=is_main)


def earlier_device_seconds(record: Mapping[str, Any], seconds: float, num_processes: int) -> float:
    """Device-seconds of the earlier commands of a run.

    Where one of them was of an older version, which did not count them, they are those of the
    training loop alone.

    Args:
        record: The content of run.json.
        seconds: Of the training loop, over all earlier commands.
        num_processes: Of this command.
    """
    counted = [each.get(SECONDS_KEY) for each in record.get(SESSIONS_KEY, ({}, {}))[:-1]]
    known = [each for each in counted if each is not None]
    if len(known) == len(counted):
        return math.fsum(known)
    return _of_the_loop(record.get("changes", ()), seconds, num_processes)


def _of_the_loop(changes: Iterable[Mapping[str, Any]], seconds: float, num_processes: int) -> float:
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
        earlier: Device-seconds of earlier commands of this run, as far as they are known.

    Returns:
        `device_seconds`, of which `earlier_device_seconds` if the run was taken up; `cost` and
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
