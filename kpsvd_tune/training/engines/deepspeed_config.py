"""What Accelerate's configuration asks of DeepSpeed, checked against the recipe and completed.

The recipe decides everything that changes a result. DeepSpeed is asked for one thing: to
shard optimiser state, gradients and weights over the processes (ZeRO).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kpsvd_tune.errors import InputError, RecipeError
from kpsvd_tune.recipe import TrainRecipe

# How ZeRO moves data about; none of it changes what is computed.
_ZERO_KEYS = (
    "stage",
    "allgather_partitions",
    "allgather_bucket_size",
    "reduce_scatter",
    "reduce_bucket_size",
    "contiguous_gradients",
    "overlap_comm",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
# Optimisers that treat every number alone.
_ELEMENTWISE = ("adamw", "sgd")
_DECIDED_BY = {"optimizer": "train.optimizer", "scheduler": "train.scheduler"}
# Set by us, or without effect on a run.
_IGNORED = (
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# How many numbers of weights that were gathered may stay whole at stage 3, where nobody says: half
# a decoder layer of 7B. DeepSpeed's own 1e9 keeps the whole of a base of 1B on every process.
_MOST_WHOLE = 100_000_000
_WHOLE_KEYS = ("stage3_max_live_parameters", "stage3_max_reuse_distance")


def launch_environment(file: str, num_processes: int) -> dict[str, str]:
    """The variables by which `accelerate launch --config_file FILE` tells its ranks of DeepSpeed.

    `num_processes` counts instead of the file's. InputError: the file cannot be used, or asks for
    something other than DeepSpeed.
    """
    # Accelerate's own reading of its file, so that a key means here what it means there.
    from accelerate.commands.launch import (  # type: ignore[import-untyped]
        _validate_launch_command,
        launch_command_parser,
    )
    from accelerate.utils.launch import prepare_deepspeed_cmd_env  # type: ignore[import-untyped]

    if not Path(file).is_file():
        raise InputError(f"--accelerate-config {file}: no such file")
    words = ["--config_file", file, "--num_processes", str(num_processes)]
    try:
        options = launch_command_parser().parse_args([*words, "--main_process_port", "0", "train"])
        options, defaults, _ = _validate_launch_command(options)
        fields = ",".join(defaults.deepspeed_config)
        options.deepspeed_fields_from_accelerate_config = fields
        if options.use_deepspeed and (options.num_machines or 1) == 1:
            environment: dict[str, str] = prepare_deepspeed_cmd_env(options)[1]
            return {k: v for k, v in environment.items() if k.startswith("ACCELERATE_")}
    except Exception as error:
        # Accelerate raises errors of any type for a file that it does not expect.
        raise InputError(
            f"--accelerate-config {file}: {error}; expected a file as `accelerate config` writes it"
        ) from error
    raise InputError(
        f"--accelerate-config {file}: expected DeepSpeed on one machine; plain processes need no "
        "configuration, and several machines are started by accelerate launch on each"
    )


def is_requested() -> bool:
    """Whether `accelerate launch` started this process for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def prepare() -> None:
    """Get DeepSpeed ready to be imported; refuse where it is not installed."""
    if find_spec("deepspeed") is None:
        raise RecipeError(
            "Accelerate's configuration asks for DeepSpeed, which is not installed; install it "
            "with `pip install kpsvd-tune[deepspeed]`, or use train.parallel: fsdp"
        )
    # Its log goes to standard output, which is for results, and says little but how it was built.
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(lambda record: record.levelno >= logging.ERROR)
    import deepspeed

    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    if not torch.accelerator.is_available():
        # For CPUs it would compile an extension, which takes a minute and a compiler; gloo will do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_stage(accelerator: Accelerator) -> int | None:
    """The ZeRO stage that this run uses, None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"].get("stage", 0))


def check_parallel(accelerator: Accelerator, recipe: TrainRecipe) -> None:
    """Refuse what DeepSpeed cannot do, and what the recipe and the configuration contradict."""
    if not is_requested():
        return
    if zero_stage(accelerator) is None:
        raise RecipeError(
            "Accelerate's configuration asks for DeepSpeed and for CPUs (use_cpu: true), of which "
            "it would take the second alone; expected one of them"
        )
    if recipe.parallel == "fsdp":
        raise RecipeError(
            "train.parallel: fsdp and DeepSpeed both shard the weights; expected ddp in the "
            "recipe, or a configuration of Accelerate without DeepSpeed"
        )
    if recipe.optimizer not in _ELEMENTWISE:
        raise RecipeError(
            f"train.optimizer: {recipe.optimizer}; expected {' or '.join(_ELEMENTWISE)}, as "
            "DeepSpeed makes flat parts of what is trained, and an optimiser that looks at whole "
            "tensors would do something else with those"
        )
    if recipe.precision == "fp16":
        raise RecipeError(
            "train.precision: fp16 is not supported with DeepSpeed, whose loss scaler cannot be "
            "resumed exactly; expected bf16 or no"
        )
    # Faults of the configuration show now, and not after the base is decomposed.
    engine_config(accelerator.deepspeed_plugin.deepspeed_config, recipe, accelerator.num_processes)
    # Set by Accelerate, it would make transformers load a base whose weights are sharded
    # already; the adapter is compared with whole ones first.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    accelerator.deepspeed_plugin.dschf = None


def engine_config(
    given: Mapping[str, Any], recipe: TrainRecipe, num_processes: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, each "auto" from the recipe; the error names every fault."""
    if faults := list(_faults(given, recipe, num_processes)):
        raise RecipeError(
            "DeepSpeed's configuration does not fit the recipe:\n  "
            + "\n  ".join(faults)
            + '\nChange these in the file that `accelerate launch` was given ("auto" leaves a '
            "value to the recipe), or shard the weights without DeepSpeed: train.parallel: fsdp"
        )
    zero = {
        key: value
        for key, value in given["zero_optimization"].items()
        if key in _ZERO_KEYS and value != "auto"
    }
    if zero.get("stage") == 3:
        for key in _WHOLE_KEYS:
            zero.setdefault(key, _MOST_WHOLE)
    return {
        "train_batch_size": recipe.batch_size * recipe.gradient_accumulation * num_processes,
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "gradient_clipping": float(recipe.max_grad_norm or 0.0),
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Mixed precision is torch's autocast around the model, as without DeepSpeed.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _faults(given: Mapping[str, Any], recipe: TrainRecipe, num_processes: int) -> Iterator[str]:
    micro, steps = recipe.batch_size, recipe.gradient_accumulation
    wanted: dict[str, tuple[list[float], str]] = {
        "train_batch_size": (
            [micro * steps * num_processes],
            "train.batch_size x gradient_accumulation x processes",
        ),
        "train_micro_batch_size_per_gpu": ([micro], "train.batch_size"),
        # Accelerate writes 1 where nobody said anything.
        "gradient_accumulation_steps": ([steps, 1], "train.gradient_accumulation"),
        "gradient_clipping": ([recipe.max_grad_norm or 0.0], "train.max_grad_norm"),
    }
    for key, value in given.items():
        if key in _IGNORED or value == "auto":
            continue
        if key in wanted:
            values, source = wanted[key]
            if value not in values:
                yield f"{key}: {value}, and {source} is {values[0]}"
        elif key in _DECIDED_BY:
            yield f"{key}: {_DECIDED_BY[key]} decides; take it out"
        elif key in ("bf16", "fp16"):
            if value.get("enabled") is True and recipe.precision != key:
                yield f"{key}.enabled: true, and train.precision is {recipe.precision}"
        elif key == "zero_optimization":
            yield from _zero_faults(value)
        else:
            yield f"{key}: not known to leave results and exact resume as they are; take it out"


def _zero_faults(given: Mapping[str, Any]) -> Iterator[str]:
    if given.get("stage") not in (0, 1, 2, 3):
        yield f"zero_optimization.stage: {given.get('stage')!r}, expected 0, 1, 2 or 3"
    for key, value in given.items():
        if key in _ZERO_KEYS or value is None:
            continue
        if key in ("offload_optimizer", "offload_param"):
            if value.get("device", "none") not in ("none", None):
                yield (
                    f"zero_optimization.{key}.device: {value['device']}, expected none: offloading "
                    "has not been shown to resume exactly"
                )
        else:
            yield f"zero_optimization.{key}: not known to resume exactly; take it out"
