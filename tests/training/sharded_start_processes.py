"""One rank of the trainings that test_sharded_start.py starts, each from both starts.

Usage: sharded_start_processes.py FOLDER PARALLEL, with RANK and so on set as a launcher sets them.
FOLDER holds a base of each kind in bases/. Every training leaves what it saw in
FOLDER/CASE-START-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kpsvd_tune.decompose.start as start
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.decompose import decompose
from kpsvd_tune.models import resolve_model
from kpsvd_tune.models.streamed import StreamedWeights
from kpsvd_tune.processes import end_processes, on_main_process
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.find import load_adapter
from kpsvd_tune.training import Training, make_accelerator
from kpsvd_tune.training.accelerator import shares_weights

# By name: the base, and what differs from the recipe of all.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("qwen2", {"train": {"gradient_checkpointing": True}}),
    # Tied, with an embedding of a class of its own.
    "scaled": ("gemma", {}),
    "tied and saved": ("qwen2", {"adapter": {"modules_to_save": ["lm_head"]}}),
    "experts": ("mixtral", {}),
    "conv1d": ("gpt2", {"adapter": {"target_modules": ["c_attn", "c_fc"]}}),
    "pickled": ("pickled", {}),
    "half": ("llama", {"model": {"dtype": "bfloat16"}}),
    "left": ("llama", {"adapter": {"form": "left", "factor_size": 4, "init": "random"}}),
    "relative": ("llama", {"adapter": {"rate": "relative", "init": "random"}}),
    "saved": ("llama", {"adapter": {"modules_to_save": ["lm_head"]}}),
    "again": ("llama", {"adapter": {"modules_to_save": ["lm_head"]}}),
}


def make_recipe(folder: Path, base: str, changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "model": {"path": str(folder / "bases" / base), "dtype": "float32"},
        "adapter": {"rank": {"max": 2}},
        "train": {
            "max_steps": 3,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "no",
            "eval_every": 0,
            "save_every": 0,
        },
        "output_dir": str(folder / "unused"),
    }
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    return Recipe.model_validate(values)


def make_rows() -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 16, (12,), generator=generator).tolist()
    ids = [tuple(torch.randint(3, 64, (n,), generator=generator).tolist()) for n in lengths]
    return [TokenizedRow(each, (-100, *each[1:]), row=row) for row, each in enumerate(ids)]


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of the base's parameters that this process holds, of sharded ones its part."""
    total = 0
    for parameter in model.parameters():
        if parameter.is_meta:
            continue
        own: Any = getattr(parameter, "_local_tensor", parameter)
        # DeepSpeed keeps the part beside an empty parameter.
        part = getattr(parameter, "ds_tensor", None)
        total += own.untyped_storage().nbytes() + (0 if part is None else part.nbytes)
    return total


def train(folder: Path, case: str, parallel: str, *, streamed: bool) -> None:
    base, changes = CASES[case]
    recipe = make_recipe(folder, base, changes)
    settings = recipe.train.model_copy(update={"parallel": parallel})
    accelerator = make_accelerator(settings)
    assert shares_weights(accelerator, settings)
    source = resolve_model(recipe.model.path, None)
    notes: list[str] = []
    options: dict[str, Any] = {"is_shared": streamed, "note": notes.append}
    name = f"{case}-{'new' if streamed else 'old'}"
    earlier = folder / "earlier"
    if case == "again":
        loaded = start.load_base(source, recipe, **options)
        model, _ = load_adapter(loaded, earlier, is_trainable=True)
    else:
        found = on_main_process(lambda: decompose(source, recipe.adapter, seed=0))
        model = start.adapt(recipe, source, found, None, **options)
    records = [layer.kpsvd_base["default"] for _, layer in kpsvd_layers(model)]
    whole = sum(each.nbytes for each in model.get_base_model().parameters())
    run = RunDirectory(folder / name)
    on_main_process(lambda: run.begin("recipe", {}, {}))
    most, before = [0], StreamedWeights.read

    def read(self: StreamedWeights, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        value = before(self, key, rows)
        most[0] = max(most[0], held_bytes(model.get_base_model()) + value.nbytes)
        return value

    factors = rate_factors(
        model, is_relative=recipe.adapter.rate == "relative", fetch=start.fetching(model)
    )
    setattr(StreamedWeights, "read", read)  # noqa: B010
    try:
        training = Training(
            model,
            make_rows(),
            [],
            settings,
            accelerator,
            run,
            pad_token_id=0,
            rate_factors=factors,
        )
    finally:
        setattr(StreamedWeights, "read", before)  # noqa: B010
    steps = [step.to_dict() for step in training.steps()]
    weights = training.trained_weights()
    if case == "saved" and not streamed and accelerator.is_main_process:
        state = {**model.state_dict(), **weights}
        model.save_pretrained(str(earlier), state_dict=state, save_embedding_layers=False)
    seen = {
        "losses": [step["loss"] for step in steps],
        "norms": [step["grad_norm"] for step in steps],
        "weights": {key: value.tolist() for key, value in weights.items()},
        "records": [each.tolist() for each in records],
        "whole": whole,
        "most": most[0],
        "held": held_bytes(model.get_base_model()),
        "buffers": {key: each.tolist() for key, each in model.named_buffers() if "inv" in key},
        "notes": notes,
        "meta": [key for key, each in model.named_parameters() if each.is_meta],
    }
    training.free()
    seen["freed"] = held_bytes(model.get_base_model())
    (folder / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.free_memory()


def main(folder: Path, parallel: str) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        for streamed in (False, True):
            train(folder, case, parallel, streamed=streamed)
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
