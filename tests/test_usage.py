"""Time and energy of a piece of work, by counters made by hand."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kpsvd_tune.usage import Usage


def zone(powercap: Path, name: str, called: str, microjoules: int) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{called}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder / "energy_uj"


def plant_nvml(monkeypatch: pytest.MonkeyPatch, counters: dict[str, list[int]]) -> None:
    """An NVML whose counters, in millijoules, give one value after the other."""

    def read(name: str) -> int:
        return counters[name].pop(0)

    nvml: Any = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_seconds_count_from_the_start() -> None:
    usage = Usage()
    time.sleep(0.01)
    assert 0.01 <= usage.seconds() < 10


def test_a_machine_that_tells_nothing_has_no_energy(tmp_path: Path) -> None:
    assert Usage(powercap=tmp_path / "nothing").joules() is None


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 100_000)
    zone(tmp_path, "intel-rapl:2", "psys", 100_000)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 500_000)
    usage = Usage(powercap=tmp_path)
    for part in tmp_path.glob("*/energy_uj"):
        part.write_text("900000")
    one.write_text("300000")
    other.write_text("550000")
    assert usage.joules() == pytest.approx(0.2 + 0.05)


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    usage = Usage(powercap=tmp_path)
    file.write_text("100000")
    assert usage.joules() == pytest.approx(0.2)
    file.write_text("50000")
    assert usage.joules() == pytest.approx(0.2 + 0.95)


def test_a_counter_that_can_no_longer_be_read_is_not_guessed(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    usage = Usage(powercap=tmp_path)
    file.unlink()
    assert usage.joules() is None
    file.write_text("900000")
    assert usage.joules() is None


def test_work_that_shares_the_host_leaves_its_processors_out(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    assert Usage(has_host=False, powercap=tmp_path).joules() is None


def test_a_gpu_and_the_processors_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nvml(monkeypatch, {"GPU-1": [5000, 7500]})
    file = zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    usage = Usage(["GPU-1"], powercap=tmp_path)
    file.write_text("200000")
    assert usage.joules() == pytest.approx(2.5 + 0.1)


def test_without_a_gpus_energy_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    plant_nvml(monkeypatch, {"GPU-1": [5000, 7500]})
    assert Usage(["GPU-2"], powercap=tmp_path).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Usage(["GPU-1"], powercap=tmp_path).joules() is None
