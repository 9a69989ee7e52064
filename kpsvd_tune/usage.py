"""What a piece of work used: seconds, and joules where the devices count them.

NVIDIA GPUs tell their energy through the package nvidia-ml-py, where it is installed; Intel's and
AMD's processors tell theirs in files below /sys/class/powercap, where these may be read. A counter
belongs to a whole device: what other programs used of it meanwhile is in its figure.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A processor's counter starts again after some hundred kilojoules: half an hour of a large one.
_SAMPLE_SECONDS = 60.0


class Usage:
    """Seconds and joules from when it was made; the seconds from an earlier moment, if wanted.

    Args:
        began: Since when the seconds count, by `time.monotonic`; None: from now on.
        gpus: Identities of the GPUs that do the work, as NVML knows them (GPU-...). With one that
            tells no energy none is given at all, for the processors' alone would mislead.
        has_host: Whether this work is the only one of ours on the host's processors; else their
            energy is left out.
        powercap: Where the processors' counters are.
    """

    def __init__(
        self,
        gpus: Sequence[str] = (),
        *,
        began: float | None = None,
        has_host: bool = True,
        powercap: Path = POWERCAP,
    ) -> None:
        self._began = time.monotonic() if began is None else began
        self._gpus = [_Gpu(name) for name in gpus]
        self._zones = [_Zone(file) for file in _package_files(powercap)] if has_host else []
        if self._zones:
            own = weakref.ref(self)
            threading.Thread(target=_sample, args=(own,), daemon=True).start()

    def seconds(self) -> float:
        """Wall time so far."""
        return time.monotonic() - self._began

    def joules(self) -> float | None:
        """Energy so far; None where no device tells it, or one of the GPUs does not."""
        counters: list[_Gpu | _Zone] = [*self._gpus, *self._zones]
        found = [each.joules() for each in counters]
        known = [each for each in found if each is not None]
        return sum(known) if known and len(known) == len(found) else None


def _sample(own: weakref.ref[Usage]) -> None:
    """Read the counters that start again, for as long as somebody wants their sum."""
    while own() is not None:
        time.sleep(_SAMPLE_SECONDS)
        usage = own()
        if usage is not None:
            usage.joules()
        del usage


class _Gpu:
    """The energy counter of one GPU."""

    def __init__(self, name: str) -> None:
        self._read: Any = None
        self._start = 0.0
        # NVML has an error for whatever a driver, a card or a permission does not offer.
        with suppress(Exception):
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._start = float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float | None:
        with suppress(Exception):
            return (float(self._read()) - self._start) / 1000
        return None


class _Zone:
    """The energy counter of one processor package, which starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._last = _number(folder / "energy_uj")
        self._range = _number(folder / "max_energy_range_uj")
        self._total = 0

    def joules(self) -> float | None:
        with self._lock:
            now = _number(self._folder / "energy_uj")
            if now is None or self._last is None:
                self._last = None  # a gap may hide a new start
                return None
            step = now - self._last
            if step < 0:
                if self._range is None:
                    self._last = None
                    return None
                step += self._range
            self._last, self._total = now, self._total + step
            return self._total / 1e6


def _package_files(powercap: Path) -> list[Path]:
    """Folders of the processor packages, of which cores are parts; memory is not counted."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        with suppress(OSError):
            if (folder / "name").read_text("ascii").startswith("package"):
                found.append(folder)
    # Counters are for root alone on many systems.
    return [each for each in found if _number(each / "energy_uj") is not None]


def _number(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text("ascii"))
    return None
