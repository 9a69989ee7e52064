"""Adapters + base model -> plain weights, proved to be the same model.

A base is merged tensor by tensor from its files wherever its tensors can be told apart there. One
that has to be loaded (GGUF, layouts that transformers joins or splits) is merged in memory; the
update, its rounding, the proof and the report are the same.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kpsvd_tune.adapter.base import noted_distances
from kpsvd_tune.data.encode.encoder import answer_ends
from kpsvd_tune.errors import InputError, ResourceError, some_of
from kpsvd_tune.events import Events
from kpsvd_tune.merge.changes import Changes, Part, changes_of
from kpsvd_tune.merge.files import add_end_tokens, copy_configurations, keep_base_files
from kpsvd_tune.merge.loaded import check_finite, load_adapted, merge_into
from kpsvd_tune.merge.proof import PROMPTS, Proof
from kpsvd_tune.merge.shards import (
    Plan,
    ShardWriter,
    Written,
    plan_files,
    stored_dtype,
    unstreamable,
)
from kpsvd_tune.merge.update import MOST_DEVIATION
from kpsvd_tune.models import Checkpoint, ModelSource, base_of, load_skeleton, load_tokenizer
from kpsvd_tune.models.loading import DTYPES, same_tokenizer
from kpsvd_tune.report.card import CARD, Base, Training, merged_card
from kpsvd_tune.report.results import MergeReport
from kpsvd_tune.runs.described import training_of
from kpsvd_tune.runs.find import Found, compare_files, full_precision_note
from kpsvd_tune.runs.merged_folder import MERGE_REPORT, trained_as
from kpsvd_tune.runs.ownership import refuse_inside_run
from kpsvd_tune.storage.disk import check_room
from kpsvd_tune.storage.durable import write_folder
from kpsvd_tune.storage.hashes import file_hashes
from kpsvd_tune.storage.memory import free_memory
from kpsvd_tune.storage.paths import check_writable
from kpsvd_tune.units import size

# Below this share of an update surviving the rounding, the merge has quietly undone training.
KEPT_SHARE_WARNING = 0.9
# What a model in float32 takes beside its weights: the libraries, and a few short prompts.
_BESIDE_WEIGHTS = 1 << 30
ProofKind = Literal["tensors", "logits", "both"]


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged."""

    # Of the stored weights: float32, bfloat16 or float16; None keeps the base's, each tensor's own.
    dtype: str | None = None
    adapter: str = ""  # where the adapters came from, for the report
    base: Base = Base("a base model", is_on_hub=False)  # for the card
    # Its configuration and tokenizer files are kept; None where the base is a single file.
    base_folder: Path | None = None
    # Largest logit difference that passes; None: the dtype's share of the largest logit.
    tolerance: float | None = None
    prompts: tuple[str, ...] = PROMPTS  # texts to compare the two models on
    # What proves the result; None: both where the model fits into memory, else the tensors.
    proof: ProofKind | None = None
    allow_other_base: bool = False
    # What the adapters were given as, and the share of each one's update; for the report.
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()  # for the report, before its own
    notes: tuple[str, ...] = ()  # for the report
    trainings: tuple[Training, ...] = ()  # of the adapters, for the card
    # Keys of the dataset section of their runs, for the report.
    trained_as: Mapping[str, Any] = field(default_factory=dict)


def check_output(output: Path, inputs: Sequence[Path]) -> Path:
    """The folder to write, which a link may name, if it is empty and apart from runs and inputs."""
    resolved = Path(os.path.realpath(output))
    if resolved.is_symlink():
        raise InputError(f"--output {output} is a link that leads nowhere: name another folder")
    if resolved == Path.cwd() or os.path.ismount(resolved):
        raise InputError(
            f"--output {output} is the folder that the command runs in, or one where a disk is "
            f"mounted, and cannot be replaced as a whole: name a new folder, as {resolved}/merged"
        )
    for path in (path.resolve() for path in inputs):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            raise InputError(
                f"--output {output} would write over or into the input {path}: name another folder"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} exists and is not empty: name another folder")
    refuse_inside_run(resolved, "--output")  # what a link names is made, and the link stays
    check_writable(resolved)
    return resolved


def weights_for(num_adapters: int, text: str | None) -> tuple[float, ...]:
    """The weights of several adapters, from a text such as 0.7,0.3; one alone has the weight 1.

    InputError: the text is none of so many numbers.
    """
    example = ",".join(["0.5"] * num_adapters)
    if text is None:
        if num_adapters > 1:
            raise InputError(
                f"{num_adapters} adapters need a weight each, by which its update is multiplied: "
                f"give them in the same order, as --weights {example}"
            )
        return (1.0,)
    try:
        weights = tuple(float(each) for each in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != num_adapters or not all(abs(each) < float("inf") for each in weights):
        raise InputError(
            f"--weights {text!r}: expected {num_adapters} numbers with commas between them, one "
            f"for each adapter, as {example}"
        )
    return weights


def settings_for(
    found: Sequence[Found], source: ModelSource, base: str | None, dtype: str | None
) -> MergeSettings:
    """The settings for adapters that were found; `base` is its place where one was typed."""
    named = base_of(source, found[0].base)
    if base and not named.is_on_hub:
        named = base_of(source, base)
    folder = None if source.kind == "gguf" else source.folder
    names = tuple(str(each.adapter) for each in found)
    if source.kind == "gguf":
        dtype = dtype or found[0].dtype
    trainings = tuple(training_of(each.adapter) for each in found if each.adapter is not None)
    return MergeSettings(
        dtype,
        names[0],
        named,
        folder,
        adapters=names,
        trainings=trainings,
        trained_as=trained_as([(each.dataset, each.template) for each in found]),
    )


def merge(
    parts: Sequence[Part],
    source: ModelSource,
    output: Path,
    settings: MergeSettings,
    events: Events,
) -> MergeReport:
    """Merge adapters into their base, and prove the result.

    The folder `output`, missing or empty so far, appears under its name only when it is complete;
    merge_report.json inside says what was measured, README.md what it is.

    Args:
        parts: The adapters and their weights; the tokenizer beside the first counts.
        source: The base model.
        output: The folder.
        settings: How it is done.
        events: Told what is being done.

    Returns:
        The report; ``passed`` is False when the proof fails.

    Raises:
        AdapterError: The base is another than an adapter's, or an adapter is damaged.
        InputError: Two adapters have trained the same module whole.
        MergeError: Weights are not finite in the dtype, or logits are not finite or all equal, so
            that nothing could be proved by them.
        ResourceError: The disk or the memory has no room.
    """
    events.stage("reading the adapter" if len(parts) == 1 else f"reading {len(parts)} adapters")
    tokenizer = load_tokenizer(source, parts[0].folder)
    others = [load_tokenizer(source, part.folder) for part in parts[1:]]
    if odd := [
        str(part.folder)
        for part, other in zip(parts[1:], others, strict=True)
        if not same_tokenizer(tokenizer, other)
    ]:
        told = (
            f"the tokenizer of {parts[0].folder} is written, and {some_of(odd)} was trained with "
            "another"
        )
        settings = replace(settings, warnings=(*settings.warnings, told))
    changes = changes_of(parts, source, settings.allow_other_base)
    skeleton = load_skeleton(source)
    needed = 4 * sum(each.numel() for each in skeleton.parameters()) + _BESIDE_WEIGHTS
    checkpoint, reason = None, needs_whole_base(source, skeleton)
    if reason is None:
        checkpoint = Checkpoint(source, skeleton)
        reason = unstreamable(checkpoint, changes)
    with_logits = _with_logits(settings, needed, events)
    if checkpoint is None or reason is not None:
        _check_memory(needed, reason)
        with noted_distances() as changes.distances:
            model = _load(parts, source, settings, events)
        stored = None if checkpoint is None else stored_dtype(checkpoint)
        settings = replace(
            settings,
            dtype=settings.dtype or stored,
            warnings=(*settings.warnings, *_other_base(model[1])),
            notes=(
                f"The base was loaded as a whole, for {reason}.",
                *_from_quantised(changes.distances),
            ),
        )
        return merge_loaded(model[0], tokenizer, output, settings, events, with_logits)
    plan = plan_files(checkpoint, changes, settings.dtype)
    proof = None
    if with_logits:
        with noted_distances() as changes.distances:
            model = _load(parts, source, settings, events)
        changes.other_base = model[1]
        check_finite(model[0])
        events.stage("computing the logits of the adapter on its base")
        proof = Proof(model[0], tokenizer, settings.prompts)
        del model
        gc.collect()
    try:
        return _stream(checkpoint, changes, plan, tokenizer, output, settings, events, proof)
    finally:
        checkpoint.close()


def _stream(
    checkpoint: Checkpoint,
    changes: Changes,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: MergeSettings,
    events: Events,
    proof: Proof | None,
) -> MergeReport:
    """Merge tensor by tensor; with a proof by logits, loading has compared the base's weights."""

    def advance(done: int, total: int) -> None:
        events.advance("merging weights", done, total)

    with write_folder(output) as partial:
        # What a killed merge left is gone by now, and its room is free.
        check_room(plan.num_bytes, output, "the merged model")
        events.stage(f"merging tensor by tensor and writing {output}")
        writer = ShardWriter(checkpoint, changes, proof is None, advance)
        written = writer.write(plan, partial)
        events.end_progress()
        folder = settings.base_folder
        assert folder is not None
        copy_configurations(partial, folder)
        tokenizer.save_pretrained(partial)
        has_own = _has_own_tokenizer(tokenizer, folder)
        keep_base_files(partial, folder, plan.dtype, has_own, plan.is_untied)
        ends = _ends_added(partial, tokenizer)
        warnings = [*settings.warnings, *_other_base(changes.conclude())]
        if not written.is_rest_compared:
            warnings.append(
                "weights that no adapter lies on were not compared with those of the training, "
                "since transformers joins or splits some of them while loading"
            )
        notes = (*settings.notes, *_from_quantised(changes.distances), *ends)
        settings = replace(settings, dtype=plan.dtype, warnings=tuple(warnings), notes=notes)
        return _prove_and_report(partial, output, settings, written, proof, events)


def merge_loaded(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: MergeSettings,
    events: Events,
    with_logits: bool = True,
) -> MergeReport:
    """Merge the active adapters of a loaded model, which is used up, as :func:`merge` does."""
    dtype = settings.dtype or "float32"
    proof = None
    if with_logits:
        events.stage("computing the logits of the adapter on its base")
        proof = Proof(model, tokenizer, settings.prompts)
    events.stage("merging")
    config: Any = model.config
    was_tied = getattr(config, "tie_word_embeddings", False)
    plain: Any
    plain, written = merge_into(model, DTYPES[dtype])
    is_untied = bool(was_tied and not plain.config.tie_word_embeddings)
    with write_folder(output) as partial:
        # What a killed merge left is gone by now, and its room is free.
        needed = sum(p.numel() * p.element_size() for p in plain.parameters())
        check_room(needed, output, "the merged model")
        events.stage(f"writing {output}")
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        has_own = _has_own_tokenizer(tokenizer, settings.base_folder)
        keep_base_files(partial, settings.base_folder, dtype, has_own, is_untied)
        ends = _ends_added(partial, tokenizer)
        del plain, model
        gc.collect()
        settings = replace(settings, dtype=dtype, notes=(*settings.notes, *ends))
        return _prove_and_report(partial, output, settings, written, proof, events)


def _prove_and_report(
    partial: Path,
    output: Path,
    settings: MergeSettings,
    written: Written,
    proof: Proof | None,
    events: Events,
) -> MergeReport:
    """Compare the logits of what was written, if they are asked for, and write the report."""
    dtype, kept, deviations = str(settings.dtype), written.kept, written.deviations
    furthest = max(deviations.values(), default=0.0)
    tensors_pass = settings.proof == "logits" or furthest <= MOST_DEVIATION
    report = MergeReport(
        adapter=settings.adapter,
        output=str(output),
        dtype=dtype,
        tolerance=None,
        max_logit_difference=None,
        top1_agreement=None,
        num_positions=0,
        prompts=(),
        kept_share=kept,
        relative_update=written.sizes,
        min_kept_share=min(kept.values(), default=1.0),
        passed=tensors_pass,
        warnings=(*settings.warnings, *_lost_updates(kept, dtype)),
        deviation=deviations,
        max_deviation=furthest,
        proof=(settings.proof or "both") if proof else "tensors",
        adapters=settings.adapters,
        weights=settings.weights,
        notes=settings.notes,
        trained_as=settings.trained_as,
    )
    if proof is not None:
        events.stage("loading the merged model afresh and comparing")
        merged: Any = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
        difference, agreement = proof.compare(merged)
        tolerance = proof.tolerance(dtype) if settings.tolerance is None else settings.tolerance
        report = replace(
            report,
            tolerance=tolerance,
            max_logit_difference=difference,
            adapter_logit_difference=proof.change,
            top1_agreement=agreement,
            num_positions=proof.num_positions,
            prompts=settings.prompts,
            # Written so that a difference that is not a number fails.
            passed=tensors_pass and difference <= tolerance,
            warnings=(*report.warnings, *proof.unseen(tolerance)),
        )
    files = {name: written.hashes[name] for name in sorted(written.hashes) if "/" not in name}
    if not files:
        events.stage("computing the hashes of the weight files, which are kept in the report")
        files = weight_hashes(partial)
    report = replace(report, weight_files=files)
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    (partial / MERGE_REPORT).write_text(text, encoding="utf-8")
    card = merged_card(report, settings.base, settings.trainings)
    (partial / CARD).write_text(card, encoding="utf-8")
    return report


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every weight file of a merged model, by name."""
    return file_hashes(folder.glob("*.safetensors"))


def needs_whole_base(source: ModelSource, skeleton: Any) -> str | None:
    """Why a base cannot be read from its files alone, as far as they need not be opened."""
    if source.kind == "gguf":
        return "it is a GGUF file, whose weights are dequantised while loading"
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    return None


def _with_logits(settings: MergeSettings, needed: int, events: Events) -> bool:
    """Whether logits are compared; by default where the model in float32 fits into memory."""
    if settings.proof is not None:
        return settings.proof != "tensors"
    free = free_memory()
    if free is None or free >= needed:
        return True
    events.note(
        f"the logits are not compared: that takes {size(needed)} of memory, and {size(free)} are "
        "free (--proof both compares them all the same); every tensor is"
    )
    return False


def _check_memory(needed: int, reason: str | None) -> None:
    free = free_memory()
    if free is not None and free < needed:
        raise ResourceError(
            f"the base has to be loaded to be merged, for {reason}; that takes {size(needed)} of "
            f"memory, and {size(free)} are free: expected a machine with more memory, or a base in "
            "safetensors with plain weights, which is merged tensor by tensor"
        )


def _load(
    parts: Sequence[Part], source: ModelSource, settings: MergeSettings, events: Events
) -> tuple[PeftModel, str | None]:
    events.stage(f"loading {source.path}")
    model, other = load_adapted(parts, source, settings.allow_other_base)
    if other is None:
        compare_files(model, source, events)
    return model, other


def _other_base(other: str | None) -> tuple[str, ...]:
    return (f"merged {other}",) if other else ()


def _has_own_tokenizer(tokenizer: PreTrainedTokenizerBase, base_folder: Path | None) -> bool:
    """Whether a tokenizer is another than the base's, which came with the adapter."""
    if base_folder is None or not (base_folder / "tokenizer_config.json").is_file():
        return False
    own: Any = AutoTokenizer.from_pretrained(
        base_folder, local_files_only=True, trust_remote_code=False
    )
    return not same_tokenizer(tokenizer, own)


def _ends_added(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Have the merged model stop where answers end, and say so where the base did not."""
    added = add_end_tokens(folder, answer_ends(tokenizer))
    if not added:
        return ()
    names = " and ".join(map(str, tokenizer.convert_ids_to_tokens(added)))
    return (
        f"Answers end with {names}, at which the base did not stop: generation_config.json names "
        "it now.",
    )


def _from_quantised(distances: Mapping[str, float]) -> tuple[str, ...]:
    note = full_precision_note(distances, "merged into")
    return () if note is None else (note,)


def _lost_updates(kept: dict[str, float], dtype: str) -> tuple[str, ...]:
    lost = [name for name, share in kept.items() if share < KEPT_SHARE_WARNING]
    if not lost:
        return ()
    worst = min(lost, key=kept.__getitem__)
    return (
        f"rounding to {dtype} lost part of the update in {len(lost)} of {len(kept)} layers "
        f"(least kept: {100 * kept[worst]:.0f} % in {worst}); use --dtype float32",
    )
