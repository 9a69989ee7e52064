"""An export that is killed, or whose disk fills, leaves no folder or a complete one, proved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_moments import check_full_disks, check_kills
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import ExportError
from kpsvd_tune.export import lora
from kpsvd_tune.merge.proof import logits
from kpsvd_tune.storage.commit import check_sealed

pytestmark = [
    pytest.mark.slow,
    # The child of a process with threads does little and is killed.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture
def work(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """Exports an adapter, as a user types it, with the LoRA loaded here: it takes a second less."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "factor_shape": "thin", "rank": 1}
    peft: Any = get_peft_model(model, KpsvdConfig(**options))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    peft.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    # There already, so that every export does the same.
    (tmp_path / "out").mkdir()

    def load_here(adapter: Path, _: Any, prompts: Sequence[Sequence[int]], whose: str) -> Any:
        base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
        return logits(loaded, [torch.tensor([ids]) for ids in prompts], whose, ExportError)

    monkeypatch.setattr(lora, "plain_logits", load_here)
    command = ["export", str(tmp_path / "adapter"), "--to", "lora", "-o"]
    return lambda: cli.run([*command, str(tmp_path / "out" / "lora")])


def check(folder: Path) -> bool:
    """Whether an exported folder is there; if so it must be whole and proved."""
    if not folder.exists():
        return False
    check_sealed(folder, "lora")
    report = json.loads((folder / "export_report.json").read_text())
    assert report["max_logit_difference"] <= report["tolerance"]
    held = load_file(folder / "adapter_model.safetensors")
    assert len(held) == 2 * len(report["layer_ranks"]) == 4
    assert all(torch.isfinite(each).all() for each in held.values())
    names = {each.name for each in folder.iterdir()}
    assert {"adapter_config.json", "manifest.json", "tokenizer.json", "README.md"} <= names
    return True


def test_a_kill_at_any_of_20_moments(
    work: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = check_kills(work, check, tmp_path / "out" / "lora", monkeypatch)
    assert {"makedirs", "write", "fsync", "replace"} <= set(names)


def test_a_disk_that_fills_at_any_of_10_offsets(
    work: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_full_disks(work, check, tmp_path / "out" / "lora", monkeypatch, capsys)
