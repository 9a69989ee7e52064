"""What the processes of one command do together; alone, each of these is trivial."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import PartialState  # type: ignore[import-untyped]

from kpsvd_tune.errors import KpsvdTuneError, RunError
from kpsvd_tune.hardware.devices import own_device, wants_cpu
from kpsvd_tune.launch import init_method
from kpsvd_tune.storage.locks import hold
from kpsvd_tune.storage.memory import host_memory

T = TypeVar("T")

# Longer than any work that one process does for all: a big base decomposed, a big corpus read.
_PATIENCE = timedelta(days=30)
# What gloo and NCCL say when the other end of a connection is gone; neither has a type for it.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket", "remote process exited")

# A disk of another machine may take a while to notice that the holder of a lock is gone.
_LOST_SECONDS = 5.0


class _Patient:
    """The process group with the long time limit, and the default group that it was made for."""

    world: Any = None
    group: Any = None


def is_distributed() -> bool:
    """Whether this process works with others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def num_processes() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if is_distributed() else 1


def meet() -> None:
    """Make the group in which the processes wait for each other without a time limit.

    Called while all of them are there: making the group itself has the usual time limit.
    """
    if is_distributed() and _Patient.world is not dist.group.WORLD:
        # gloo, whatever the devices: what is sent here are plain objects.
        _Patient.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _Patient.world = dist.group.WORLD


def wait_for_all() -> None:
    """Return once every process has come here."""
    if is_distributed():
        meet()
        dist.barrier(group=_Patient.group)


def device() -> torch.device:
    """The device of this process; of several processes, after the process group is initialised."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return own_device()
    found = init_method()
    others: dict[str, str] = {} if found is None else {"init_method": found}
    place: torch.device = PartialState(cpu=wants_cpu(), **others).device
    return place


@dataclass(frozen=True)
class _Parts:
    """What the main process asks all of them to do, in place of the result that they wait for."""

    parts: Sequence[Any]  # one for each process; the first is the main one's own


def on_main_process(work: Callable[[], T], helper: Callable[[Any], Any] | None = None) -> T:
    """The result of work that the main process does once while the others wait for it.

    It must be picklable. The others wait without a time limit, and notice at once when the main
    process dies. A KpsvdTuneError of `work` is raised on every process alike, so that none waits
    for one that has gone; other exceptions become a RunError on the others.

    While they wait they do with `helper` what `work` asks of them by :func:`share_out`.
    """
    if not is_distributed():
        return work()
    meet()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except KpsvdTuneError as error:
            outcome[1] = error
        except Exception as error:
            outcome[1] = RunError(f"the main process failed: {type(error).__name__}: {error}")
            dist.broadcast_object_list(outcome, src=0, group=_Patient.group)
            raise
    dist.broadcast_object_list(outcome, src=0, group=_Patient.group)
    own: Exception | None = None
    while isinstance(outcome[0], _Parts):
        assert helper is not None  # work that shares out is given with what the others do
        answer, own = _attempt(helper, outcome[0].parts[rank()])
        dist.gather_object(answer, dst=0, group=_Patient.group)
        dist.broadcast_object_list(outcome, src=0, group=_Patient.group)
    if own is not None and not isinstance(own, KpsvdTuneError):
        # What it was is known here alone, such as a lack of memory.
        raise own
    if outcome[1] is not None:
        outcome[1].is_everywhere = True
        raise outcome[1]
    result: T = outcome[0]
    return result


def share_out(parts: Sequence[Any], work: Callable[[Any], T]) -> list[T]:
    """Do the first part here, and have each other process do its own by its helper.

    For work inside of :func:`on_main_process`. `parts` are one for each process, and they and the
    results, which come in the same order, must be picklable. An exception of any process is raised
    here once all have answered; of another process one that is no KpsvdTuneError is a RunError.
    """
    if not is_distributed():
        return [work(each) for each in parts]
    dist.broadcast_object_list([_Parts(parts), None], src=0, group=_Patient.group)
    answer, own = _attempt(work, parts[0])
    answers: list[Any] = [None] * num_processes()
    dist.gather_object(answer, answers, dst=0, group=_Patient.group)
    if own is not None:
        raise own
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]


def _attempt(work: Callable[[Any], T], part: Any) -> tuple[tuple[T | None, Any], Exception | None]:
    """What is sent of one part, a result or an error that can be, and the exception itself."""
    try:
        return (work(part), None), None
    except KpsvdTuneError as error:
        return (None, error), error
    except Exception as error:
        return (None, RunError(f"rank {rank()} failed: {type(error).__name__}: {error}")), error


def end_processes() -> None:
    """Destroy the process group; does nothing where there is none.

    Without it the threads of a process group outlive Python, and ending them by force may end the
    program with SIGABRT after all its work is done.
    """
    _Patient.world = _Patient.group = None
    if is_distributed():
        # A gloo thread needs Python's interpreter lock to finish its last work. DDP, which may hold
        # the group last, waits for that thread without giving the lock back (torch 2.13).
        time.sleep(0.1)
        PartialState().destroy_process_group()


def how_it_ended(process: BaseProcess) -> str:
    """How a worker that gave no result ended, as the end of a sentence."""
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return f"was killed by signal 9, which usually means that memory ran out: {host_memory()}"
    if code < 0:
        return f"was killed by signal {-code}"
    return f"ended with exit code {code} and gave no reason; it may stand above"


@contextlib.contextmanager
def name_lost_process(
    phase: Callable[[], str],
    folder: Path | None = None,
    *,
    kept: Callable[[], str] = lambda: "Nothing that was finished is lost",
) -> Iterator[None]:
    """Turn the failure of a collective whose partner died into a RunError with rank and phase.

    With a `folder` that all processes see, the message names the ranks that died, on whatever
    machine: each holds the lock of a file there until it ends, and empties it where it could.
    `kept` says what the same command goes on from.
    """
    with contextlib.ExitStack() as stack:
        if folder is not None and is_distributed():
            stack.enter_context(_alive(folder))
        try:
            yield
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            reason = str(error).splitlines()[0]
            lost = [] if folder is None else _lost(folder)
            raise RunError(
                f"rank {dist.get_rank()} lost the connection to {_named(lost)}, while {phase()} "
                f"({reason}). {kept()}; the same command goes on from there"
            ) from error


@contextlib.contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Hold the lock of this rank's file while the block runs; no run ends for want of one."""
    file = folder / f"rank-{rank()}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(hold(file, wait=False)):
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        # Files of all ranks are there from here on.
        wait_for_all()
        try:
            yield
        finally:
            # Before the lock is gone: who ended in order was not lost.
            with contextlib.suppress(OSError):
                os.truncate(file, 0)


def _lost(folder: Path) -> list[str]:
    """The ranks that were killed, with process and machine; empty where nobody can tell."""
    deadline = time.monotonic() + _LOST_SECONDS
    while True:
        found = []
        for number in range(num_processes()):
            file = folder / f"rank-{number}"
            with contextlib.suppress(OSError), hold(file, wait=False) as held:
                if held and (who := file.read_text("utf-8")):
                    found.append(f"rank {number} ({who})")
        # A machine that is gone loses its locks a little later than its connections.
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _named(lost: Sequence[str]) -> str:
    if not lost:
        return "another rank, which has died"
    return f"{' and '.join(lost)}, which {'has' if len(lost) == 1 else 'have'} died"


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    words = str(error).lower()
    return is_distributed() and any(each in words for each in _LOST)


def gpu_identity(place: torch.device) -> list[str]:
    """The GPU that a process computes on, as NVML knows it; none on a CPU."""
    if place.type != "cuda":
        return []
    about: Any = torch.cuda.get_device_properties(place)
    return [f"GPU-{getattr(about, 'uuid', '')}"]


def gather_numbers(accelerator: Accelerator, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every process, in the order of processes; one wait for the device."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    own = torch.tensor([numbers], dtype=dtype, device=accelerator.device)
    rows: list[list[float]] = accelerator.gather(own).tolist()
    return rows


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory_bytes` count from what this process holds now, where that is known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux forgets the highest mark of resident memory when it is told so (man 5 proc).
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # What getrusage tells counts the parent that this process was forked from, however large.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if (found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)) is not None:
            return int(found[1]) * 1024
    if find_spec("resource") is None:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes where Linux counts kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024
