"""The adapter folder: saved whole with its model card, and checked before PEFT reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import AdapterError, CheckpointError
from kpsvd_tune.report.card import CARD, with_scores
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.commit import MANIFEST, check_sealed, seal
from kpsvd_tune.storage.hashes import file_hash
from kpsvd_tune.storage.json_files import check_regular, check_types, read_json
from kpsvd_tune.storage.patterns import check_patterns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# No matrix of any model is larger; the product of two such sizes is still a number of torch.
_Size = Annotated[int, Field(ge=1, le=2**31)]
# What a manifest calls the folder, which may have any name.
_KIND = "adapter"


class _Layer(BaseModel):
    """One adapted layer: the sizes of its factors, and the base's product with their first term."""

    model_config = ConfigDict(strict=True)
    shape: Annotated[list[_Size], Field(min_length=4, max_length=4)]
    rank: _Size
    fingerprint: float | None = None
    norm: Annotated[float, Field(ge=0)] | None = None


class AdapterFile(BaseModel):
    """The keys that our commands and PEFT's loading read; others are PEFT's to judge."""

    model_config = ConfigDict(strict=True, extra="allow")
    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers: dict[str, _Layer] | None = None
    base_files: dict[str, str] | None = None
    base_config: dict[str, Any] | None = None
    base_tensors: dict[str, float] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    path: str = "auto"
    seed: int = 0
    form: str = "both"
    factor_size: int | list[int] | None = None
    frozen_seed: int | None = None
    rank: int | dict[str, Any] = Field(default_factory=dict)
    rank_pattern: dict[str, Any] = Field(default_factory=dict)


def read_adapter_config(folder: Path) -> AdapterFile:
    """Read the configuration of a KPSVD adapter; AdapterError for any other file."""
    file = folder / CONFIG
    cure = "expected the file that was saved with the adapter's weights"
    content = read_json(file, error=AdapterError, cure=cure)
    # Said first: the keys of another method have another form.
    if content.get("peft_type") != "KPSVD":
        raise AdapterError(
            f"{folder} is a {str(content.get('peft_type'))[:40]} adapter: expected one of KPSVD"
        )
    try:
        found: AdapterFile = check_types(content, AdapterFile)
    except ValueError as error:
        raise AdapterError(f"{file} {error}; {cure}") from error
    return found


def check_adapter(folder: Path, names: list[str]) -> None:
    """Refuse an adapter that is not as saved, or whose patterns take for ever on these modules."""
    check_seal(folder)
    config = read_adapter_config(folder)
    patterns = {
        f"{folder / CONFIG}: {key}": getattr(config, key)
        for key in ("target_modules", "exclude_modules")
    }
    try:
        check_patterns(patterns, names)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    try:
        check_regular(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} holds no {WEIGHTS}, the weights of the adapter") from error
    except OSError as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's configuration and weights."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def save_adapter(
    model: PeftModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Write the adapter folder; it appears whole under its name, and replaces one that is there.

    `weights` are the trained tensors by name, whole where the model holds only this process's
    part. ResourceError: the disk refused; an adapter that was there stays.
    """
    with durable.write_folder(folder, replace=True) as aside:
        # No embedding is ever adapted; "auto" would ask the hub about the base model.
        model.save_pretrained(
            str(aside), state_dict={**model.state_dict(), **weights}, save_embedding_layers=False
        )
        tokenizer.save_pretrained(aside)  # PEFT's users expect it there
        (aside / CARD).write_text(card, encoding="utf-8")
        seal(aside, _KIND, but=CARD)  # the card takes scores


def adapter_hash(folder: Path) -> str:
    """The sha256 of an adapter's weights, by which a run knows the one it began with or saved."""
    return file_hash(folder / WEIGHTS)


def check_own(folder: Path, saved: Any) -> None:
    """Refuse a run's adapter that is not the one which the run has saved.

    `saved` is the hash in run.json, None in runs of older versions. AdapterError: a file is
    another, or all are those of another run.
    """
    check_seal(folder)
    if saved is not None and (folder / WEIGHTS).is_file() and adapter_hash(folder) != saved:
        raise AdapterError(
            f"{folder} holds another adapter than its run has saved: by run.json the weights are "
            f"others. Was it copied here? Move {folder} away, where it can be used by its own "
            "path, and call `kpsvd-tune train` as before: it makes the run's own anew from its "
            "last checkpoint"
        )


def check_seal(folder: Path) -> None:
    """Refuse an adapter with a changed file; those without a manifest (PEFT's, old ones) pass."""
    try:
        check_sealed(folder, _KIND)
    except CheckpointError as error:
        raise AdapterError(
            f"{error}; restore the adapter from a copy. If the change was meant, remove "
            f"{folder / MANIFEST}, by which it is noticed"
        ) from error


def update_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Bring a card's evaluation section up to date from results.json; without a card do nothing."""
    card = folder / CARD
    if not card.is_file():
        return
    # A card is the user's to edit; bytes of another encoding stay as they are.
    text = with_scores(card.read_text(encoding="utf-8", errors="surrogateescape"), results)
    durable.replace_file(card, text.encode(errors="surrogateescape"))
