"""What results.json says of the cost of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.recipe import load_recipe
from kpsvd_tune.training import cost
from kpsvd_tune.usage import Usage


class Told(Usage):
    """Time and energy as a test says."""

    def __init__(self, seconds: float, joules: float | None) -> None:
        super().__init__(has_host=False)
        self._told = seconds, joules

    def seconds(self) -> float:
        return self._told[0]

    def joules(self) -> float | None:
        return self._told[1]


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What the other processes tell."""
    told: list[list[float]] = []

    def gather(_: Any, own: Sequence[float]) -> list[list[float]]:
        return [list(own), *told]

    monkeypatch.setattr(cost, "gather_numbers", gather)
    return told


def test_device_time_is_priced(write_recipe: Callable[..., Path], others: object) -> None:
    recipe = load_recipe(write_recipe(compare={"price_per_hour": 1.5, "currency": "EUR"}))
    found = cost.run_cost(Told(1800.0, 90.0), None, recipe, 0.0)
    assert found == {
        "device_seconds": 1800.0,
        "cost": 0.75,
        "currency": "EUR",
        "energy_joules": 90.0,
    }


def test_every_process_is_a_device(
    write_recipe: Callable[..., Path], others: list[list[float]]
) -> None:
    recipe = load_recipe(write_recipe(compare={"price_per_hour": 1.5}))
    others.append([2000.0, 10.0])
    found = cost.run_cost(Told(1800.0, 90.0), None, recipe, 0.0)
    # Two devices for 2000 s: the first waits for the second.
    assert found["device_seconds"] == 4000.0
    assert found["cost"] == pytest.approx(4000 / 3600 * 1.5)
    assert found["energy_joules"] == 100.0


def test_a_run_that_went_on_counts_its_earlier_steps_and_tells_no_energy(
    write_recipe: Callable[..., Path], others: object
) -> None:
    recipe = load_recipe(write_recipe())
    found = cost.run_cost(Told(100.0, 90.0), None, recipe, 300.0)
    assert found == {"device_seconds": 400.0, "earlier_device_seconds": 300.0}


def test_a_device_that_tells_no_energy_is_not_guessed(
    write_recipe: Callable[..., Path], others: list[list[float]]
) -> None:
    others.append([1.0, float("nan")])
    found = cost.run_cost(Told(1.0, 90.0), None, load_recipe(write_recipe()), 0.0)
    assert "energy_joules" not in found


def test_each_stretch_counts_the_processes_that_it_had() -> None:
    changes = [
        {"key": "train.seed", "old": 0, "new": 1, "step": 2},
        {"key": "num_processes", "old": 4, "new": 1, "seconds": 100.0},
        {"key": "num_processes", "old": 1, "new": 2, "seconds": 160.0},
    ]
    record = {"changes": changes, "sessions": [{"started": "an older version's"}, {}]}
    assert cost.earlier_device_seconds({}, 200.0, 3) == 600.0
    assert cost.earlier_device_seconds(record, 200.0, 2) == 4 * 100 + 60 + 2 * 40
    # A run that went back to a checkpoint of before the second change.
    assert cost.earlier_device_seconds(record, 120.0, 2) == 4 * 100 + 20


def test_commands_that_counted_their_time_are_summed_whole() -> None:
    record = {
        "changes": [{"key": "num_processes", "old": 4, "new": 1, "seconds": 100.0}],
        "sessions": [{"device_seconds": 70.0}, {"device_seconds": 30.5}, {"device_seconds": 9.0}],
    }
    # The last one is under way.
    assert cost.earlier_device_seconds(record, 55.0, 1) == 100.5
    assert cost.earlier_device_seconds({"sessions": [{"device_seconds": 9.0}]}, 0.0, 1) == 0.0
