"""What each trial trains at its budget: KPSVD's ranks, or one of PEFT's own methods."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.comparison.baselines import (
    SLACK,
    Baseline,
    Size,
    Sizes,
    baseline,
    best_size,
    check_training,
)
from kpsvd_tune.comparison.methods import Method, is_ours
from kpsvd_tune.comparison.trial_log import SCHEDULE
from kpsvd_tune.decompose import Spectra, collect_spectra, report_decomposition
from kpsvd_tune.errors import InputError
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe import RankRecipe, Recipe
from kpsvd_tune.report.comparison import Trial

# Of the section train: curves have a point a step, and a trial is one process.
KEYS_OF_TRIALS: Mapping[str, Any] = {"log_every": 1, "num_workers": 0}


@dataclass(frozen=True)
class Setup:
    """One trial, ready to run."""

    trial: Trial
    method: Method
    recipe: Recipe  # with the trial's rate and seed, and for KPSVD its rank rule and budget
    baseline: Baseline | None  # None for KPSVD
    folder: Path  # of the run
    base: Mapping[str, float | None]  # losses of the base model
    identity: Mapping[str, Any]  # what must be equal for a stopped trial to go on, as JSON values


class Setups:
    """Turns the trials of a comparison into setups.

    After `prepare`, ``budgets`` has those that each method is run at, and ``notes`` says which
    others it is not run at and where it trains clearly fewer parameters than it might.
    """

    def __init__(
        self,
        recipe: Recipe,  # what all methods share
        recipes: Mapping[str, Recipe],  # the recipe of each method by its name
        methods: Sequence[Method],
        sizes: Mapping[str, Sizes],  # of the modules that each method goes on, by its name
        model_type: str,  # transformers' name of the architecture
        folder: Path,
        shared: Mapping[str, Any],  # what is equal in all trials, as JSON values
    ) -> None:
        self._recipe, self._shared = recipe, shared
        self._sizes, self._model_type, self._folder = sizes, model_type, folder
        self._methods = {method.name: method for method in methods}
        self._adapters = {name: each.adapter for name, each in recipes.items()}
        self._ranks: dict[tuple[str, int], RankRecipe] = {}
        self._chosen: dict[tuple[str, int], Size] = {}
        self.budgets: dict[str, tuple[int, ...]] = {}
        self.notes: list[str] = []

    def prepare(self, source: ModelSource, budgets: Sequence[int], events: Events) -> None:
        """Choose sizes and rank rules, and fill the spectra cache, so that no trial spends time.

        Refuses a PEFT method that no budget is enough for (InputError) or a rank rule
        (AdapterError): what cannot be met is refused before the first trial, not after hours.
        """
        for method in self._methods.values():
            if method.kind != "kpsvd":
                self._choose_sizes(method, sorted(budgets))
        for name in self.adapters():
            adapter = self._adapters[name]
            events.stage(f"decomposing {self._recipe.model.path} for {name}")
            spectra = collect_spectra(source, adapter, progress=report_decomposition(events))
            events.end_progress()
            self._choose_ranks(name, adapter.rank, spectra, sorted(budgets))

    def knows(self, trial: Trial) -> bool:
        """Whether the method of a trial has a size at its budget."""
        return (trial.method, trial.budget) in {*self._ranks, *self._chosen}

    def setup(self, trial: Trial, base: Mapping[str, float | None]) -> Setup:
        """A trial, ready to run; ``base`` holds the losses of the base model."""
        method, adapter, own = self._methods[trial.method], self._adapters[trial.method], None
        if method.kind == "kpsvd":
            rank = self._ranks[trial.method, trial.budget]
            adapter = adapter.model_copy(update={"rank": rank})
        else:
            size = self._chosen[trial.method, trial.budget]
            dropout = self._recipe.adapter.dropout
            own = baseline(method, size, self._model_type, dropout=dropout, seed=trial.seed)
        keys = {**KEYS_OF_TRIALS, "learning_rate": trial.learning_rate, "seed": trial.seed}
        train = self._recipe.train.model_copy(update=keys)
        folder = self._folder / "trials" / trial.folder_name
        recipe = self._recipe.model_copy(
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
            name: self._adapters[name].model_dump(mode="json")
            for name, method in self._methods.items()
            if method.kind == "kpsvd"
        }

    def _choose_ranks(
        self, name: str, rank: RankRecipe, spectra: Spectra, budgets: Sequence[int]
    ) -> None:
        """The budgets at which a KPSVD method has ranks of its own, and its rules there."""
        chosen: dict[int, tuple[int, ...]] = {}
        for budget in budgets:
            rule = _rank_rule(self._methods[name], rank, spectra, budget)
            self._ranks[name, budget] = rule
            report = spectra.report(rule)
            ranks = tuple(layer.rank for layer in report.layers)
            earlier = next((known for known, other in chosen.items() if other == ranks), None)
            if earlier is not None:
                trained = int(report.totals["trainable_parameters"])
                self.notes.append(_not_run(name, budget, trained, earlier))
                continue
            chosen[budget] = ranks
            spectra.factors(report)
        self.budgets[name] = tuple(chosen)

    def _choose_sizes(self, method: Method, budgets: Sequence[int]) -> None:
        """The budgets at which a method trains something of its own, and its sizes there."""
        name, train = method.name, self._recipe.train
        check_training(method, self._recipe.adapter.dropout, train.weight_decay)
        chosen: dict[int, Size] = {}
        refusal: InputError | None = None
        too_small: list[int] = []
        for budget in budgets:
            try:
                size = best_size(method, self._sizes[name], budget, self._model_type)
            except InputError as error:
                refusal = error
                too_small.append(budget)
                continue
            earlier = next((known for known, other in chosen.items() if other == size), None)
            if earlier is not None:
                self.notes.append(_not_run(name, budget, size.trainable_parameters, earlier))
                continue
            chosen[budget] = size
            if size.trainable_parameters < (1 - SLACK) * budget:
                self.notes.append(
                    f"{name} at {budget:,} trains {size.trainable_parameters:,} parameters, the "
                    "nearest below of the sizes that it has on these modules"
                )
        if not chosen and refusal is not None:
            raise refusal
        if too_small:
            self.notes.append(f"{name} is not run at {_listed(too_small)}: {refusal}")
        self.budgets[name] = tuple(chosen)
        self._chosen |= {(name, budget): size for budget, size in chosen.items()}


def _not_run(name: str, budget: int, trained: int, earlier: int) -> str:
    return (
        f"{name} is not run at {budget:,}: it would train the same {trained:,} parameters as at "
        f"{earlier:,}"
    )


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(f"{each:,}" for each in numbers)


def _rank_rule(method: Method, rank: RankRecipe, spectra: Spectra, budget: int) -> RankRecipe:
    """The recipe's rule within the budget, where the method names one; else equal ranks.

    Equal ranks are what the baselines get: the same number of terms in every layer, and one more
    where it holds the most energy for its parameters until the budget is used up. A baseline of
    ours gets equal ranks alone, as its authors give it.
    """
    if any(key.startswith("rank") for key in method.settings):
        return rank.model_copy(update={"budget": budget})

    def equal(low: int, high: int, limit: int | None) -> RankRecipe:
        rule = {"method": "fixed", "min": low, "max": high, "budget": limit}
        return rank.model_copy(update=rule)

    def cost(number: int) -> int:
        report = spectra.report(equal(number, number, None))
        return int(report.totals["trainable_parameters"])

    # A core of r x r costs by the square of the rank, so the cost of one term says little.
    fits = bisect_right(range(1, rank.window + 1), budget, key=cost)
    if is_ours(method.name) and fits:
        return equal(fits, fits, budget)
    return equal(fits, min(fits + 1, rank.window), budget)
