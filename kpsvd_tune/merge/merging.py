"""Adapter + base model -> plain weights, proved to be the same model.

The proof loads the merged folder afresh and compares its logits with those of the adapter on
the base, both computed in float32, so that what is left is the merge itself and the rounding of
the stored weights, not the noise of a 16-bit forward pass.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
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
from kpsvd_tune.models.loading import same_tokenizer
from kpsvd_tune.report.card import Base, merged_card
from kpsvd_tune.report.results import MergeReport
from kpsvd_tune.storage.durable import write_folder
from kpsvd_tune.units import size

UNKNOWN_BASE = Base("a base model", is_on_hub=False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest logit difference that passes, as a share of the largest logit. In float32 it is the
# order of operations; in 16 bits the rounding of every merged weight, which adds up over layers.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
# Below this share of an update surviving the rounding, the merge has quietly undone training.
KEPT_SHARE_WARNING = 0.9
PROMPTS = (
    "The capital of France is",
    "Question: A baker makes 12 loaves and sells 7. How many are left?\nAnswer:",
    "def reverse(text):\n    return",
    "Dear Ms Keller,\nthank you for your letter of",
)


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output folder that holds something or is part of an input.

    Raises:
        InputError: The folder is not empty, or lies in, around or on one of the inputs.
    """
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


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    adapter: str,
    dtype: str,
    base: Base = UNKNOWN_BASE,
    tolerance: float | None = None,
    prompts: Sequence[str] = PROMPTS,
    warnings: Sequence[str] = (),
    base_folder: Path | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> MergeReport:
    """Merge an adapter into its base, save it, load it again and compare.

    The folder appears under its name only when it is complete; merge_report.json inside says
    what was measured, README.md what it is. The model given is used up.

    Args:
        model: Base model in float32 with a KPSVD adapter.
        tokenizer: Saved beside the weights.
        output: A folder that does not exist or is empty.
        adapter: Where the adapter came from, for the report.
        dtype: float32, bfloat16 or float16: the dtype the weights are stored in.
        base: The base model, for the card.
        tolerance: Largest logit difference that passes; None takes the dtype's share of the
            largest logit: 1e-5 in float32, 5e-3 in float16, 4e-2 in bfloat16.
        prompts: Texts to compare the two models on.
        warnings: For the report, before its own.
        base_folder: Of the base model, whose configuration and tokenizer files are kept; None
            where it is a single file.
        stage: Told what is being done.

    Returns:
        The report; ``passed`` is False when the tolerance is exceeded.

    Raises:
        MergeError: Weights are not finite in the dtype, or logits are not finite or all equal, so
            that nothing could be proved by them.
        ResourceError: The disk has no room.
    """
    batches = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    model.eval()
    stage("computing the logits of the adapter on its base")
    expected = _logits(model, batches)
    _check_telling(expected, "the adapter on its base")
    with model.disable_adapter():
        of_base = _logits(model, batches)
    _check_telling(of_base, "the base model")
    change, _ = _difference(of_base, expected)
    if tolerance is None:
        # Of the prompt with the smallest logits, so that large ones of another excuse nothing.
        tolerance = TOLERANCES[dtype] * min(float(logits.abs().max()) for logits in expected)
    stage("merging")
    kept, sizes = _survival(model, DTYPES[dtype])
    plain: Any = model.merge_and_unload()
    plain.to(DTYPES[dtype])
    _check_finite(plain, dtype)
    _check_room(plain, output)
    with write_folder(output) as partial:
        stage(f"writing {output}")
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        keep_base_files(partial, base_folder, dtype, _has_own_tokenizer(tokenizer, base_folder))
        del plain, model
        gc.collect()
        stage("loading the merged model afresh and comparing")
        merged: Any = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
        merged.eval()
        found = _logits(merged, batches)
        _check_telling(found, "the merged model")
        difference, agreement = _difference(expected, found)
        report = MergeReport(
            adapter=adapter,
            output=str(output),
            dtype=dtype,
            max_logit_difference=difference,
            adapter_logit_difference=change,
            top1_agreement=agreement,
            num_positions=sum(len(logits) for logits in expected),
            kept_share=kept,
            relative_update=sizes,
            min_kept_share=min(kept.values(), default=1.0),
            tolerance=tolerance,
            prompts=tuple(prompts),
            # Written so that a difference that is not a number fails.
            passed=difference <= tolerance,
            warnings=(*warnings, *_lost_updates(kept, dtype)) + _unseen(change, tolerance),
        )
        (partial / "merge_report.json").write_text(
            json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8"
        )
        (partial / "README.md").write_text(merged_card(report, base), encoding="utf-8")
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

    The share is <W' - W, Delta> / ||Delta||^2 with W' the stored weight. It falls far below 1
    where W is itself a 16-bit number and Delta is smaller than half the spacing around it.
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


@torch.no_grad()
def _logits(model: torch.nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids).logits[0].float() for ids in batches]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute logit difference, and the share of positions with the same top token."""
    pairs = list(zip(expected, found, strict=True))
    # Of tensors and not of floats: Python's max() forgets what is not a number.
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return difference, same / sum(len(a) for a in expected)


def _check_telling(logits: Sequence[Tensor], whose: str) -> None:
    """Refuse logits that would equal any others, or none."""
    for number, each in enumerate(logits, 1):
        if not torch.isfinite(each).all():
            raise MergeError(
                f"the logits of {whose} are not finite for prompt {number}: the weights of the "
                "base or of the adapter are damaged; nothing was written"
            )
        if each.max() == each.min():
            raise MergeError(
                f"the logits of {whose} are all {float(each.max()):g} for prompt {number}, so that "
                "comparing them proves nothing: the weights of the base or of the adapter are "
                "damaged; nothing was written"
            )


def _check_finite(model: PreTrainedModel, dtype: str) -> None:
    """Name the weights, adapted or not, that are not finite in the dtype they are stored in."""
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not torch.isfinite(parameter).all()
    ]
    if broken:
        raise MergeError(
            f"{some_of(broken)}: not finite in {dtype}; the base model is damaged, or the dtype's "
            "range too small: try --dtype float32. Nothing was written"
        )


def _unseen(change: float, tolerance: float) -> tuple[str, ...]:
    """Say so where the proof could not tell the merged model from the base."""
    if change == 0:
        return (
            "the adapter changes nothing: on all prompts its logits are those of its base model. "
            "Was it trained?",
        )
    if change <= tolerance:
        return (
            f"the adapter changes the logits of its base by at most {change:.3g}, which is within "
            f"the tolerance {tolerance:.3g}: the proof could not tell the merged model from the "
            "base model; use --dtype float32 or a smaller --tolerance",
        )
    return ()


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
