"""What computes gradients and moves the weights: one engine for each way to share the work.

`plain` is one process, or several with whole weights (DDP), and what the others differ from;
`sharded` is torch's fully_shard; `deepspeed` is DeepSpeed's ZeRO, and `deepspeed_config` what is
asked of it.
"""

from __future__ import annotations

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.engines.deepspeed import DeepSpeedEngine
from kpsvd_tune.training.engines.deepspeed_config import zero_stage
from kpsvd_tune.training.engines.plain import Engine
from kpsvd_tune.training.engines.sharded import ShardedEngine


def engine_class(recipe: TrainRecipe, accelerator: Accelerator) -> type[Engine]:
    """The engine for the way in which a run shares its work."""
    if zero_stage(accelerator) is not None:
        return DeepSpeedEngine
    is_sharded = recipe.parallel == "fsdp" and accelerator.num_processes > 1
    return ShardedEngine if is_sharded else Engine
