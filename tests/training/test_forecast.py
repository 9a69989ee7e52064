"""The first five steps of a run tell how long all of it takes, by a clock that is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kpsvd_tune.training.loop as loop
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.estimate.batches import batches_of, validation_size
from kpsvd_tune.estimate.time import FEWEST_STEPS, Ahead, seconds_by_steps
from kpsvd_tune.training import Training
from kpsvd_tune.training.saving import Saving

# What the planted clock says that things take, in seconds.
PER_TOKEN = 0.01  # of a forward pass; the backward pass takes twice as much
WARMING_UP = 4.0  # the first pass of a validation, and of a step: caches, compilation
NUM_STEPS = 60


def rows_of(lengths: list[int]) -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
        rows.append(TokenizedRow(ids, (-100, *ids[1:]), row=number))
    return rows


def unequal(num_rows: int, seed: int) -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(seed)
    return rows_of((4 + torch.randint(0, 60, (num_rows,), generator=generator)).tolist())


class Stored:
    """Rows as the store of tokenised rows has them."""

    def __init__(self, rows: list[TokenizedRow]) -> None:
        self.lengths = np.array([len(row.input_ids) for row in rows])
        self.num_supervised = self.lengths - 1

    def __len__(self) -> int:
        return len(self.lengths)


def plant_clock(model: Any, monkeypatch: pytest.MonkeyPatch, saving: float) -> None:
    now, is_cold = [0.0], {True: True, False: True}

    def passes(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        size = inputs["input_ids"].numel()
        now[0] += PER_TOKEN * size * (3 if model.training else 1)
        now[0] += WARMING_UP * is_cold[model.training]
        is_cold[model.training] = False

    model.base_model.model.model.register_forward_pre_hook(passes, with_kwargs=True)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    save = Saving.save

    def slowly(self: Saving, progress: Any) -> None:
        before = self._newest
        save(self, progress)
        now[0] += saving * (self._newest != before)

    monkeypatch.setattr(Saving, "save", slowly)


RUNS: dict[str, dict[str, Any]] = {
    "steps alone": {},
    "rows sorted by length": {"group_by_length": True},
    "a last batch that is short": {"train": unequal(7, 3), "batch_size": 4},
    "packed rows": {"packing": True},
    "accumulated steps": {"gradient_accumulation": 3, "batch_size": 1},
    "validations that take longer than the steps between them": {
        "validation": unequal(60, 1),
        "eval_every": 10,
    },
    "validations from early on": {"validation": unequal(20, 1), "eval_every": 2},
    "checkpoints": {"save_every": 20},
    "all of it": {
        "validation": unequal(30, 1),
        "eval_every": 20,
        "save_every": 10,
        "group_by_length": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_five_steps_tell_the_time_within_30_percent(
    name: str,
    start_training: Callable[..., Training],
    lora_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Any] = {"train": unequal(50, 0), "batch_size": 3, "max_steps": NUM_STEPS}
    changes |= RUNS[name]
    saving = 0.05
    model = lora_model()
    plant_clock(model, monkeypatch, saving)
    training = start_training(model=model, **changes)
    list(training.steps())
    recipe = training._recipe
    held_out = changes.get("validation", [])
    batches = batches_of(Stored(changes["train"]), recipe, NUM_STEPS)  # type: ignore[arg-type]
    ahead = Ahead(
        NUM_STEPS,
        batches.size_until,
        validation_size(Stored(held_out), recipe) if held_out else 0.0,  # type: ignore[arg-type]
        recipe.eval_every,
        recipe.save_every,
        checkpoint_bytes=10_000_000,
    )
    lines = [*map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    measured = training.result().wall_seconds
    assert seconds_by_steps(lines[: FEWEST_STEPS - 1], ahead) is None
    for number in (FEWEST_STEPS, 20, NUM_STEPS):
        forecast = seconds_by_steps(lines[:number], ahead)
        assert forecast is not None
        assert abs(forecast / measured - 1) < 0.3
    # Without anything left to come it is what was measured.
    assert forecast == pytest.approx(measured, rel=0.05)
