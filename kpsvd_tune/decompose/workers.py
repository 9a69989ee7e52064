"""Decompose on several processes of this machine; results come through the cache."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from kpsvd_tune.decompose.spectra import Found, Settings, SpectraWorker, divide
from kpsvd_tune.errors import ResourceError
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models import ModelSource, WeightReader
from kpsvd_tune.processes import how_it_ended

# A worker that was asked to stop gets this long before it is killed.
GRACE_SECONDS = 5.0


def run_processes(
    source: ModelSource,
    plans: Sequence[LayerPlan],
    settings: Settings,
    num_processes: int,
    report: Callable[[Found], None],
) -> None:
    """Decompose every layer on worker processes, each with an equal part of the threads.

    Every worker reads the model for itself; with the device ``cuda`` worker i takes GPU i. Workers
    are spawned, so a script that calls this needs the usual ``if __name__ == "__main__"``. When one
    fails, with an error as of :meth:`SpectraWorker.run` or killed (ResourceError), the others stop;
    matrices finished by then are in the cache.
    """
    num_processes = min(num_processes, len(plans))
    if num_processes == 0:
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // num_processes)
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for index, part in enumerate(divide(plans, num_processes)):
            device = f"cuda:{index}" if settings.device == "cuda" else settings.device
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work,
                args=(source, part, replace(settings, device=device), threads, sender),
                daemon=True,
            )
            process.start()
            # Only the worker's copy stays open, so that the pipe ends when the worker does.
            sender.close()
            workers[receiver] = process
        _listen(workers, report)
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _listen(workers: dict[Connection, SpawnProcess], report: Callable[[Found], None]) -> None:
    open_ends = dict(workers)
    while open_ends:
        for end in wait(list(open_ends)):
            assert isinstance(end, Connection)
            try:
                message = end.recv()
            except EOFError:
                process = open_ends.pop(end)
                process.join()
                if process.exitcode != 0:
                    fewer = "fewer --processes" if process.exitcode == -9 else "--processes 1"
                    raise ResourceError(
                        f"a decomposition worker {how_it_ended(process)}. Run again with {fewer}: "
                        "finished matrices are in the cache"
                    ) from None
                continue
            if isinstance(message, BaseException):
                raise message
            report(message)


def _work(
    source: ModelSource,
    plans: Sequence[LayerPlan],
    settings: Settings,
    threads: int,
    sender: Connection,
) -> None:
    # Ctrl-C reaches every process of a terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        reader = WeightReader(source, [plan.name for plan in plans])
        SpectraWorker(reader, settings).run(plans, sender.send)
    except BrokenPipeError:
        return  # the parent has ended; finished matrices are in the cache
    except Exception as error:
        error.add_note("in a decomposition worker:\n" + traceback.format_exc())
        sender.send(error)
    finally:
        sender.close()
