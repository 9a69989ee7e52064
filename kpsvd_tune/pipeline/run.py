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
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.checkpoint import RunDirectory, Start, read_json
from kpsvd_tune.data import PreparedData, TokenizedRow, prepare
from kpsvd_tune.data.preflight import check_known_tokens, pad_token_id
from kpsvd_tune.decompose import Decomposition, layers_of
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.evaluation.sandbox import Sandbox
from kpsvd_tune.models import ModelSource, base_fingerprint, load_tokenizer
from kpsvd_tune.pipeline.save import save_adapter
from kpsvd_tune.pipeline.score import Scorer, check_tasks, labelled
from kpsvd_tune.pipeline.stages import Events, adapt, find_model
from kpsvd_tune.pipeline.start import starting_factors
from kpsvd_tune.recipe import DatasetRecipe, Recipe, recipe_to_yaml
from kpsvd_tune.report.files import write_rank_report
from kpsvd_tune.report.results import RankReport, Score
from kpsvd_tune.report.score import as_mapping
from kpsvd_tune.training import Training, make_accelerator, on_main_process

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "kpsvd-tune")


def train(
    recipe: Recipe,
    events: Events,
    *,
    offline: bool = False,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    allow_code_execution: bool = False,
    sandbox: Sandbox = "bwrap",
) -> dict[str, Any]:
    """Run a recipe, or continue the run that its output_dir holds.

    Args:
        recipe: The recipe.
        events: Told of stages and progress.
        offline: Make no network call.
        resume: auto, never, or the path of a checkpoint.
        allow_change: Recipe keys that may differ from those the run began with.
        allow_code_execution: Whether an evaluation may run generated programs.
        sandbox: What they run in; none runs them without protection.

    Returns:
        The content of results.json.

    Raises:
        KpsvdTuneError: See :mod:`kpsvd_tune.errors`; the message says what to do.
    """
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    # Everything that can be refused is refused before the first long stage.
    check_tasks(
        recipe.evaluation,
        recipe.dataset,
        allow_code_execution=allow_code_execution,
        sandbox=sandbox,
        offline=offline,
    )
    run = RunDirectory(recipe.output_dir)
    accelerator = make_accelerator(recipe.train, recipe.tracking, run.path / "logs")
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: stack.enter_context(run.lock()))
        source = on_main_process(accelerator, lambda: find_model(recipe, offline))
        tokenizer = load_tokenizer(source)
        data = _prepare(recipe.dataset, tokenizer, recipe.train.seed, events, offline)
        base_files = on_main_process(accelerator, lambda: base_fingerprint(source))
        start = on_main_process(
            accelerator,
            lambda: run.begin(
                recipe_to_yaml(recipe),
                {
                    "recipe": recipe.model_dump(mode="json"),
                    "base": base_files,
                    "dataset": data.sha256,
                    "num_processes": accelerator.num_processes,
                },
                _about(recipe, accelerator),
                resume=resume,
                allow_change=allow_change,
            ),
        )
        if start.is_finished:
            events.note(
                f"the run in {run.path} is finished; nothing was done. To run it again, choose "
                "another output_dir or pass --resume never"
            )
            return read_json(run.results_file)
        pad_id = pad_token_id(tokenizer)
        report, factors = _decompose(
            recipe, source, data.train, pad_id, run, start, accelerator, events
        )
        layers = layers_of(report, has_fingerprints=recipe.adapter.init == "weight")
        model = adapt(recipe, source, layers, factors, base_files)
        scorer = Scorer(
            tokenizer,
            recipe.dataset,
            accelerator.device,
            events,
            offline=offline,
            allow_code_execution=allow_code_execution,
            sandbox=sandbox,
        )
        tasks = labelled(recipe.evaluation)
        # Offsets are zero here, so this is the base model's score, also when a run goes on.
        before = scorer.score_all(
            model,
            {label: task for label, task in tasks.items() if task.before},
            run.path / "evaluation" / "before",
        )
        check_known_tokens(data.train, model.get_input_embeddings().num_embeddings)
        training = Training(
            model,
            data.train,
            data.validation,
            recipe.train,
            accelerator,
            run,
            pad_token_id=pad_id,
            checkpoint=start.checkpoint,
            settings=recipe.model_dump(mode="json"),
            rate_factors=rate_factors(
                model,
                ratio=recipe.adapter.rate_ratio,
                is_relative=recipe.adapter.rate == "relative",
            ),
        )
        if start.checkpoint is not None:
            events.note(f"continuing from {start.checkpoint}")
        events.stage(f"training for {training.num_steps} steps")
        for metrics in training.steps():
            events.step(metrics, training.num_steps)
        events.end_progress()
        outcome = training.result()
        after = scorer.score_all(model, tasks, run.path / "evaluation" / "after")
        results = outcome.to_dict() | _scores(before, after)
        if tasks:
            results["score_conditions"] = scorer.conditions(tasks)
        on_main_process(
            accelerator, lambda: _finish(run, model, tokenizer, recipe, report, results)
        )
        events.note(f"adapter: {run.adapter}, results: {run.results_file}")
    return results


def _prepare(
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    events: Events,
    offline: bool,
) -> PreparedData:
    events.stage(f"reading {dataset.path}")
    data = prepare(
        dataset,
        tokenizer,
        seed=seed,
        offline=offline,
        progress=lambda done, total: events.advance("tokenising", done, total),
    )
    events.preflight(data.report)
    return data


def _decompose(
    recipe: Recipe,
    source: ModelSource,
    rows: Sequence[TokenizedRow],
    pad_id: int,
    run: RunDirectory,
    start: Start,
    accelerator: Accelerator,
    events: Events,
) -> tuple[RankReport, Mapping[str, Any]]:
    """The decomposition of this run: read back where a run goes on, never made twice."""
    factors_file, report_file = run.init / "factors.safetensors", run.init / "rank_report.json"

    def compute() -> None:
        events.stage(f"decomposing {recipe.model.path}")
        began = time.monotonic()
        decomposition = starting_factors(
            recipe,
            source,
            rows,
            pad_id,
            accelerator.device,
            events,
            seed=recipe.train.seed,
        )
        for note in decomposition.notes:
            events.note(note)
        # Factors last: with them the stage counts as done.
        missing_page = write_rank_report(decomposition.report, run.init)
        if missing_page is not None:
            events.note(missing_page)
        decomposition.save_factors(factors_file)
        run.update(init_seconds=time.monotonic() - began)

    is_ours = start.checkpoint is not None or start.is_same
    if not (is_ours and factors_file.is_file() and report_file.is_file()):
        on_main_process(accelerator, compute)
    report = RankReport.from_dict(read_json(report_file))
    events.ranks(report)
    return report, Decomposition.load_factors(factors_file)


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


def _finish(
    run: RunDirectory,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    report: RankReport,
    results: Mapping[str, Any],
) -> None:
    save_adapter(model, tokenizer, run.adapter, recipe, report, results)
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
