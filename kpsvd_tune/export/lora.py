"""An adapter becomes a plain LoRA: exact where its update has a rank that LoRA can hold."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.targets import LINEAR, modules_by_name
from kpsvd_tune.data.encode.encoder import answer_ends
from kpsvd_tune.errors import AdapterError, ExportError, InputError
from kpsvd_tune.events import Events
from kpsvd_tune.export.about_base import about_base
from kpsvd_tune.export.low_rank import LowRank, low_rank
from kpsvd_tune.export.proof import plain_logits
from kpsvd_tune.merge.proof import PROMPTS, TOLERANCES, difference, logits
from kpsvd_tune.models import ModelSource, base_of, load_skeleton
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.report.card import CARD, lora_card
from kpsvd_tune.report.results import LoraReport
from kpsvd_tune.runs.adapter_folder import CONFIG, WEIGHTS
from kpsvd_tune.runs.described import training_of
from kpsvd_tune.runs.find import Found, Loaded, compare_files, load
from kpsvd_tune.storage.commit import seal
from kpsvd_tune.storage.durable import write_file, write_folder
from kpsvd_tune.storage.json_files import to_json
from kpsvd_tune.units import percent

# What vLLM's --max-lora-rank can be set to.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# A LoRA that holds a smaller share of the update's energy is written only where that is asked for.
LEAST_SHARE = 0.99
_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter is exported."""

    max_rank: int = 64  # the widest LoRA that may be written, one of RANKS
    dtype: str = "float32"  # of the stored matrices
    is_lossy: bool = False  # write one that holds less than LEAST_SHARE of the update too
    allow_other_base: bool = False


@dataclass(frozen=True)
class Update:
    """What all layers' updates are in the form of LoRA."""

    layers: Mapping[str, LowRank]
    rank: int  # of the LoRA, the same in every layer
    is_exact: bool  # whether it holds every update to the rounding of float32

    @property
    def share(self) -> float:
        """The share of the energy of all updates together that the LoRA holds."""
        return _share(self.layers.values(), self.rank)

    @property
    def worst(self) -> str:
        """The layer of whose update the LoRA holds the least."""
        return min(self.layers, key=lambda name: self.layers[name].kept(self.rank))


def check_rank(rank: int) -> None:
    """Refuse a width that servers do not know (InputError)."""
    if rank not in RANKS:
        raise InputError(
            f"--max-rank {rank}: expected one of {', '.join(map(str, RANKS))}, the widths that "
            "servers of LoRA can be set to"
        )


def export_lora(
    found: Found, source: ModelSource, output: Path, settings: LoraSettings, events: Events
) -> LoraReport:
    """Write an adapter as a LoRA of one rank, load that with plain PEFT and compare.

    The folder `output`, missing or empty so far, appears under its name only when it is complete
    and proved. Its rank is the smallest of RANKS that holds every update exactly, or the largest
    allowed, with zeros where a layer needs less, and alpha is the rank: servers read one of each.

    Raises:
        AdapterError: LoRA cannot hold a layer, or too little of the update in the rank allowed.
        ExportError: What plain PEFT computes with the LoRA is not what was meant.
        ResourceError: The disk has no room, or the memory none for a second base model.
    """
    check_rank(settings.max_rank)
    folder = found.adapter
    assert folder is not None
    training = training_of(folder)
    _check_rotations(source)
    events.stage(f"loading {source.path}")
    loaded = load(
        found, source, "float32", allow_other_base=settings.allow_other_base, in_full=True
    )
    model, tokenizer, other_base = loaded.model, loaded.tokenizer, loaded.other_base
    told = _told_of_base(loaded, source)
    if other_base is None:
        compare_files(model, source, events)
    _check_layers(model)
    events.stage("taking the updates apart")
    update = fitted(_decomposed(model, settings.max_rank, events), settings.max_rank)
    if not settings.is_lossy:
        check_share(update, settings.max_rank)
    factors = _factors(update, DTYPES[settings.dtype])

    events.stage("computing the logits of the adapter on its base")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    batches = [torch.tensor([ids]) for ids in prompts]
    model.eval()
    of_adapter = logits(model, batches, "the adapter on its base", ExportError)
    with model.disable_adapter():
        of_base = logits(model, batches, "the base model", ExportError)
    change, _ = difference(of_base, of_adapter)
    _replace_updates(model, factors)
    of_lora = logits(model, batches, "the LoRA on its base", ExportError)
    config = _config(model, source, list(factors), update.rank)
    unknown = _unknown_ends(model, tokenizer)
    # The process that is started next needs the room.
    del loaded, model, of_base
    gc.collect()

    smallest = min(float(each.abs().max()) for each in of_adapter)
    exact_tolerance = TOLERANCES["float32"] * smallest
    tolerance = TOLERANCES[settings.dtype] * smallest if update.is_exact else None
    with write_folder(output) as partial:
        events.stage(f"writing {output}")
        write_file(partial / CONFIG, _config_file(config))
        tensors = {**_named(factors), **_others(folder)}
        write_file(partial / WEIGHTS, save(tensors, {"format": "pt"}))
        tokenizer.save_pretrained(partial)
        events.stage("loading it with plain PEFT in a process of its own and comparing")
        plain = plain_logits(partial, source, prompts, "the LoRA in plain PEFT")
        of_file, _ = difference(of_lora, plain)
        largest, agreement = difference(of_adapter, plain)
        _check_proof(of_file, exact_tolerance, "the LoRA that was computed")
        if tolerance is not None:
            _check_proof(largest, tolerance, "the adapter on its base")
        report = LoraReport(
            adapter=str(folder),
            output=str(output),
            dtype=settings.dtype,
            rank=update.rank,
            exact=update.is_exact,
            energy=update.share,
            worst_layer=update.worst,
            worst_energy=update.layers[update.worst].kept(update.rank),
            layer_energies={name: each.kept(update.rank) for name, each in update.layers.items()},
            layer_ranks={name: each.exact_rank for name, each in update.layers.items()},
            max_logit_difference=largest,
            file_logit_difference=of_file,
            adapter_logit_difference=change,
            tolerance=tolerance,
            top1_agreement=agreement,
            num_positions=sum(map(len, prompts)),
            prompts=PROMPTS,
            warnings=_warnings(config, change, told, unknown),
        )
        write_file(partial / "export_report.json", to_json(report.to_dict()))
        card = lora_card(report, base_of(source, found.base), training)
        write_file(partial / CARD, card.encode())
        seal(partial, "lora", but=CARD)
    return report


def fitted(layers: Mapping[str, LowRank], max_rank: int) -> Update:
    """Choose the rank: the smallest of RANKS that is exact everywhere, else ``max_rank``."""
    needed = [each.exact_rank for each in layers.values()]
    most = max((each for each in needed if each is not None), default=0)
    if None in needed or most > max_rank:
        return Update(layers, max_rank, is_exact=False)
    return Update(layers, next(rank for rank in RANKS if rank >= most), is_exact=True)


def check_share(update: Update, max_rank: int) -> None:
    """Refuse a LoRA that holds less than LEAST_SHARE of the update (AdapterError)."""
    if update.share >= LEAST_SHARE:
        return
    worst = update.layers[update.worst].kept(update.rank)
    enough = [
        rank
        for rank in RANKS
        if rank > max_rank and _share(update.layers.values(), rank) >= LEAST_SHARE
    ]
    wider = f"--max-rank {enough[0]} holds that much; or " if enough else ""
    raise AdapterError(
        f"a LoRA of rank {update.rank} holds {percent(update.share)} of the energy of this "
        f"adapter's update (of {update.worst}, the worst layer, {percent(worst)}), and at least "
        f"{100 * LEAST_SHARE:g} % is expected: {wider}serve the merged model (kpsvd-tune merge), "
        "which holds all of it; or write this LoRA nevertheless with --lossy. Nothing was written"
    )


def _share(layers: Iterable[LowRank], rank: int) -> float:
    found = list(layers)
    total = sum(each.total for each in found)
    return sum(each.kept(rank) * each.total for each in found) / total if total else 1.0


def _check_layers(model: PeftModel) -> None:
    """Refuse layers that PEFT's LoRA does not take, by name."""
    refused = [
        f"  {name}: a {type(base).__name__}"
        for name, layer in kpsvd_layers(model, _ADAPTER)
        if not isinstance(base := layer.get_base_layer(), LINEAR) or base.weight.ndim != 2
    ]
    if refused:
        raise AdapterError(
            "plain LoRA holds updates of nn.Linear and Conv1D alone, and this adapter has others:\n"
            + "\n".join(refused[:6])
            + "\nServe the merged model instead: kpsvd-tune merge"
        )


def _decomposed(model: PeftModel, most: int, events: Events) -> dict[str, LowRank]:
    layers = list(kpsvd_layers(model, _ADAPTER))
    found = {}
    for number, (name, layer) in enumerate(layers, 1):
        # In float64 the sums of offsets and frozen factors are exact.
        tensors = [each.detach().double() for each in layer.tensors(_ADAPTER)]
        left, right = layer.kpsvd_form[_ADAPTER].terms(tensors)
        found[name] = low_rank(left, right, most)
        events.advance("layers", number, len(layers))
    events.end_progress()
    return found


def _factors(update: Update, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of every layer, with zeros beyond what it needs."""
    factors = {}
    for name, layer in update.layers.items():
        missing = max(0, update.rank - len(layer.right))
        a = nn.functional.pad(layer.right[: update.rank], (0, 0, 0, missing)).to(dtype)
        b = nn.functional.pad(layer.left[:, : update.rank], (0, missing)).to(dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(
                f"{name}: its LoRA is not finite in {dtype}: the adapter is broken, or the dtype's "
                "range too small; try --dtype float32"
            )
        factors[name] = (a.contiguous(), b.contiguous())
    return factors


@torch.no_grad()
def _replace_updates(model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put the LoRA into the base's weights and take the adapter's own update out."""
    for name, layer in kpsvd_layers(model, _ADAPTER):
        a, b = (each.float() for each in factors[name])
        base: Any = layer.get_base_layer()
        base.weight += (b @ a).T if isinstance(base, Conv1D) else b @ a
        for trained in layer.trained(_ADAPTER):
            trained.zero_()


def _config(model: PeftModel, source: ModelSource, names: Sequence[str], rank: int) -> LoraConfig:
    own: Any = model.peft_config[_ADAPTER]
    modules = modules_by_name(model.get_base_model())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(names, list(modules)),
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in names),
        modules_to_save=own.modules_to_save,
        trainable_token_indices=own.trainable_token_indices,
        task_type=own.task_type or "CAUSAL_LM",
        base_model_name_or_path=source.path if source.kind == "hub" else str(source.folder),
        revision=source.revision if source.kind == "hub" else None,
        inference_mode=True,
    )


def _config_file(config: LoraConfig) -> bytes:
    """The configuration as PEFT saves it, with sets in one order, so that equal ones are equal."""
    fields = config.to_dict()  # type: ignore[no-untyped-call]
    return to_json({k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()})


def _targets(names: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest way to say which modules: last parts of names, whole names, or a pattern."""

    def matched(entries: Iterable[str]) -> set[str]:
        ends = tuple(f".{entry}" for entry in entries)
        return {name for name in modules if f".{name}".endswith(ends)}

    last = sorted({name.rpartition(".")[2] for name in names})
    for entries in (last, sorted(names)):
        if matched(entries) == set(names):
            return entries
    return "|".join(map(re.escape, sorted(names)))


def _named(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in factors.items():
        named[f"base_model.model.{name}.lora_A.weight"] = a
        named[f"base_model.model.{name}.lora_B.weight"] = b
    return named


def _others(folder: Path) -> dict[str, Tensor]:
    """What the adapter's file holds beside factors: modules and rows that are saved whole."""
    return {key: value for key, value in load_file(folder / WEIGHTS).items() if "kpsvd_" not in key}


def _check_proof(found: float, tolerance: float, what: str) -> None:
    # Written so that a difference that is not a number fails.
    if not found <= tolerance:
        raise ExportError(
            f"plain PEFT computes something else with the LoRA than {what}: the largest logit "
            f"difference is {found:.3g}, and at most {tolerance:.3g} is expected; nothing was "
            "written. Serve the merged model instead: kpsvd-tune merge"
        )


def _unknown_ends(model: PeftModel, tokenizer: Any) -> list[str]:
    """The tokens that answers end with and the base does not stop at by itself."""
    base: Any = model.get_base_model()
    settings = getattr(base, "generation_config", None) or base.config
    known = settings.eos_token_id
    held = known if isinstance(known, list) else [known]
    unknown = [each for each in answer_ends(tokenizer) if each not in held]
    return [str(each) for each in tokenizer.convert_ids_to_tokens(unknown)]


def _check_rotations(source: ModelSource) -> None:
    """Refuse a GGUF base that no program but this one loads as the model that it is."""
    rope = getattr(load_skeleton(source).config, "rope_parameters", None) or {}
    if source.kind == "gguf" and rope.get("rope_type") in ("linear", "yarn"):
        raise ExportError(
            f"--to lora: {source.path} rescales its rotary embedding ({rope['rope_type']}), which "
            "transformers does not read from GGUF, so that plain PEFT would put the LoRA on "
            "another model; expected the base's folder with safetensors (--base), or serve the "
            "merged model: kpsvd-tune merge"
        )


def _told_of_base(loaded: Loaded, source: ModelSource) -> list[str]:
    """What is to be said of the base that the LoRA was compared on."""
    found = about_base(loaded)
    if getattr(load_skeleton(source).config, "quantization_config", None) is not None:
        found.append(
            "the base is stored quantised, and the LoRA was compared on its dequantised weights; "
            "on the quantised ones the library that computes with them rounds in its own way"
        )
    return found


def _warnings(
    config: LoraConfig, change: float, told: Sequence[str], unknown_ends: Sequence[str]
) -> tuple[str, ...]:
    found = [*told]
    if change == 0:
        found.append(
            "the adapter changes nothing: on all prompts its logits are those of its base model. "
            "Was it trained?"
        )
    if config.modules_to_save or config.trainable_token_indices:
        found.append(
            "the adapter has modules or rows of the embedding that are saved whole; PEFT takes "
            "them, vLLM and llama.cpp do not: serve the merged model there"
        )
    if unknown_ends:
        found.append(
            f"answers end with {' and '.join(unknown_ends)}, at which the base does not stop by "
            "its generation_config.json, and a LoRA cannot change that: name it to the server as a "
            "stop token (vLLM: stop_token_ids), or serve the merged model, which names it itself"
        )
    return tuple(found)
