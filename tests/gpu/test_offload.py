"""A run whose decoder blocks stay in the host's memory is that of a card that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.models import offload


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_offloaded_run_has_the_same_bytes(
    device: str,
    precision: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(
        train={
            "max_steps": 3,
            "eval_every": 0,
            "precision": precision,
            "gradient_checkpointing": True,
        },
        adapter={"rank": {"method": "fixed", "max": 1, "window": 2}},
    )
    monkeypatch.setattr(offload, "free_bytes", lambda _: 160_000)
    found, answers = [], []
    for key in ("null", "auto"):
        run = tmp_path / key
        keys = [f"model.device_map={key}", f"output_dir={run}"]
        assert cli.run(["train", str(recipe), *keys]) == 0
        found.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
        trained = capsys.readouterr().err
        assert ("0 of 2 decoder blocks are on " in trained) == (key == "auto")
        assert cli.run(["generate", str(run), "Tom has", "--max-new-tokens", "5"]) == 0
        answers.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert answers[0] == answers[1]
