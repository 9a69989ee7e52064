"""What `init-only`, `merge`, `export`, `eval` and `compare` would do and take, without weights.

Sizes come from configurations and headers, times from short probes of this machine, as in `plan`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.decompose import default_cache_dir, layer_plans
from kpsvd_tune.estimate.answers import (
    ANSWERS_BASIS,
    answering_seconds,
    batch_rows,
    prompt_lengths,
)
from kpsvd_tune.estimate.loading import (
    is_loaded_whole,
    loading_seconds,
)
from kpsvd_tune.estimate.memory import (
    COPYING,
    base_bytes,
    cache_bytes,
    host_memory,
    leave_on_host,
    loading_bytes,
    pass_bytes,
    process_bytes,
)
from kpsvd_tune.estimate.memory import device_memory as on_one_device
from kpsvd_tune.estimate.passes import PassTimes
from kpsvd_tune.estimate.plan import make_plan
from kpsvd_tune.estimate.ranks import possible_ranks, ranks_of_adapter
from kpsvd_tune.estimate.time import STEP_RANGE, decomposition_seconds
from kpsvd_tune.evaluation.evaluate import as_trained, check_tasks, conditions, rows_asked
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.events import Silence
from kpsvd_tune.export.gguf_model import GgufModel, choose_file
from kpsvd_tune.linalg import KroneckerShape
from kpsvd_tune.merge.merging import needs_whole_base
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    find_configuration,
    load_skeleton,
    load_tokenizer,
)
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.recipe import EvaluationRecipe, Recipe
from kpsvd_tune.report.plan import span
from kpsvd_tune.report.work import DiskPlan, WorkPlan
from kpsvd_tune.runs.find import Found
from kpsvd_tune.units import counted, duration, money, size

_FLOAT = 4
# Bytes a number takes in a GGUF file; q8_0 has two more for every 32.
_GGUF_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "q8_0": 34 / 32}
_BY_CONFIGURATION = "sizes by the configuration and the files' headers"
# Tensors in hand at once: read and rearranged by the decomposition, or one of each merging thread.
_IN_HAND = 2
_WHOLE = "base in float32"


def decomposition_work(recipe: Recipe, *, processes: int = 1, on_gpu: bool = False) -> WorkPlan:
    """What `init-only` would do: decompose what the cache lacks.

    Raises:
        ModelError, AdapterError: As the decomposition refuses them.
    """
    source = find_configuration(recipe.model.path, recipe.model.revision)
    skeleton = load_skeleton(source)
    adapter = recipe.adapter
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    reader = WeightReader(source, names, skeleton)
    ranks = possible_ranks(reader, layer_plans(reader, adapter), adapter, recipe.train.seed)
    todo = ranks.to_decompose
    device = torch.device("cuda" if on_gpu else "cpu")
    seconds = decomposition_seconds(todo, adapter.rank.window, adapter.rank.tolerance, device)
    cached = 0
    for plan in todo:
        m, n, p, q = plan.shape.as_tuple()
        cached += _FLOAT * min(adapter.rank.window, plan.shape.max_rank) * (m * n + p * q)
    largest = _FLOAT * max((p.shape.out_features * p.shape.in_features for p in todo), default=0)
    parts = {"matrices in hand": _IN_HAND * largest * processes}
    loading = 0
    if is_loaded_whole(source):
        loading = loading_bytes(source, skeleton, "float32")
    own = process_bytes()
    share = seconds / processes
    loads = (0.0, 0.0)
    if todo and is_loaded_whole(source):
        loads = loading_seconds(source, skeleton, "float32", decomposes=False)
    low, high = ranks.num_trained()
    return WorkPlan(
        command="init-only",
        steps=(
            ("model", recipe.model.path),
            ("target matrices", f"{len(ranks.most):,}, {len(todo):,} of them not in the cache"),
            ("trainable parameters", span((low, high))),
            ("ranks", ranks.basis),
        ),
        # Large matrices differ from small ones by what the caches hold.
        seconds=(STEP_RANGE[0] * share + loads[0], STEP_RANGE[1] * share + loads[1]),
        host=host_memory(own * processes, loading, parts),
        on_device=None,
        disk=_disk(default_cache_dir(), cached, cached),
        basis=(
            f"{_BY_CONFIGURATION}; time by random matrices of the same shapes decomposed now; "
            "memory by the largest matrix twice in float32",
        ),
    )


def merge_work(
    found: Sequence[Found], source: ModelSource, output: Path, dtype: str | None, proof: str | None
) -> WorkPlan:
    """What `merge` would do: write the base with the updates in it."""
    skeleton = load_skeleton(source)
    dtype = dtype or (found[0].dtype if source.kind == "gguf" else None)
    reason = needs_whole_base(source, skeleton)
    written, stored = _model_bytes(source, skeleton, dtype)
    whole = base_bytes(skeleton, "float32")
    parts = {
        "tensors in hand": _IN_HAND * 8 * max(each.numel() for each in skeleton.parameters()),
        "adapters": sum(_adapter_bytes(each) for each in found),
    }
    own = process_bytes()
    is_whole = reason is not None or proof in ("logits", "both")
    if is_whole:
        parts[_WHOLE] = whole
    memory = host_memory(own, 0, parts)
    fits_whole = memory.free_bytes is None or own + whole + sum(parts.values()) <= memory.free_bytes
    proofs = proof or ("both" if fits_whole else "tensors")
    if proof is None and reason is None and fits_whole:
        memory = host_memory(own, 0, {**parts, "base in float32, for the proof": whole})
    return WorkPlan(
        command="merge",
        steps=(
            ("adapters", ", ".join(str(each.adapter) for each in found)),
            ("base model", source.path),
            ("how", "tensor by tensor" if reason is None else f"the base is loaded, for {reason}"),
            ("stored as", dtype or stored),
            ("proof", proofs),
        ),
        seconds=None,
        host=memory,
        on_device=None,
        disk=_disk(output, written, written),
        basis=(
            f"{_BY_CONFIGURATION}; the time is not estimated, for it is the disk's: "
            f"{size(_read_bytes(source, written))} are read and {size(written)} written",
        ),
    )


def export_work(
    found: Found, source: ModelSource, output: Path, max_rank: int, dtype: str
) -> WorkPlan:
    """What `export --to lora` would do: factorise every update and prove the result."""
    shapes, parts = _exported(found, source)
    width = sum(each.out_features + each.in_features for each in shapes)
    item = DTYPES[dtype].itemsize
    parts["the base once more, for the proof"] = parts[_WHOLE]
    own = process_bytes()
    return WorkPlan(
        command="export",
        steps=(
            ("adapter", str(found.adapter)),
            ("base model", source.path),
            ("layers", f"{len(shapes):,}"),
            ("rank of the LoRA", f"1 to {max_rank}, by the updates"),
        ),
        seconds=None,
        # The proof is a process of its own.
        host=host_memory(2 * own, 0, parts),
        on_device=None,
        disk=_disk(output, item * width, item * width * max_rank),
        basis=(
            f"{_BY_CONFIGURATION}; the proof loads the base a second time in another process; the "
            "time is not estimated, for it depends on the rank of the updates",
        ),
    )


def gguf_work(
    found: Found, source: ModelSource, output: Path, metadata_from: Path | None, dtype: str
) -> WorkPlan:
    """What `export --to gguf` would do: merge, round, write the file, read it and compare.

    Raises:
        InputError, ModelError: As the export refuses the file whose metadata it takes.
    """
    file = GgufModel(choose_file(source, metadata_from))
    shapes, parts = _exported(found, source)
    parts["what transformers reads of a GGUF file, before it is the model"] = parts[_WHOLE]
    most = file.bytes_with(_GGUF_BYTES[dtype], source.kind == "gguf")
    return WorkPlan(
        command="export",
        steps=(
            ("adapter", str(found.adapter)),
            ("base model", source.path),
            ("layers", f"{len(shapes):,}"),
            ("architecture", file.architecture),
            ("tokenizer and settings of", str(file.path)),
        ),
        seconds=None,
        host=host_memory(process_bytes(), 0, parts),
        on_device=None,
        disk=_disk(output, most, most),
        basis=(
            f"{_BY_CONFIGURATION}; the file is smaller where tensors are copied from a smaller "
            "base; the time is not estimated",
        ),
    )


def _exported(found: Found, source: ModelSource) -> tuple[list[KroneckerShape], dict[str, int]]:
    """The adapted layers that are trained, and what each export holds in memory."""
    assert found.adapter is not None
    layers = ranks_of_adapter(found.adapter).most
    largest = max((p.shape.out_features * p.shape.in_features for p in layers), default=0)
    parts = {
        _WHOLE: base_bytes(load_skeleton(source), "float32"),
        "adapter": _adapter_bytes(found),
        "an update in float64": 8 * _IN_HAND * largest,
    }
    return [each.shape for each in layers if each.rank > 0], parts


def evaluation_work(
    found: Found,
    source: ModelSource,
    task: EvaluationRecipe,
    dtype: str,
    output: Path,
    device: torch.device,
) -> WorkPlan:
    """What `eval` would do: answer the questions of a task.

    Raises:
        InputError, DataError: As `eval` refuses the task or its rows.
    """
    check_tasks([task], found.dataset)
    task = as_trained(task, found.dataset)
    skeleton = load_skeleton(source)
    weights = base_bytes(skeleton, dtype, found.quantization)
    parts = {"weights": weights, "adapter": _adapter_bytes(found)}
    on_cpu = device.type == "cpu"
    kept = {} if on_cpu else leave_on_host(parts, skeleton, dtype, found.device_map)
    steps = [("model", source.path), ("task", f"{task.task}: {conditions(task, rows_asked(task))}")]
    seconds, most = None, 0
    basis = [_BY_CONFIGURATION]
    if not TASKS[task.task].scorers:
        basis.append("the time is not estimated for tasks without answers to generate")
    else:
        lengths = prompt_lengths(task, load_tokenizer(source, found.adapter))
        answers = len(lengths) * task.samples
        most = answers * task.max_new_tokens
        steps += [
            ("questions", f"{len(lengths):,}, {counted(task.samples, 'answer')} each"),
            ("prompts", f"{sum(lengths):,} tokens, the longest {max(lengths):,}"),
            ("answers", f"at most {most:,} tokens"),
        ]
        rows = batch_rows(task, lengths)
        cache = cache_bytes(skeleton, dtype, rows, max(lengths) + task.max_new_tokens)
        if cache is None:
            basis.append("the cache of keys and values is not counted: another kind of model")
        else:
            parts["keys and values"] = cache
        parts["activations and logits"] = pass_bytes(skeleton, dtype, rows, max(lengths))
        passes = PassTimes(skeleton, DTYPES[dtype], device, _num_adapted(found))
        answering = answering_seconds(passes, task, lengths)
        loads = loading_seconds(source, skeleton, dtype, decomposes=False)
        seconds = (answering[0] + loads[0], answering[1] + loads[1])
        basis.append(f"time {ANSWERS_BASIS}")
        if kept:
            basis.append(COPYING)
    loading = loading_bytes(source, skeleton, dtype, found.quantization)
    own = process_bytes()
    host = host_memory(own, loading, parts if on_cpu else kept)
    # A line of a completion holds prompt and answer, at about four bytes a token.
    lines = 0 if not TASKS[task.task].scorers else 4 * (sum(lengths) * task.samples + most)
    return WorkPlan(
        command="eval",
        steps=tuple(steps),
        seconds=seconds,
        host=host,
        on_device=None if on_cpu else on_one_device(parts),
        disk=_disk(output, 0, lines),
        basis=("; ".join(basis),),
    )


def comparison_work(recipe: Recipe, budget: int, num_trials: int, jobs: int) -> WorkPlan:
    """What `compare` would do: trainings like that of the recipe, with at most `budget` parameters.

    Raises:
        RecipeError, ModelError, AdapterError, DataError: As `plan` refuses the recipe.
    """
    rank = recipe.adapter.rank.model_copy(update={"budget": budget, "min": 0})
    adapter = recipe.adapter.model_copy(update={"rank": rank})
    # Trials are judged by their loss; the recipe's evaluation is not run.
    trial = recipe.model_copy(update={"adapter": adapter, "evaluation": []})
    plan = make_plan(trial, Silence())
    parts = {f"{name}, {jobs} at a time": part * jobs for name, part in plan.host.parts.items()}
    peak = max(plan.host.peak_bytes * jobs, sum(parts.values()))
    host = replace(plan.host, parts=parts if jobs > 1 else plan.host.parts, peak_bytes=peak)
    on_device = plan.on_device
    if on_device is not None:
        shared = {name: part * jobs for name, part in on_device.parts.items()}
        on_device = replace(on_device, parts=shared, peak_bytes=sum(shared.values()))
    steps = [("trials", f"{num_trials:,}, {jobs} at a time")]
    seconds = None
    if plan.time.training_seconds is not None:
        each = plan.time.training_seconds
        loading = plan.time.loading_seconds or (0.0, 0.0)
        once = (sum(ends) for ends in zip(plan.time.decomposition_range, loading, strict=True))
        low, high = (first + num_trials * one / jobs for first, one in zip(once, each, strict=True))
        seconds = (low, high)
        steps.append(("a trial", span(each, duration)))
        if (price := recipe.compare.price_per_hour) is not None:
            bill = (low * price / 3600, high * price / 3600)
            steps.append(("cost", f"{span(bill, money)} {recipe.compare.currency}"))
    stored = plan.adapter.file_bytes[1] * num_trials
    return WorkPlan(
        command="compare",
        steps=tuple(steps),
        seconds=seconds,
        host=host,
        on_device=on_device,
        disk=_disk(Path(recipe.output_dir), 0, stored),
        basis=(
            "each trial as the recipe's own training by `plan`, with the largest budget; baselines "
            "take somewhat less or up to twice the time a step (docs/performance.md)",
        ),
    )


def _num_adapted(found: Found) -> int:
    if found.adapter is None:
        return 0
    return sum(plan.rank > 0 for plan in ranks_of_adapter(found.adapter).most)


def _model_bytes(source: ModelSource, skeleton: Any, dtype: str | None) -> tuple[int, str]:
    """Bytes of the base stored in a dtype, or in its own, and that in words."""
    if dtype is not None:
        return base_bytes(skeleton, dtype), dtype
    if source.weight_files:
        return sum(file.stat().st_size for file in source.weight_files), "each tensor's own dtype"
    own = str(getattr(skeleton.config, "dtype", None) or "float32").removeprefix("torch.")
    return base_bytes(skeleton, own if own in DTYPES else "float32"), own


def _read_bytes(source: ModelSource, otherwise: int) -> int:
    return sum(file.stat().st_size for file in source.weight_files) or otherwise


def _adapter_bytes(found: Found) -> int:
    if found.adapter is None:
        return 0
    return sum(file.stat().st_size for file in found.adapter.glob("*.safetensors"))


def _disk(place: Path, least: int, most: int) -> DiskPlan:
    """What is written to a folder that may not be there yet."""
    whole = place.absolute()
    there = next((each for each in (whole, *whole.parents) if each.exists()), None)
    free = None if there is None else shutil.disk_usage(there).free
    return DiskPlan(str(place), (least, most), free)
