"""One rank of the runs that test_distributed.py starts; with one process it is their reference.

Usage: two_processes.py FOLDER, with RANK, WORLD_SIZE and so on set as a launcher sets them. Every
run leaves what it saw in FOLDER/NAME-RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import KpsvdTuneError, RunError
from kpsvd_tune.processes import end_processes, on_main_process
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.training import Training, make_accelerator
from kpsvd_tune.training.optim import SHARDABLE


def make_model(dropout: float = 0.0, has_idle_layer: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    adapter = LoraConfig(
        r=2,
        lora_dropout=dropout,
        target_modules=["q_proj", "up_proj", *["idle"][: int(has_idle_layer)]],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = LlamaForCausalLM(config)
    if has_idle_layer:
        # Last, so that the others get the weights that they have without it.
        with torch.random.fork_rng():
            base.idle = torch.nn.Linear(4, 4)
    model = get_peft_model(base, adapter)
    assert isinstance(model, torch.nn.Module)
    return model


def make_rows(num_rows: int) -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(num_rows):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = tuple(torch.randint(0, 64, (length,), generator=generator).tolist())
        # Rows differ much in supervised tokens: a mean of means would differ from the mean.
        prompt = number % (length - 1)
        rows.append(TokenizedRow(ids, (-100,) * prompt + ids[prompt:], row=number))
    return rows


def train(
    folder: Path,
    name: str,
    dropout: float = 0.0,
    plant: Callable[[torch.nn.Module, int], None] | None = None,
    stop_after: int | None = None,
    two_rates: bool = False,
    has_idle_layer: bool = False,
    **changes: Any,
) -> None:
    """Train, and write what this process saw."""
    recipe = TrainRecipe.model_validate(
        {
            "max_steps": 4,
            "learning_rate": 1e-2,
            "precision": "no",
            "scheduler": "constant",
            "eval_every": 2,
            "save_every": 2,
        }
        | changes
    )
    accelerator = make_accelerator(recipe)
    run = RunDirectory(folder / name.partition("+")[0])
    identity = {"num_processes": accelerator.num_processes}
    start = on_main_process(lambda: run.begin("recipe", identity, {}))
    model = make_model(dropout, has_idle_layer)
    rows = make_rows(16)
    training = Training(
        model,
        rows[:11],
        rows[11:],
        recipe,
        accelerator,
        run,
        pad_token_id=0,
        checkpoint=start.checkpoint,
        # Parameters of unlike rates are of unlike groups of the optimiser.
        rate_factors={
            name: 0.5 for name, _ in model.named_parameters() if two_rates and "lora_B" in name
        },
    )
    seen: dict[str, Any] = {"metrics": [], "error": None}
    try:
        steps = training.steps()
        for metrics in steps:
            seen["metrics"].append(metrics.to_dict())
            if plant is not None:
                plant(model, metrics.step)
            if metrics.step == stop_after:
                steps.close()
    except KpsvdTuneError as error:
        seen["error"] = [type(error).__name__, error.exit_code, str(error)]
    seen["weights"] = {name: each.tolist() for name, each in training.trained_weights().items()}
    # What this process holds of the model, which may be less than all of it.
    seen["num_held"] = sum(parameter.numel() for parameter in model.parameters())
    seen["kinds"] = sorted({type(parameter).__name__ for parameter in model.parameters()})
    seen["result"] = training.result().to_dict()
    path = folder / f"{name}-{accelerator.process_index}.json"
    path.write_text(json.dumps(seen))


def plant_nan(model: torch.nn.Module, step: int) -> None:
    if step == 2 and os.environ["RANK"] == "1":
        next(p for p in model.parameters() if not p.requires_grad).data.fill_(math.nan)


def plant_nan_once(model: torch.nn.Module, step: int) -> None:
    """Make the loss NaN on rank 1 in step 3, the first time that it is computed."""
    if step != 2 or os.environ["RANK"] != "1":
        return
    projection = model.get_output_embeddings()  # type: ignore[operator]

    def spoil(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Not in the validation that comes first where a run goes back to step 2.
        if not model.training:
            return output
        handle.remove()
        return output * math.nan

    handle = projection.register_forward_hook(spoil)


def kill_once(model: torch.nn.Module, step: int) -> None:
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def fail_on_main(folder: Path) -> None:
    accelerator = make_accelerator(TrainRecipe(precision="no"))

    def fail() -> None:
        raise RunError("the disk is full")

    try:
        on_main_process(fail)
    except RunError as error:
        (folder / f"main-{accelerator.process_index}.json").write_text(json.dumps(str(error)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train(folder, "plain", batch_size=2)
    train(folder, "accumulated", batch_size=1, gradient_accumulation=2)
    train(folder, "whole", dropout=0.3, batch_size=2)
    train(folder, "parts", dropout=0.3, batch_size=2, stop_after=3)
    train(folder, "parts+resumed", dropout=0.3, batch_size=2)
    train(folder, "nan", batch_size=2, plant=plant_nan)
    train(folder, "signal", batch_size=2, plant=kill_once)
    train(folder, "idle", batch_size=2, has_idle_layer=True)
    train(folder, "packed", batch_size=2, packing=True)
    train(folder, "grouped", batch_size=2, group_by_length=True)
    sharded: dict[str, Any] = {"batch_size": 2, "parallel": "fsdp"}
    train(folder, "sharded", **sharded)
    train(folder, "sharded-accumulated", parallel="fsdp", batch_size=1, gradient_accumulation=2)
    train(folder, "sharded-checkpointing", **sharded, gradient_checkpointing=True)
    train(folder, "sharded-packed", **sharded, packing=True)
    train(folder, "sharded-parts", **sharded, stop_after=3)
    train(folder, "sharded-parts+resumed", **sharded)
    for name in SHARDABLE:
        arguments: dict[str, Any] = {"batch_size": 2, "optimizer": name, "max_steps": 3}
        arguments |= {"save_every": 1, "eval_every": 0}
        train(folder, f"ddp-{name}", **arguments)
        train(folder, f"fsdp-{name}", **arguments, parallel="fsdp", stop_after=2)
        train(folder, f"fsdp-{name}+resumed", **arguments, parallel="fsdp")
    train(folder, "sharded-nan", **sharded, plant=plant_nan)
    train(folder, "skip", batch_size=2, plant=plant_nan_once, on_nonfinite="skip")
    train(folder, "retry", batch_size=2, plant=plant_nan_once, on_nonfinite="retry")
    fail_on_main(folder)
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
