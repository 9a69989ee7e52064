"""Out of memory: what counts as it, what the message says, and that every long stage gives it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import ModelError, ResourceError
from kpsvd_tune.storage import memory

GIB = 1 << 30
CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.50 GiB"
CPU = (
    "[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def raised(action: Callable[[], Any]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def chained() -> None:
    try:
        raise RuntimeError(CPU)
    except RuntimeError as error:
        raise ValueError("cannot load") from error


@pytest.mark.parametrize(
    ("error", "place", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "GPU memory", "21 MB were"),
        (RuntimeError("CUDA error: out of memory"), "GPU memory", None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "GPU memory", None),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "GPU memory", None),
        (RuntimeError(CPU), "memory", "4.0 TB were"),
        (MemoryError(), "memory", None),
        (raised(lambda: np.empty(1 << 50)), "memory", "9,007 TB were"),
        (raised(lambda: torch.empty(1 << 50)), "memory", "4,504 TB were"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory", None),
        (RuntimeError("std::bad_alloc"), "memory", None),
        (raised(chained), "memory", "4.0 TB were"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_kind_is_known_and_told_with_what_was_asked_for(
    error: BaseException, place: str, asked: str | None
) -> None:
    assert memory.is_out_of_memory(error)
    message = str(memory.out_of_memory(error, "testing", ["first", "second"]))
    assert message.startswith(f"out of {place} while testing")
    assert message.endswith(". What helps:\n  - first\n  - second")
    assert (f": {asked} asked for;" in message) if asked else ("asked for" not in message)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("size mismatch"),
        OSError(errno.ENOSPC, "No space left on device"),
        ModelError("the model is out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not memory.is_out_of_memory(error)


def test_the_tightest_limit_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "are free now" in memory.host_memory()
    monkeypatch.setattr(memory, "_of_machine", lambda: (8 * GIB, 64 * GIB, "the machine's"))
    monkeypatch.setattr(memory, "_of_address_space", lambda: None)
    # A job with a limit, in a group without one, in the root that has files of version 2.
    outer, inner = tmp_path / "jobs", tmp_path / "jobs" / "mine"
    inner.mkdir(parents=True)
    for folder, limit, used, stat in (
        (outer, "max", 3 * GIB, ""),
        (inner, str(2 * GIB), GIB, f"anon 5\ninactive_file {GIB // 2}\n"),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    groups = tmp_path / "cgroup"
    monkeypatch.setattr(memory, "_GROUPS_OF_PROCESS", groups)
    groups.write_text("0::/jobs/mine\n")
    assert memory.host_memory() == "1.6 GB of the container's or job's 2.1 GB are free now"
    # Version 1 has a hierarchy of its own for memory; others name no limit.
    older = tmp_path / "memory" / "job"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (older / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    groups.write_text("9:cpu:/job\n4:memory:/job\n0::/\n")
    assert memory.host_memory() == "0 bytes of the container's or job's 1.1 GB are free now"
    groups.unlink()
    assert memory.host_memory() == "8.6 GB of the machine's 69 GB are free now"
    monkeypatch.setattr(memory, "_of_machine", lambda: None)
    assert memory.host_memory() == "what is free is not known here"


def test_the_device_tells_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.device_memory() == "what is free on the device is not known here"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10**9, 80 * 10**9))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 70 * 10**9)
    assert memory.device_memory() == (
        "1.0 GB of the GPU's 80 GB are free now, and this process holds 70 GB"
    )


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={"max_steps": 2, "batch_size": 4},
    )


def full(*args: Any, **options: Any) -> None:
    raise RuntimeError(CPU)


STAGES = {
    "kpsvd_tune.training.stages.prepare": (
        "reading and tokenising the data",
        "a lower dataset.max_length (now 512)",
    ),
    "kpsvd_tune.training.initialise.decompose": (
        "decomposing the base model",
        "a lower adapter.rank.window (now 8)",
    ),
    "transformers.AutoModelForCausalLM.from_pretrained": (
        "loading the base model",
        "model.dtype bfloat16, which holds the weights in half the memory (now float32)",
    ),
    "kpsvd_tune.training.loss.SummedTokenLoss.forward": (
        "training, step 1 of 2",
        "train.batch_size=2 train.gradient_accumulation=2: half of the rows at a time in the same "
        "steps; train.on_oom=halve does that by itself, in one process\n"
        "  - train.gradient_checkpointing=true: activations are computed twice, not kept\n"
        "  - a lower dataset.max_length (now 512): shorter rows",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", STAGES, ids=lambda place: place.rpartition(".")[2])
def test_every_stage_of_a_training_says_what_helps_there(
    place: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, full)
    assert cli.run(["train", str(recipe)]) == 1
    err = capsys.readouterr().err
    doing, cure = STAGES[place]
    assert f"error: out of memory while {doing}: 4.0 TB were asked for; " in err
    assert " are free now. What helps:" in err
    assert cure in err
    assert "bug" not in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "place", "doing", "cure"),
    [
        (["init-only"], "kpsvd_tune.decompose.decompose", "decomposing", "rank.window"),
        (["merge", "-o", "merged"], "kpsvd_tune.merge.merging.merge", "merging",
         "--proof tensors"),
        (["merge", "-o", "merged"], "transformers.AutoModelForCausalLM.from_pretrained", "merging",
         "a machine with more memory"),
        (["eval", "--task", "gsm8k", "--limit", "1", "--path", "rows"],
         "kpsvd_tune.evaluation.evaluate.Scorer.score", "scoring gsm8k",
         "batch_size of the evaluation"),
        (["eval", "--task", "gsm8k", "--path", "rows"],
         "transformers.AutoModelForCausalLM.from_pretrained", "loading the model", "--dtype"),
        (["generate"], "kpsvd_tune.evaluation.generation.answer_one", "answering",
         "--max-new-tokens"),
        (["report"], "kpsvd_tune.commands.report.read_run_files", "running report", ""),
    ],
)  # fmt: skip
def test_every_other_command_does(
    words: list[str],
    place: str,
    doing: str,
    cure: str,
    recipe: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] != "init-only":
        assert cli.run(["train", str(recipe)]) == 0
    monkeypatch.setattr(place, full)
    verb, *options = [str(rows_file) if word == "rows" else word for word in words]
    source = str(recipe) if verb == "init-only" else str(tmp_path / "run")
    prompt = ["How many?"] if verb == "generate" else []
    assert cli.run([verb, source, *prompt, *options]) == 1
    err = capsys.readouterr().err
    assert f"error: out of memory while {doing}" in err
    assert "4.0 TB were asked for" in err
    assert cure in err
    assert "bug" not in err
    assert "Traceback" not in err


PROGRAM = """
import resource, sys
from kpsvd_tune.commands import main as cli
recipe = sys.argv[1]
assert cli.run(["train", recipe]) == 0
for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        used = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
sys.exit(cli.run(["train", recipe, "--resume", "never", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_whose_memory_is_limited_says_so(recipe: Path) -> None:
    big = ["train.batch_size=1024", "train.max_steps=1", "dataset.validation=0"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(recipe), *big],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :]
    assert last.startswith("error: out of memory while training, step 1 of 1: "), last
    assert " MB were asked for; " in last or " GB were asked for; " in last
    assert "of the limit (ulimit -v) of " in last
    assert "train.batch_size=512 train.gradient_accumulation=2" in last
    assert "Traceback" not in done.stderr


def test_the_error_is_one_of_resources() -> None:
    assert isinstance(memory.out_of_memory(MemoryError(), "testing", ()), ResourceError)
    assert str(memory.out_of_memory(MemoryError(), "testing", ())).endswith("are free now")
