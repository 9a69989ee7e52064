"""What training starts from: the terms of the weights, of the loss's gradient, or random ones."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.data import StatelessSampler, TokenizedRow
from kpsvd_tune.decompose import Decomposition, decompose, layers_of
from kpsvd_tune.decompose.progress import report_decomposition
from kpsvd_tune.decompose.ranks import rank_report
from kpsvd_tune.decompose.tasks import Finished
from kpsvd_tune.events import Events
from kpsvd_tune.linalg import KPSVD, KroneckerShape, kpsvd
from kpsvd_tune.models import ModelSource, load_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.training.loss import make_micro_batch
from kpsvd_tune.training.mean_gradient import mean_gradients


def starting_factors(
    recipe: Recipe,
    source: ModelSource,
    rows: Sequence[TokenizedRow],
    pad_token_id: int,
    device: torch.device,
    events: Events,
    *,
    seed: int = 0,
) -> Decomposition:
    """Decompose, choose the ranks, and give the factors of `adapter.init`.

    Whatever the start, the k-th term of a layer has the norms sqrt(sigma_k) of the weight's own
    k-th term in both factors, so that starts differ in directions and in nothing else.

    Args:
        recipe: Its adapter and train sections.
        source: The base model.
        rows: Training rows, for the gradient.
        pad_token_id: Fills short rows.
        device: Where to compute.
        events: Told of progress.
        seed: Seeds the truncated decomposition.

    Returns:
        Report, layers for ``KpsvdConfig`` and factors.
    """
    decomposition = decompose(
        source,
        recipe.adapter,
        seed=seed,
        device=str(device),
        progress=report_decomposition(events),
    )
    events.end_progress()
    if recipe.adapter.init == "weight":
        return decomposition
    if recipe.adapter.init == "random":
        return _random(decomposition, recipe.train.seed)
    return _from_gradient(decomposition, recipe, source, rows, pad_token_id, device, events)


def _random(decomposition: Decomposition, seed: int) -> Decomposition:
    """Gaussian directions, of the norms that the weight's terms have."""
    factors = {}
    for name, pair in decomposition.factors.items():
        digest = hashlib.sha256(f"start {seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        factors[name] = tuple(
            _scaled(torch.randn(factor.shape, generator=generator), factor) for factor in pair
        )
    return _with_factors(decomposition, decomposition.report, factors)


def _from_gradient(
    decomposition: Decomposition,
    recipe: Recipe,
    source: ModelSource,
    rows: Sequence[TokenizedRow],
    pad_token_id: int,
    device: torch.device,
    events: Events,
) -> Decomposition:
    """The leading terms of the mean gradient over the run's first batches, and ranks by them."""
    adapter, train = recipe.adapter, recipe.train
    sampler = StatelessSampler(len(rows), train.batch_size, 1, 1, train.seed)
    batches = [
        make_micro_batch([rows[index] for index in sampler.batch(step, 0, 0)], pad_token_id)
        for step in range(adapter.gradient_batches)
    ]
    model: Any = load_model(source, recipe.model.dtype, recipe.model.attn_implementation)
    model.to(device)
    layers = {layer.name: layer for layer in decomposition.report.layers}
    terms: dict[str, KPSVD] = {}
    finished = []
    events.stage(f"decomposing the gradient of {len(batches)} batches")
    gradients = mean_gradients(
        model,
        list(layers),
        batches,
        progress=lambda done, total: events.advance("gradient", done, total),
    )
    for name, gradient in gradients:
        began = time.monotonic()
        if isinstance(model.get_submodule(name), Conv1D):
            gradient = gradient.T
        shape = KroneckerShape(*layers[name].factor_shape)
        terms[name] = kpsvd(gradient, shape, adapter.rank.window, tolerance=adapter.rank.tolerance)
        finished.append(
            Finished(
                name=name,
                key="",
                shape=shape,
                note=layers[name].note,
                values=tuple(terms[name].values.tolist()),
                squared_norm=terms[name].squared_norm,
                seconds=time.monotonic() - began,
                is_new=True,
            )
        )
    events.end_progress()
    report = rank_report(
        source.path,
        finished,
        adapter.rank,
        base_parameters=int(decomposition.report.totals["base_parameters"]),
        left_alone=decomposition.report.untouched,
    )
    factors = {
        layer.name: _gradient_factors(
            terms[layer.name], layers[layer.name].singular_values, layer.rank
        )
        for layer in report.layers
        if layer.rank > 0
    }
    return _with_factors(decomposition, report, factors)


def _gradient_factors(
    terms: KPSVD, weight_values: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    roots = torch.tensor(weight_values[:rank], dtype=torch.float64).sqrt()
    roots = roots.to(terms.left)[:, None, None]
    return (terms.left[:rank] * roots).cpu(), (terms.right[:rank] * roots).cpu()


def _scaled(drawn: Tensor, like: Tensor) -> Tensor:
    wanted, given = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (like, drawn))
    scale: Tensor = (wanted / given)[:, None, None]
    return drawn * scale


def _with_factors(
    decomposition: Decomposition, report: RankReport, factors: Mapping[str, Any]
) -> Decomposition:
    layers = layers_of(report, has_fingerprints=False)
    return replace(decomposition, report=report, layers=layers, factors=dict(factors))
