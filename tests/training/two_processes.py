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
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import kpsvd_tune.training.loop as loop
import kpsvd_tune.training.watching as watching
from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import KpsvdTuneError, RunError
from kpsvd_tune.events import Silence
from kpsvd_tune.processes import end_processes, on_main_process
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.record import RunEvents
from kpsvd_tune.training import Training, make_accelerator
from kpsvd_tune.training.optim import SHARDABLE
from kpsvd_tune.training.progress import Progress


def make_model(
    dropout: float = 0.0, has_idle_layer: bool = False, adapter: Any = None
) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = LoraConfig(
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
    model = get_peft_model(base, adapter or lora)
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
    prepare: Callable[[Training, torch.nn.Module], None] | None = None,
    stop_when: Callable[[Progress], bool] = lambda _: False,
    is_watched: bool = False,
    adapter: Any = None,
    **changes: Any,
) -> None:
    """Train, and write what this process saw.

    `plant` is called after each step and `prepare` before the first; `stop_when` ends as a kill
    does, with nothing saved any more. With `is_watched` the run has events, as `train` keeps them.
    """
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
    model = make_model(dropout, has_idle_layer, adapter)
    rows = make_rows(16)
    events = RunEvents(Silence(), run, is_main=accelerator.is_main_process)
    events.begin(start.changed)
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
        tell=events.tell if is_watched else None,
    )
    if prepare is not None:
        prepare(training, model)
    seen: dict[str, Any] = {"metrics": [], "error": None}
    try:
        steps = training.steps()
        for metrics in steps:
            seen["metrics"].append(metrics.to_dict())
            if plant is not None:
                plant(model, metrics.step)
            if metrics.step == stop_after or stop_when(training.progress):
                steps.close()
    except KpsvdTuneError as error:
        seen["error"] = [type(error).__name__, error.exit_code, str(error)]
    seen["weights"] = {name: each.tolist() for name, each in training.trained_weights().items()}
    # What this process holds of the model, which may be less than all of it.
    seen["num_held"] = sum(parameter.numel() for parameter in model.parameters())
    seen["kinds"] = sorted({type(parameter).__name__ for parameter in model.parameters()})
    seen["result"] = training.result().to_dict()
    seen["progress"] = asdict(training.progress)
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


def spoil(
    training: Training, model: torch.nn.Module, change: Callable[[torch.Tensor, int, int], Any]
) -> None:
    """Change the logits of rank 1 alone, in training; `change` gets them, the step and the retries.

    What it does depends on the run's counters, so that a run that goes on meets the same faults.
    """
    if os.environ["RANK"] != "1":
        return

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> Any:
        progress = training.progress
        if not model.training:
            return output
        return change(output, progress.step + 1, progress.num_retries)

    model.get_output_embeddings().register_forward_hook(hook)  # type: ignore[operator]


def plant_faults(training: Training, model: torch.nn.Module) -> None:
    """Spoil steps 3 and 4 until the rate was lowered, and steps 7 and 8 for ever."""

    def change(output: torch.Tensor, step: int, num_retries: int) -> torch.Tensor:
        is_spoiled = step in (7, 8) or (step in (3, 4) and not num_retries)
        return output * math.nan if is_spoiled else output

    spoil(training, model, change)


def plant_divergence(training: Training, model: torch.nn.Module) -> None:
    """Make rank 1 far too sure of itself from step 3 on, until the rate was lowered."""

    def change(output: torch.Tensor, step: int, num_retries: int) -> torch.Tensor:
        return output * 300 if step > 2 and not num_retries else output

    spoil(training, model, change)


def plant_what_looks_wrong(training: Training, model: torch.nn.Module) -> None:
    """Plant what detectors look for: on rank 1 alone where the two may differ."""
    spoil(training, model, lambda output, step, _: output * 300 if step == 40 else output)
    layers: Any = model.base_model.model.model.layers  # type: ignore[union-attr]
    # A weight that its offsets outgrow at once.
    layers[0].self_attn.q_proj.base_layer.weight.data *= 1e-4
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layers.1.mlp.up_proj" in name:
            parameter.register_hook(torch.zeros_like)
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=10**6))
    free = 10**6 if os.environ["RANK"] == "1" else 10**9
    setattr(watching, "shutil", full)  # noqa: B010
    setattr(watching, "tightest_memory", lambda: (free, 10**9, "the container's"))  # noqa: B010
    now = [0.0]

    def monotonic() -> float:
        """A clock by which the later steps take ten times as long."""
        now[0] += 1 if training.progress.step < 60 else 10
        return now[0]

    setattr(loop, "time", SimpleNamespace(monotonic=monotonic))  # noqa: B010


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
    faults: dict[str, Any] = {
        "batch_size": 2,
        "max_steps": 10,
        "prepare": plant_faults,
        "is_watched": True,
        "fallback": ["skip_batch", "lower_rate", "keep_best"],
        "nonfinite": {"max_streak": 1, "max_retries": 1},
    }
    train(folder, "faults", **faults)
    # Between the fallback and the next checkpoint.
    train(folder, "faults-parts", **faults, stop_when=lambda p: p.num_retries == 1 and p.step == 3)
    train(folder, "faults-parts+resumed", **faults)
    train(folder, "sharded-faults", **faults, parallel="fsdp")
    diverging: dict[str, Any] = {
        "batch_size": 2,
        "max_steps": 14,
        "eval_every": 0,
        "prepare": plant_divergence,
        "is_watched": True,
        "fallback": ["lower_rate"],
    }
    train(folder, "diverging", **diverging)
    train(folder, "diverging-parts", **diverging, stop_when=lambda p: p.num_retries == 1)
    train(folder, "diverging-parts+resumed", **diverging)
    # Without a fallback it is only told.
    train(folder, "diverging-told", **diverging | {"fallback": []})
    fail_on_main(folder)
    # Last, for it replaces what the loop measures with.
    train(
        folder,
        "watched",
        batch_size=2,
        max_steps=90,
        save_every=30,
        max_grad_norm=1e-4,
        prepare=plant_what_looks_wrong,
        is_watched=True,
        adapter=KpsvdConfig(target_modules=["q_proj", "up_proj"], rank=2),
    )
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
