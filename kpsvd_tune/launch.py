"""Starts one command as several processes that find each other, and ends them together.

`accelerate launch` starts a single process on a CPU unless MPI is installed, and turns a worker's
exit code into a traceback of its own; this keeps exit codes, signals and messages as they are.
Accelerate in the workers reads the same environment variables that torchrun would set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from kpsvd_tune.errors import UNSAVED_EXIT_CODE, InputError
from kpsvd_tune.storage.memory import host_memory

# After one rank failed the others get this long to end by themselves, then they are killed:
# a rank that waits for the dead one would wait for ever.
GRACE_SECONDS = 10.0
# A terminal or a job system may signal a command in two ways at once: two within this time are one
# request, here as in signals.py. A little longer than there, so that what is a second request here
# is one to the ranks as well.
_SAME_REQUEST_SECONDS = 1.1
# After a second signal the ranks get this long to say what is lost and to end.
_FORCED_SECONDS = 2.0
# Names the file in which a rank keeps what it is doing, for the message if it dies.
PHASE_FILE = "KPSVD_TUNE_PHASE_FILE"
# Names the file by which ranks of one machine find each other, where they need no port for it.
RENDEZVOUS = "KPSVD_TUNE_RENDEZVOUS"
# Ranks of one machine talk over the interface that no other machine sees. Without these variables
# the libraries look up this machine's name and listen on the address that they find.
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_LOOPBACK = {"GLOO_SOCKET_IFNAME": _INTERFACE, "NCCL_SOCKET_IFNAME": _INTERFACE}
# What torchrun, Accelerate, MPI and this file tell a rank of its place and its launch.
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "NODE_RANK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *(PHASE_FILE, RENDEZVOUS),
)
_OF_A_LAUNCHER = (
    *("MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"),
    *("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_"),
)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def init_method() -> str | None:
    """Where torch finds the other ranks, in the form of its `init_method`; None for its own way."""
    if not (path := os.environ.get(RENDEZVOUS)):
        return None
    if os.environ.get("ACCELERATE_USE_CPU") == "true":
        return f"file://{path}"  # Accelerate tells torch the rank, and twice is refused
    rank, number = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return f"file://{path}?rank={rank}&world_size={number}"


def is_of_other_launcher() -> bool:
    """Whether another launcher, such as torchrun, has started this process as one of its ranks."""
    return "WORLD_SIZE" in os.environ and PHASE_FILE not in os.environ


def tell_phase(phase: str) -> None:
    """Tell the launcher, where there is one, what this rank does now, such as "training"."""
    if path := os.environ.get(PHASE_FILE):
        with contextlib.suppress(OSError):
            # Replaced as a whole: a rank that is killed while it writes leaves the phase before.
            Path(f"{path}.new").write_text(phase, encoding="utf-8")
            os.replace(f"{path}.new", path)


def check_gpus(count: int) -> None:
    """Refuse more GPUs than PyTorch sees, or any where the environment asks for the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU") == "true":
        raise InputError(
            f"--gpus {count}: the environment says ACCELERATE_USE_CPU=true; unset it to use GPUs, "
            f"or share the work over CPU processes with --processes {count}"
        )
    import torch

    found = torch.cuda.device_count()
    if count <= found:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.version.cuda and not torch.version.hip:
        why = f" (PyTorch {torch.__version__} is a build without CUDA)"
    elif visible is not None:
        why = f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    else:
        why = ""
    seen = f"{found or 'no'} CUDA GPU{'' if found == 1 else 's'}"
    fewer = f"ask for at most {found}, or " if found else ""
    raise InputError(
        f"--gpus {count}: PyTorch sees {seen} here{why}; {fewer}share the work over CPU processes "
        f"with --processes {count}"
    )


def launch(
    arguments: Sequence[str],
    num_processes: int,
    use_cpu: bool,
    # Variables by which Accelerate's launcher tells its ranks of DeepSpeed.
    deepspeed: Mapping[str, str] | None = None,
) -> int:
    """Run `python -m kpsvd_tune ARGUMENTS` as several ranks on this machine.

    SIGINT and SIGTERM are passed on to every rank; each saves and ends by itself. A second one, a
    second or more later, is passed on too and ends them at once, or they are killed. When this
    process is killed itself, Linux sends the ranks a SIGTERM, so none is left behind.

    Gives the exit code of the first rank that failed, 128 + the number of a signal that killed it,
    UNSAVED_EXIT_CODE where a second signal made us kill it, or 0.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    for name, value in _LOOPBACK.items():
        environment.setdefault(name, value)
    environment |= deepspeed or {}
    if use_cpu:
        # ACCELERATE_USE_CPU would keep Accelerate from using DeepSpeed.
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if deepspeed else {"ACCELERATE_USE_CPU": "true"}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # Every rank with all threads is slower than one rank alone.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // num_processes)))
    with tempfile.TemporaryDirectory(prefix="kpsvd-tune-") as folder:
        phases = [Path(folder, str(rank)) for rank in range(num_processes)]
        if not deepspeed:
            # A store on a port would listen on every interface; DeepSpeed knows no other.
            environment[RENDEZVOUS] = str(Path(folder, "store"))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "kpsvd_tune", *arguments],
                env=environment
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), PHASE_FILE: str(phases[rank])},
                # A group of its own: a terminal's Ctrl-C reaches the ranks through us alone, once.
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
            for rank in range(num_processes)
        ]
        return _attend(ranks, phases)


def run_alone(arguments: Sequence[str]) -> int:
    """Run `python -m kpsvd_tune ARGUMENTS` in a process that is no rank of this one's launch.

    It has this process's standard error and device, the threads of all ranks of this machine, and
    no standard output. SIGINT and SIGTERM are passed on to it, and it ends when this process does.

    Gives its exit code, or 128 + the number of a signal that ended it.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "kpsvd_tune", *arguments],
        env=environment_alone(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # A group of its own: a terminal's Ctrl-C reaches it through us alone, once.
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    with _passing_on_signals([child]) as signalled:
        while (code := child.poll()) is None:
            if len(signalled) > 1 and time.monotonic() > signalled[1] + _FORCED_SECONDS:
                child.kill()
            time.sleep(0.05)
    return code if code >= 0 else 128 - code


def environment_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that works alone, made of that of a rank."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_RANK and not name.startswith(_OF_A_LAUNCHER)
    }
    if environment.get("ACCELERATE_USE_CPU") == "true":
        kept["ACCELERATE_USE_CPU"] = "true"
    with contextlib.suppress(KeyError, ValueError):
        # Launchers share the cores out among the ranks, which have all ended but one.
        threads = int(environment["OMP_NUM_THREADS"]) * int(environment["LOCAL_WORLD_SIZE"])
        kept["OMP_NUM_THREADS"] = str(threads)
    return kept


def _attend(ranks: Sequence[subprocess.Popen[bytes]], phases: Sequence[Path]) -> int:
    with _passing_on_signals(ranks) as signalled:
        return _wait(ranks, phases, signalled)


@contextlib.contextmanager
def _passing_on_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[float]]:
    """Pass SIGINT and SIGTERM on to processes; kills at the end those that still run.

    Gives the times of the first signal and of those that are another request.
    """
    signalled: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signalled and now - signalled[0] < _SAME_REQUEST_SECONDS:
            return
        signalled.append(now)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signalled
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], phases: Sequence[Path], signalled: Sequence[float]
) -> int:
    first_failure: int | None = None
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        # Ranks that were killed first: the others fail because of them, often before they are seen.
        for index, code in sorted(enumerate(codes), key=lambda each: (each[1] or 0) >= 0):
            if code and first_failure is None:
                first_failure = code if code > 0 else 128 - code
                deadline = time.monotonic() + GRACE_SECONDS
                if code < 0 and not signalled:
                    name = signal.Signals(-code).name
                    doing = _phase(phases[index])
                    why = _memory_note() if code == -signal.SIGKILL else ""
                    print(f"error: rank {index} was killed by {name} {doing}{why}", file=sys.stderr)
        if all(code is not None for code in codes):
            return first_failure or 0
        if len(signalled) > 1 and time.monotonic() > signalled[1] + _FORCED_SECONDS:
            print("stopped at once by a second signal: what was not saved is lost", file=sys.stderr)
            return UNSAVED_EXIT_CODE
        if time.monotonic() > deadline:
            for index, rank in enumerate(ranks):
                if codes[index] is None:
                    if not signalled:
                        still = f"which still waits {_phase(phases[index])}"
                        print(
                            f"error: a rank failed; stopping rank {index}, {still}", file=sys.stderr
                        )
                    rank.kill()
            deadline = float("inf")
        time.sleep(0.05)


def _memory_note() -> str:
    return (
        f"; most likely memory ran out: {host_memory()}. Fewer --processes, or a lower "
        "train.batch_size with more train.gradient_accumulation, need less"
    )


def _phase(file: Path) -> str:
    """What a rank did last, as the end of a sentence."""
    try:
        return f"while {file.read_text(encoding='utf-8')}"
    except OSError:
        return "while starting"


def end_with_parent() -> None:
    """In a new process: ask Linux for a SIGTERM when its parent ends, however it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
