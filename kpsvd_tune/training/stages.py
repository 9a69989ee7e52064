"""The command that a recipe is for: decompose, train, score, save."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.data import TokenizedRow, prepare, source_names
from kpsvd_tune.data.rows.preflight import check_known_tokens, model_limits, pad_token_id
from kpsvd_tune.decompose.start import adapt
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.evaluation.evaluate import rows_source
from kpsvd_tune.evaluation.sandbox.run import NO_CODE, CodePermission
from kpsvd_tune.evaluation.score import Scorer, check_tasks, labelled
from kpsvd_tune.events import Events
from kpsvd_tune.launch import init_method
from kpsvd_tune.models import (
    ModelSource,
    base_fingerprint,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.phase import (
    Phase,
    answering_cures,
    data_cures,
    decomposition_cures,
    loading_cures,
    training_cures,
    watched,
)
from kpsvd_tune.processes import end_processes, name_lost_process, on_main_process
from kpsvd_tune.recipe import DatasetRecipe, Recipe, recipe_to_yaml
from kpsvd_tune.report.results import RankReport, Score
from kpsvd_tune.report.run import as_mapping, ending
from kpsvd_tune.runs import RunDirectory
from kpsvd_tune.runs.adapter_folder import adapter_hash, check_own
from kpsvd_tune.runs.find import ADAPTER_KEY, TEMPLATE_KEY, trained_as
from kpsvd_tune.runs.ownership import is_run, refuse_inside_run
from kpsvd_tune.runs.save_adapter import save_adapter
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.training import (
    Training,
    make_accelerator,
)
from kpsvd_tune.training.engines.deepspeed_config import zero_stage
from kpsvd_tune.training.from_adapter import (
    find_adapter,
    holds_adapter,
    load_adapted,
    write_ranks,
)
from kpsvd_tune.training.initialise import initialise
from kpsvd_tune.training.schedule import run_length

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "kpsvd-tune")

# Parts of results.json that `eval RUN` writes as well.
_ADDED_BY_EVAL = ("scores", "base_scores", "score_files", "score_conditions")


def train(
    recipe: Recipe,
    events: Events,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    allow_other_base: bool = False,
    permission: CodePermission = NO_CODE,
) -> dict[str, Any]:
    """Run a recipe, or continue the run that its output_dir holds.

    Args:
        recipe: The recipe.
        events: Told of stages and progress.
        resume: auto, never, or the path of a checkpoint.
        allow_change: Recipe keys that may differ from those the run began with.
        allow_other_base: Go on from an adapter (`adapter.from`) of another base model.
        permission: To run programs, which an evaluation on mbpp needs.

    Returns:
        The content of results.json.

    Raises:
        KpsvdTuneError: See :mod:`kpsvd_tune.errors`; the message says what to do.
    """
    dataset = recipe.dataset
    if dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    if recipe.train.parallel == "fsdp" and recipe.evaluation:
        raise RecipeError(
            "evaluation: answers are not generated from sharded weights (train.parallel: fsdp); "
            "pass evaluation=[] and score the finished run with `kpsvd-tune eval`"
        )
    # Everything that can be refused is refused before the first long stage.
    check_tasks(
        recipe.evaluation,
        recipe.dataset,
    )
    adapter_folder = find_adapter(recipe)
    others: list[str] = []
    run = RunDirectory(recipe.output_dir)
    phase = Phase()
    with watched(phase), ExitStack() as stack:
        phase.enter("meeting the other ranks")
        stack.callback(end_processes)
        accelerator = make_accelerator(
            recipe.train, recipe.tracking, run.path / "logs", init_method()
        )
        stack.enter_context(name_lost_process(lambda: phase.name))
        if (stage := zero_stage(accelerator)) == 3 and recipe.evaluation:
            raise RecipeError(
                "evaluation: answers are not generated from sharded weights (DeepSpeed's ZeRO 3); "
                "pass evaluation=[] and score the finished run with `kpsvd-tune eval`"
            )
        on_main_process(lambda: _claim(run, resume, stack))
        phase.enter("finding the base model")
        source = on_main_process(lambda: resolve_model(recipe.model.path, recipe.model.revision))
        tokenizer = load_tokenizer(source)
        phase.enter("reading and tokenising the data", data_cures(recipe))
        train_rows, validation_rows, data_sha256, template = on_main_process(
            lambda: _prepare(dataset, tokenizer, source, recipe.train.seed, events),
        )
        # Only the first process has read the rows, which decide on it where the recipe does not.
        tokenizer.chat_template = on_main_process(lambda: tokenizer.chat_template)
        length = run_length(
            recipe.train, len(train_rows), len(validation_rows), accelerator.num_processes
        )
        # A run that is under way goes on, whatever is thought of its settings by now.
        if length.faults and (resume == "never" or not run.holds_checkpoint()):
            raise RecipeError("\n".join(length.faults))
        base_files = on_main_process(lambda: base_fingerprint(source))
        origin = {} if adapter_folder is None else {"adapter": adapter_hash(adapter_folder)}
        start = on_main_process(
            lambda: run.begin(
                recipe_to_yaml(recipe),
                {
                    "recipe": recipe.model_dump(mode="json"),
                    "base": base_files,
                    "dataset": data_sha256,
                    "num_processes": accelerator.num_processes,
                    **origin,
                }
                | ({} if stage is None else {"deepspeed_zero_stage": stage}),
                {**_about(recipe, accelerator), TEMPLATE_KEY: template},
                resume=resume,
                allow_change=allow_change,
                rebuild=not holds_adapter(run.adapter),
            ),
        )
        if start.is_finished:
            if holds_adapter(run.adapter):
                check_own(run.adapter, read_json(run.run_file).get(ADAPTER_KEY))
            missing = (
                ""
                if holds_adapter(run.adapter)
                else (" Its adapter is gone, and no checkpoint is left to make it from.")
            )
            events.note(
                f"the run in {run.path} is finished; nothing was done.{missing} To run it again, "
                "choose another output_dir or pass --resume never"
            )
            return read_json(run.results_file)
        for note in length.notes:
            events.note(note)
        pad_id = pad_token_id(tokenizer)
        if adapter_folder is None:
            phase.enter(
                "decomposing the base model",
                decomposition_cures(recipe),
                "finished matrices are kept",
            )
            recipe, decomposition = initialise(
                recipe,
                source,
                train_rows,
                validation_rows,
                length.num_steps,
                pad_id,
                run,
                start,
                accelerator,
                events,
            )
            phase.enter("loading the base model", loading_cures(recipe.model.dtype))
            report = decomposition.report
            model = adapt(recipe, source, decomposition, base_files)
        else:
            phase.enter("loading the adapter and its base model", loading_cures(recipe.model.dtype))
            events.stage(f"loading {adapter_folder} on {recipe.model.path}")
            model = load_adapted(
                recipe,
                source,
                adapter_folder,
                base_files,
                events,
                others if allow_other_base else None,
            )
            report = on_main_process(lambda: write_ranks(model, recipe, run.init, events))
        scorer = Scorer(
            tokenizer,
            trained_as(dataset, template),
            accelerator.device,
            events,
            permission,
        )
        tasks = labelled(recipe.evaluation)
        phase.enter(
            "scoring the base model",
            answering_cures(recipe.evaluation),
            "finished completions are kept",
        )
        # Offsets are those of step 0 here, also when a run goes on: zero, which is the base model,
        # unless adapter.from gave others.
        before = scorer.score_all(
            model,
            {label: task for label, task in tasks.items() if task.before},
            run.path / "evaluation" / "before",
        )
        phase.enter("preparing the training", training_cures(recipe))
        # The preflight held them against the configuration; this is the model itself.
        for part in (train_rows, validation_rows):
            check_known_tokens(part, model.get_input_embeddings().num_embeddings)
        training = Training(
            model,
            train_rows,
            validation_rows,
            recipe.train,
            accelerator,
            run,
            pad_token_id=pad_id,
            checkpoint=start.checkpoint,
            settings=recipe.model_dump(mode="json"),
            rate_factors=rate_factors(model, is_relative=recipe.adapter.rate == "relative"),
        )
        if start.checkpoint is not None:
            events.note(f"continuing from {start.checkpoint}")
        events.stage(f"training for {training.num_steps} steps")
        cures = training_cures(recipe)
        phase.enter(f"training, step {training.progress.step + 1} of {training.num_steps}", cures)
        for metrics in training.steps():
            events.step(metrics, training.num_steps)
            phase.enter(f"training, step {metrics.step + 1} of {training.num_steps}", cures)
        events.end_progress()
        phase.enter(
            "scoring and saving",
            answering_cures(recipe.evaluation),
            "the training and finished completions are kept",
        )
        outcome = training.result()
        weights = training.trained_weights()
        after = scorer.score_all(model, tasks, run.path / "evaluation" / "after")
        results = outcome.to_dict() | training.halvings()
        results |= ending(results, from_adapter=adapter_folder is not None)
        results |= _scores(before, after)
        results |= {"other_base": f"trained {others[0]}"} if others else {}
        if tasks:
            results["score_files"] = {name: rows_source(task) for name, task in tasks.items()}
            results["score_conditions"] = scorer.conditions(tasks)
        on_main_process(lambda: _finish(run, model, weights, tokenizer, recipe, report, results))
        events.note(f"adapter: {run.adapter}, results: {run.results_file}")
    return results


def _prepare(
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    seed: int,
    events: Events,
) -> tuple[Sequence[TokenizedRow], Sequence[TokenizedRow], str, str]:
    """Rows to train on, held-out rows, the hash of both, and the template of both."""
    events.stage(f"reading {source_names(dataset)}")
    data = prepare(
        dataset,
        tokenizer,
        seed=seed,
        progress=lambda done, total: events.advance("tokenising", done, total),
        limits=model_limits(load_skeleton(source)),
    )
    events.note(data.cache_note)
    events.preflight(data.report)
    return data.train, data.validation, data.sha256, data.template


def _scores(
    before: Mapping[str, Sequence[Score]], after: Mapping[str, Sequence[Score]]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if after:
        results["scores"] = {task: as_mapping(scores) for task, scores in after.items()}
    if before:
        results["base_scores"] = {task: as_mapping(scores) for task, scores in before.items()}
    for task in before:
        results[task] = {
            "before": before[task][0].value,
            "after": after[task][0].value,
            "n": after[task][0].n,
        }
    return results


def _claim(run: RunDirectory, resume: str, stack: ExitStack) -> None:
    """Make sure that the folder is this run's to write, then keep other runs out of it."""
    if not is_run(run.path):
        refuse_inside_run(run.path, "output_dir")
    run.check_ours(resume)
    stack.enter_context(run.lock())


def _finish(
    run: RunDirectory,
    model: PeftModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    report: RankReport,
    results: Mapping[str, Any],
) -> None:
    # Where a finished run is rebuilt, what `eval` has added to its results stays.
    earlier = read_json(run.results_file) if run.results_file.exists() else {}
    for key, value in earlier.items():
        if key in _ADDED_BY_EVAL and isinstance(value, dict):
            results = {**results, key: {**value, **results.get(key, {})}}
    save_adapter(model, weights, tokenizer, run.adapter, recipe, report, results)
    run.update(**{ADAPTER_KEY: adapter_hash(run.adapter)})
    run.finish(results)


def _about(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "seed": recipe.train.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
