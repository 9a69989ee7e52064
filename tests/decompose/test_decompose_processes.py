"""Other processes: worker processes give the same numbers, and kill -9 loses no finished matrix."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

import architectures
import pytest
import torch
import warm

from kpsvd_tune.decompose import (
    Decomposition,
    Progress,
    decompose,
    default_cache_dir,
    workers,
)
from kpsvd_tune.decompose.spectra import Settings
from kpsvd_tune.errors import ModelError, ResourceError
from kpsvd_tune.linalg import KroneckerShape, LayerPlan
from kpsvd_tune.models import ModelSource, resolve_model
from kpsvd_tune.recipe.adapter import AdapterRecipe


def killed_after(matrices: int, source: ModelSource) -> int:
    """Decompose in a forked process that kills itself; returns how it ended."""

    def kill(progress: Progress) -> None:
        if progress.done == matrices:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; the child uses one thread and never returns.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = warm.fork_unmeasured()
    if child == 0:
        try:
            torch.set_num_threads(1)
            decompose(source, AdapterRecipe(), progress=kill)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def entries() -> dict[Path, int]:
    """The cache's files and when they were written."""
    files = (default_cache_dir() / "spectra").rglob("*.safetensors")
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Equal bits are promised for equal threads; workers get one each here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undisturbed(
    tmp_path: Path, tiny_model_dir: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> Decomposition:
    source = resolve_model(str(tiny_model_dir))
    with monkeypatch.context() as context:
        context.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        return decompose(source, AdapterRecipe())


def assert_same(one: Decomposition, other: Decomposition) -> None:
    assert one.layers == other.layers
    for name, (left, right) in other.factors.items():
        assert torch.equal(one.factors[name][0], left), name
        assert torch.equal(one.factors[name][1], right), name


@pytest.mark.slow
def test_a_killed_run_goes_on_after_the_last_matrix_with_the_same_end(
    tiny_model_dir: Path, undisturbed: Decomposition
) -> None:
    source = resolve_model(str(tiny_model_dir))
    assert killed_after(5, source) == -signal.SIGKILL
    written = entries()
    assert len(written) == 5
    assert_same(decompose(source, AdapterRecipe()), undisturbed)
    assert {file: time for file, time in entries().items() if file in written} == written
    assert len(entries()) == 14


@pytest.mark.slow
def test_a_run_killed_while_it_writes_an_entry_ends_the_same(
    tiny_model_dir: Path, undisturbed: Decomposition
) -> None:
    # The fifth entry dies between its last byte and its name, in a process of its own.
    script = (
        "import os, signal, sys\n"
        "from kpsvd_tune.decompose import cache, decompose\n"
        "from kpsvd_tune.models import resolve_model\n"
        "from kpsvd_tune.recipe.adapter import AdapterRecipe\n"
        "rename, entries = os.replace, []\n"
        "def replace(source, target):\n"
        "    entries.append(target)\n"
        "    if len(entries) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(source, target)\n"
        "os.replace = replace\n"
        "decompose(resolve_model(sys.argv[1]), AdapterRecipe())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = warm.run(
        [sys.executable, "-c", script, str(tiny_model_dir)], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    written = entries()
    assert len(written) == 4
    assert len(list((default_cache_dir() / "spectra").rglob("*.tmp"))) == 1
    assert_same(decompose(resolve_model(str(tiny_model_dir)), AdapterRecipe()), undisturbed)
    assert {file: time for file, time in entries().items() if file in written} == written
    assert len(entries()) == 14
    assert not list((default_cache_dir() / "spectra").rglob("*.tmp"))


@pytest.mark.slow
def test_two_workers_give_what_one_process_gives(
    tiny_model_dir: Path, undisturbed: Decomposition
) -> None:
    seen: list[Progress] = []
    source = resolve_model(str(tiny_model_dir))
    found = decompose(source, AdapterRecipe(), processes=2, progress=seen.append)
    assert [progress.done for progress in seen] == list(range(1, 15))
    assert_same(found, undisturbed)


def test_a_fault_in_a_worker_is_raised_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architectures.make("llama")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        architectures.weight_of(model, name)[2, 2] = float("inf")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    workers._work(
        resolve_model(str(tmp_path / "model")),
        [LayerPlan(name, KroneckerShape(6, 4, 4, 4))],
        Settings(tmp_path / "cache", 2, 5e-3, 0),
        torch.get_num_threads(),
        sender,
    )
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj cannot be decomposed") as caught:
        workers._listen({receiver: SpawnProcess()}, lambda finished: None)
    assert "in a decomposition worker:\nTraceback" in caught.value.__notes__[0]


def test_workers_are_not_started_for_what_is_cached(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(str(tiny_model_dir))
    first = decompose(source, AdapterRecipe())
    monkeypatch.setattr(multiprocessing, "get_context", None)
    monkeypatch.setattr("kpsvd_tune.decompose.hashes.SETTLED_SECONDS", -1)
    decompose(source, AdapterRecipe())
    assert decompose(source, AdapterRecipe(), processes=2).layers == first.layers


@pytest.mark.parametrize(
    ("death", "number", "message"),
    [
        (sys.exit, 7, "ended with exit code 7 and gave no reason; .*with --processes 1"),
        (signal.raise_signal, signal.SIGKILL, "was killed by signal 9, which .* fewer --processes"),
    ],
)
def test_a_worker_that_dies_is_reported(
    death: Callable[[int], object], number: int, message: str
) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=death, args=(int(number),))
    process.start()
    sender.close()
    with pytest.raises(ResourceError, match=message):
        workers._listen({receiver: process}, lambda finished: None)
