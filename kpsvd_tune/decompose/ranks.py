"""The rank rule of a recipe over the spectra of all layers, and what comes of it as a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, RankRule, choose_ranks
from kpsvd_tune.recipe.adapter import RankRecipe
from kpsvd_tune.report.results import LayerReport, RankReport


def rank_rule(rank: RankRecipe) -> RankRule:
    """A recipe's rule; the default stands for auto, for only training tells the threshold."""
    return RankRule(**_with_number(rank).model_dump())


def rank_report(
    model: str,
    plans: Sequence[LayerPlan],  # in model order
    rank: RankRecipe,
    *,
    base_parameters: int,  # how many the base model has
    # (name, reason) of the weight matrices that are not targeted
    left_alone: Sequence[tuple[str, str]],
    is_drawn: bool = False,  # a seed gives the frozen factors
    trained_whole: Mapping[str, int] | None = None,  # parameters of modules trained whole
) -> RankReport:
    """Choose the ranks of all layers and describe them.

    The window of the rule may be smaller than the one that was computed. An AdapterError says that
    the budget is below the minima, or that an override matches nothing.
    """
    try:
        plans = choose_ranks(plans, rank_rule(rank))
    except ValueError as error:
        raise AdapterError(f"adapter.rank: {error}") from error
    # Every layer weighs the same, as in the pooled rule.
    kept = math.fsum(plan.energy(plan.rank) for plan in plans)
    whole = math.fsum(plan.energy(len(plan.values)) for plan in plans)
    return RankReport(
        model=model,
        totals={
            "modules": len(plans),
            "trainable_parameters": sum(plan.num_parameters for plan in plans),
            "stored_parameters": sum(plan.stored(is_drawn) for plan in plans),
            "base_parameters": base_parameters,
            "energy": kept / whole if whole > 0 else 0.0,
        },
        layers=tuple(map(layer_report, plans)),
        untouched=tuple(left_alone),
        rule=_with_number(rank).model_dump(),
        form=plans[0].form if plans else "both",
        trained_whole=dict(trained_whole or {}),
    )


def layer_report(plan: LayerPlan) -> LayerReport:
    """A layer as the report's files have it."""
    shape = plan.shape
    window, kept = plan.energy(len(plan.values)), plan.energy(plan.rank)
    leading = plan.values[0] ** 2 if plan.values else 0.0
    return LayerReport(
        name=plan.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        factor_shape=shape.as_tuple(),
        rank=plan.rank,
        rank_energy=plan.rank_energy,
        rank_elbow=plan.rank_elbow,
        bound_by=plan.bound_by,
        energy_window=kept / window if window > 0 else 0.0,
        energy_total=kept,
        parameters=plan.num_parameters,
        relative_error=plan.relative_error(plan.rank),
        singular_values=plan.values,
        # Of R(W), not of W: how many leading terms of equal size would hold all the energy.
        stable_rank=plan.squared_norm / leading if leading > 0 else 0.0,
        seconds=plan.seconds,
        note=plan.note,
    )


def layers_of(report: RankReport, *, is_of_weight: bool = True) -> dict[str, dict[str, Any]]:
    """What ``KpsvdConfig.layers`` keeps of each adapted layer: :meth:`LayerPlan.settings`."""
    plans = [
        LayerPlan(
            layer.name,
            KroneckerShape(*layer.factor_shape),
            values=tuple(layer.singular_values),
            squared_norm=layer.stable_rank * layer.singular_values[0] ** 2,
            rank=layer.rank,
        )
        for layer in report.layers
        if layer.rank > 0
    ]
    return {plan.name: plan.settings(is_of_weight=is_of_weight) for plan in plans}


def _with_number(rank: RankRecipe) -> RankRecipe:
    if rank.energy != "auto":
        return rank
    return rank.model_copy(update={"energy": RankRecipe().energy})
