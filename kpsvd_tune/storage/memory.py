"""Recognises that memory ran out, on the host or on a device, and says so with figures."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import KpsvdTuneError, ResourceError
from kpsvd_tune.units import size

# What libraries say that have no type for it: torch on CPUs, on Apple's devices and inside CUDA's
# libraries, C++ code, and the system where a file is to be mapped.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "memoryallocation",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_DEVICE_WORDS = ("cuda", "cublas", "cudnn", "hip", "mps", "xpu", "gpu")
# CUDA's allocator, torch's on CPUs and numpy each name the size in words of their own.
_ASKED = re.compile(
    r"(?:tried to allocate|unable to allocate) ([\d.,]+ ?(?:[KMGTPE]i?B|bytes)?)", re.IGNORECASE
)
_CGROUPS = Path("/sys/fs/cgroup")
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        # Not our own errors: where those are raised, memory was looked for already.
        if isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError":
            words = str(error).lower()
            if any(each in words for each in _WORDS):
                return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def explained_memory(doing: str, *cures: str) -> Iterator[None]:
    """Turn an out-of-memory error inside into the ResourceError of :func:`out_of_memory`."""
    try:
        yield
    except KpsvdTuneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, doing, cures) from error


def out_of_memory(error: BaseException, doing: str, cures: Sequence[str]) -> ResourceError:
    """The error to raise: what was asked for, what is free, and what helps.

    `doing` is the stage, as in "out of memory while ..."; of the cures the most useful comes first.
    """
    first = _first_that_says(error)
    is_device = _is_of_device(first)
    place = "GPU memory" if is_device else "memory"
    asked = _ASKED.search(str(first))
    wanted = f": {_size(asked[1])} were asked for" if asked else ""
    free = device_memory() if is_device else host_memory()
    said = f"out of {place} while {doing}{wanted}; {free}"
    if not cures:
        return ResourceError(said)
    return ResourceError("\n  - ".join([f"{said}. What helps:", *cures]))


def host_memory() -> str:
    """What is free for this process, as the end of a sentence; which limit is the tightest."""
    tightest = tightest_memory()
    if tightest is None:
        return "what is free is not known here"
    free, total, whose = tightest
    return f"{size(max(0, free))} of {whose} {size(total)} are free now"


def free_memory() -> int | None:
    """Bytes that this process could still get, by the tightest limit; None where not known."""
    tightest = tightest_memory()
    return None if tightest is None else max(0, tightest[0])


def device_memory() -> str:
    """What is free on the current GPU, as the end of a sentence."""
    torch: Any = sys.modules.get("torch")
    try:
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved()
    except Exception:
        # No CUDA device, or one that an error has left unusable.
        return "what is free on the device is not known here"
    return (
        f"{size(free)} of the GPU's {size(total)} are free now, and this process holds {size(own)}"
    )


def _first_that_says(error: BaseException) -> BaseException:
    """The innermost error of a chain that is about memory: its text has the figures."""
    found = error
    while (cause := found.__cause__) is not None and is_out_of_memory(cause):
        found = cause
    return found


def _is_of_device(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return False
    words = str(error).lower()
    if "defaultcpuallocator" in words:
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(w in words for w in _DEVICE_WORDS)


def _size(text: str) -> str:
    """A size as a library wrote it, in the units of our messages."""
    match = re.fullmatch(r"([\d.,]+?)[.,]? ?([KMGTPE]i?B|bytes)?", text.strip(), re.I)
    if match is None:
        return text
    unit = (match[2] or "bytes").lower()
    power = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}.get(unit[0], 0)
    return size(float(match[1].replace(",", "")) * (1024 if "i" in unit else 1000) ** power)


def tightest_memory() -> tuple[int, int, str] | None:
    """The tightest limit of this process: bytes free, bytes in all, whose; None where not known."""
    bounds = (_of_machine(), _of_cgroup(), _of_address_space())
    return min((each for each in bounds if each), default=None)


def _of_machine() -> tuple[int, int, str] | None:
    found = _table(Path("/proc/meminfo"))
    if "MemAvailable" not in found or "MemTotal" not in found:
        return None
    return found["MemAvailable"] * 1024, found["MemTotal"] * 1024, "the machine's"


def _of_cgroup() -> tuple[int, int, str] | None:
    """The tightest limit of a container or a job, of either version of control groups."""
    bounds = []
    for folder, limit, used in _cgroup_files():
        try:
            allowed = int((folder / limit).read_text())  # "max" where there is no limit
            taken = int((folder / used).read_text())
            # Pages of files count as used and are given back when they are needed.
            table = _table(folder / "memory.stat")
            taken -= table.get("inactive_file", table.get("total_inactive_file", 0))
        except (OSError, ValueError):
            continue
        if allowed < 1 << 60:
            bounds.append((allowed - taken, allowed, "the container's or job's"))
    return min(bounds, default=None)


def _cgroup_files() -> Iterator[tuple[Path, str, str]]:
    try:
        lines = _GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            root, limit, used = (
                _CGROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        # A limit of any group above holds as well; in a container the root is our own group.
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            yield each, limit, used
            if each == root:
                break


def _of_address_space() -> tuple[int, int, str] | None:
    """The limit of `ulimit -v`."""
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _table(Path("/proc/self/status")).get("VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return limit - used * 1024, limit, "the limit (ulimit -v) of"


def _table(file: Path) -> dict[str, int]:
    """Lines such as `MemFree: 12 kB` or `inactive_file 12`; those of another form are left out."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = re.findall(r"^(\w+):?\s+(\d+)(?: kB)?$", text, re.MULTILINE)
    return {name: int(number) for name, number in found}
