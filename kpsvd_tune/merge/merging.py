"""Adapter + base model -> plain weights, proved to be the same model."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.errors import InputError, MergeError, ResourceError, some_of
from kpsvd_tune.linalg import kron_sum
from kpsvd_tune.merge.files import keep_base_files
from kpsvd_tune.merge.proof import PROMPTS, Proof
from kpsvd_tune.models import ModelSource, describe_base
from kpsvd_tune.models.loading import DTYPES, same_tokenizer
from kpsvd_tune.report.card import Base, merged_card
from kpsvd_tune.report.results import MergeReport
from kpsvd_tune.runs.find import Found
from kpsvd_tune.runs.ownership import refuse_inside_run
from kpsvd_tune.storage.durable import write_folder
from kpsvd_tune.storage.paths import check_writable, kind_of
from kpsvd_tune.units import size

# Below this share of an update surviving the rounding, the merge has quietly undone training.
KEPT_SHARE_WARNING = 0.9


@dataclass(frozen=True)
class MergeSettings:
    """How an adapter is merged."""

    adapter: str  # where it came from, for the report
    dtype: str  # of the stored weights: float32, bfloat16 or float16
    base: Base = Base("a base model", is_on_hub=False)  # for the card
    # Its configuration and tokenizer files are kept; None where the base is a single file.
    base_folder: Path | None = None
    # Largest logit difference that passes; None: the dtype's share of the largest logit.
    tolerance: float | None = None
    prompts: tuple[str, ...] = PROMPTS  # texts to compare the two models on
    warnings: tuple[str, ...] = ()  # for the report, before its own


def check_source(source: str, found: Found) -> Path:
    """The adapter that is merged; InputError where what was typed is none."""
    if found.adapter is not None:
        return found.adapter
    if kind_of(source) in ("merged", "model"):
        raise InputError(
            f"{source} is a model, with plain weights: there is nothing to merge; expected a "
            "run or an adapter"
        )
    raise InputError(
        f"{source} is neither a run nor an adapter: expected a folder with recipe.yaml and "
        "adapter/, or one with adapter_config.json"
    )


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


def settings_for(found: Found, source: ModelSource, base: str | None, dtype: str) -> MergeSettings:
    """The settings for an adapter that was found; `base` is its place where one was typed."""
    named = describe_base(found.base or source.path, source.folder)
    if base and not named.is_on_hub:
        named = describe_base(base, source.folder)
    folder = None if source.kind == "gguf" else source.folder
    return MergeSettings(str(found.adapter), dtype, named, folder)


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: MergeSettings,
    stage: Callable[[str], None] = lambda _: None,
) -> MergeReport:
    """Merge an adapter into its base in float32, save it, load it again and compare.

    The folder `output`, missing or empty so far, appears under its name only when it is complete;
    merge_report.json inside says what was measured, README.md what it is. The model given is used
    up, the tokenizer saved beside the weights, and `stage` is told what is being done.

    Returns:
        The report; ``passed`` is False when the tolerance is exceeded.

    Raises:
        MergeError: Weights are not finite in the dtype, or logits are not finite or all equal, so
            that nothing could be proved by them.
        ResourceError: The disk has no room.
    """
    dtype = settings.dtype
    stage("computing the logits of the adapter on its base")
    proof = Proof(model, tokenizer, settings.prompts)
    tolerance = proof.tolerance(dtype) if settings.tolerance is None else settings.tolerance
    stage("merging")
    kept, sizes = _survival(model, DTYPES[dtype])
    plain: Any = model.merge_and_unload()
    plain.to(DTYPES[dtype])
    _check_finite(plain, dtype)
    with write_folder(output) as partial:
        # What a killed merge left is gone by now, and its room is free.
        _check_room(plain, output)
        stage(f"writing {output}")
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        has_own = _has_own_tokenizer(tokenizer, settings.base_folder)
        keep_base_files(partial, settings.base_folder, dtype, has_own)
        del plain, model
        gc.collect()
        stage("loading the merged model afresh and comparing")
        merged: Any = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
        difference, agreement = proof.compare(merged)
        report = MergeReport(
            adapter=settings.adapter,
            output=str(output),
            dtype=dtype,
            max_logit_difference=difference,
            adapter_logit_difference=proof.change,
            top1_agreement=agreement,
            num_positions=proof.num_positions,
            kept_share=kept,
            relative_update=sizes,
            min_kept_share=min(kept.values(), default=1.0),
            tolerance=tolerance,
            prompts=settings.prompts,
            # Written so that a difference that is not a number fails.
            passed=difference <= tolerance,
            warnings=(*settings.warnings, *_lost_updates(kept, dtype), *proof.unseen(tolerance)),
        )
        (partial / "merge_report.json").write_text(
            json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8"
        )
        (partial / "README.md").write_text(merged_card(report, settings.base), encoding="utf-8")
    return report


def _has_own_tokenizer(tokenizer: PreTrainedTokenizerBase, base_folder: Path | None) -> bool:
    """Whether a tokenizer is another than the base's, which came with the adapter."""
    if base_folder is None or not (base_folder / "tokenizer_config.json").is_file():
        return False
    own: Any = AutoTokenizer.from_pretrained(base_folder, local_files_only=True)
    return not same_tokenizer(tokenizer, own)


@torch.no_grad()
def _survival(model: PeftModel, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Per layer the share of the update that rounding keeps, and ||Delta||_F / ||W||_F.

    The share is <W' - W, Delta> / ||Delta||^2 with W' the stored weight: far below 1 where W has 16
    bits and Delta is smaller than half the spacing around it.
    """
    kept: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, layer in kpsvd_layers(model, model.active_adapter):
        delta = kron_sum(*layer.terms(model.active_adapter))
        weight = base_weight(layer).float()
        stored = (weight + delta).to(dtype)
        if not torch.isfinite(stored).all():
            raise MergeError(
                f"{name}: the merged weight is not finite in {dtype}: the adapter is broken or "
                "the dtype's range too small; try --dtype float32"
            )
        square = delta.double().square().sum()
        overlap = ((stored.double() - weight.double()) * delta.double()).sum()
        kept[name] = float(overlap / square) if square > 0 else 1.0
        norm = torch.linalg.vector_norm(weight)
        sizes[name] = float(torch.linalg.vector_norm(delta) / norm) if norm > 0 else 0.0
    return kept, sizes


def _check_finite(model: PreTrainedModel, dtype: str) -> None:
    """Name the weights, adapted or not, that are not finite in the dtype they are stored in."""
    weights = [each for each in model.named_parameters() if each[1].is_floating_point()]
    if broken := [name for name, weight in weights if not torch.isfinite(weight).all()]:
        raise MergeError(
            f"{some_of(broken)}: not finite in {dtype}; the base model is damaged, or the dtype's "
            "range too small: try --dtype float32. Nothing was written"
        )


def _lost_updates(kept: dict[str, float], dtype: str) -> tuple[str, ...]:
    lost = [name for name, share in kept.items() if share < KEPT_SHARE_WARNING]
    if not lost:
        return ()
    worst = min(lost, key=kept.__getitem__)
    return (
        f"rounding to {dtype} lost part of the update in {len(lost)} of {len(kept)} layers "
        f"(least kept: {100 * kept[worst]:.0f} % in {worst}); use --dtype float32",
    )


def _check_room(model: PreTrainedModel, output: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.05 * needed:
        raise ResourceError(
            f"the merged model needs {size(needed)} on disk and {existing} has {size(free)} free: "
            "make room or choose another --output"
        )
