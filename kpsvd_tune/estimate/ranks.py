"""The ranks that a recipe can lead to, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kpsvd_tune.adapter.config import KpsvdConfig
from kpsvd_tune.decompose import cached_spectra
from kpsvd_tune.decompose.ranks import rank_rule
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, RankRule, check_rule, choose_ranks
from kpsvd_tune.models import WeightReader
from kpsvd_tune.recipe.adapter import AdapterRecipe


@dataclass(frozen=True)
class PossibleRanks:
    """Two plans of every target layer: with the fewest terms it may get, and with the most."""

    least: tuple[LayerPlan, ...]
    most: tuple[LayerPlan, ...]
    budget: int | None  # most trained values of all layers
    basis: str  # what they rest on
    to_decompose: tuple[LayerPlan, ...] = ()  # layers whose spectra are not in the cache
    modules_to_save: tuple[str, ...] = ()  # of a saved adapter; else the recipe says it

    def num_trained(self) -> tuple[int, int]:
        """Fewest and most trained values."""
        low, high = (sum(p.num_parameters for p in each) for each in (self.least, self.most))
        return (low, high if self.budget is None else max(low, min(high, self.budget)))

    def num_stored(self, *, is_drawn: bool) -> tuple[int, int]:
        """Fewest and most numbers of the adapter's file."""
        low = sum(plan.stored(is_drawn) for plan in self.least)
        trained = self.num_trained()[1]
        return (low, max(low, trained + self._most_frozen(trained, is_drawn=is_drawn)))

    def _most_frozen(self, trained: int, *, is_drawn: bool) -> int:
        """Most frozen numbers beside so many trained ones, wherever the budget puts them."""
        pairs = [(p.num_parameters, p.stored(is_drawn) - p.num_parameters) for p in self.most]
        whole = sum(frozen for _, frozen in pairs)
        if trained >= sum(own for own, _ in pairs):
            return whole
        if self.most[0].form == "core":
            # Ranks whose squares have a sum cost most frozen numbers by Cauchy and Schwarz.
            a_term = [plan.shape.num_parameters for plan in self.most if not is_drawn]
            return min(whole, math.floor(math.sqrt(trained * sum(each**2 for each in a_term))))
        found, left = 0.0, trained
        for own, frozen in sorted(pairs, key=lambda pair: -pair[1] / max(1, pair[0])):
            taken = min(own, left)
            found += frozen * taken / max(1, own)
            left -= taken
        return math.ceil(found)


def possible_ranks(
    reader: WeightReader, plans: Sequence[LayerPlan], adapter: AdapterRecipe, seed: int
) -> PossibleRanks:
    """The chosen ranks where the cache holds every spectrum, else the bounds of the rule.

    Raises:
        AdapterError: The rule cannot be met.
    """
    rule = rank_rule(adapter.rank)
    try:
        check_rule(plans, rule)
        found = cached_spectra(reader, plans, adapter, seed)
        missing = () if adapter.is_drawn else tuple(p for p in plans if p.name not in found)
        if not missing and not adapter.is_drawn and adapter.rank.energy != "auto":
            chosen = tuple(choose_ranks([found[plan.name] for plan in plans], rule))
            return PossibleRanks(
                chosen, chosen, None, "ranks by the spectra in the cache, as the run takes them"
            )
        least = tuple(_all_at(plans, rule, "min"))
        most = tuple(_all_at(plans, rule, "max"))
    except ValueError as error:
        raise AdapterError(f"adapter.rank: {error}") from error
    is_exact = least == most and rule.budget is None
    reason = (
        "energy: auto is chosen by short trainings"
        if adapter.rank.energy == "auto"
        else (
            f"{len(missing)} of {len(plans)} spectra are not in the cache; `kpsvd-tune init-only` "
            "computes them and tells the ranks"
        )
    )
    basis = "ranks as the rule fixes them" if is_exact else f"bounds of the ranks: {reason}"
    return PossibleRanks(least, most, rule.budget, basis, missing)


def ranks_of_adapter(folder: Path) -> PossibleRanks:
    """Those of a saved adapter, which `adapter.from` goes on from."""
    config: KpsvdConfig = KpsvdConfig.from_pretrained(str(folder))
    if not config.layers:
        raise AdapterError(f"adapter.from: {folder} says nothing about its layers")
    plans = tuple(
        LayerPlan(name, KroneckerShape(*each["shape"]), rank=each["rank"], form=config.form)
        for name, each in config.layers.items()
    )
    return PossibleRanks(
        plans,
        plans,
        None,
        f"ranks of the adapter in {folder}",
        modules_to_save=tuple(config.modules_to_save or ()),
    )


def _all_at(plans: Sequence[LayerPlan], rule: RankRule, end: str) -> list[LayerPlan]:
    """Every layer with the least (`min`) or most (`max`) terms that its rule allows."""
    ranks = []
    for plan, own in zip(plans, rule.for_layers([each.name for each in plans]), strict=True):
        rank = own.rank
        if rank is None:
            is_fixed = own.rule.method == "fixed"
            rank = own.rule.max if is_fixed or end == "max" else own.rule.min
        if end == "min" and rule.budget is not None:
            rank = min(rank, own.least)
        ranks.append(replace(plan, rank=min(rank, rule.window, plan.shape.max_rank)))
    return ranks
