"""Kills a command, or fills its disk, at chosen operations: a folder is whole or not there.

The commands write through `kpsvd_tune.storage.durable` alone, so its operations on the disk are the
moments at which anything can change.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from faulty_os import FaultyOs, kill, raising

from kpsvd_tune.storage import durable

MOMENTS, OFFSETS = 20, 10
_WRITES = ("write", "pwrite", "copy_file_range", "fsync")
Work = Callable[[], int]  # a command that makes a folder, and its exit code
Check = Callable[[Path], bool]  # whether the folder is there; if so it must be whole


def check_kills(
    work: Work, check: Check, output: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Kill the command at MOMENTS operations, and give the names of all that it does.

    After each, the folder is whole or missing, and the next call makes it and leaves no more.
    """
    names = _count(work, monkeypatch)
    assert check(output)
    _remove(output)
    moments = _spread(list(range(len(names))), MOMENTS)
    found = set()
    for number in moments:
        pid = warm.fork_unmeasured()
        if pid == 0:
            try:
                # OpenMP's threads are not there in a child.
                torch.set_num_threads(1)
                durable.os = FaultyOs(kill, number, "after")  # type: ignore[assignment,attr-defined]
                work()
            finally:
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended == -signal.SIGKILL, (number, names[number])
        is_there = check(output)
        found.add(is_there)
        if not is_there:
            assert work() == 0
            assert check(output)
        assert [each.name for each in output.parent.iterdir()] == [output.name], names[number]
        _remove(output)
    assert found == {False, True}
    return names


def check_full_disks(
    work: Work,
    check: Check,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offsets: int = OFFSETS,
) -> None:
    """Let the disk be full at so many of its writes: an error, and nothing half done."""
    names = _count(work, monkeypatch)
    _remove(output)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    writes = [number for number, name in enumerate(names) if name in _WRITES]
    for number in _spread(writes, offsets):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FaultyOs(raising(full), number, "before"))
            assert work() == 1, names[number]
        said = " ".join(capsys.readouterr().err.split())
        what = r"could not (write|save|rename) .*: No space left on device"
        words = f"{what}; free some space, or choose an --output"
        assert re.search(words, said), names[number]
        # After the renaming, whose sync may fail, the folder is complete.
        if check(output):
            _remove(output)
        assert list(output.parent.iterdir()) == [], names[number]
    assert work() == 0
    assert check(output)


def _count(work: Work, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counting = FaultyOs(kill, -1, "before")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counting)
        assert work() == 0
    return counting.calls


def _spread(numbers: list[int], count: int) -> list[int]:
    """So many of the numbers, from the first to the last at equal distances."""
    last = len(numbers) - 1
    chosen = sorted({numbers[round(k * last / (count - 1))] for k in range(count)})
    assert len(chosen) == count, f"only {len(numbers)} operations"
    return chosen


def _remove(folder: Path) -> None:
    if folder.exists():
        durable.remove_folder(folder)
