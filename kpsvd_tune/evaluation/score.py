"""Scoring: the tasks of a recipe around training, one task on anything, and what is kept of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import CheckpointError, InputError, ResourceError
from kpsvd_tune.evaluation.evaluate import (
    COMPLETIONS_FILE,
    SETTINGS_FILE,
    check_task,
    conditions,
    rows_source,
)
from kpsvd_tune.evaluation.evaluate import evaluate as run_task
from kpsvd_tune.evaluation.sandbox.run import NO_CODE, CodePermission
from kpsvd_tune.evaluation.scoring import missing_scorers
from kpsvd_tune.events import Events
from kpsvd_tune.models import load_model, load_tokenizer
from kpsvd_tune.phase import Phase, answering_cures, loading_cures, watched
from kpsvd_tune.processes import device, end_processes, on_main_process
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import as_mapping, score_label, score_text
from kpsvd_tune.runs.adapter_card import update_card
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.find import Found, find, load_adapter, resolve_base
from kpsvd_tune.runs.ownership import refuse_foreign, refuse_inside_run
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.storage.paths import check_replaceable, check_writable, expand

RESULTS_FILE = "results.json"
_OUR_FILES = (COMPLETIONS_FILE, SETTINGS_FILE, RESULTS_FILE)


def labelled(tasks: Sequence[EvaluationRecipe]) -> dict[str, EvaluationRecipe]:
    """Tasks by the name of their scores: the task's, numbered from the second of a kind on."""
    named: dict[str, EvaluationRecipe] = {}
    for task in tasks:
        number = sum(each.task == task.task for each in named.values()) + 1
        named[task.task if number == 1 else f"{task.task}-{number}"] = task
    return named


def check_tasks(tasks: Sequence[EvaluationRecipe], dataset: DatasetRecipe | None) -> None:
    """Refuse now what would stop the scoring after a training.

    Raises:
        InputError: Worked examples are wanted, and there are no rows to take them from.
        DataError: A task's rows or text cannot be read.
    """
    for task in tasks:
        check_task(as_trained(task, dataset))


class Scorer:
    """Scores a model on tasks and reports progress.

    Args:
        tokenizer: The model's tokenizer.
        dataset: What the model was trained on, whose template and columns hold where a task has
            none; None: the tasks' own.
        place: Device to compute on.
        events: Told of progress and scores.
        permission: To run programs, which mbpp needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: DatasetRecipe | None,
        place: torch.device,
        events: Events,
        permission: CodePermission,
    ) -> None:
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._place = place
        self._events = events
        self._permission = permission

    def score_all(
        self, model: Any, tasks: Mapping[str, EvaluationRecipe], folder: Path
    ) -> dict[str, list[Score]]:
        """Scores by name, told as they are found; completions go to a folder of the task's name.

        Completions there that another model wrote, as those of an earlier run in this place, are
        set aside.
        """
        found = {}
        for name, task in tasks.items():
            found[name] = self.score(model, task, folder / name, set_aside=True)
            for score in found[name]:
                self._events.note(f"{score.scorer}: {score_text(score.scorer, score.to_dict())}")
        return found

    def conditions(self, tasks: Mapping[str, EvaluationRecipe]) -> dict[str, str]:
        """How each task was asked, in words."""
        return {name: conditions(as_trained(task, self._dataset)) for name, task in tasks.items()}

    def score(
        self, model: Any, task: EvaluationRecipe, folder: Path, *, set_aside: bool = False
    ) -> list[Score]:
        """Run one task; an interrupted one goes on from the completions in ``folder``."""
        task = as_trained(task, self._dataset)
        self._events.stage(f"scoring {task.task}: {conditions(task)}")
        model.to(self._place)
        scores = run_task(
            model,
            self._tokenizer,
            task,
            folder,
            self._events,
            permission=self._permission,
            set_aside=set_aside,
        )
        self._events.end_progress()
        for note in missing_scorers(task.task):
            self._events.note(note)
        return scores


def evaluate(
    source: str,
    task: EvaluationRecipe,
    events: Events,
    *,
    output: Path | None = None,
    base_only: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    allow_other_base: bool = False,
    permission: CodePermission = NO_CODE,
) -> dict[str, Any]:
    """Score a run, an adapter or a model on a task.

    The scores also go to results.json beside the completions; those of a run to its results.json
    and its model card as well.

    Args:
        source: A run, an adapter folder, or a model.
        task: The task with its data and sizes.
        events: Told of progress.
        output: Folder of the completions; by default one inside the run.
        base_only: Score the base model without the adapter.
        dtype: Of the weights; by default the recipe's, else float32.
        base: Another place of the same base model.
        allow_other_base: Take a base that is not the adapter's; the results say so.
        permission: To run programs, which mbpp needs.

    Returns:
        ``{"scores": {scorer: {"value", "n", "stderr", "unextractable"}}}``, shares with their
        interval, the task, what was scored (adapter, base model or model), where the rows are from,
        how they were asked, and where the completions lie.

    Raises:
        InputError: Code may not be run, a model was given without an output folder, or what a
            model forgot was asked without an adapter.
        DataError: The task's rows or text cannot be read.
    """
    found = find(source)
    if task.task == "forgetting" and (found.adapter is None or base_only):
        raise InputError("forgetting compares an adapter with its base: give a run or an adapter")
    output = _output_folder(found, source, task, base_only, output)
    is_run = found.recipe is not None
    if is_run:
        # The scores lie in the output folder all the same.
        try:
            check_writable(expand(source))
        except InputError as error:
            events.note(f"the scores will not be added to the run: {error}")
    check_tasks([task], found.dataset)
    phase = Phase()
    with watched(phase), ExitStack() as stack:
        # Processes that do not destroy their group may end with SIGABRT after all work is done.
        stack.callback(end_processes)
        place = device()
        model_source = on_main_process(lambda: resolve_base(found, source, base))
        events.stage(f"loading {model_source.path}")
        dtype = dtype or (found.recipe.model.dtype if found.recipe else "float32")
        phase.enter("loading the model", loading_cures(dtype, "--dtype"))
        model: Any = load_model(model_source, dtype)
        other = None
        if found.adapter is not None and not base_only:
            model, other = load_adapter(model, found.adapter, allow_other_base)
        tokenizer = load_tokenizer(model_source, found.adapter)
        scorer = Scorer(tokenizer, found.dataset, place, events, permission)
        phase.enter(
            f"scoring {task.task}",
            answering_cures([task]),
            f"completions that are finished are kept in {output}",
        )
        scores = scorer.score(model, task, output)
        result: dict[str, Any] = {
            "task": task.task,
            "model": "base model" if base_only else "adapter" if found.adapter else "model",
            "file": rows_source(task),
            "scores": as_mapping(scores),
            "conditions": scorer.conditions({task.task: task})[task.task],
        }
        if other is not None:
            events.note(f"scored {other}")
            # The conditions stand in results.json and in the card of a run.
            result["conditions"] += "; on another base model than the adapter's"
            result["other_base"] = f"scored {other}"
        if (file := output / COMPLETIONS_FILE).exists():
            result["completions"] = str(file)

        def keep() -> None:
            durable.make_folder(output)
            durable.replace_file(output / RESULTS_FILE, to_json(result))
            if is_run:
                _record(RunDirectory(source), result, base_only, events)

        on_main_process(keep)
        return result


def _output_folder(
    found: Found, source: str, task: EvaluationRecipe, base_only: bool, output: Path | None
) -> Path:
    """Where the completions go: the folder asked for, or one inside the run.

    Raises:
        InputError: there is neither, or the folder may not be written to, or it holds other files.
    """
    if output is not None:
        refuse_inside_run(output, "--output")
        _check_ours(output)
    elif found.recipe is None:
        raise InputError(f"{source} is no run, so say where completions go: --output DIR")
    else:
        output = _folder(expand(source), task, base_only)
    check_writable(output)
    check_replaceable(output, _OUR_FILES)
    return output


def _check_ours(output: Path) -> None:
    """Refuse an output folder that holds anything but an earlier evaluation."""
    kept = (each.name for each in output.glob("previous-*"))
    refuse_foreign(output, (*_OUR_FILES, *kept), "--output")
    file = output / RESULTS_FILE
    if file.exists() and not {"task", "scores"} <= read_json(file).keys():
        raise InputError(
            f"--output: {file} is not of an evaluation, and would be replaced; name another folder"
        )


def _folder(run: Path, task: EvaluationRecipe, base_only: bool) -> Path:
    """Where a run keeps the completions of a task: one folder for each source of rows."""
    results = RunDirectory(run).results_file
    known = read_json(results) if results.exists() else {}
    name = re.sub(r"[^\w.-]+", "-", score_label(known, task.task, rows_source(task)))
    return run / "evaluation" / f"{'base-' if base_only else ''}{name}"


def as_trained(task: EvaluationRecipe, dataset: DatasetRecipe | None) -> EvaluationRecipe:
    """The task with what it leaves open taken from the training."""
    if dataset is None:
        return task
    update: dict[str, Any] = {
        "template": task.template or dataset.template,
        "learn": task.learn or dataset.learn,
    }
    if task.task in ("exact_match", "loss") and not task.columns:
        # They have no columns of their own; those of the training are the likeliest.
        update["columns"] = dataset.columns
    return task.model_copy(update=update)


def _record(run: RunDirectory, result: Mapping[str, Any], base_only: bool, events: Events) -> None:
    """Put scores among the results of a finished run; the latest of a task on a file stand there.

    Scores on another file get a name of their own.
    """
    if not (run.run_file.exists() and run.results_file.exists()):
        events.note(f"{run.path} has no results.json to add the scores to")
        return
    try:
        with run.lock():
            results = read_json(run.results_file)
            place, name = "base_scores" if base_only else "scores", result["task"]
            name = score_label(results, name, result["file"])
            asked = f"{name}, base model" if base_only else name
            results.setdefault(place, {})[name] = result["scores"]
            results.setdefault("score_files", {})[name] = result["file"]
            results.setdefault("score_conditions", {})[asked] = result["conditions"]
            run.finish(results)
            update_card(run.adapter, results)
    except (CheckpointError, ResourceError) as error:
        events.note(f"the scores were not added to {run.results_file}: {error}")
