"""Weights sharded over processes by torch's fully_shard (FSDP2), on GPUs and on CPUs alike.

Accelerate's own FSDP is not used: on a CPU it silently turns into DDP, and what the tests do not
run is not known to work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.hardware.heap import return_large_blocks
from kpsvd_tune.models.offload import decoder_blocks
from kpsvd_tune.models.streamed import streamed_weights, to_be_filled
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.engines.plain import Engine
from kpsvd_tune.training.loss import SummedTokenLoss

Tree = TypeVar("Tree")


class ShardedEngine(Engine):
    """The plain engine over DTensors; every process must call the loss equally often.

    A block's weights are whole only while it computes; buffers, with the frozen factors, always.
    """

    holds_weights = False

    def _prepare(self, token_loss: SummedTokenLoss) -> nn.Module:
        check_shardable(token_loss.model, self._recipe)
        device, number = self._accelerator.device, self._accelerator.num_processes
        mesh = init_device_mesh(device.type, (number,))
        if device.type == "cpu":
            return_large_blocks()
        for block in (*decoder_blocks(token_loss.model), *_ends(token_loss.model)):
            fully_shard(block, mesh=mesh)
        fully_shard(token_loss, mesh=mesh)
        fill_shards(token_loss.model)
        token_loss.is_sharded = True
        # Sets up the precision; in evaluation mode Accelerate does not wrap the module in DDP.
        module: nn.Module = self._accelerator.prepare_model(token_loss, evaluation_mode=True)
        return module

    def backward(self, inputs: Mapping[str, Tensor], scale: float, is_last: bool) -> Tensor:
        """Compute the loss of a micro batch and add its gradient."""
        cast(FSDPModule, self._module).set_requires_gradient_sync(is_last)
        return super().backward(inputs, scale, is_last)

    def clip(self) -> float:
        """Clip the gradient; the norm of the whole one before that."""
        norm = torch.nn.utils.clip_grad_norm_(list(self._names), self._max_grad_norm)
        return float(_whole(norm))

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, whole."""
        return _whole(super().weights())

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Put back the shards of whole tensors."""
        shards = {name: _shard_of(values[name], own) for own, name in self._names.items()}
        super().load_weights(shards)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state by names of parameters, whole."""
        return _whole(super().optimizer_state())

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Put back the state of each parameter, sharded as the parameter is."""
        own = {name: parameter for parameter, name in self._names.items()}
        shards = {
            name: {key: _shard_of(value, own[name]) for key, value in values.items()}
            for name, values in state["state"].items()
        }
        super().load_optimizer_state({**state, "state": shards})


@torch.no_grad()
def fill_shards(model: nn.Module) -> None:
    """Read this process's part of each weight that is on the meta device."""
    weights = streamed_weights(model)
    if weights is None:
        return
    for name, places, held in to_be_filled(_base_of(model)):
        meta = cast(DTensor, held)
        mesh, rows = meta.device_mesh, meta.shape[0]
        # As torch.chunk cuts them, of which the last may be shorter or absent.
        share = -(-rows // mesh.size())
        first = min(rows, mesh.get_local_rank() * share)
        own = weights.read(name, (first, min(rows, first + share)))
        shard = DTensor.from_local(
            own.to(mesh.device_type, meta.dtype),
            mesh,
            meta.placements,
            run_check=False,
            shape=meta.shape,
            stride=meta.stride(),
        )
        filled = nn.Parameter(shard, requires_grad=held.requires_grad)
        for module, key in places:
            module._parameters[key] = filled
    weights.close()


def check_shardable(model: nn.Module, recipe: TrainRecipe) -> None:
    """Refuse what fully_shard cannot do."""
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


def _ends(model: nn.Module) -> list[nn.Module]:
    """The embedding and the output head, each where its weight is plain, and is nowhere else.

    What is in no unit of its own stays whole from the first layer's forward to its backward pass.
    """
    base: Any = _base_of(model)
    held = Counter(id(each) for module in base.modules() for each in module._parameters.values())
    inner = {id(each) for block in decoder_blocks(model) for each in block.modules()}
    return [
        each
        for each in (base.get_input_embeddings(), base.get_output_embeddings())
        if type(each) in (nn.Embedding, nn.Linear)
        and held[id(each.weight)] == 1
        and id(each) not in inner
    ]


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _whole(tree: Tree) -> Tree:
    """A tree of dicts and lists with every sharded tensor put together, on all processes."""
    if isinstance(tree, DTensor):
        return cast(Tree, tree.full_tensor())
    if isinstance(tree, dict):
        return cast(Tree, {key: _whole(value) for key, value in tree.items()})
    if isinstance(tree, list):
        return cast(Tree, [_whole(value) for value in tree])
    return tree


def _shard_of(value: Any, parameter: Tensor) -> Any:
    """This process's shard of a whole tensor, where the parameter is sharded and has its shape."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        return value
    # Every process has the whole already: nothing is sent.
    return distribute_tensor(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )
