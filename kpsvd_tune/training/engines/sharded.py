"""Weights shared out over processes by torch's fully_shard (FSDP2), on GPUs and on CPUs alike.

Accelerate's own FSDP is not used: on a CPU it turns into DDP without a word, and what the tests do
not run is not known to work.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import TrainRecipe

Tree = TypeVar("Tree")


def shard(root: nn.Module, model: nn.Module, accelerator: Accelerator) -> None:
    """Share out every parameter, one group a block of the model and one for the rest, in place.

    A block's weights are whole on a process only while that block computes. Parameters become
    DTensors; buffers, the frozen factors among them, stay whole everywhere. Every process must
    call the root equally often from then on.

    Args:
        root: What is called in training.
        model: The language model in it, of transformers, PEFT's wrapper allowed.
        accelerator: At least two processes.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's authors say must stay on one device: its decoder layers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on it, or DeepSpeed shares out its weights (ZeRO 3)."""
    # DeepSpeed marks every parameter whose data it holds elsewhere.
    parameter = next(module.parameters(), None)
    return isinstance(module, FSDPModule) or hasattr(parameter, "ds_id")


def sum_gradients(module: nn.Module, is_last: bool) -> None:
    """Let the backward pass to come leave gradients to be summed over processes, or sum them."""
    cast(FSDPModule, module).set_requires_gradient_sync(is_last)


def free(module: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left whole, where it is shared out."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tree: Tree) -> Tree:
    """A tree of dicts and lists with every shared-out tensor put together, on all processes.

    All processes must ask at the same time, for trees of the same form.
    """
    if isinstance(tree, DTensor):
        return cast(Tree, tree.full_tensor())
    if isinstance(tree, dict):
        return cast(Tree, {key: whole(value) for key, value in tree.items()})
    if isinstance(tree, list):
        return cast(Tree, [whole(value) for value in tree])
    return tree


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is shared out and has its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    placed = tensor.to(device=like.device)
    # Every process has the whole already: nothing is sent.
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def number(norm: Tensor) -> float:
    """A norm as a number: that of the whole where it was taken over shared-out tensors."""
    return float(whole(norm))


def parts_of_state(state: dict[str, Any], parameters: dict[str, Tensor]) -> dict[str, Any]:
    """An optimiser's state by parameter name with each whole tensor cut as its parameter is."""
    return {
        name: {
            key: part_of(value, parameters[name]) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for name, values in state.items()
    }


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a parameter, shared out or not, with a whole tensor."""
    with torch.no_grad():
        parameter.copy_(part_of(value, parameter))


def check_shardable(model: nn.Module, recipe: TrainRecipe) -> None:
    """Refuse what fully_shard cannot do.

    Raises:
        RecipeError: Names the key.
    """
    if recipe.precision == "fp16":
        raise RecipeError(
            "train.precision: fp16 needs a loss scaler, which train.parallel: fsdp does not have; "
            "expected bf16 or no"
        )
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise RecipeError(
            f"train.parallel: fsdp needs one type for all that is trained, got "
            f"{' and '.join(sorted(dtypes))}; set model.dtype: float32, or "
            "adapter.modules_to_save: []"
        )
