"""What `train` would do and take: resolved by configuration, headers and rows, without weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.adapter.base import RECORD
from kpsvd_tune.adapter.forms import FORMS
from kpsvd_tune.adapter.targets import saved_whole, target_names, untouched
from kpsvd_tune.data import PreparedData
from kpsvd_tune.decompose import layer_plans
from kpsvd_tune.errors import DataError, RecipeError
from kpsvd_tune.estimate.answers import (
    ANSWERS_BASIS,
    AskedTask,
    asked_tasks,
    batch_rows,
    scoring_seconds,
)
from kpsvd_tune.estimate.batches import RunBatches, batches_of, full_batches, validation_size
from kpsvd_tune.estimate.loading import loading_seconds
from kpsvd_tune.estimate.memory import (
    COPYING,
    OFFLOADED,
    base_bytes,
    cache_bytes,
    device_memory,
    heap_bytes,
    host_memory,
    leave_on_host,
    loading_bytes,
    part_of_process,
    pass_bytes,
    process_bytes,
    shared_loading_bytes,
    training_parts,
)
from kpsvd_tune.estimate.ranks import PossibleRanks, possible_ranks, ranks_of_adapter
from kpsvd_tune.estimate.time import (
    STEP_RANGE,
    Ahead,
    decomposition_seconds,
    measure_speed,
    run_seconds,
    seconds_by_steps,
    step_seconds,
)
from kpsvd_tune.estimate.trace import Trace, trace_step
from kpsvd_tune.evaluation.known import known_rows
from kpsvd_tune.events import Events
from kpsvd_tune.hardware.devices import decomposing_device, own_device
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    find_configuration,
    load_skeleton,
    load_tokenizer,
)
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.models.offload import check_device
from kpsvd_tune.models.quantised import check_quantisation
from kpsvd_tune.recipe import DatasetRecipe, Recipe, recipe_to_yaml
from kpsvd_tune.report.plan import (
    AdapterPlan,
    DataPlan,
    MemoryPlan,
    ModuleKind,
    Plan,
    TimePlan,
)
from kpsvd_tune.storage.json_files import parse_json
from kpsvd_tune.training.device_map import check_device_map
from kpsvd_tune.training.from_adapter import find_adapter
from kpsvd_tune.training.precision import going_on, settle_precision
from kpsvd_tune.training.schedule import RunLength, run_length
from kpsvd_tune.training.stages import read_rows
from kpsvd_tune.training.whole import whole_warnings
from kpsvd_tune.units import size

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FEWEST_TOKENS = 64  # rows are not cut further to make a run fit
# A forward pass without a backward one, in times of a step.
_VALIDATION = 1 / 3
# Half-width of what the steps of a run that has begun tell.
_BY_STEPS = 0.1
# Of each trained number: itself and AdamW's two, in float32.
_CHECKPOINT_BYTES = 3 * 4
_HEADER_BYTES = 130  # of a tensor in a safetensors file, its name among them


@dataclass(frozen=True)
class _Setting:
    """What the estimates need to know."""

    recipe: Recipe
    source: ModelSource
    skeleton: Any
    ranks: PossibleRanks
    data: PreparedData | None
    length: RunLength | None
    device: torch.device
    processes: int
    process_bytes: int
    tokenizer: PreTrainedTokenizerBase | None  # None where the rows were not read
    asked: list[AskedTask]  # tasks that have answers, as of `asked_tasks`
    unasked: list[str]  # the others
    trained_whole: Mapping[str, int]  # parameters of the modules that are trained whole


def make_plan(
    recipe: Recipe,
    events: Events,
    *,
    processes: int = 1,
    on_cpu: bool = False,
    reads_rows: bool = True,
) -> Plan:
    """Say what a training would do and take; nothing is written but the cache of tokenised rows.

    Args:
        recipe: The recipe.
        events: Told of stages and notes.
        processes: Processes that would share the work.
        on_cpu: Whether they would work on the CPU although there is a GPU.
        reads_rows: Whether to read and tokenise the rows; else every row counts as the longest.

    Raises:
        RecipeError: The recipe has no rows, or its settings cannot work together, with the number
            of rows or with that of processes.
        ModelError: The base model cannot be found or read.
        AdapterError: No layer to adapt, or a rank rule that cannot be met.
        DataError: The rows cannot be used.
    """
    dataset = recipe.dataset
    if dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    device = own_device(on_cpu)
    check_device_map(recipe, processes)
    if recipe.model.device_map is not None:
        check_device(device)
    settled = settle_precision(recipe, device, going_on(recipe))
    recipe = settled.recipe
    if settled.note is not None:
        events.note(settled.note)
    events.stage(f"reading the configuration of {recipe.model.path}")
    source = find_configuration(recipe.model.path, recipe.model.revision)
    skeleton = load_skeleton(source)
    check_quantisation(skeleton, recipe.model.quantization, source.path, device.type)
    adapter = recipe.adapter
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    folder = find_adapter(recipe)
    if folder is not None:
        ranks = ranks_of_adapter(folder)
    else:
        reader = WeightReader(source, names, skeleton)
        ranks = possible_ranks(reader, layer_plans(reader, adapter), adapter, recipe.train.seed)
    for warning in whole_warnings(recipe, folder):
        events.tell(warning)
    data = length = tokenizer = None
    if reads_rows:
        tokenizer = load_tokenizer(source)
        data = read_rows(recipe, dataset, tokenizer, skeleton, events)
        length = run_length(recipe.train, len(data.train), len(data.validation), processes)
        if length.faults:
            raise RecipeError("\n".join(length.faults))
        for note in length.notes:
            events.note(note)
        for warning in length.warnings:
            events.tell(warning)
        for task in recipe.evaluation:
            # One whose rows cannot be read is named among those that are not counted.
            with suppress(DataError):
                for note in known_rows([task], dataset, data):
                    events.note(note)
    setting = _Setting(
        recipe,
        source,
        skeleton,
        ranks,
        data,
        length,
        device,
        processes,
        process_bytes(),
        tokenizer,
        *(([], []) if tokenizer is None else asked_tasks(recipe, tokenizer, events.note)),
        trained_whole=saved_whole(
            skeleton, adapter.modules_to_save if folder is None else ranks.modules_to_save
        ),
    )
    events.stage("tracing a step of the largest batch on tensors without numbers")
    return _plan(setting, dataset)


def _plan(setting: _Setting, dataset: DatasetRecipe) -> Plan:
    recipe, ranks, skeleton = setting.recipe, setting.ranks, setting.skeleton
    batches = _batches(setting, recipe, dataset.max_length)
    trace, holes = _trace(setting, recipe, batches)
    host, on_device = _memory(setting, recipe, trace, holes)
    does_not_fit = False in [each.fits for each in (host, on_device) if each is not None]
    cure = _cure(setting, dataset.max_length) if does_not_fit else None
    time = _with_scoring(setting, _with_loading(setting, _time(setting, batches, trace)))
    if OFFLOADED in host.parts:
        time = replace(time, basis=(*time.basis, COPYING))
    price = recipe.compare.price_per_hour
    cost = None
    if price is not None and (seconds := time.whole_seconds) is not None:
        hours = [each / 3600 for each in seconds]
        cost = (hours[0] * price * setting.processes, hours[1] * price * setting.processes)
    numel = sum(parameter.numel() for parameter in skeleton.parameters())
    return Plan(
        model=recipe.model.path,
        base_parameters=numel,
        base_model_bytes=base_bytes(skeleton, recipe.model.dtype, recipe.model.quantization),
        target_matrices=len(ranks.most),
        rank_rule=recipe.adapter.rank.method if recipe.adapter.from_ is None else "from",
        device=setting.device.type,
        processes=setting.processes,
        adapter=_adapter(setting),
        data=_data(setting, batches),
        host=host,
        on_device=on_device,
        memory_basis=_memory_basis(setting),
        cure=None if cure is None else f"{' '.join(cure[0])} (peak {size(cure[1])})",
        cure_keys=() if cure is None else cure[0],
        time=time,
        cost=cost,
        currency=recipe.compare.currency,
        output_dir=recipe.output_dir,
        output_dir_exists=Path(recipe.output_dir).exists(),
    )


def _batches(setting: _Setting, recipe: Recipe, max_length: int) -> RunBatches:
    if setting.data is None or setting.length is None:
        return full_batches(recipe.train, max_length, setting.processes)
    return batches_of(
        setting.data.train,
        recipe.train,
        setting.length.num_steps,
        num_processes=setting.processes,
        multiple=_multiple(setting),
        max_length=max_length,
    )


def _adapter(setting: _Setting) -> AdapterPlan:
    ranks, recipe = setting.ranks, setting.recipe
    kinds: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for low, high in zip(ranks.least, ranks.most, strict=True):
        key = (_NUMBER.sub("*", low.name), low.shape)
        kinds.setdefault(key, []).append((low.rank, high.rank))
    stored = ranks.num_stored(is_drawn=recipe.adapter.is_drawn)
    form = FORMS[ranks.most[0].form]
    tensors = len(form.trained) + (0 if recipe.adapter.is_drawn else len(form.frozen)) + 1
    whole = sum(setting.trained_whole.values())
    extra = len(ranks.most) * (4 * math.prod(RECORD) + tensors * _HEADER_BYTES)
    extra += whole * DTYPES[recipe.model.dtype].itemsize
    fewest, most = (each + whole for each in ranks.num_trained())
    names = [plan.name for plan in ranks.most]
    return AdapterPlan(
        form=ranks.most[0].form,
        kinds=tuple(
            ModuleKind(
                name=name,
                count=len(found),
                out_features=shape.out_features,
                in_features=shape.in_features,
                factor_shape=shape.as_tuple(),
                ranks=(min(low for low, _ in found), max(high for _, high in found)),
            )
            for (name, shape), found in kinds.items()
        ),
        untouched=tuple(untouched(setting.skeleton, names, setting.trained_whole)),
        trainable_parameters=(fewest, most),
        file_bytes=(4 * stored[0] + extra, 4 * stored[1] + extra),
        basis=ranks.basis,
        trained_whole=setting.trained_whole,
    )


def _data(setting: _Setting, batches: RunBatches) -> DataPlan:
    train, data, length = setting.recipe.train, setting.data, setting.length
    largest = batches.largest
    steps = train.max_steps if length is None else length.num_steps
    found = DataPlan(
        steps=steps,
        passes=None if length is None else length.passes,
        rows_per_step=train.batch_size * train.gradient_accumulation * setting.processes,
        training_rows=None if data is None else len(data.train),
        validation_rows=None if data is None else len(data.validation),
        tokens=None if data is None or steps is None else round(batches.tokens_per_step * steps),
        largest_batch=(largest.rows, largest.tokens, largest.supervised),
        basis="the tokenised rows, in the order that the run takes them",
    )
    if data is None:
        return replace(found, basis="dataset.max_length: the rows were not read")
    return found


def _trace(setting: _Setting, recipe: Recipe, batches: RunBatches) -> tuple[Trace, int]:
    """The trace of the largest step, and the bytes of holes that the steps leave in the heap."""
    config, layers = setting.skeleton.config, setting.ranks.most
    kind, step = setting.device.type, batches.largest
    found = trace_step(config, recipe, layers, step, kind)
    if kind != "cpu":
        return found, 0
    whole = found
    if recipe.train.gradient_checkpointing:
        train = recipe.train.model_copy(update={"gradient_checkpointing": False})
        keeping = recipe.model_copy(update={"train": train})
        whole = trace_step(config, keeping, layers, step, kind)
    return found, heap_bytes(whole, recipe.model.dtype, is_uneven=batches.is_uneven)


def _memory(
    setting: _Setting, recipe: Recipe, trace: Trace, holes: int
) -> tuple[MemoryPlan, MemoryPlan | None]:
    """Of the host, and of each device where that is another."""
    count = setting.processes
    parts = training_parts(recipe, setting.skeleton, setting.ranks.most, trace)
    parts = part_of_process(parts, recipe, count)
    wanted = recipe.model
    loading = loading_bytes(setting.source, setting.skeleton, wanted.dtype, wanted.quantization)
    if recipe.train.parallel == "fsdp" and count > 1:
        shared = shared_loading_bytes(setting.source, setting.skeleton, wanted.dtype, count)
        loading = loading if shared is None else shared
    process = setting.process_bytes
    if setting.device.type == "cpu":
        scoring = _scoring_bytes(setting, recipe, parts)
        parts["holes in the heap"] = holes
        everything = {name: each * count for name, each in parts.items()}
        return host_memory(process * count, loading * count, everything, scoring * count), None
    kept = leave_on_host(parts, setting.skeleton, wanted.dtype, wanted.device_map)
    host = host_memory(process * count, loading * count, kept)
    return host, device_memory(parts, _scoring_bytes(setting, recipe, parts))


def _scoring_bytes(setting: _Setting, recipe: Recipe, parts: Mapping[str, int]) -> int:
    """Bytes of the scoring after the training, in a process that has these parts; 0 without one."""
    if not setting.asked or recipe.train.parallel == "fsdp":
        return 0
    dtype, skeleton = recipe.model.dtype, setting.skeleton
    most = max(
        (cache_bytes(skeleton, dtype, rows, max(lengths) + task.max_new_tokens) or 0)
        + pass_bytes(skeleton, dtype, rows, max(lengths))
        for task, lengths in setting.asked
        for rows in [batch_rows(task, lengths)]
    )
    return most + sum(parts[each] for each in ("weights", "adapter", "optimiser", "gradients"))


def _memory_basis(setting: _Setting) -> tuple[str, ...]:
    found = [
        "weights and adapter by their sizes; activations by a forward and a backward pass of the "
        "largest batch, traced without numbers; libraries by what this process holds",
    ]
    if setting.device.type == "cpu":
        found.append(
            "holes in the heap by a share fitted on a few runs; see docs/performance.md for how "
            "far predictions were from measured peaks"
        )
    if setting.device.type != "cpu":
        found.append("predictions for GPUs have not been held against measured ones yet")
    if setting.asked:
        found.append(
            "the scoring by keys and values, one layer and the logits of its largest batch; where "
            "it is the peak, a lower batch_size of the evaluation takes less"
        )
    elif setting.recipe.evaluation:
        found.append("the memory of the evaluation is not counted: none of its prompts was read")
    return tuple(found)


def _time(setting: _Setting, batches: RunBatches, largest: Trace) -> TimePlan:
    recipe, length = setting.recipe, setting.length
    rank, todo = recipe.adapter.rank, setting.ranks.to_decompose
    place = decomposing_device(setting.device)
    seconds = decomposition_seconds(todo, rank.window, rank.tolerance, place)
    basis = ["decomposition by random matrices of the same shapes decomposed now"] if todo else []
    steps = recipe.train.max_steps if length is None else length.num_steps
    if steps is None:
        return _times(seconds, len(todo), None, basis)
    validations, share = _validations(setting, steps)
    known = seconds_by_steps(_begun(recipe), _ahead(setting, batches, steps))
    if known is not None:
        basis.append(f"training by the steps that the run in {recipe.output_dir} has done")
        ends = ((1 - _BY_STEPS) * known, (1 + _BY_STEPS) * known)
        return _times(seconds, len(todo), ends, basis)
    precision = recipe.train.precision
    dtype = DTYPES[{"bf16": "bfloat16", "fp16": "float16"}.get(precision, recipe.model.dtype)]
    speed = measure_speed(setting.device, dtype)
    trace = largest.scaled(batches.mean_size / batches.largest.size)
    low, high = step_seconds(trace, recipe.train.gradient_accumulation, speed)
    basis.append(
        "training by the operations of a step and the speed that this machine shows now; after "
        "five steps the run itself tells it, and so does `plan`"
    )
    most, least = (run_seconds(each, steps, validations, share) for each in (high, low))
    return _times(seconds, len(todo), (least, most), basis)


def _times(
    decomposing: float, to_decompose: int, training: tuple[float, float] | None, basis: list[str]
) -> TimePlan:
    low, high = (factor * decomposing for factor in STEP_RANGE)
    return TimePlan(decomposing, to_decompose, training, tuple(basis), (low, high))


def _with_loading(setting: _Setting, time: TimePlan) -> TimePlan:
    """The times with that of loading the base model, which a training does once or twice."""
    seconds = loading_seconds(
        setting.source,
        setting.skeleton,
        setting.recipe.model.dtype,
        decomposes=bool(setting.ranks.to_decompose),
    )
    said = (
        "loading by the kind of the files and the pace of Python, of a machine left alone and of "
        "one as busy as now; fetching the files is not counted"
    )
    return replace(time, basis=(*time.basis, said), loading_seconds=seconds)


def _with_scoring(setting: _Setting, time: TimePlan) -> TimePlan:
    """The times with that of the evaluation, whose questions are read."""
    recipe = setting.recipe
    if not recipe.evaluation:
        return time
    if setting.tokenizer is None:
        unread = "the time of scoring is not estimated: the rows were not read"
        return replace(time, basis=(*time.basis, unread))
    seconds = scoring_seconds(
        setting.asked,
        setting.skeleton,
        recipe.model.dtype,
        setting.device,
        setting.processes,
        sum(plan.rank > 0 for plan in setting.ranks.most),
    )
    basis = [f"scoring {ANSWERS_BASIS}"] if setting.asked else []
    if setting.unasked:
        basis.append(f"the time of scoring {', '.join(setting.unasked)} is not estimated")
    return replace(time, basis=(*time.basis, *basis), scoring_seconds=seconds)


def _ahead(setting: _Setting, batches: RunBatches, steps: int) -> Ahead:
    train, data = setting.recipe.train, setting.data
    held_out = 0.0
    if data is not None and len(data.validation):
        held_out = validation_size(
            data.validation,
            train,
            num_processes=setting.processes,
            multiple=_multiple(setting),
        )
    return Ahead(
        num_steps=steps,
        size_until=batches.size_until,
        validation_size=held_out,
        eval_every=train.eval_every,
        save_every=train.save_every,
        checkpoint_bytes=_CHECKPOINT_BYTES
        * (setting.ranks.num_trained()[1] + sum(setting.trained_whole.values())),
    )


def _multiple(setting: _Setting) -> int:
    """Rows are padded to a multiple of so many tokens."""
    return 1 if setting.device.type == "cpu" else 8


def _validations(setting: _Setting, steps: int) -> tuple[int, float]:
    """How often the held-out rows are looked at, and what it takes in times of a step."""
    train, data = setting.recipe.train, setting.data
    if data is None or not len(data.validation):
        return 0, 0.0
    rows = train.batch_size * train.gradient_accumulation * setting.processes
    every = train.eval_every
    count = 1 + (steps // every if every else 0) + (0 if every and steps % every == 0 else 1)
    return count, _VALIDATION * len(data.validation) / rows


def _begun(recipe: Recipe) -> list[Mapping[str, Any]]:
    """The metrics of the run in output_dir, where it is of this very recipe."""
    folder = Path(recipe.output_dir)
    try:
        if (folder / "recipe.yaml").read_text(encoding="utf-8") != recipe_to_yaml(recipe):
            return []
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return [parse_json(line, dict[str, Any]) for line in lines]
    except (OSError, ValueError):
        return []


def _cure(setting: _Setting, max_length: int) -> tuple[tuple[str, ...], int] | None:
    """The cheapest change of those tried that makes the run fit; None where none does.

    Gives it as KEY=VALUE, one for each key, and the peak in bytes that is left then.
    """
    for changes, recipe, length in _changes(setting, max_length):
        batches = _batches(setting, recipe, length)
        nothing = _memory(setting, recipe, Trace(0, 0, 0), 0)
        if False in [each.fits for each in nothing if each is not None]:
            continue
        needed = _memory(setting, recipe, *_trace(setting, recipe, batches))
        found = [each for each in needed if each is not None]
        if all(each.fits for each in found):
            keys = tuple(f"{key}={value}" for key, value in changes.items())
            return keys, found[-1].peak_bytes
    return None


def _changes(setting: _Setting, max_length: int) -> Iterator[tuple[dict[str, object], Recipe, int]]:
    """Changes that take less memory, the cheapest first, each with the recipe that has it.

    Smaller batches with more accumulation leave the steps what they are; checkpointing costs a
    third more time; bfloat16 rounds the base, and nf4 does so coarsely; offloading copies
    weights in each step; shorter rows change what is learnt.
    """
    recipe = setting.recipe
    halvings = list(_halvings(recipe))
    for changes, changed in halvings:
        yield changes, changed, max_length
    if not recipe.train.gradient_checkpointing:
        for changes, changed in [({}, recipe), *halvings]:
            train = changed.train.model_copy(update={"gradient_checkpointing": True})
            keys = {**changes, "train.gradient_checkpointing": "true"}
            yield keys, changed.model_copy(update={"train": train}), max_length
    least, changed = halvings[-1] if halvings else ({}, recipe)
    train = changed.train.model_copy(update={"gradient_checkpointing": True})
    changed = changed.model_copy(update={"train": train})
    keys = {**least}
    if not recipe.train.gradient_checkpointing:
        keys["train.gradient_checkpointing"] = "true"
    if recipe.model.dtype == "float32":
        model = recipe.model.model_copy(update={"dtype": "bfloat16"})
        changed, keys = (
            changed.model_copy(update={"model": model}),
            {**keys, "model.dtype": "bfloat16"},
        )
        yield keys, changed, max_length
    exact, exact_keys = changed, keys
    can_quantise = setting.source.kind != "gguf" and recipe.train.parallel == "ddp"
    can_quantise = can_quantise and recipe.model.device_map is None
    if recipe.model.quantization is None and can_quantise:
        model = changed.model.model_copy(update={"quantization": "nf4"})
        changed = changed.model_copy(update={"model": model})
        keys = {**keys, "model.quantization": "nf4"}
        yield keys, changed, max_length
    if _can_offload(setting):
        model = exact.model.model_copy(update={"device_map": "auto"})
        found = exact.model_copy(update={"model": model})
        yield {**exact_keys, "model.device_map": "auto"}, found, max_length
    while max_length > _FEWEST_TOKENS:
        max_length //= 2
        yield {**keys, "dataset.max_length": max_length}, changed, max_length


def _can_offload(setting: _Setting) -> bool:
    """Whether `model.device_map: auto` would change anything, and is not refused."""
    model = setting.recipe.model
    is_alone = setting.processes == 1 and setting.recipe.train.parallel == "ddp"
    is_free = model.device_map is None and model.quantization is None
    return is_alone and is_free and setting.device.type == "cuda"


def _halvings(recipe: Recipe) -> Iterator[tuple[dict[str, object], Recipe]]:
    """The same steps with ever fewer rows at a time."""
    train = recipe.train
    rows, times = train.batch_size, train.gradient_accumulation
    while rows > 1 and rows % 2 == 0:
        rows, times = rows // 2, times * 2
        update = {"batch_size": rows, "gradient_accumulation": times}
        keys: dict[str, object] = {f"train.{key}": value for key, value in update.items()}
        yield keys, recipe.model_copy(update={"train": train.model_copy(update=update)})
