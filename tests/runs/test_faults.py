"""A process killed before and after every disk operation of a save and of a resume."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from faulty_os import FaultyOs, kill

from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.state import TrainingState
from kpsvd_tune.storage import durable

SAVE_EVERY = 2
IDENTITY = {"recipe": {"train": {"seed": 0}}}

pytestmark = [
    pytest.mark.slow,
    # The child of a process with threads does little and is killed.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def state(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        offsets={"w": torch.full((8,), float(step))},
        optimizer={"state": {"w": {"exp_avg": torch.ones(8)}}, "groups": []},
        scheduler={},
        random=[{"torch": torch.arange(4)}],
        progress={"step": step},
    )


def two_steps_and_a_save(folder: Path) -> None:
    run = RunDirectory(folder)
    run.log({"step": 5})
    run.log({"step": 6})
    run.save(state(6), keep=2)


def settle(folder: Path) -> None:
    """Complete a step whose validation was put off, and save it again."""
    run = RunDirectory(folder)
    run.log({"step": 5})
    run.save(state(5), keep=2)


def go_on(folder: Path) -> None:
    RunDirectory(folder).begin("recipe", IDENTITY, {})


def go_back(folder: Path) -> None:
    """Resume from a named, older checkpoint, which moves the later one away."""
    older = folder / "checkpoints" / "step-000002"
    if older.is_dir():
        RunDirectory(folder).begin("recipe", IDENTITY, {}, resume=str(older))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path / "source"
    run = RunDirectory(folder)
    run.begin("recipe", IDENTITY, {})
    for step in range(1, 5):
        run.log({"step": step})
        if step % SAVE_EVERY == 0:
            run.save(state(step), keep=2)
    return folder


def operations(work: Callable[[Path], None], source: Path, monkeypatch: Any) -> list[str]:
    folder = Path(shutil.copytree(source, source.with_name("count")))
    counting = FaultyOs(kill, -1, "before")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counting)
        work(folder)
    return counting.calls


def killed(work: Callable[[Path], None], folder: Path, number: int, moment: str) -> int:
    """Do the work in a child that is killed; its exit code as Python gives it."""
    pid = warm.fork_unmeasured()
    if pid == 0:
        try:
            durable.os = FaultyOs(kill, number, moment)  # type: ignore[assignment,attr-defined]
            work(folder)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("work", [two_steps_and_a_save, go_on, go_back])
def test_a_kill_at_any_disk_operation_loses_at_most_save_every_steps(run, monkeypatch, work):
    names = operations(work, run, monkeypatch)
    kinds = {"open", "write", "fsync", "close", "replace"}
    if work is two_steps_and_a_save:
        kinds |= {"makedirs", "unlink", "rmdir"}
    assert kinds <= set(names)
    for number in range(len(names)):
        for moment in ("before", "after"):
            folder = Path(shutil.copytree(run, run.with_name(f"{number}-{moment}")))
            where = f"{moment} {names[number]} ({number})"
            assert killed(work, folder, number, moment) == -signal.SIGKILL, where
            start = RunDirectory(folder).begin("recipe", IDENTITY, {})
            assert start.checkpoint is not None, f"nothing to go on from after a kill {where}"
            found = RunDirectory(folder).load(start.checkpoint)
            assert torch.equal(found.offsets["w"], state(found.step).offsets["w"]), where
            reached = 6 if work is two_steps_and_a_save else 4
            if work is go_back:
                assert found.step in (2, 4), where
            else:
                assert found.step >= reached - SAVE_EVERY, where
            # The log ends where the checkpoint was taken, and the same work gets through now.
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == found.step, where
            if found.step < 6:
                work(folder)
            shutil.rmtree(folder)


def test_a_kill_while_a_pending_checkpoint_is_replaced_loses_no_step(run, monkeypatch):
    RunDirectory(run).save(state(5), keep=2, is_pending=True)
    names = operations(settle, run, monkeypatch)
    assert {"write", "replace", "unlink", "rmdir"} <= set(names)
    found = set()
    for number in range(len(names)):
        for moment in ("before", "after"):
            folder = Path(shutil.copytree(run, run.with_name(f"{number}-{moment}")))
            where = f"{moment} {names[number]} ({number})"
            assert killed(settle, folder, number, moment) == -signal.SIGKILL, where
            start = RunDirectory(folder).begin("recipe", IDENTITY, {})
            assert start.checkpoint is not None, where
            assert RunDirectory(folder).load(start.checkpoint).step == 5, where
            is_settled = start.checkpoint.name == "step-000005"
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == (5 if is_settled else 4), where
            if not is_settled:
                settle(folder)
            left = {path.name for path in (folder / "checkpoints").iterdir()}
            assert "step-000005" in left, where
            assert not any("pending" in name for name in left), where
            found.add(is_settled)
            shutil.rmtree(folder)
    assert found == {False, True}


def test_every_file_of_a_checkpoint_cut_or_flipped_is_named(run):
    newest = run / "checkpoints" / "step-000004"
    files = sorted(newest.iterdir())
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        step = max(1, len(data) // 40)
        damaged = [data[:cut] for cut in (0, 1, len(data) // 2, len(data) - 1)]
        damaged += [
            data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), step)
        ]
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=str(path)):
                RunDirectory(run).load(newest)
        path.write_bytes(data)
    assert RunDirectory(run).load(newest).step == 4
