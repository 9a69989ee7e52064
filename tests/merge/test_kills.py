"""A merge that is killed, or whose disk fills, leaves no folder or a complete one, proved."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_os import FaultyOs, kill, raising
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli
from kpsvd_tune.storage import durable

pytestmark = [
    pytest.mark.slow,
    # The child of a process with threads does little and is killed.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
MOMENTS, OFFSETS = 20, 10


@pytest.fixture
def work(
    tmp_path: Path, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[[], int]:
    """Merges an adapter into a base of several shards, as a user types it."""
    base = tmp_path / "base"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(base, max_shard_size="20KB")
    tokenizer.save_pretrained(base)
    options: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "init_weights": False}
    peft: Any = get_peft_model(model, KpsvdConfig(rank=1, **options))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(str(tmp_path / "adapter"))
    # There already, so that every merge does the same.
    (tmp_path / "out").mkdir()
    command = ["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out" / "m")]
    return lambda: cli.run([*command, "--proof", "tensors"])


def check(folder: Path) -> bool:
    """Whether a merged folder is there; if so it must be whole and proved."""
    if not folder.exists():
        return False
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["passed"]
    assert report["max_deviation"] <= 0.501
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        held = load_file(folder / name)
        assert held.keys() == {key for key, file in index["weight_map"].items() if file == name}
        assert all(torch.isfinite(each).all() for each in held.values())
    assert (folder / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    return True


def count(work: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counting = FaultyOs(kill, -1, "before")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counting)
        assert work() == 0
    return counting.calls


def remove(folder: Path) -> None:
    if folder.exists():
        durable.remove_folder(folder)


def test_a_kill_at_any_of_20_moments(
    work: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "m"
    names = count(work, monkeypatch)
    assert {"pwrite", "copy_file_range", "fsync", "replace"} <= set(names)
    assert check(output)
    remove(output)
    last = len(names) - 1
    moments = sorted({round(k * last / (MOMENTS - 1)) for k in range(MOMENTS)})
    assert len(moments) == MOMENTS
    found = set()
    for number in moments:
        pid = os.fork()
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
            # The next one starts clean, and leaves nothing of the last.
            assert work() == 0
            assert check(output)
        assert [each.name for each in output.parent.iterdir()] == ["m"], names[number]
        remove(output)
    assert found == {False, True}


def test_a_disk_that_fills_at_any_of_10_offsets(
    work: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out" / "m"
    names = count(work, monkeypatch)
    remove(output)
    writes = [k for k, name in enumerate(names) if name in ("pwrite", "copy_file_range", "fsync")]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number in (writes[round(k * (len(writes) - 1) / (OFFSETS - 1))] for k in range(OFFSETS)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FaultyOs(raising(full), number, "before"))
            assert work() == 1, names[number]
        said = " ".join(capsys.readouterr().err.split())
        words = r"could not (write|save|rename) .*: No space left on device; free some"
        assert re.search(words, said), names[number]
        # After the renaming, whose sync may fail, the folder is complete.
        if check(output):
            remove(output)
        assert list(output.parent.iterdir()) == [], names[number]
    assert work() == 0
    assert check(output)
