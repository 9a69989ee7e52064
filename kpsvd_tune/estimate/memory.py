"""The most memory that a run holds at once, on the host and on a device.

On a CPU everything is in one process: Python with its libraries, the base model, the adapter, the
optimiser's state, gradients, and what a forward and a backward pass keep. On another device the
host only holds the base model while it is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kpsvd_tune.adapter.forms import FORMS
from kpsvd_tune.adapter.targets import saved_whole
from kpsvd_tune.estimate.trace import Trace
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models import ModelSource
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.models.offload import RESERVE, block_parameters, num_that_fit
from kpsvd_tune.models.quantised import weight_bytes
from kpsvd_tune.recipe import Recipe, TrainRecipe
from kpsvd_tune.report.plan import MemoryPlan
from kpsvd_tune.storage.memory import free_memory
from kpsvd_tune.training.optim import make_optimizer

# Resident memory of a process after the libraries of `train` are imported, where the system does
# not tell what this one has.
_USUAL_PROCESS = 700_000_000
# Holes that the C library's heap is left with where tensors of layers come and go, as a share of
# what the layers would keep without gradient checkpointing: a block that is freed does not fit
# the next aligned one of its size. How many there are is luck: six runs of SmolLM2-135M with
# checkpointing and glibc 2.36 had 0.22 to 0.34, a GPT-2 0.52. Batches of many lengths leave more in
# 16 bits, whose blocks are seldom large enough for pages of their own: 0.5 to 1.8 in nine runs
# (docs/performance.md).
_HOLES = 0.32
_HOLES_UNEVEN_HALF = 1.1
_FLOAT = 4  # bytes; adapters are kept and trained in float32
OFFLOADED = "weights that are offloaded"
COPYING = "the copying of offloaded weights to the device, for each use, is not in the time"


def base_bytes(skeleton: nn.Module, dtype: str, quantization: str | None = None) -> int:
    """Bytes of the base's weights in a dtype; shared ones count once."""
    return weight_bytes(skeleton, DTYPES[dtype], quantization)


def adapter_bytes(plans: Sequence[LayerPlan]) -> tuple[int, int]:
    """Bytes of what is trained and of what is frozen in adapters with these ranks."""
    trained = frozen = 0
    for plan in plans:
        if plan.rank > 0:
            form = FORMS[plan.form](plan.shape, plan.rank)
            trained += form.num_trained
            frozen += sum(math.prod(form.size(part)) for part in form.frozen)
    return _FLOAT * trained, _FLOAT * frozen


def saved_whole_bytes(skeleton: nn.Module, recipe: Recipe) -> int:
    """Bytes of the copies of modules that are trained whole."""
    numel = sum(saved_whole(skeleton, recipe.adapter.modules_to_save).values())
    return numel * DTYPES[recipe.model.dtype].itemsize


def optimiser_bytes(train: TrainRecipe, trained: int) -> int:
    """Bytes of the optimiser's state for so many bytes of float32 parameters."""
    parameter = nn.Parameter(torch.zeros(4, 32, 32))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(train, [parameter])
    optimizer.step()
    state = [each for each in optimizer.state[parameter].values() if isinstance(each, torch.Tensor)]
    return round(trained * sum(each.nbytes for each in state) / parameter.nbytes)


def process_bytes() -> int:
    """Resident memory of this process, which has imported what `train` imports."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _USUAL_PROCESS
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else _USUAL_PROCESS


def training_parts(
    recipe: Recipe, skeleton: nn.Module, plans: Sequence[LayerPlan], trace: Trace
) -> dict[str, int]:
    """Bytes of each part of one process's training, by its name."""
    trained, frozen = adapter_bytes(plans)
    whole = saved_whole_bytes(skeleton, recipe)
    return {
        "weights": base_bytes(skeleton, recipe.model.dtype, recipe.model.quantization),
        "adapter": trained + frozen + whole,
        "optimiser": optimiser_bytes(recipe.train, trained + whole),
        "gradients": trained + whole,
        "activations": trace.activations,
    }


def part_of_process(parts: dict[str, int], recipe: Recipe, count: int) -> dict[str, int]:
    """Bytes of each part that one of so many processes holds: its shard, where they are sharded."""
    if recipe.train.parallel != "fsdp" or count == 1:
        return parts
    return {name: b if name == "activations" else b // count for name, b in parts.items()}


def loading_bytes(
    source: ModelSource, skeleton: nn.Module, dtype: str, quantization: str | None = None
) -> int:
    """Bytes beside the process that loading the base model takes at its peak.

    The weights, the files mapped into memory, and for GGUF the largest tensor twice while it is
    dequantised; what cannot be streamed is loaded in float32 to be decomposed.
    """
    files = sum(file.stat().st_size for file in source.weight_files)
    largest = max(each.numel() for each in skeleton.parameters())
    if source.weight_files and not source.is_safetensors:
        return base_bytes(skeleton, "float32") + files + 2 * _FLOAT * largest
    return base_bytes(skeleton, dtype, quantization) + files


def shared_loading_bytes(
    source: ModelSource, skeleton: nn.Module, dtype: str, processes: int
) -> int | None:
    """Bytes beside each process while processes share out the weights that they read.

    A part of the weights, and the largest tensor as it is stored and as it is kept. None where
    every process loads the whole base first.
    """
    if not source.weight_files or source.kind == "gguf":
        return None
    config = getattr(skeleton, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        return None
    largest = max(each.numel() for each in skeleton.parameters())
    wide = largest * (_FLOAT + DTYPES[dtype].itemsize)
    return base_bytes(skeleton, dtype) // processes + wide


def heap_bytes(whole: Trace, dtype: str, *, is_uneven: bool) -> int:
    """Bytes of holes in the heap of a CPU process.

    Args:
        whole: The trace of the largest batch without gradient checkpointing.
        dtype: Of the activations.
        is_uneven: Whether the forward passes differ in size.
    """
    is_half = DTYPES[dtype].itemsize < _FLOAT
    return round((_HOLES_UNEVEN_HALF if is_half and is_uneven else _HOLES) * whole.in_layers)


def cache_bytes(skeleton: Any, dtype: str, rows: int, tokens: int) -> int | None:
    """Bytes of keys and values of a batch; None for models that keep something else."""
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * layers * kept * width * rows * tokens * DTYPES[dtype].itemsize)


def pass_bytes(skeleton: Any, dtype: str, rows: int, tokens: int) -> int:
    """Bytes that a pass over prompts holds beside keys and values: of one layer, and of the logits.

    A layer's input, its norm and sum and its attention have the width of the model; the MLP's two
    products and theirs that of the MLP. Of each row the last token has logits, of which a copy is
    made where they are drawn from.
    """
    config = skeleton.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = rows * tokens * (4 * config.hidden_size + 3 * wide)
    return int((layer + 2 * rows * config.vocab_size) * DTYPES[dtype].itemsize)


def host_memory(process: int, loading: int, parts: dict[str, int], scoring: int = 0) -> MemoryPlan:
    """The host's memory of a command whose training has these parts.

    ``scoring`` are the bytes beside the process while answers are generated.
    """
    parts = {"Python and libraries": process, **parts}
    own, free = process_bytes(), free_memory()
    stages = {
        "training": sum(parts.values()),
        "loading the base model": process + loading,
        "scoring": process + scoring,
    }
    bound = max(stages, key=lambda each: stages[each])
    # What this process holds is there for the run as well.
    return MemoryPlan(parts, stages[bound], None if free is None else free + own, bound)


def leave_on_host(
    parts: dict[str, int], skeleton: nn.Module, dtype: str, device_map: str | None
) -> dict[str, int]:
    """Take off a card's parts the weights that stay in the host's memory, which are given back.

    With `model.device_map`, on this machine's CUDA device as it is now; as `models.offload` does.
    All parts but the activations are there, or have their room, when the model is placed.
    """
    if device_map is None or not torch.cuda.is_available():
        return {}
    free, _ = torch.cuda.mem_get_info()
    width = DTYPES[dtype].itemsize
    sizes = [number * width for number in block_parameters(skeleton)]
    others = sum(parts.values()) - parts.get("activations", 0) - sum(sizes)
    away = sum(sizes[num_that_fit(sizes, round((1 - RESERVE) * free) - others) :])
    if not away:
        return {}
    # The block that computes is on the device as well, in turn with the others.
    parts["weights"] += max(sizes) - away
    return {OFFLOADED: away}


def device_memory(parts: dict[str, int], scoring: int = 0) -> MemoryPlan:
    """The memory of one CUDA device in a training with these parts."""
    free: Any = None
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    training = sum(parts.values())
    bound = "scoring" if scoring > training else "training"
    return MemoryPlan(parts, max(training, scoring), free, bound)
