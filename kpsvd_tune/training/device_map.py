"""What `model.device_map` cannot be trained with."""

from __future__ import annotations

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.models.offload import check_alone, check_device
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.training.engines.deepspeed_config import zero_stage


def check_device_map(recipe: Recipe, processes: int = 1) -> None:
    """Refuse keys of a recipe that exclude each other, and several processes; RecipeError says why.

    ``processes`` are those that are planned; in those that run `check_place` looks for itself.
    """
    model, train = recipe.model, recipe.train
    if model.device_map is None:
        return
    got = f"model.device_map: {model.device_map}"
    if train.parallel == "fsdp":
        raise RecipeError(
            f"{got} and train.parallel: fsdp: got two answers to where the weights lie; expected "
            "train.parallel: fsdp with model.device_map: null on several GPUs, or ddp on one"
        )
    if model.quantization is not None:
        raise RecipeError(
            f"{got} and model.quantization: {model.quantization}: packed weights are not copied "
            "between host and card; expected one of the two: model.quantization takes less time, "
            "model.device_map: auto keeps the weights exact"
        )
    if not train.gradient_checkpointing:
        raise RecipeError(
            f"{got} and train.gradient_checkpointing: false: the copy of each offloaded weight "
            "would be kept on the card until the backward pass, and nothing would be saved; set "
            "train.gradient_checkpointing: true, with which a block's weights are there only while "
            "it computes"
        )
    check_alone(processes)


def check_place(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what a launch makes of it: several processes, DeepSpeed, mps; RecipeError says why."""
    if recipe.model.device_map is None:
        return
    if zero_stage(accelerator) is not None:
        raise RecipeError(
            "model.device_map: auto and DeepSpeed: got two answers to where the weights lie; "
            "expected model.device_map: null, or a plain process"
        )
    check_device(accelerator.device)
