"""Where bfloat16 is fast: devices with units for it, and a probe of the CPUs among them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kpsvd_tune.hardware.devices import hardware_name


def _cpu_unit() -> str:
    """This CPU's fastest unit for bfloat16, as its flags name it; empty where it has none."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return ""
    has = torch.cpu.get_capabilities()
    return next((unit for unit in ("amx_bf16", "avx512_bf16") if has.get(unit)), "")


CPU_UNIT = _cpu_unit()
CPU_MULTIPLIES_BF16 = bool(CPU_UNIT)
# A CPU that has units may still be slow with them, as where a library does not use them: in
# bfloat16 a product must be so many times as fast as in float32.
WORTHWHILE = 1.5
PROBE_SECONDS = 0.8
# CUDA devices from the Ampere generation on have units for bfloat16.
_AMPERE = 8
# Rows of activations and sides of the weight in the probe: a layer of a small model, large enough
# that a product is bound by multiplications.
_PROBE_SIZES = (256, 1024, 1024)


@dataclass(frozen=True)
class Bf16:
    """Whether a device computes in bfloat16 at full speed, and how that is known."""

    is_fast: bool
    why: str  # the device and the reason, as a clause
    ratio: float | None = None  # speed in bfloat16 over that in float32, where it was probed


def multiplies_narrow(dtype: torch.dtype, device_kind: str) -> bool:
    """Whether products of 16-bit numbers are at least as fast as those of 32-bit ones.

    A CPU without units for bfloat16 multiplies float32 many times faster.
    """
    if torch.finfo(dtype).bits >= 32:
        return False
    return device_kind != "cpu" or (dtype == torch.bfloat16 and CPU_MULTIPLIES_BF16)


def without_bf16(device: torch.device) -> str | None:
    """The device's name where it has no units for bfloat16; None where it has them."""
    if device.type == "cpu":
        return None if CPU_MULTIPLIES_BF16 else "this CPU"
    if device.type != "cuda":
        return None
    return None if torch.cuda.get_device_capability(device)[0] >= _AMPERE else hardware_name(device)


def bf16_speed(device: torch.device) -> Bf16:
    """Find out whether to compute in bfloat16: by the device's kind, and on a CPU by a probe.

    It takes at most a second.
    """
    name = hardware_name(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        is_new = major >= _AMPERE
        units = "multiplies bfloat16 natively" if is_new else "has no units for bfloat16"
        return Bf16(is_new, f"{name} (compute capability {major}.{minor}) {units}")
    if device.type != "cpu":
        return Bf16(False, f"bfloat16 has not been tried on {device.type}")
    if not CPU_MULTIPLIES_BF16:
        return Bf16(False, f"this CPU ({name}) has no units for bfloat16")
    ratio = probe_ratio()
    found = f"bfloat16 was {ratio:.1f} x as fast as float32 on this CPU ({name}) in a short probe"
    if ratio >= WORTHWHILE:
        return Bf16(True, found, ratio)
    return Bf16(False, f"{found}, and {WORTHWHILE} x are asked for", ratio)


def probe_ratio(seconds: float = PROBE_SECONDS) -> float:
    """The speed of a product on this CPU in bfloat16 over that in float32.

    The two take turns, and the fastest turn of each counts, so that a moment in which the machine
    does something else changes nothing.
    """
    tokens, size, out = _PROBE_SIZES
    pairs = {
        dtype: (torch.ones(tokens, size, dtype=dtype), torch.ones(out, size, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(pairs, float("inf"))
    began = time.perf_counter()
    # The first turn also sets the products up.
    for turn in range(1_000):
        for dtype, (x, weight) in pairs.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if turn > 1 and time.perf_counter() - began > seconds:
            break
    return best[torch.float32] / best[torch.bfloat16]
