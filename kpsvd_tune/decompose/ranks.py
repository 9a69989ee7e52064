"""The rank rules over the spectra of all layers, and what comes of them as a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kpsvd_tune.decompose.tasks import Finished, Task
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import (
    LayerSpectrum,
    RankChoice,
    RankRule,
    check_rule,
    choose_ranks,
)
from kpsvd_tune.recipe.adapter import RankRecipe
from kpsvd_tune.report.results import LayerReport, RankReport


def rank_report(
    model: str,
    finished: Sequence[Finished],
    rank: RankRecipe,
    *,
    base_parameters: int,
    left_alone: Sequence[tuple[str, str]],
) -> RankReport:
    """Choose the ranks of all layers and describe them.

    Args:
        model: The base model, as the recipe names it.
        finished: The spectra of the target modules, in model order.
        rank: The rule; its window may be smaller than the one that was computed.
        base_parameters: Parameters of the base model.
        left_alone: (name, reason) of the weight matrices that are not targeted.

    Returns:
        Ranks, energies and totals of all target modules.

    Raises:
        AdapterError: A budget below the minima, or an override that matches nothing.
    """
    rank = _with_number(rank)
    spectra = [
        LayerSpectrum(done.name, done.values[: rank.window], done.squared_norm, done.shape)
        for done in finished
    ]
    try:
        choices = choose_ranks(spectra, _rule(rank), _overrides(rank))
    except ValueError as error:
        raise AdapterError(f"adapter.rank: {error}") from error
    layers = tuple(
        _layer_report(spectrum, choice, done)
        for spectrum, choice, done in zip(spectra, choices, finished, strict=True)
    )
    # Every layer weighs the same, as in the pooled rule.
    kept = math.fsum(layer.energy_total for layer in layers)
    whole = math.fsum(_share(spectrum, rank.window) for spectrum in spectra)
    return RankReport(
        model=model,
        totals={
            "modules": len(layers),
            "trainable_parameters": sum(layer.parameters for layer in layers),
            "base_parameters": base_parameters,
            "energy": kept / whole if whole > 0 else 0.0,
        },
        layers=layers,
        untouched=tuple(left_alone),
        rule=rank.model_dump(),
    )


def check_rank(tasks: Sequence[Task], rank: RankRecipe) -> None:
    """Refuse a rank rule that cannot be met, before the work.

    Args:
        tasks: The matrices, in model order.
        rank: The rule.

    Raises:
        AdapterError: A budget below the minima, or an override that matches nothing.
    """
    names, shapes = [task.name for task in tasks], [task.shape for task in tasks]
    try:
        check_rule(names, shapes, _rule(_with_number(rank)), _overrides(rank))
    except ValueError as error:
        raise AdapterError(f"adapter.rank: {error}") from error


def _with_number(rank: RankRecipe) -> RankRecipe:
    """The rule with the default in place of auto: only training tells the threshold."""
    if rank.energy != "auto":
        return rank
    return rank.model_copy(update={"energy": RankRecipe().energy})


def _rule(rank: RankRecipe) -> RankRule:
    other = {"overrides", "tolerance"}
    return RankRule(**rank.model_dump(exclude=other))


def _overrides(rank: RankRecipe) -> dict[str, int | dict[str, Any]]:
    # The recipe lets {rank: 4} stand for 4.
    return {
        pattern: value if isinstance(value, int) else value.get("rank", dict(value))
        for pattern, value in rank.overrides.items()
    }


def _share(spectrum: LayerSpectrum, num_terms: int) -> float:
    """Share of ||W||_F^2 in the leading terms; the sums' rounding must not take it above 1."""
    if spectrum.squared_norm == 0:
        return 0.0
    held = math.fsum(value * value for value in spectrum.values[:num_terms])
    return min(1.0, held / spectrum.squared_norm)


def _layer_report(spectrum: LayerSpectrum, choice: RankChoice, finished: Finished) -> LayerReport:
    shape = spectrum.shape
    window, kept = _share(spectrum, len(spectrum.values)), _share(spectrum, choice.rank)
    norm = spectrum.squared_norm
    leading = spectrum.values[0] ** 2 if spectrum.values else 0.0
    return LayerReport(
        name=spectrum.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        factor_shape=shape.as_tuple(),
        rank=choice.rank,
        rank_energy=choice.rank_energy,
        rank_elbow=choice.rank_elbow,
        bound_by=choice.bound_by,
        energy_window=kept / window if window > 0 else 0.0,
        energy_total=kept,
        parameters=choice.rank * shape.num_parameters,
        relative_error=math.sqrt(1.0 - kept) if norm > 0 else 0.0,
        singular_values=spectrum.values,
        # Of R(W), not of W: how many leading terms of equal size would hold all the energy.
        stable_rank=norm / leading if leading > 0 else 0.0,
        seconds=finished.seconds,
        note="; ".join(text for text in (finished.note, choice.note) if text) or None,
    )
