"""Each check of `doctor`: what was found, whether it is well, and what to do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kpsvd_tune.doctor.packages import (
    extras,
    install_command,
    installed_packages,
    package_faults,
    python_fault,
)
from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.offline import hub_address, is_offline, no_answer
from kpsvd_tune.report.doctor import Check, Status
from kpsvd_tune.storage.memory import free_memory, host_memory
from kpsvd_tune.storage.paths import CACHE_PLACE, cache_folder
from kpsvd_tune.units import counted, size

# Below this a checkpoint or a decomposition soon fails, and below the other nothing can be written.
_LITTLE_DISK, _NO_DISK = 5 * 10**9, 10**8
_LITTLE_MEMORY = 2 * 10**9
_NVIDIA = Path("/proc/driver/nvidia/version")


def all_checks() -> Iterator[Check]:
    """Every check but the self-test, the quick ones first; none has paths of the home folder."""
    for look in (
        _python,
        _packages,
        _extras,
        _torch,
        _devices,
        _memory,
        _disk,
        _cache,
        _hub,
        _sandbox,
    ):
        yield anonymous(checked(look))


def checked(look: Callable[[], Check]) -> Check:
    """What a check says; one that fails itself is a warning, and the others go on."""
    try:
        return look()
    except Exception as error:  # of any library or driver that was asked
        name = look.__name__.strip("_").replace("_", " ")
        said = (
            str(error) if isinstance(error, KpsvdTuneError) else f"{type(error).__name__}: {error}"
        )
        return Check(name, "warning", f"could not be found out: {said}", "report this with --json")


def anonymous(check: Check) -> Check:
    """The check without paths of the home folder."""
    home = os.path.expanduser("~")
    if home in ("", "/", "~"):
        return check
    hidden = {key: getattr(check, key).replace(home, "~") for key in ("found", "cure")}
    return replace(check, **hidden)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    fault = python_fault()
    if fault is None:
        return Check("python", "ok", found)
    return Check("python", "warning", fault, "make a virtual environment with a tested Python")


def _packages() -> Check:
    faults = package_faults()
    if not faults:
        names = ("torch", "transformers", "peft", "accelerate", "datasets", "typer")
        here = installed_packages()
        shown = ", ".join(f"{name} {here[name]}" for name in names if name in here)
        return Check("packages", "ok", f"{shown}; all within the tested versions")
    said = "; ".join(text for text, _ in faults.values())
    is_missing = any(missing for _, missing in faults.values())
    status: Status = "fault" if is_missing else "warning"
    return Check("packages", status, said, install_command(list(faults)))


def _extras() -> Check:
    found = extras()
    whole = [name for name, missing in found.items() if not missing]
    others = [name for name, missing in found.items() if missing]
    text = f"installed: {', '.join(whole) or 'none'}"
    if others:
        text += f"; not installed: {', '.join(others)}"
    return Check("extras", "ok", text)


def _torch() -> Check:
    import torch

    build = f"torch {torch.__version__}, built for " + (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPUs"
    )
    has_driver = _NVIDIA.exists() or shutil.which("nvidia-smi") is not None
    if has_driver and not torch.version.cuda:
        return Check(
            "torch",
            "warning",
            f"{build}, and this machine has an NVIDIA driver: its GPUs are not used",
            "install the build for CUDA: https://pytorch.org/get-started/locally",
        )
    if has_driver and not torch.cuda.is_available():
        return Check(
            "torch",
            "warning",
            f"{build}, and it finds no GPU although there is an NVIDIA driver",
            "compare the driver's version (nvidia-smi) with that CUDA version; is "
            "CUDA_VISIBLE_DEVICES set?",
        )
    return Check("torch", "ok", build)


def _devices() -> Check:
    import torch

    from kpsvd_tune.hardware.bf16 import bf16_speed
    from kpsvd_tune.hardware.devices import own_device

    found = [f"CPU with {counted(torch.get_num_threads(), 'thread')}"]
    for index in range(torch.cuda.device_count()):
        about: Any = torch.cuda.get_device_properties(index)
        found.append(f"GPU {index}: {about.name}, {size(about.total_memory)}")
    if torch.backends.mps.is_available():
        found.append("Apple's mps, on which nothing was tried yet")
    speed = bf16_speed(own_device())
    taken = "bf16" if speed.is_fast else "no (float32)"
    found.append(f"train.precision: auto takes {taken} here: {speed.why}")
    return Check("devices", "ok", "; ".join(found))


def _memory() -> Check:
    free = free_memory()
    if free is not None and free < _LITTLE_MEMORY:
        return Check("memory", "warning", host_memory(), "end other programs, or raise the limit")
    return Check("memory", "ok", host_memory())


def _disk() -> Check:
    places = {"here": Path.cwd(), "cache": _existing(cache_folder())}
    free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    found = ", ".join(f"{size(number)} free {_WHERE[name]}" for name, number in free.items())
    least = min(free.values())
    if least >= _LITTLE_DISK:
        return Check("disk", "ok", found)
    cure = f"free some space, or choose an output_dir on another disk and {CACHE_PLACE}"
    return Check("disk", "fault" if least < _NO_DISK else "warning", found, cure)


_WHERE = {"here": "in this folder", "cache": "for the cache"}


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _cache() -> Check:
    folder = cache_folder()
    sizes = {}
    for part in ("spectra", "tokens"):
        files = [each for each in (folder / part).rglob("*") if each.is_file()]
        sizes[part] = sum(each.stat().st_size for each in files)
    text = ", ".join(f"{name} {size(number)}" for name, number in sizes.items())
    return Check("cache", "ok", f"{folder}: {text}; it may be removed at any time")


def _hub() -> Check:
    if is_offline():
        return Check("hub", "ok", "not asked: HF_HUB_OFFLINE (or --offline) forbids the network")
    address = hub_address()
    problem = no_answer(address, with_certificate=True)
    if problem is None:
        return Check("hub", "ok", f"{address} answers")
    return Check(
        "hub",
        "warning",
        f"{address} cannot be reached: {problem}",
        "models and rows must be local paths, or lie in the hub's cache (then pass --offline); "
        "behind a proxy set HTTPS_PROXY",
    )


def _sandbox() -> Check:
    from kpsvd_tune.evaluation.sandbox.run import sandbox_fault

    fault = sandbox_fault()
    if fault is None:
        return Check("bubblewrap", "ok", "a sandbox starts")
    cure = "install bubblewrap 0.8 or newer; only the tasks that run generated programs need it"
    return Check("bubblewrap", "warning", fault, cure)
