"""The trials of a comparison as tasks of Ray, each a worker that takes one trial.

Ray decides where and when; which trial a task runs, and that no other has it, is settled by the
comparison's folder as among any workers, so it must be on a disk that all machines have. A task
that was killed is started again by Ray, and the trial it had is free for it or another.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError, ResourceError, RunError
from kpsvd_tune.events import Events
from kpsvd_tune.phase import watched
from kpsvd_tune.units import counted

# How often Ray starts a task again that was killed, or whose machine is gone.
RETRIES = 3
_LAST_LINES = 20


def run_tasks(
    words: Sequence[str], num_tasks: int, address: str, jobs: int | None, events: Events
) -> None:
    """Have tasks of Ray run the trials that are to come, and return when all have ended.

    Args:
        words: The command `compare` and what follows, without the options of a worker.
        num_tasks: As many as there are trials; those without anything left to do end at once.
        address: Of the cluster: as `ray.init` takes it, auto, or local for this machine.
        jobs: At most so many at a time; None: one a GPU of the cluster, or one a processor.
        events: Told of progress.

    Raises:
        InputError: Ray is not installed, or there is no cluster there.
        ResourceError: A task was killed more often than it is started again.
        RunError: A task ended with an error; it is part of the message.
    """
    if find_spec("ray") is None:
        raise InputError(
            "--ray needs the package ray; install it with: pip install 'kpsvd-tune[ray]'"
        )
    import ray

    with watched() as phase:
        phase.enter("starting Ray")
        try:
            ray.init(
                **({} if address == "local" else {"address": address}),
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--ray {address}: Ray finds no cluster there ({error}); expected an address such "
                "as ray://HOST:10001, auto on a machine of the cluster, or local"
            ) from error
        try:
            phase.enter("running trials as tasks of Ray", kept="finished trials are kept")
            resources = _resources(ray.cluster_resources(), jobs)
            events.stage(f"running {counted(num_tasks, 'task')} of Ray")
            task = ray.remote(max_retries=RETRIES, retry_exceptions=[_Killed], **resources)(_work)
            command = [*words, "--shared", "--trials", "1"]
            left = [task.remote(command, str(Path.cwd())) for _ in range(num_tasks)]
            while left:
                done, left = ray.wait(left)
                _check(ray, done[0])
                events.advance("tasks of Ray", num_tasks - len(left), num_tasks)
            events.end_progress()
        finally:
            ray.shutdown()


def _resources(cluster: dict[str, float], jobs: int | None) -> dict[str, Any]:
    """What a task takes of a machine: a GPU where the cluster has any, and its part of the rest."""
    num_cpus, num_gpus = int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0))
    at_once = jobs or num_gpus or num_cpus
    found: dict[str, Any] = {"num_cpus": max(1, num_cpus // at_once)}
    if num_gpus:
        found["num_gpus"] = 1
    return found


class _Killed(Exception):
    """A worker was killed; Ray starts the task again."""


# Code between fork and exec could hang in a process of Ray's, which has many threads: so the worker
# itself asks to end with its parent, since Ray kills its own processes alone.
_WORKER = (
    "from kpsvd_tune.launch import end_with_parent; end_with_parent(); "
    "import runpy; runpy.run_module('kpsvd_tune', run_name='__main__', alter_sys=True)"
)


def _work(command: Sequence[str], folder: str) -> str:
    """Run one worker, in a task of Ray; what it said last, where it ended with an error."""
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            check=False,
        )
        errors.seek(0)
        told = errors.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
    said = "\n".join(told)
    if done.returncode < 0 or done.returncode >= 128:
        raise _Killed(f"a worker ended with {done.returncode}:\n{said}")
    return said if done.returncode else ""


def _check(ray: Any, done: Any) -> None:
    try:
        said = ray.get(done)
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"a task of Ray was killed more than {RETRIES} times: {str(error).splitlines()[-1]}. "
            "Run the same command again: finished trials are kept"
        ) from error
    if said:
        raise RunError(f"a task of Ray ended with an error; it said:\n{said}")
