"""A run that is trained and not scored: its tasks, scored as they are after other trainings.

Answers are not generated from weights that processes share out, so such a training ends without
scores, and says so in results.json. A process that loads the whole model makes up for them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation.evaluate import Scorer, check_tasks, labelled
from kpsvd_tune.evaluation.sandbox.run import Sandbox
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource, load_tokenizer
from kpsvd_tune.phase import Phase, answering_cures, loading_cures
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import EvaluationRecipe, Recipe
from kpsvd_tune.report.live_page import LivePage
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import UNSCORED
from kpsvd_tune.runs.adapter_folder import update_card
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.find import Found, find, load, place_loaded
from kpsvd_tune.storage.json_files import read_json


@dataclass(frozen=True)
class UnscoredRun:
    """A trained run, and with what it is scored."""

    run: RunDirectory
    found: Found  # the run: its recipe and its adapter
    base: ModelSource
    dtype: str  # to load the base in
    place: torch.device  # to compute on
    events: Events  # told of stages, progress and scores
    phase: Phase
    sandbox: Sandbox | None  # for programs, which mbpp runs; None: they may not run
    allow_other_base: bool = False

    @property
    def recipe(self) -> Recipe:
        """The run's."""
        assert self.found.recipe is not None  # only a run has scores to make up for
        return self.found.recipe

    def score(self) -> dict[str, Any]:
        """Score the recipe's tasks, put the scores among the run's results, and give these.

        Completions go where a training puts them, and those that are there are kept. The folder is
        locked meanwhile. Every process of several calls this.

        Raises:
            FolderInUseError: Another command trains or scores the run.
        """
        tasks = labelled(self.recipe.evaluation)
        with ExitStack() as stack:
            on_main_process(lambda: _claim(stack, self.run))
            check_tasks(self.recipe.evaluation, self.found.dataset)
            tokenizer = load_tokenizer(self.base, self.found.adapter)
            scorer = Scorer(tokenizer, self.found.dataset, self.place, self.events, self.sandbox)
            first = {name: task for name, task in tasks.items() if task.before}
            before = self._score(scorer, self._at_start(), first, "before") if first else {}
            after = self._score(scorer, self.found, tasks, "after")
            scores = scorer.of_training(tasks, before, after)
            return on_main_process(lambda: _record(self.run, scores))

    def _at_start(self) -> Found:
        """The model before the training: the base, or with the adapter that it began with."""
        adapter = self.recipe.adapter.from_
        return replace(self.found, adapter=None if adapter is None else find(adapter).adapter)

    def _score(
        self, scorer: Scorer, found: Found, tasks: Mapping[str, EvaluationRecipe], when: str
    ) -> Mapping[str, Sequence[Score]]:
        """Load a model and score it; afterwards it is gone."""
        self.events.stage(f"loading {found.adapter or self.base.path}")
        is_gpu = self.place.type != "cpu"
        slower = ["ACCELERATE_USE_CPU=true in the environment: the CPU scores, slowly"] * is_gpu
        self.phase.enter("loading the model", [*slower, *loading_cures(self.dtype, "--dtype")])
        loaded = load(found, self.base, self.dtype, allow_other_base=self.allow_other_base)
        place_loaded(found, loaded, self.place, self.events.note)
        folder = self.run.path / "evaluation" / when
        kept = f"finished completions are kept in {folder}"
        cures = [*slower, *answering_cures(list(tasks.values()))]
        self.phase.enter(f"scoring the model {when} the training", cures, kept)
        scores = scorer.score_all(loaded.model, tasks, folder)
        del loaded
        gc.collect()  # a model with an adapter refers to itself
        return scores


def _claim(stack: ExitStack, run: RunDirectory) -> None:
    """Keep others out of the run's folder, if its scores are still missing by then."""
    stack.enter_context(run.lock())
    status = read_json(run.run_file).get("status")
    if status != "finished" or UNSCORED not in read_json(run.results_file):
        raise InputError(
            f"{run.path} was scored or trained on by another command meanwhile; look at "
            f"{run.results_file}"
        )


def _record(run: RunDirectory, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Put the scores among the results of the run, on its card and its page."""
    results = read_json(run.results_file)
    del results[UNSCORED]
    for key, value in scores.items():
        # `eval` may have added scores of other tasks.
        results[key] = {**results.get(key, {}), **value}
    run.replace_results(results)
    update_card(run.adapter, results)
    LivePage(run.path).refresh(is_last=True)
    return results
