"""What each trial of a comparison trains: the recipe, and for KPSVD its ranks, at a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.comparison.baselines import baseline
from kpsvd_tune.comparison.methods import Method
from kpsvd_tune.comparison.plan import Trial
from kpsvd_tune.comparison.trial import Setup
from kpsvd_tune.comparison.trial_log import SCHEDULE
from kpsvd_tune.decompose import Spectra, collect_spectra, report_decomposition
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe import RankRecipe, Recipe


class Setups:
    """Turns the trials of a comparison into setups.

    Args:
        recipe: What all methods share.
        recipes: The recipe of each method by its name.
        methods: The methods.
        sizes: Module name to (out_features, in_features) of each target module.
        folder: Of the comparison.
        shared: What is equal in all trials, as JSON values.
    """

    def __init__(
        self,
        recipe: Recipe,
        recipes: Mapping[str, Recipe],
        methods: Sequence[Method],
        sizes: Mapping[str, tuple[int, int]],
        folder: Path,
        shared: Mapping[str, Any],
    ) -> None:
        self._recipe, self._recipes, self._shared = recipe, recipes, shared
        self._sizes, self._folder = sizes, folder
        self._methods = {method.name: method for method in methods}
        self._ranks: dict[tuple[str, int], RankRecipe] = {}

    def check_baselines(self, budgets: Sequence[int]) -> None:
        """Refuse budgets that a method of PEFT cannot meet.

        Raises:
            InputError: Rank 1 already costs more.
        """
        for method in self._methods.values():
            for budget in budgets:
                if method.kind != "kpsvd":
                    baseline(method, self._sizes, budget, self._recipe.adapter.dropout)

    def decompose(self, source: ModelSource, budgets: Sequence[int], events: Events) -> None:
        """Fill the spectra cache, so that no trial spends time on it, and choose the rank rules.

        Raises:
            AdapterError: A budget that a method's rank rule cannot meet.
        """
        for name, method in self._methods.items():
            if method.kind != "kpsvd":
                continue
            recipe = self._recipes[name]
            events.stage(f"decomposing {recipe.model.path} for {name}")
            spectra = collect_spectra(source, recipe.adapter, progress=report_decomposition(events))
            events.end_progress()
            for budget in budgets:
                self._ranks[name, budget] = rule = _rank_rule(method, recipe, spectra, budget)
                spectra.factors(spectra.report(rule))

    def setup(self, trial: Trial, base: Mapping[str, float | None]) -> Setup:
        """A trial, ready to run; ``base`` holds the losses of the base model."""
        method, recipe = self._methods[trial.method], self._recipe
        adapter, own = self._recipes[trial.method].adapter, None
        if method.kind == "kpsvd":
            rank = self._ranks[trial.method, trial.budget]
            adapter = adapter.model_copy(update={"rank": rank})
        else:
            own = baseline(method, self._sizes, trial.budget, recipe.adapter.dropout)
        train = recipe.train.model_copy(
            update={
                "learning_rate": trial.learning_rate,
                "seed": trial.seed,
                # Curves have a point a step, and a trial is one process.
                "log_every": 1,
                "num_workers": 0,
            }
        )
        folder = self._folder / "trials" / trial.folder_name
        recipe = recipe.model_copy(
            update={"adapter": adapter, "train": train, "output_dir": str(folder)}
        )
        identity = {
            "shared": self._shared,
            "method": trial.method,
            "adapter": self.adapters().get(trial.method),
            "schedule": SCHEDULE,
        }
        return Setup(trial, method, recipe, own, folder, base, identity)

    def adapters(self) -> dict[str, Any]:
        """The adapter section of each KPSVD method, as JSON values."""
        return {
            name: self._recipes[name].adapter.model_dump(mode="json")
            for name, method in self._methods.items()
            if method.kind == "kpsvd"
        }


def _rank_rule(method: Method, recipe: Recipe, spectra: Spectra, budget: int) -> RankRecipe:
    """The recipe's rule within the budget, where the method names one; else equal ranks.

    Equal ranks are what the baselines get: the same number of terms in every layer, and one more
    where it holds the most energy for its parameters until the budget is used up.
    """
    rank = recipe.adapter.rank
    if any(key.startswith("rank") for key in method.settings):
        return rank.model_copy(update={"budget": budget})
    one = rank.model_copy(update={"method": "fixed", "min": 1, "max": 1, "budget": None})
    cost = int(spectra.report(one).totals["trainable_parameters"])
    equal = min(budget // cost, rank.window)
    return one.model_copy(
        update={"min": equal, "max": min(equal + 1, rank.window), "budget": budget}
    )
