"""What each trial trains at its budget: KPSVD's ranks, or one of PEFT's own methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lokr.layer import factorization

from kpsvd_tune.comparison.methods import Method
from kpsvd_tune.comparison.trial_log import SCHEDULE
from kpsvd_tune.decompose import Spectra, collect_spectra, report_decomposition
from kpsvd_tune.errors import InputError
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe import RankRecipe, Recipe
from kpsvd_tune.report.comparison import Trial

# A rank is a whole number for every layer, so a budget can be missed by nearly a rank's
# parameters; one that is missed by no more than this share counts as met.
SLACK = 0.02
# Module name to (out_features, in_features).
Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's methods, ready to be put on a model."""

    config: PeftConfig
    rank: int  # the same for every layer
    trainable_parameters: int
    # parts of parameter names to what their learning rate is multiplied with
    rate_ratios: Mapping[str, float]


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
    """Turns the trials of a comparison into setups."""

    def __init__(
        self,
        recipe: Recipe,  # what all methods share
        recipes: Mapping[str, Recipe],  # the recipe of each method by its name
        methods: Sequence[Method],
        sizes: Sizes,
        folder: Path,
        shared: Mapping[str, Any],  # what is equal in all trials, as JSON values
    ) -> None:
        self._recipe, self._shared = recipe, shared
        self._sizes, self._folder = sizes, folder
        self._methods = {method.name: method for method in methods}
        self._adapters = {name: each.adapter for name, each in recipes.items()}
        self._ranks: dict[tuple[str, int], RankRecipe] = {}

    def prepare(self, source: ModelSource, budgets: Sequence[int], events: Events) -> None:
        """Choose the rank rules and fill the spectra cache, so that no trial spends time on it.

        Refuses a budget below rank 1 of a PEFT method (InputError) or a rank rule (AdapterError).
        """
        # What cannot be met is refused before the first trial, not after hours.
        for name, method in self._methods.items():
            for budget in budgets if method.kind != "kpsvd" else ():
                self._baseline(name, budget)
        for name in self.adapters():
            adapter = self._adapters[name]
            events.stage(f"decomposing {self._recipe.model.path} for {name}")
            spectra = collect_spectra(source, adapter, progress=report_decomposition(events))
            events.end_progress()
            for budget in budgets:
                rule = _rank_rule(self._methods[name], adapter.rank, spectra, budget)
                self._ranks[name, budget] = rule
                spectra.factors(spectra.report(rule))

    def setup(self, trial: Trial, base: Mapping[str, float | None]) -> Setup:
        """A trial, ready to run; ``base`` holds the losses of the base model."""
        method, adapter, own = self._methods[trial.method], self._adapters[trial.method], None
        if method.kind == "kpsvd":
            rank = self._ranks[trial.method, trial.budget]
            adapter = adapter.model_copy(update={"rank": rank})
        else:
            own = self._baseline(trial.method, trial.budget)
        # Curves have a point a step, and a trial is one process.
        keys: dict[str, Any] = {"log_every": 1, "num_workers": 0}
        keys |= {"learning_rate": trial.learning_rate, "seed": trial.seed}
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

    def _baseline(self, name: str, budget: int) -> Baseline:
        return baseline(self._methods[name], self._sizes, budget, self._recipe.adapter.dropout)


def _rank_rule(method: Method, rank: RankRecipe, spectra: Spectra, budget: int) -> RankRecipe:
    """The recipe's rule within the budget, where the method names one; else equal ranks.

    Equal ranks are what the baselines get: the same number of terms in every layer, and one more
    where it holds the most energy for its parameters until the budget is used up.
    """
    if any(key.startswith("rank") for key in method.settings):
        return rank.model_copy(update={"budget": budget})
    one = rank.model_copy(update={"method": "fixed", "min": 1, "max": 1, "budget": None})
    cost = int(spectra.report(one).totals["trainable_parameters"])
    equal = min(budget // cost, rank.window)
    return one.model_copy(
        update={"min": equal, "max": min(equal + 1, rank.window), "budget": budget}
    )


def baseline(method: Method, sizes: Sizes, budget: int, dropout: float = 0.0) -> Baseline:
    """Choose the largest rank of lora, pissa or lokr within a budget of trainable parameters.

    A rank that costs at most 2 % more still fits. An InputError says that rank 1 already costs
    more, or that the method has no such dropout.
    """
    if dropout and method.kind == "lokr":
        raise InputError(
            f"{method.name}: PEFT's LoKr cannot drop inputs, and adapter.dropout is {dropout:g}; "
            "set it to 0 or leave lokr out"
        )
    settings = method.settings
    count = _lokr_count(int(settings["factor"])) if method.kind == "lokr" else _lora_count
    rank = 0
    # LoKr stops growing once its factors are whole; so does a rank at a layer's smaller side.
    largest = min(min(size) for size in sizes.values())
    while rank < largest and count(sizes, rank + 1) <= budget * (1 + SLACK):
        rank += 1
    if rank == 0:
        raise InputError(
            f"a budget of {budget:,} trainable parameters is below the {count(sizes, 1):,} that "
            f"{method.name} needs at rank 1 on these {len(sizes)} modules; raise --budgets or "
            "target fewer modules"
        )
    alpha = _alpha(settings["alpha"], rank)
    targets: dict[str, Any] = {"target_modules": list(sizes), "task_type": "CAUSAL_LM"}
    config: PeftConfig
    if method.kind == "lokr":
        config = LoKrConfig(
            r=rank, alpha=alpha, decompose_factor=int(settings["factor"]), **targets
        )
    else:
        start: Any = True
        if method.kind == "pissa":
            start = f"pissa_niter_{settings['niter']}" if settings["niter"] != "0" else "pissa"
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=settings.get("rslora") == "true",
            init_lora_weights=start,
            lora_dropout=dropout,
            **targets,
        )
    ratio = float(settings.get("ratio", 1))
    return Baseline(config, rank, count(sizes, rank), {"lora_B": ratio} if ratio != 1 else {})


def _lora_count(sizes: Sizes, rank: int) -> int:
    return sum(rank * (out + into) for out, into in sizes.values())


def _lokr_count(factor: int) -> Any:
    """Parameters of LoKr: a whole left factor, and a right one of low rank where that is smaller.

    Source: peft.tuners.lokr.layer.LoKrLayer.update_layer with decompose_both=False.
    """

    def count(sizes: Sizes, rank: int) -> int:
        total = 0
        for out, into in sizes.values():
            (out_l, out_k), (in_m, in_n) = factorization(out, factor), factorization(into, factor)
            is_low_rank = rank < max(out_k, in_n) / 2
            total += out_l * in_m + (rank * (out_k + in_n) if is_low_rank else out_k * in_n)
        return total

    return count


def _alpha(text: str, rank: int) -> Any:
    """A number, or a multiple of the rank; whole where it can be, as PEFT's type says."""
    value = float(text[:-1]) * rank if text.endswith("r") else float(text)
    return int(value) if value == int(value) else value
