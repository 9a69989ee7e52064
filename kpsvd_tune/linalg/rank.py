"""How many KPSVD terms each layer gets, by a rank rule, from the spectra of all layers.

``sigma_k`` are a layer's KP singular values over the window of computed leading terms, and a
term's share is sigma_k^2 / ||W||_F^2, its part of the layer's energy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from kpsvd_tune.linalg.cutoff import (
    elbow_count,
    energy_count,
    noise_edge_count,
    num_usable,
    pooled_counts,
)
from kpsvd_tune.linalg.plan import LayerPlan
from kpsvd_tune.linalg.rule import LayerRule, RankRule


def choose_ranks(plans: Sequence[LayerPlan], rule: RankRule) -> list[LayerPlan]:
    """Choose the Kronecker rank of every layer.

    The rule proposes, ``min`` and ``max`` clip, and ``budget`` caps the whole: starting from the
    minima it adds the next whole term with the most energy share per trainable parameter, in
    order within a layer and never above the rule's proposal, until no further term fits.

    A rule that cannot decide falls back and says so in ``note``: without an elbow or a noise edge
    it proposes the whole window (so that energy, ``max`` or ``budget`` decide), and an energy
    threshold above what the window holds does the same. Terms that are only rounding are never
    chosen, whatever ``min`` or an override asks: a layer of zeros gets rank 0.

    Args:
        plans: The layers with their spectra of at least one term, in model order.
        rule: The rule; its window may be smaller than the one that was computed.

    Returns:
        The plans with their ranks, in the order given.

    Raises:
        ValueError: A budget below the minima; an override as in :meth:`RankRule.for_layers`.

    Source: the energy threshold and the elbow are named by SoKA (arXiv 2506.15251), which says
    neither how they combine nor which elbow is meant.
    """
    plans = [plan.within(rule.window) for plan in plans]
    rules = rule.for_layers([plan.name for plan in plans])
    pooled = pooled_counts(
        [plan.shares() if own.is_pooled else [] for plan, own in zip(plans, rules, strict=True)],
        rule.energy,
    )
    proposals = [
        _propose(plan, own, count) for plan, own, count in zip(plans, rules, pooled, strict=True)
    ]
    if rule.budget is None or sum(plan.num_parameters for plan in proposals) <= rule.budget:
        return proposals
    minima = [min(own.least, plan.rank) for plan, own in zip(proposals, rules, strict=True)]
    ranks = _within_budget(proposals, minima, rule.budget)
    return [
        plan if rank == plan.rank else replace(plan, rank=rank, bound_by="budget")
        for plan, rank in zip(proposals, ranks, strict=True)
    ]


def check_rule(plans: Sequence[LayerPlan], rule: RankRule) -> None:
    """Refuse what :func:`choose_ranks` would refuse, before anything is decomposed.

    Args:
        plans: The layers with their shapes, in model order.
        rule: The rule.

    Raises:
        ValueError: An override as in :func:`choose_ranks`; a budget below the minima of weights
            that have that many terms.
    """
    rules = rule.for_layers([plan.name for plan in plans])
    needed = sum(
        plan.cost(min(own.least, plan.shape.max_rank))
        for own, plan in zip(rules, plans, strict=True)
    )
    if rule.budget is not None and needed > rule.budget:
        raise ValueError(
            f"a budget of {rule.budget:,} parameters is below the {needed:,} that the minimum "
            "ranks and fixed overrides need (less only where a weight is zero): raise the budget "
            "or lower the minimum"
        )


def _propose(plan: LayerPlan, own: LayerRule, pooled: int) -> LayerPlan:
    """The plan with the rule's rank, clipped; ``pooled`` is its part of the pool if it has one."""
    rule, values, notes = own.rule, plan.values, [plan.note]
    by_energy, reached = (pooled, True) if own.is_pooled else _by_energy(plan, rule)
    by_elbow, elbow_note = elbow_count(values)
    if own.rank is not None:
        rank, bound = own.rank, "override"
    elif rule.method == "fixed":
        rank, bound = rule.max, "fixed"
    elif rule.method == "noise_edge":
        rank, note = noise_edge_count(values, plan.squared_norm, plan.shape)
        bound = "noise_edge"
        notes.append(note)
    else:
        found = []
        if "energy" in rule.method:
            found.append((by_energy, "energy" if reached else "window"))
            notes.append(None if reached else f"the window holds less than energy {rule.energy}")
        if "elbow" in rule.method:
            found.append((by_elbow, "elbow"))
            notes.append(elbow_note)
        # The first of equals: energy, which is the rule with a meaning of its own.
        rank, bound = min(found, key=lambda proposal: proposal[0])
    if own.rank is None and rank > rule.max:
        rank, bound = rule.max, "max"
    elif own.rank is None and rank < rule.min:
        rank, bound = rule.min, "min"
    usable = num_usable(values)
    if rank > usable:
        rank, bound = usable, "window"
        if usable < len(values):
            notes.append(f"only {usable} terms of the weight are more than rounding")
    return replace(
        plan,
        note="; ".join(note for note in notes if note) or None,
        rank=rank,
        rank_energy=by_energy,
        rank_elbow=by_elbow,
        bound_by=bound,
    )


def _by_energy(plan: LayerPlan, rule: RankRule) -> tuple[int, bool]:
    window = math.fsum(value * value for value in plan.values)
    whole = plan.squared_norm if rule.energy_of == "total" else window
    return energy_count(plan.values, rule.energy, whole)


def _within_budget(plans: Sequence[LayerPlan], minima: Sequence[int], budget: int) -> list[int]:
    """Ranks from the minima up to those of the plans that cost at most a budget.

    The next whole term with the most energy share per parameter is taken, in order within a
    layer, ties to the earlier layer, until no further term fits. Minima above the budget give a
    ValueError.
    """
    ranks = list(minima)
    shares = [plan.shares() for plan in plans]
    spent = sum(plan.cost(rank) for plan, rank in zip(plans, ranks, strict=True))
    if spent > budget:
        raise ValueError(
            f"a budget of {budget:,} parameters is below the {spent:,} that the minimum ranks and "
            "fixed overrides need: raise the budget or lower the minimum"
        )
    queue: list[tuple[float, int]] = []

    def next_cost(layer: int) -> int:
        return plans[layer].cost(ranks[layer] + 1) - plans[layer].cost(ranks[layer])

    def offer(layer: int) -> None:
        if ranks[layer] < plans[layer].rank:
            share = shares[layer][ranks[layer]]
            heapq.heappush(queue, (-share / next_cost(layer), layer))

    for layer in range(len(ranks)):
        offer(layer)
    while queue:
        _, layer = heapq.heappop(queue)
        # A layer whose term does not fit now never fits again: what is left only shrinks.
        if spent + next_cost(layer) <= budget:
            spent += next_cost(layer)
            ranks[layer] += 1
            offer(layer)
    return ranks
