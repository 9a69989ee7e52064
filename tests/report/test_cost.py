"""A run's cost in words."""

from __future__ import annotations

from kpsvd_tune.report.cost import cost_in_words


def test_a_price_is_named_with_the_time_it_is_of() -> None:
    # 756 s at 2 an hour: 0.21 hours, 0.42.
    results = {"steps": 3, "device_seconds": 756.0, "cost": 0.42, "currency": "EUR"}
    assert cost_in_words(results) == {
        "steps": 3,
        "cost": "0.42 EUR: 12 min 36 s of a device at 2.00 EUR an hour",
    }


def test_without_a_price_no_cost_is_named() -> None:
    assert cost_in_words({"steps": 3, "device_seconds": 756.0}) == {"steps": 3}


def test_energy_is_named_with_or_without_a_price() -> None:
    assert cost_in_words({"energy_joules": 43_200.0}) == {"energy": "12 Wh"}
