"""Several rank rules applied to spectra that are computed once: `init-only --sweep`."""

from __future__ import annotations

from collections.abc import Mapping

from kpsvd_tune.decompose.collect import Spectra
from kpsvd_tune.errors import AdapterError, RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import RankReport


def check_sweep(variants: Mapping[str, Recipe]) -> Recipe:
    """The recipe with the widest window, whose spectra serve all of them.

    Args:
        variants: A recipe for each value tried, by its KEY=VALUE.

    Raises:
        RecipeError: The swept key is not one of adapter.rank, or is its tolerance.
    """
    for setting in variants:
        key = setting.partition("=")[0].strip()
        if not key.startswith("adapter.rank."):
            raise RecipeError(f"--sweep {setting}: only keys of adapter.rank can be swept")
        if key == "adapter.rank.tolerance":
            raise RecipeError(f"--sweep {setting}: one set of spectra has one tolerance")
    return max(variants.values(), key=lambda recipe: recipe.adapter.rank.window)


def sweep_ranks(
    spectra: Spectra, variants: Mapping[str, Recipe], events: Events
) -> dict[str, RankReport | dict[str, str]]:
    """The ranks by each rule.

    Args:
        spectra: Of the widest window.
        variants: A recipe for each value tried; they differ in adapter.rank only.
        events: Told of notes.

    Returns:
        For each value its report, or ``{"error": reason}`` where the rule cannot be met.

    Raises:
        AdapterError: No value can be met.
    """
    rules = [recipe.adapter.rank for recipe in variants.values()]
    if any(rule.energy == "auto" for rule in rules):
        events.note("adapter.rank.energy: auto is chosen by `train`; here the default stands in")
    found: dict[str, RankReport | dict[str, str]] = {}
    ranks: list[tuple[int, ...]] = []
    refusals: list[AdapterError] = []
    for setting, rule in zip(variants, rules, strict=True):
        try:
            found[setting] = report = spectra.report(rule)
            ranks.append(tuple(layer.rank for layer in report.layers))
        except AdapterError as error:
            # The others are worth showing.
            found[setting] = {"error": str(error)}
            refusals.append(error)
    if len(refusals) == len(found):
        raise refusals[0]
    if len(ranks) > 1 and len(set(ranks)) == 1:
        rule = max(rules, key=lambda rule: rule.window)
        events.note(
            f"every value gives the same ranks: with method {rule.method}, max {rule.max} and "
            f"budget {rule.budget} the key swept decides nothing"
        )
    return found
