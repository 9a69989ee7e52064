"""Disks that fill or vanish, dead processes, no network: a message, an exit code, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kpsvd_tune.adapter  # noqa: F401  registers KPSVD with PEFT
from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.runs.directory import RunDirectory

# A program, for the console script of an environment may be that of another checkout.
COMMAND = [sys.executable, "-m", "kpsvd_tune"]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={"max_steps": 6, "eval_every": 3, "save_every": 2},
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB; needs the right to mount, which root has outside of some containers."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def used_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_disk_that_fills_anywhere_ends_the_run_and_loses_nothing(
    recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe)]
    before = used_bytes(small_disk)
    assert cli.run([*command, f"output_dir={small_disk / 'whole'}"]) == 0
    need = used_bytes(small_disk) - before
    shutil.rmtree(small_disk / "whole" / "init")
    rest = used_bytes(small_disk) - before
    # The page of the rank report takes most of the room: three places in it, seven after it.
    rooms = [int((need - rest) * (n + 0.5) / 3) for n in range(3)]
    rooms += [int(need - rest + rest * (n + 0.5) / 7) for n in range(7)]
    expected = adapter_of(small_disk / "whole")
    shutil.rmtree(small_disk / "whole")
    run, ballast = small_disk / "run", small_disk / "ballast"
    seen = set()
    for room in rooms:
        shutil.rmtree(run, ignore_errors=True)
        found = os.statvfs(small_disk)
        ballast.write_bytes(bytes(found.f_bfree * found.f_frsize - room))
        capsys.readouterr()
        assert cli.run([*command, f"output_dir={run}"]) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: could not "), message
        assert str(small_disk) in message
        assert "No space left on device" in message
        assert "free some space" in message
        seen.add(message.partition(str(run))[0])
        # Whatever stands under a checkpoint's name is whole.
        runs = RunDirectory(run)
        for folder in runs.checkpoints.glob("step-*"):
            runs.load(folder)
        ballast.unlink()
        assert cli.run([*command, f"output_dir={run}"]) == 0
        assert adapter_of(run) == expected
        assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    assert any("bytes to" in each for each in seen), seen


@contextlib.contextmanager
def at_step(number: int, action: Any) -> Iterator[None]:
    original = ConsoleEvents.step

    def step(self: ConsoleEvents, metrics: Any, total: int) -> None:
        original(self, metrics, total)
        if metrics.step == number:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConsoleEvents, "step", step)
        yield


@pytest.mark.slow
def test_a_disk_that_turns_read_only_is_named(
    recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe), f"output_dir={small_disk / 'run'}"]
    with at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert cli.run(command) == 130
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.run(command) == 1
    err = capsys.readouterr().err
    assert "Read-only file system" in err
    assert "choose an output_dir that can be written" in err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert cli.run(command) == 0


@pytest.mark.slow
def test_a_vanished_folder_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with at_step(3, lambda: shutil.rmtree(tmp_path / "run")):
        assert cli.run(["train", str(recipe)]) == 1
    err = capsys.readouterr().err
    assert f"bytes to {tmp_path / 'run' / 'metrics.jsonl'}" in err
    assert "the folder vanished; was output_dir moved, deleted or unmounted?" in err


OFFLINE = """
import socket, sys
asked = []
def refuse(*arguments, **options):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = refuse
socket.create_connection = refuse
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
from kpsvd_tune.commands import main as cli
code = cli.run(sys.argv[1:])
assert not asked, asked
sys.exit(code)
"""


@pytest.mark.slow
def test_offline_makes_no_network_call(recipe: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "train", str(recipe), "--offline"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def two_ranks(recipe: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A long run in two processes that has saved its first checkpoint; and its ranks, by number."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    changes = ["train.max_steps=100000", "train.batch_size=1", "train.eval_every=0"]
    process = subprocess.Popen(
        [*COMMAND, "train", str(recipe), *changes, "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    ranks = children(process.pid)
    assert len(ranks) == 2
    yield process, ranks
    for pid in [process.pid, *ranks]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_with_rank_and_phase(
    two_ranks: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, ranks = two_ranks
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 was killed by SIGKILL while training, step " in err
    assert "of 100000" in err
    assert re.search(
        r"rank 0 lost the connection to rank 1 \(process \d+ on .*\), which has died", err
    )
    assert RunDirectory(tmp_path / "run").newest_checkpoint() is not None
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_behind(
    two_ranks: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, ranks = two_ranks
    process.kill()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in ranks):
        assert time.monotonic() < until, "a rank goes on without its launcher"
        time.sleep(0.1)
    assert RunDirectory(tmp_path / "run").newest_checkpoint() is not None


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.slow
def test_a_sharded_run_leaves_a_whole_adapter(
    recipe: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    warm_ranks: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two processes with shared-out weights against one; the adapter loads on one process."""
    from kpsvd_tune.launch import launch

    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.run(["train", str(recipe), f"output_dir={one}"]) == 0
    changes = [f"output_dir={two}", "train.batch_size=1", "train.parallel=fsdp"]
    assert launch(["train", str(recipe), *changes, "--processes", "2"], 2, use_cpu=True) == 0
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)
    logits = []
    for run in (one, two):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model: Any = PeftModel.from_pretrained(base, run / "adapter").eval()
        with torch.no_grad():
            logits.append(model(torch.arange(16)[None]).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    # What all ranks would say alike is said once.
    assert launch(["train", str(recipe), "model.quantization=nf4", *changes], 2, True) == 2
    assert capfd.readouterr().err.count("quantised weights are not sharded") == 1


SLOW_STEP = """
import sys
from hashlib import pbkdf2_hmac
from kpsvd_tune.commands import main as cli
from kpsvd_tune.training.loss import SummedTokenLoss

forward, calls = SummedTokenLoss.forward, 0

def slow(self, **inputs):
    global calls
    calls += self.training
    if calls == 3 and self.training:
        print("step 3 runs", flush=True)
        # Python runs no handler meanwhile, as in a backward pass.
        pbkdf2_hmac("sha256", b"x", b"y", int(sys.argv[1]))
    return forward(self, **inputs)

SummedTokenLoss.forward = slow
sys.exit(cli.run(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_every", "lost"),
    [(0, "2 finished steps and the running one are lost, for there is no checkpoint yet"),
     (1, "0 finished steps since the checkpoint of step 2, and the running one, are lost")],
)  # fmt: skip
def test_a_second_signal_says_what_is_lost_and_has_a_code_of_its_own(
    recipe: Path, save_every: int, lost: str
) -> None:
    rounds = str(10**9)  # minutes
    words = ["train", str(recipe), f"train.save_every={save_every}", "dataset.validation=0"]
    with warm.Popen(
        [sys.executable, "-c", SLOW_STEP, rounds, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "step 3 runs\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        for line in process.stderr:
            if line.startswith("SIGINT"):
                break
        assert line.startswith("SIGINT: finishing step 3, about ")
        assert line.endswith(" s, and saving; again to stop now\n")
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert rest == f"stopped at once by a second SIGINT: {lost}\n"
    assert process.returncode == 5
    # Nothing is damaged: the run goes on, to its end.
    assert cli.run(words) == 0


@pytest.mark.slow
def test_a_signal_before_the_first_step_says_where_it_came(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("kpsvd_tune.training.initialise.decompose", wait)
    assert cli.run(["train", str(recipe)]) == 143
    assert capsys.readouterr().err.endswith(
        "stopped by SIGTERM while decomposing the base model; finished matrices are kept; the same "
        f"command goes on from there:\n  {shlex.join(['kpsvd-tune', 'train', str(recipe)])}\n"
    )
    monkeypatch.setattr("kpsvd_tune.training.stages.prepare", wait)
    assert cli.run(["train", str(recipe)]) == 143
    err = capsys.readouterr().err
    assert "stopped by SIGTERM while reading and tokenising the data; the same command" in err
    monkeypatch.undo()
    assert cli.run(["train", str(recipe)]) == 0
    monkeypatch.setattr("kpsvd_tune.merge.merging.merge", wait)
    run = recipe.parent / "run"
    assert cli.run(["merge", str(run), "-o", str(recipe.parent / "merged")]) == 143
    assert capsys.readouterr().err.endswith(
        "stopped by SIGTERM while merging the adapter into its base; nothing was written\n"
    )


@pytest.mark.slow
def test_the_first_signal_is_answered_with_what_happens_now(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert cli.run(["train", str(recipe)]) == 130
    err = capfd.readouterr().err
    said = [line for line in err.splitlines() if "again to stop now" in line]
    assert len(said) == 1
    assert said[0].startswith("SIGINT: finishing step 5, about 1 s, and saving; ")
    assert "stopped by SIGINT; what was done is saved; the same command goes on from there:" in err
