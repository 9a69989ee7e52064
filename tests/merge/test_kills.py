"""A merge that is killed, or whose disk fills, leaves no folder or a complete one, proved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_moments import check_full_disks, check_kills
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli

pytestmark = [
    pytest.mark.slow,
    # The child of a process with threads does little and is killed.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


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


def test_a_kill_at_any_of_20_moments(
    work: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = check_kills(work, check, tmp_path / "out" / "m", monkeypatch)
    assert {"pwrite", "copy_file_range", "fsync", "replace"} <= set(names)


def test_a_disk_that_fills_at_any_of_10_offsets(
    work: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_full_disks(work, check, tmp_path / "out" / "m", monkeypatch, capsys)
