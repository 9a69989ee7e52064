"""Times and sizes for people: every border between two units."""

from __future__ import annotations

import math

import pytest

from kpsvd_tune.units import counted, duration, energy, money, size, time_left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.02, "8 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (53, "53 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (86399, "1 d 0 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_a_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (64_192, "64 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (421_126_144, "421 MB"),
        (1_234_567_890, "1.2 GB"),
        (26_900_000_000, "27 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_a_size(num_bytes: float, text: str):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (math.inf, ""),
        (0.2, ""),
        (0.6, "1 s left"),
        (12.4, "12 s left"),
        (185, "3 min 05 s left"),
    ],
)
def test_the_time_left_is_said_in_one_way(seconds: float | None, text: str):
    assert time_left(seconds) == text


def test_money_shows_two_digits_however_small():
    amounts = (1234.5, 12.0, 0.091, 0.00012, 0.0, -0.5, -0.012)
    shown = ["1,234.50", "12.00", "0.091", "0.00012", "0.00", "-0.50", "-0.012"]
    assert [money(each) for each in amounts] == shown


def test_energy_is_in_watt_hours():
    joules = (360, 3600, 43_200, 3_600_000, 4_680_000)
    assert [energy(each) for each in joules] == ["0.1 Wh", "1 Wh", "12 Wh", "1.0 kWh", "1.3 kWh"]


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ["step"], "0 steps"),
        (1, ["step"], "1 step"),
        (1200, ["step"], "1,200 steps"),
        (1, ["matrix", "matrices"], "1 matrix"),
        (210, ["matrix", "matrices"], "210 matrices"),
    ],
)
def test_one_thing_is_no_plural(number: int, nouns: list[str], text: str):
    assert counted(number, *nouns) == text
