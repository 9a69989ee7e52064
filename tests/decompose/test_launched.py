"""The processes of a launch share a decomposition; the main one has what one alone would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import warm
from safetensors.torch import load_file

from kpsvd_tune import processes
from kpsvd_tune.commands import main as cli
from kpsvd_tune.decompose import Decomposition, decompose
from kpsvd_tune.decompose.spectra import SpectraWorker
from kpsvd_tune.errors import ModelError, RunError
from kpsvd_tune.launch import RENDEZVOUS
from kpsvd_tune.models import resolve_model
from kpsvd_tune.recipe import load_recipe

COMMAND = ("-m", "kpsvd_tune")
# Rank 1 decomposes one matrix, and waits or dies in the second.
SECOND = """
import os, pathlib, signal, sys, time
from kpsvd_tune.commands import main as cli
from kpsvd_tune.decompose.spectra import SpectraWorker

compute, calls = SpectraWorker._compute, []

def second(self, plan, *rest):
    calls.append(plan.name)
    if len(calls) == 2:
        pathlib.Path(sys.argv[1]).touch()
        {does}
    return compute(self, plan, *rest)

SpectraWorker._compute = second
sys.exit(cli.run(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Equal bits are promised for equal threads; ranks get one each here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={"max_steps": 2, "eval_every": 0, "batch_size": 1},
    )


@contextmanager
def two_ranks(
    words: Sequence[str],
    caches: Sequence[Path],
    folder: Path,
    commands: Sequence[Sequence[str]] = (COMMAND, COMMAND),
) -> Iterator[list[Any]]:
    """Two ranks of a command, as a launcher starts them, each with a cache folder."""
    ranks: list[Any] = []
    for number, (command, cache) in enumerate(zip(commands, caches, strict=True)):
        environment = os.environ | {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "ACCELERATE_USE_CPU": "true",
            "XDG_CACHE_HOME": str(cache),
            RENDEZVOUS: str(folder / "store"),
        }
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(
            warm.Popen([sys.executable, *command, *words], env=environment, text=True, **pipes)
        )
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def run_to_the_end(words: Sequence[str], caches: Sequence[Path], folder: Path) -> list[Any]:
    """What both ranks said, output and errors."""
    with two_ranks(words, caches, folder) as ranks:
        said = [rank.communicate(timeout=240) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
    return said


def entries(cache: Path) -> set[str]:
    return {file.name for file in (cache / "kpsvd-tune" / "spectra").rglob("*.safetensors")}


def alone(recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Decomposition:
    """The decomposition of a recipe by this process, with another cache."""
    loaded = load_recipe(str(recipe))
    with monkeypatch.context() as context:
        context.setenv("XDG_CACHE_HOME", str(cache))
        source = resolve_model(loaded.model.path)
        return decompose(source, loaded.adapter, seed=loaded.train.seed)


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [True, False], ids=["one disk", "two disks"])
def test_init_only_in_a_launch_gives_the_bits_of_one_process(
    is_shared: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [tmp_path / "here", tmp_path / ("here" if is_shared else "there")]
    (output, told), (silence, nothing) = run_to_the_end(
        ["init-only", str(recipe), "--json"], caches, tmp_path
    )
    # The main one counts the matrices of both, and speaks for both.
    assert "decomposing 14 of 14" in told
    assert (silence, nothing) == ("", "")
    expected = alone(recipe, tmp_path / "other", monkeypatch)
    assert len(entries(caches[0])) == 14
    if not is_shared:
        assert len(entries(caches[1])) == 7
    with monkeypatch.context() as context:
        context.setattr(SpectraWorker, "_compute", None)  # all of it is in the main one's cache
        found = alone(recipe, caches[0], monkeypatch)
    assert found.layers == expected.layers
    for name, pair in expected.factors.items():
        assert all(torch.equal(*each) for each in zip(found.factors[name], pair, strict=True))
    layers = json.loads(output)["layers"]
    assert [each["singular_values"] for each in layers] == [
        list(each.singular_values) for each in expected.report.layers
    ]


@pytest.mark.slow
@pytest.mark.parametrize("energy", ["0.5", "auto"])
def test_a_training_in_a_launch_starts_from_the_factors_of_one_process(
    energy: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [tmp_path / "here", tmp_path / "there"]
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["train", str(recipe), f"adapter.rank.energy={energy}", "train.max_steps=1"]
    run_to_the_end([*words, f"output_dir={two}"], caches, tmp_path)
    assert (len(entries(caches[0])), len(entries(caches[1]))) == (14, 7)
    if energy == "auto":
        return  # probes of two processes are other trainings than those of one
    assert cli.run([*words, f"output_dir={one}"]) == 0
    first, second = (load_file(run / "init" / "factors.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name, factor in first.items():
        assert torch.equal(second[name], factor), name


@pytest.mark.slow
def test_a_fault_on_another_rank_ends_all_with_its_message(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = architectures.make("llama")
    with torch.no_grad():
        architectures.weight_of(model, "model.layers.0.mlp.up_proj")[2, 2] = float("inf")
    model.save_pretrained(tmp_path / "model")
    recipe = write_recipe(model={"path": str(tmp_path / "model"), "dtype": "float32"})
    caches = [tmp_path / "here", tmp_path / "there"]
    with two_ranks(["init-only", str(recipe)], caches, tmp_path) as ranks:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "error: model.layers.0.mlp.up_proj cannot be decomposed: " in said[0]
    assert said[1] == ""
    # It is rank 1 that met the weight.
    assert not entries(caches[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "lost", "kept"),
    [
        ("init-only", "another rank", "Finished matrices are kept"),
        ("train", "rank 1 (pro", "There is no checkpoint yet; what was finished before is kept"),
    ],
)
def test_a_rank_that_dies_ends_the_others(
    verb: str, lost: str, kept: str, recipe: Path, tmp_path: Path
) -> None:
    script = SECOND.format(does="os.kill(os.getpid(), signal.SIGKILL)")
    commands = (COMMAND, ("-c", script, str(tmp_path / "second")))
    caches = [tmp_path / "here", tmp_path / "there"]
    with two_ranks([verb, str(recipe)], caches, tmp_path, commands) as ranks:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert ranks[0].returncode == 1, said
    assert ranks[1].returncode == -signal.SIGKILL
    assert f"error: rank 0 lost the connection to {lost}" in said[0]
    assert ", which has died, while " in said[0]
    assert "while decomposing the base model (" in said[0]
    assert said[0].endswith(f"). {kept}; the same command goes on from there\n")
    # What was finished is kept.
    assert len(entries(caches[0])) >= 2


@pytest.mark.slow
def test_a_signal_ends_all_ranks(recipe: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    commands = (COMMAND, ("-c", SECOND.format(does="time.sleep(600)"), str(second)))
    caches = [tmp_path / "here", tmp_path / "there"]
    with two_ranks(["init-only", str(recipe)], caches, tmp_path, commands) as ranks:
        until = time.monotonic() + 240
        while not second.exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.5)  # rank 0 waits for it by then
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130], said
    assert said[0].endswith(
        "stopped by SIGINT while decomposing the base model; finished matrices are kept; the same "
        "command goes on from there\n"
    )
    assert said[1] == ""


def test_workers_beside_ranks_are_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.run(["init-only", str(recipe), "--processes", "2"]) == 2
    assert capsys.readouterr().err == (
        "error: 2 worker processes were asked for, and a launcher has started 4 ranks, which "
        "share the matrices; leave --processes and --gpus out\n"
    )


def test_parts_alone_and_the_errors_of_parts() -> None:
    assert processes.share_out([3], lambda part: part + 1) == [4]

    def fail(error: Exception) -> None:
        raise error

    known, bug = ModelError("a weight is missing"), KeyError("q")
    assert processes._attempt(fail, known) == ((None, known), known)
    (result, sent), own = processes._attempt(fail, bug)
    assert (result, own) == (None, bug)
    assert isinstance(sent, RunError)
    assert str(sent) == "rank 0 failed: KeyError: 'q'"
