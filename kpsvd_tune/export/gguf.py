"""An adapter and its base become one GGUF file, proved by what transformers reads of it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.data.encode.encoder import answer_ends
from kpsvd_tune.errors import ExportError
from kpsvd_tune.events import Events
from kpsvd_tune.export.about_base import about_base
from kpsvd_tune.export.gguf_model import (
    Entry,
    GgufModel,
    check_configuration,
    check_rope,
    check_vocabulary,
    choose_file,
    names_in_file,
)
from kpsvd_tune.export.gguf_writing import NewTensor, plan_tensors, write_gguf
from kpsvd_tune.linalg import kron_sum_rows
from kpsvd_tune.merge.changes import terms_of
from kpsvd_tune.merge.loaded import merge_into
from kpsvd_tune.merge.merging import KEPT_SHARE_WARNING
from kpsvd_tune.merge.proof import PROMPTS, TOLERANCES, difference, logits
from kpsvd_tune.merge.update import Term
from kpsvd_tune.models import (
    ModelSource,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.models.source import base_of
from kpsvd_tune.report.card import CARD, gguf_card
from kpsvd_tune.report.results import GgufReport
from kpsvd_tune.runs.described import training_of
from kpsvd_tune.runs.find import Found, compare_files, load
from kpsvd_tune.storage.disk import check_room
from kpsvd_tune.storage.durable import write_file, write_folder
from kpsvd_tune.storage.hashes import file_hash
from kpsvd_tune.storage.json_files import to_json

NAME = "model.gguf"  # of the file in the output folder
# What ends a turn of a chat, beside the end token.
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
# Entries whose update is computed at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class GgufSettings:
    """How an adapter is exported."""

    dtype: str = "float16"  # of the matrices: float32, float16, bfloat16 or q8_0
    # A GGUF file of the same base, whose metadata are taken where the base itself is none.
    metadata_from: Path | None = None
    allow_other_base: bool = False


def export_gguf(
    found: Found, source: ModelSource, output: Path, settings: GgufSettings, events: Events
) -> GgufReport:
    """Merge an adapter into its base, write that as GGUF, read the file and compare.

    The folder `output`, missing or empty so far, appears under its name only when it is complete
    and proved: NAME, export_report.json and a model card. The base is held in float32.

    Raises:
        InputError: The base is no GGUF file, and none is named whose metadata could be taken.
        ModelError: The file named is of another model, or of one that is not known here.
        ExportError: What transformers reads of the new file is not what was meant.
        ResourceError: The disk has no room.
    """
    folder = found.adapter
    assert folder is not None
    training = training_of(folder)
    file = GgufModel(choose_file(source, settings.metadata_from))
    is_base = source.kind == "gguf"
    if not is_base:
        # Before the base is loaded, which takes longer.
        of_file = load_skeleton(resolve_model(str(file.path))).config
        check_configuration(file, load_skeleton(source).config, of_file)
    events.stage(f"loading {source.path}")
    loaded = load(
        found, source, "float32", allow_other_base=settings.allow_other_base, in_full=True
    )
    model, tokenizer, other_base = loaded.model, loaded.tokenizer, loaded.other_base
    told = about_base(loaded)
    if other_base is None:
        compare_files(model, source, events)
    check_vocabulary(file, tokenizer, load_tokenizer(source))

    events.stage("computing the logits of the adapter on its base")
    prompts = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in PROMPTS]
    model.eval()
    of_adapter = logits(model, prompts, "the adapter on its base", ExportError)
    with model.disable_adapter():
        of_base = logits(model, prompts, "the base model", ExportError)
    change, _ = difference(of_base, of_adapter)
    del of_base

    events.stage("merging")
    (adapter,) = model.active_adapters
    terms = {name: terms_of([(1.0, each, adapter)]) for name, each in kpsvd_layers(model, adapter)}
    plain: Any
    plain, _ = merge_into(model, torch.float32)
    del loaded, model
    gc.collect()
    if not is_base:
        check_rope(file, plain)
    names = names_in_file(file, plain)
    plan = plan_tensors(file, names, plain, settings.dtype, is_base)
    metadata, notes = _changed_metadata(file, tokenizer)

    with write_folder(output) as partial:
        check_room(sum(each.num_bytes for each in plan), output, "the GGUF file")
        events.stage(f"writing {output / NAME}")
        kept = _write(partial / NAME, file, plan, plain, settings.dtype, metadata, terms, events)
        of_rounded = logits(plain, prompts, "the rounded weights", ExportError)
        config = plain.config
        del plain
        gc.collect()
        events.stage("reading it with transformers and comparing")
        of_file_logits = _read_back(partial, None if is_base else config, prompts)
        smallest = min(float(each.abs().max()) for each in of_adapter)
        report = GgufReport(
            adapter=str(folder),
            output=str(output),
            file=NAME,
            dtype=settings.dtype,
            architecture=file.architecture,
            metadata_from=file.path.name,
            num_tensors=len(plan),
            num_copied=sum(each.is_copied for each in plan),
            num_bytes=(partial / NAME).stat().st_size,
            kept_share=kept,
            min_kept_share=min(kept.values(), default=1.0),
            max_logit_difference=difference(of_adapter, of_file_logits)[0],
            top1_agreement=difference(of_adapter, of_file_logits)[1],
            file_logit_difference=difference(of_rounded, of_file_logits)[0],
            adapter_logit_difference=change,
            tolerance=TOLERANCES[settings.dtype] * smallest
            if settings.dtype in TOLERANCES
            else None,
            num_positions=sum(each.shape[1] for each in prompts),
            prompts=PROMPTS,
            notes=notes,
            sha256=file_hash(partial / NAME),
        )
        _check_proof(report, TOLERANCES["float32"] * smallest)
        report = replace(report, warnings=_warnings(report, file, is_base, told))
        write_file(partial / "export_report.json", to_json(report.to_dict()))
        card = gguf_card(report, base_of(source, found.base), training)
        write_file(partial / CARD, card.encode())
    return report


def _write(
    path: Path,
    file: GgufModel,
    plan: Sequence[NewTensor],
    model: Any,
    dtype: str,
    metadata: Mapping[str, Entry],
    terms: Mapping[str, Sequence[Term]],
    events: Events,
) -> dict[str, float]:
    """Write the file; the share of each layer's update that the rounding left."""
    kept: dict[str, float] = {}

    def measure(key: str, merged: Tensor, rounded: Tensor) -> None:
        layer = key.removesuffix(".weight")
        if layer in terms:
            kept[layer] = kept_share(terms[layer], merged, rounded)

    def advance(done: int, total: int) -> None:
        events.advance("tensors", done, total)

    write_gguf(path, file, plan, model, dtype, metadata, measure, advance)
    events.end_progress()
    return {name: kept.get(name, 1.0) for name in terms}


@torch.no_grad()
def kept_share(terms: Sequence[Term], merged: Tensor, rounded: Tensor) -> float:
    """<W' - W, Delta> / ||Delta||^2 with W' the rounded weight; 1 where nothing is added.

    Args:
        terms: The parts of Delta.
        merged: W + Delta, (out, in).
        rounded: W', of the same size.
    """
    overlap = norm = 0.0
    step = max(1, _BLOCK // merged.shape[1])
    for begin in range(0, len(merged), step):
        end = min(len(merged), begin + step)
        delta = torch.zeros(end - begin, merged.shape[1], dtype=torch.float64)
        for term in terms:
            delta += term.weight * kron_sum_rows(term.left, term.right, begin, end)
        lost = rounded[begin:end].double() - merged[begin:end].double()
        overlap += float(((lost + delta) * delta).sum())
        norm += float(delta.square().sum())
    return overlap / norm if norm > 0 else 1.0


def _changed_metadata(
    file: GgufModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """What the training changed of the metadata: the chat template, and what ends an answer."""
    from gguf import GGUFValueType

    own, changed, notes = file.metadata(), {}, []
    template: Any = tokenizer.chat_template
    before = own.get("tokenizer.chat_template")
    if isinstance(template, str) and (before is None or before.value != template.encode()):
        changed["tokenizer.chat_template"] = Entry(template.encode(), GGUFValueType.STRING, None)
        notes.append("The chat template is the one that the adapter was trained with.")
    eos: Any = tokenizer.eos_token_id
    if isinstance(eos, int) and eos != file.eos_token_id:
        changed["tokenizer.ggml.eos_token_id"] = Entry(eos, GGUFValueType.UINT32, None)
        notes.append(
            f"Answers end with the token {tokenizer.eos_token}, as the adapter was trained; the "
            f"base's file names the token number {file.eos_token_id}."
        )
    of_turn = own.get(_END_OF_TURN)
    others = [each for each in answer_ends(tokenizer) if each != eos]
    if others and (of_turn is None or of_turn.value != others[0]):
        changed[_END_OF_TURN] = Entry(others[0], GGUFValueType.UINT32, None)
        name = tokenizer.convert_ids_to_tokens(others[0])
        notes.append(f"Answers of chats end with the token {name}, which the file names too.")
    return changed, tuple(notes)


def _read_back(folder: Path, config: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of the new file as transformers reads it, with a given configuration or its own.

    Raises:
        ExportError: It cannot be read whole.
    """
    options: dict[str, Any] = {} if config is None else {"config": config}
    load_file: Any = AutoModelForCausalLM.from_pretrained
    model, info = load_file(
        folder,
        gguf_file=NAME,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        raise ExportError(
            f"transformers finds no values for {len(missing)} weights in the file that was "
            f"written, the first is {missing[0]}; nothing was kept. Merge, and convert with "
            "llama.cpp: docs/serving.md"
        )
    return logits(model.eval(), prompts, "the GGUF file", ExportError)


def _check_proof(report: GgufReport, exact: float) -> None:
    """Refuse a file that is not what was meant (ExportError)."""
    checks = [(report.file_logit_difference, exact, "the weights that were written")]
    if report.tolerance is not None:
        checks.append((report.max_logit_difference, report.tolerance, "the adapter on its base"))
    for found, tolerance, what in checks:
        # Written so that a difference that is not a number fails.
        if not found <= tolerance:
            raise ExportError(
                f"the GGUF file gives other logits in transformers than {what}: the largest "
                f"difference is {found:.3g}, and at most {tolerance:.3g} is expected; nothing was "
                "kept. Merge, and convert with llama.cpp: docs/serving.md"
            )


def _warnings(
    report: GgufReport, file: GgufModel, is_base: bool, told: Sequence[str]
) -> tuple[str, ...]:
    found = [*told]
    change, far = report.adapter_logit_difference, report.max_logit_difference
    if change == 0:
        found.append(
            "the adapter changes nothing: on all prompts its logits are those of its base model. "
            "Was it trained?"
        )
    elif far >= change:
        found.append(
            f"rounding to {report.dtype} changes a logit by up to {far:.3g}, and the adapter by "
            f"{change:.3g}: little of the training may be left; use --dtype float16 or float32"
        )
    lost = [name for name, share in report.kept_share.items() if share < KEPT_SHARE_WARNING]
    if lost:
        worst = min(lost, key=report.kept_share.__getitem__)
        found.append(
            f"rounding to {report.dtype} lost part of the update in {len(lost)} of "
            f"{len(report.kept_share)} layers (least kept: "
            f"{100 * report.kept_share[worst]:.0f} % in {worst}); use --dtype float16 or float32"
        )
    if is_base and file.rescales_rope:
        found.append(
            f"{file.path.name} rescales the rotary embedding, which llama.cpp does and "
            "transformers, with which the adapter was trained on this file, does not: its answers "
            "in llama.cpp are not those of the training"
        )
    return tuple(found)
