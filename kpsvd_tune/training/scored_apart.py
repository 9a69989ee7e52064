"""Scores of a training with shared-out weights, made by a process that holds the whole model."""

from __future__ import annotations

import gc
import shlex
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpsvd_tune.errors import RunError, StoppedBySignal
from kpsvd_tune.launch import run_alone, tell_phase
from kpsvd_tune.report.run import UNSCORED
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.memory import host_memory

# Exit codes of a process that SIGINT or SIGTERM has stopped.
_STOPPED = {128 + each: each for each in (signal.SIGINT, signal.SIGTERM)}


def score_apart(
    output_dir: str, results: Mapping[str, Any], options: Sequence[str]
) -> Mapping[str, Any]:
    """Score a saved run that says it is not, by `eval` in a process of its own; its new results.

    Called by the main process alone, once nothing refers to the model any more and the processes
    of the launch have parted. What `eval` says stands on the standard error.

    Args:
        output_dir: The run's folder.
        results: The content of its results.json; without unscored tasks nothing is done.
        options: For `eval`, beside the run.

    Raises:
        RunError: The process failed; the run is saved, and waits for its scores.
        StoppedBySignal: It was stopped; likewise.
    """
    if UNSCORED not in results:
        return results
    run = RunDirectory(output_dir)
    _free_memory()
    tell_phase("scoring the trained model in a process of its own")
    code = run_alone(["eval", str(run.path), "--json", *options])
    # By what it left, for it may have been killed when all was written.
    if UNSCORED not in (scored := read_json(run.results_file)):
        return scored
    command = shlex.join(["kpsvd-tune", "eval", str(run.path), *options])
    saved = f"the run is trained and its adapter is saved in {run.adapter}"
    again = f"`{command}` scores it, and so does the command that trained it, typed again"
    if code in _STOPPED:
        kept = f" while scoring; {saved}: {again}"
        raise StoppedBySignal(_STOPPED[code], kept, goes_on=False)
    if code == 128 + signal.SIGKILL:
        why = f"was killed, most likely because memory ran out: {host_memory()}"
    else:
        why = f"ended with exit code {code}, and has said why above"
    raise RunError(
        f"{saved}; it is not scored, for the process that loads the whole model for that {why}. "
        f"When that is mended, {again}"
    )


def _free_memory() -> None:
    """Give back what the model took; it refers to itself, so that Python keeps it until asked."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
