"""The rank rules: how many KPSVD terms each layer gets, from the spectra of all layers.

``sigma_k`` are a layer's KP singular values over the window of computed leading terms, and a
term's share is sigma_k^2 / ||W||_F^2, its part of the layer's energy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kpsvd_tune.linalg.budget import share_out
from kpsvd_tune.linalg.cutoff import (
    elbow_count,
    energy_count,
    noise_edge_count,
    num_usable,
    pooled_counts,
)
from kpsvd_tune.linalg.kronecker import KroneckerShape
from kpsvd_tune.linalg.overrides import overrides_by_layer

METHODS = ("energy", "elbow", "energy+elbow", "noise_edge", "fixed")
ENERGY_OF = ("pooled", "window", "total")


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen.

    Attributes:
        method: energy, elbow, energy+elbow (the smaller of the two), noise_edge or fixed.
        energy: The threshold tau in (0, 1].
        energy_of: What tau is a share of: the ``pooled`` window of all layers, each layer's own
            ``window``, or each layer's ``total`` ||W||_F^2.
        window: Leading terms that are computed and looked at.
        min: Fewest terms of a layer; 0 lets a layer stay untouched.
        max: Most terms of a layer; what ``fixed`` uses everywhere.
        budget: Most trainable parameters of all layers together, or None.

    Raises:
        ValueError: A value is out of range.
    """

    method: str = "energy+elbow"
    energy: float = 0.5
    energy_of: str = "pooled"
    window: int = 32
    min: int = 1
    max: int = 16
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"rank method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.energy_of not in ENERGY_OF:
            raise ValueError(
                f"energy_of {self.energy_of!r}: expected one of {', '.join(ENERGY_OF)}"
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"the energy threshold must be in (0, 1], got {self.energy}")
        if self.window < 1:
            raise ValueError(f"the window must be at least 1, got {self.window}")
        if not 0 <= self.min <= self.max:
            raise ValueError(f"expected 0 <= min <= max, got min {self.min} and max {self.max}")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"the budget must not be negative, got {self.budget}")


@dataclass(frozen=True)
class LayerSpectrum:
    """What the rules know of one layer.

    Attributes:
        name: The module's name.
        values: KP singular values over the window, descending, at least one.
        squared_norm: ||W||_F^2.
        shape: The Kronecker shape; a term costs ``shape.num_parameters``.
    """

    name: str
    values: tuple[float, ...]
    squared_norm: float
    shape: KroneckerShape

    def shares(self) -> list[float]:
        """Each term's share of the layer's total energy; zeros for a zero matrix."""
        whole = self.squared_norm or 1.0
        return [value * value / whole for value in self.values]


@dataclass(frozen=True)
class RankChoice:
    """The rank of one layer and how it came about.

    Attributes:
        name: The module's name.
        rank: Terms chosen.
        rank_energy: What the energy threshold alone gives, before clipping.
        rank_elbow: What the elbow alone gives, before clipping.
        bound_by: energy, elbow, noise_edge, fixed, min, max, budget, override, or window: the
            computed terms (or those of them that are more than rounding) ended first.
        note: One sentence when a rule could not decide and fell back, else None.
    """

    name: str
    rank: int
    rank_energy: int
    rank_elbow: int
    bound_by: str
    note: str | None = None


def choose_ranks(
    spectra: Sequence[LayerSpectrum],
    rule: RankRule,
    overrides: Mapping[str, int | Mapping[str, Any]] | None = None,
) -> list[RankChoice]:
    """Choose the Kronecker rank of every layer.

    The rule proposes, ``min`` and ``max`` clip, and ``budget`` caps the whole: starting from the
    minima it adds the next whole term with the most energy share per trainable parameter, in
    order within a layer and never above the rule's proposal, until no further term fits.

    A rule that cannot decide falls back and says so in ``note``: without an elbow or a noise edge
    it proposes the whole window (so that energy, ``max`` or ``budget`` decide), and an energy
    threshold above what the window holds does the same. Terms that are only rounding are never
    chosen, whatever ``min`` or an override asks: a layer of zeros gets rank 0.

    Args:
        spectra: One entry a layer, in model order.
        rule: The rule.
        overrides: Patterns (regular expressions, matched against a module's whole name or its
            end after a dot) to a fixed rank or to a mapping with some of method, energy, min,
            max. The first match wins. A layer with its own ``energy`` applies it to its own
            window when the rule pools, and leaves the pool.

    Returns:
        One choice a layer, in the order given.

    Raises:
        ValueError: A budget below the minima; an override that matches nothing, is no regular
            expression, or asks for something unknown or out of range.

    Source: the energy threshold and the elbow are named by SoKA (arXiv 2506.15251), which says
    neither how they combine nor which elbow is meant.
    """
    own = overrides_by_layer([spectrum.name for spectrum in spectra], overrides or {})
    rules = [
        rule if isinstance(override, int) else _replace(rule, override, spectrum.name)
        for spectrum, override in zip(spectra, own, strict=True)
    ]
    pools = [
        rule.energy_of == "pooled" and (isinstance(override, int) or "energy" not in override)
        for override in own
    ]
    pooled = pooled_counts(
        [s.shares() if pool else [] for s, pool in zip(spectra, pools, strict=True)], rule.energy
    )
    proposals = [
        _propose(spectrum, layer_rule, count if pool else None, override)
        for spectrum, layer_rule, count, pool, override in zip(
            spectra, rules, pooled, pools, own, strict=True
        )
    ]
    costs = [spectrum.shape.num_parameters for spectrum in spectra]
    wanted = [choice.rank for choice in proposals]
    total = sum(cost * rank for cost, rank in zip(costs, wanted, strict=True))
    if rule.budget is None or total <= rule.budget:
        return proposals
    minima = [
        choice.rank if isinstance(override, int) else min(layer_rule.min, choice.rank)
        for choice, layer_rule, override in zip(proposals, rules, own, strict=True)
    ]
    ranks = share_out([s.shares() for s in spectra], costs, minima, wanted, rule.budget)
    return [
        choice if rank == choice.rank else replace(choice, rank=rank, bound_by="budget")
        for choice, rank in zip(proposals, ranks, strict=True)
    ]


def check_rule(
    names: Sequence[str],
    shapes: Sequence[KroneckerShape],
    rule: RankRule,
    overrides: Mapping[str, int | Mapping[str, Any]],
) -> None:
    """Refuse what :func:`choose_ranks` would refuse, before anything is decomposed.

    Args:
        names: The layers, in model order.
        shapes: Their Kronecker shapes.
        rule: The rule.
        overrides: As for :func:`choose_ranks`.

    Raises:
        ValueError: An override as in :func:`choose_ranks`; a budget below the minima of weights
            that have that many terms.
    """
    own = overrides_by_layer(names, overrides)
    minima = [
        override if isinstance(override, int) else _replace(rule, override, name).min
        for name, override in zip(names, own, strict=True)
    ]
    if rule.budget is None:
        return
    needed = sum(
        min(least, shape.max_rank) * shape.num_parameters
        for least, shape in zip(minima, shapes, strict=True)
    )
    if needed > rule.budget:
        raise ValueError(
            f"a budget of {rule.budget:,} parameters is below the {needed:,} that the minimum "
            "ranks and fixed overrides need (less only where a weight is zero): raise the budget "
            "or lower the minimum"
        )


def _replace(rule: RankRule, override: Mapping[str, Any], name: str) -> RankRule:
    try:
        return replace(rule, **override)
    except ValueError as error:
        raise ValueError(f"rank override for {name}: {error}") from None


def _propose(
    spectrum: LayerSpectrum,
    rule: RankRule,
    pooled: int | None,
    override: int | Mapping[str, Any],
) -> RankChoice:
    """The rule's rank of one layer, clipped; ``pooled`` is its part of the pool if it has one."""
    values = spectrum.values
    notes: list[str | None] = []
    if pooled is None:
        window = math.fsum(value * value for value in values)
        whole = spectrum.squared_norm if rule.energy_of == "total" else window
        by_energy, reached = energy_count(values, rule.energy, whole)
    else:
        by_energy, reached = pooled, True
    by_elbow, elbow_note = elbow_count(values)
    if isinstance(override, int):
        rank, bound = override, "override"
    elif rule.method == "fixed":
        rank, bound = rule.max, "fixed"
    elif rule.method == "noise_edge":
        rank, note = noise_edge_count(values, spectrum.squared_norm, spectrum.shape)
        bound = "noise_edge"
        notes.append(note)
    else:
        proposals = []
        if "energy" in rule.method:
            proposals.append((by_energy, "energy" if reached else "window"))
            notes.append(None if reached else f"the window holds less than energy {rule.energy}")
        if "elbow" in rule.method:
            proposals.append((by_elbow, "elbow"))
            notes.append(elbow_note)
        # The first of equals: energy, which is the rule with a meaning of its own.
        rank, bound = min(proposals, key=lambda proposal: proposal[0])
    if not isinstance(override, int):
        if rank > rule.max:
            rank, bound = rule.max, "max"
        elif rank < rule.min:
            rank, bound = rule.min, "min"
    usable = num_usable(values)
    if rank > usable:
        rank, bound = usable, "window"
        if usable < len(values):
            notes.append(f"only {usable} terms of the weight are more than rounding")
    said = "; ".join(note for note in notes if note)
    return RankChoice(spectrum.name, rank, by_energy, by_elbow, bound, said or None)
