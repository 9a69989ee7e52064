"""Scoring: the tasks of a recipe around training, one task on anything, and stored completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation.evaluate import evaluate as run_task
from kpsvd_tune.evaluation.generate import GenerationProgress
from kpsvd_tune.evaluation.sandbox import Sandbox
from kpsvd_tune.evaluation.scoring import check_code_execution, missing_scorers
from kpsvd_tune.models import load_model, load_tokenizer, resolve_model
from kpsvd_tune.pipeline.apply import find
from kpsvd_tune.pipeline.stages import Events, device
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.results import Score


class Scorer:
    """Scores a model on tasks and reports progress.

    Args:
        tokenizer: The model's tokenizer.
        template: The training template; None: the task's own.
        place: Device to compute on.
        events: Told of progress and scores.
        offline: Make no network call.
        allow_code_execution: Whether generated programs may be run.
        sandbox: What they run in.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        place: torch.device,
        events: Events,
        *,
        offline: bool = False,
        allow_code_execution: bool = False,
        sandbox: Sandbox = "bwrap",
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._place = place
        self._events = events
        self._offline = offline
        self._allow_code_execution = allow_code_execution
        self._sandbox = sandbox

    def score_all(
        self, model: Any, tasks: Sequence[EvaluationRecipe], folder: Path
    ) -> dict[str, list[Score]]:
        """Scores by task; the n-th task's completions go to ``folder/N-TASK``."""
        return {
            task.task: self.score(model, task, folder / f"{number}-{task.task}")
            for number, task in enumerate(tasks)
        }

    def score(self, model: Any, task: EvaluationRecipe, folder: Path) -> list[Score]:
        """Run one task; an interrupted one goes on from the completions in ``folder``."""
        self._events.stage(f"scoring {task.task} in {folder}")
        model.to(self._place)
        scores = run_task(
            model,
            self._tokenizer,
            task,
            folder,
            template=self._template,
            allow_code_execution=self._allow_code_execution,
            sandbox=self._sandbox,
            offline=self._offline,
            progress=self._answering,
            score_progress=lambda done, total: self._events.advance("running", done, total),
        )
        self._events.end_progress()
        for score in scores:
            self._events.note(
                f"{score.scorer}: {100 * score.value:.1f} % of {score.n} (standard error "
                f"{100 * score.stderr:.1f}), {score.unextractable} without an answer"
            )
        for note in missing_scorers(task.task):
            self._events.note(note)
        return scores

    def _answering(self, progress: GenerationProgress) -> None:
        left = progress.seconds_left
        detail = f"{progress.tokens_per_second:.0f} tokens/s"
        self._events.advance(
            "answering",
            progress.done,
            progress.total,
            detail if left is None else f"{detail}, {left:.0f} s left",
        )


def evaluate(
    source: str,
    task: EvaluationRecipe,
    events: Events,
    *,
    output: Path | None = None,
    base_only: bool = False,
    offline: bool = False,
    allow_code_execution: bool = False,
    sandbox: Sandbox = "bwrap",
) -> dict[str, Any]:
    """Score a run, an adapter or a model on a task.

    Args:
        source: A run, an adapter folder, or a model.
        task: The task with its data and sizes.
        events: Told of progress.
        output: Folder of the completions; by default one inside the run.
        base_only: Score the base model without the adapter.
        offline: Make no network call.
        allow_code_execution: Whether generated programs may be run.
        sandbox: bwrap, or none to run them without protection.

    Returns:
        ``{"scores": {scorer: {"value", "n", "stderr", "unextractable"}}}`` and where the
        completions lie.

    Raises:
        InputError: Code may not be run, or a model was given without an output folder.
    """
    check_code_execution(task.task, allow_code_execution=allow_code_execution, sandbox=sandbox)
    found = find(source)
    if output is None:
        if found.recipe is None:
            raise InputError(f"{source} is no run, so say where completions go: --output DIR")
        output = Path(source) / "evaluation" / f"{'base-' if base_only else ''}{task.task}"
    model_source = resolve_model(found.base, found.revision, offline)
    events.stage(f"loading {model_source.path}")
    model: Any = load_model(model_source, found.recipe.model.dtype if found.recipe else "float32")
    if found.adapter is not None and not base_only:
        model = PeftModel.from_pretrained(model, found.adapter)
    dataset = found.recipe.dataset if found.recipe else None
    if task.task == "exact_match" and dataset is not None and not task.columns:
        # It has no columns of its own; those of the training are the likeliest.
        task = task.model_copy(update={"columns": dataset.columns})
    scorer = Scorer(
        load_tokenizer(model_source),
        dataset.template if dataset else None,
        device(),
        events,
        offline=offline,
        allow_code_execution=allow_code_execution,
        sandbox=sandbox,
    )
    return {
        "task": task.task,
        "scores": as_mapping(scorer.score(model, task, output)),
        "completions": str(output / "completions.jsonl"),
    }


def as_mapping(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Scorer to its value, n, stderr and unextractable."""
    return {
        score.scorer: {k: v for k, v in score.to_dict().items() if k != "scorer"}
        for score in scores
    }
