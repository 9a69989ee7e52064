"""The one place that chooses a device for training, scoring, generation and plans."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")
# Lines of /proc/cpuinfo that name a processor: on x86, and on most others.
_CPU_KEYS = ("model name", "Model", "cpu")


def wants_cpu() -> bool:
    """Whether the environment asks for the CPU although there may be another device."""
    return os.environ.get("ACCELERATE_USE_CPU") == "true"


def own_device(on_cpu: bool = False) -> torch.device:
    """The device of a process that works alone: a CUDA GPU, else Apple's mps, else the CPU.

    Accelerate, which chooses for a training, knows the same order.

    Args:
        on_cpu: Whether the CPU is asked for although there may be another device.
    """
    if on_cpu or wants_cpu():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def decomposing_device(device: torch.device) -> torch.device:
    """Where a weight is decomposed in a process that computes on a device.

    mps has no float64, in which the singular values are taken, and shares its memory with the CPU.
    """
    return torch.device("cpu") if device.type == "mps" else device


def hardware_name(device: torch.device) -> str:
    """What the hardware calls itself, such as `NVIDIA A100-SXM4-80GB` or `AMD EPYC`."""
    if device.type == "cuda":
        about: Any = torch.cuda.get_device_properties(device)
        return str(about.name)
    return _processor() or device.type


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        found.setdefault(key.strip(), value.strip())
    named = (found[key] for key in _CPU_KEYS if found.get(key))
    return next(named, platform.processor() or platform.machine())


def wait_for(device: torch.device) -> None:
    """Return once a device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
