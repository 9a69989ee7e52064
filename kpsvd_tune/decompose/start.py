"""The model that training starts from: the base model with an adapter of decomposed factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor

from kpsvd_tune.adapter import KpsvdConfig, load_factors
from kpsvd_tune.decompose.decomposition import Decomposition
from kpsvd_tune.models import ModelSource, load_model
from kpsvd_tune.models.streamed import load_streamed, streamed_weights
from kpsvd_tune.recipe import Recipe

Note = Callable[[str], None]  # gets a sentence for the user


def adapt(
    recipe: Recipe,
    source: ModelSource,
    decomposition: Decomposition,
    base_files: Mapping[str, str] | None,
    base: Any = None,
    is_shared: bool = False,
    note: Note | None = None,
) -> PeftModel:
    """Load the base model and inject the adapter with the factors of the decomposition.

    Args:
        recipe: Its model and adapter sections.
        source: The base model.
        decomposition: Layers and factors.
        base_files: Hashes of the base's files, where the adapter is to know them.
        base: The base model, where it is loaded already.
        is_shared: As of :func:`load_base`.
        note: As of :func:`load_base`.
    """
    if base is None:
        base = load_base(source, recipe, is_shared=is_shared, note=note)
    adapter = recipe.adapter
    shape = adapter.factor_shape
    config = KpsvdConfig(
        task_type="CAUSAL_LM",
        target_modules=_plain(adapter.target_modules),
        exclude_modules=_plain(adapter.exclude_modules),
        form=adapter.form,
        factor_size=adapter.factor_size,
        frozen_seed=decomposition.report.frozen_seed,
        factor_shape=shape if isinstance(shape, str) else {"n": shape["n"], "p": shape["p"]},
        rank=adapter.rank.model_dump(exclude={"overrides", "tolerance"}),
        dropout=adapter.dropout,
        modules_to_save=list(adapter.modules_to_save) or None,
        path=adapter.path,
        seed=recipe.train.seed,
        layers=decomposition.layers,
        base_files=dict(base_files) if base_files is not None else None,
    )
    model = get_peft_model(base, config)
    load_factors(model, decomposition.factors, fetch=fetching(model))
    # What a user can load again: the recipe's words, with a local path made independent of
    # the folder the command ran in.
    model.peft_config["default"].base_model_name_or_path = base_name(recipe.model.path)
    return model


def load_base(
    source: ModelSource, recipe: Recipe, *, is_shared: bool = False, note: Note | None = None
) -> Any:
    """Load the base model as a recipe asks for it.

    With `is_shared` processes are to share out its weights: it comes on the meta device, and
    :func:`kpsvd_tune.models.streamed.streamed_weights` tells what its weights are read by. Where
    its files cannot be read so it comes whole, and `note` is told why.
    """
    wanted = recipe.model
    if is_shared:
        found = load_streamed(source, wanted.dtype, wanted.attn_implementation)
        if not isinstance(found, str):
            return found
        if note is not None:
            note(
                f"every process loads the whole of {wanted.path} before the weights are shared "
                f"out, for {found}"
            )
    return load_model(source, wanted.dtype, wanted.attn_implementation, wanted.quantization)


def fetching(model: Any) -> Callable[[str], Tensor] | None:
    """What reads the weights of a base that is on the meta device; None where they are here."""
    weights = streamed_weights(model)
    return None if weights is None else weights.read


def base_name(path: str) -> str:
    """How an adapter names its base: as the recipe does, local paths made absolute."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _plain(names: Any) -> Any:
    return list(names) if isinstance(names, (list, tuple)) else names
