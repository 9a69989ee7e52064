"""What training starts from: the factors of `adapter.init`, and the base model with them on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kpsvd_tune.adapter import KpsvdConfig, load_factors
from kpsvd_tune.decompose.decomposition import Decomposition, decompose, layers_of
from kpsvd_tune.decompose.progress import Progress
from kpsvd_tune.models import ModelSource, load_model
from kpsvd_tune.recipe import Recipe


def starting_factors(
    recipe: Recipe,
    source: ModelSource,
    device: torch.device,
    progress: Callable[[Progress], None] | None = None,
    *,
    seed: int = 0,
) -> Decomposition:
    """Decompose, choose the ranks, and give the factors of `adapter.init`.

    Whatever the start, the k-th term of a layer has the norms sqrt(sigma_k) of the weight's own
    k-th term in both factors, so that starts differ in directions and in nothing else.

    Args:
        recipe: Its adapter and train sections.
        source: The base model.
        device: Where to compute.
        progress: Called after each matrix.
        seed: Seeds the truncated decomposition.

    Returns:
        Report, layers for ``KpsvdConfig`` and factors.
    """
    decomposition = decompose(
        source, recipe.adapter, seed=seed, device=str(device), progress=progress
    )
    if recipe.adapter.init == "weight":
        return decomposition
    return _random(decomposition, recipe.train.seed)


def adapt(
    recipe: Recipe,
    source: ModelSource,
    layers: Mapping[str, Mapping[str, Any]],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base_files: Mapping[str, str] | None,
) -> PeftModel:
    """Load the base model and inject the adapter with the factors of the decomposition."""
    base = load_model(source, recipe.model.dtype, recipe.model.attn_implementation)
    adapter = recipe.adapter
    shape = adapter.factor_shape
    config = KpsvdConfig(
        task_type="CAUSAL_LM",
        target_modules=_plain(adapter.target_modules),
        exclude_modules=_plain(adapter.exclude_modules),
        factor_shape=shape if isinstance(shape, str) else {"n": shape["n"], "p": shape["p"]},
        rank=adapter.rank.model_dump(exclude={"overrides", "tolerance"}),
        dropout=adapter.dropout,
        modules_to_save=list(adapter.modules_to_save) or None,
        path=adapter.path,
        seed=recipe.train.seed,
        layers={name: dict(layer) for name, layer in layers.items()},
        base_files=dict(base_files) if base_files is not None else None,
    )
    model = get_peft_model(base, config)
    load_factors(model, factors)
    # What a user can load again: the recipe's words, with a local path made independent of
    # the folder the command ran in.
    model.peft_config["default"].base_model_name_or_path = base_name(recipe.model.path)
    return model


def base_name(path: str) -> str:
    """How an adapter names its base: as the recipe does, local paths made absolute."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _plain(names: Any) -> Any:
    return list(names) if isinstance(names, (list, tuple)) else names


def _random(decomposition: Decomposition, seed: int) -> Decomposition:
    """Gaussian directions, of the norms that the weight's terms have."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (left, right) in decomposition.factors.items():
        digest = hashlib.sha256(f"start {seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        factors[name] = (_drawn_like(left, generator), _drawn_like(right, generator))
    layers = layers_of(decomposition.report, has_fingerprints=False)
    return replace(decomposition, layers=layers, factors=factors)


def _drawn_like(factor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(factor.shape, generator=generator)
    wanted, given = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (factor, drawn))
    scale: Tensor = (wanted / given)[:, None, None]
    return drawn * scale
