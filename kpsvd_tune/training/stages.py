"""The stages of `train`: prepare the run, read the data, start the model, train it, finish."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kpsvd_tune.adapter.costs import from_record, table_of, to_record, use_costs
from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.context import Context, RunInput, RunOptions
from kpsvd_tune.data import PreparedData, prepare, source_names
from kpsvd_tune.data.rows.preflight import check_known_tokens, model_limits, pad_token_id
from kpsvd_tune.decompose.start import adapt, fetching
from kpsvd_tune.errors import KpsvdTuneError, RecipeError, StoppedBySignal
from kpsvd_tune.evaluation.evaluate import Scorer, check_tasks, labelled
from kpsvd_tune.evaluation.kept_text import KeptText, read_kept_text
from kpsvd_tune.evaluation.known import known_rows
from kpsvd_tune.events import Events
from kpsvd_tune.hardware.bf16 import without_bf16
from kpsvd_tune.hardware.devices import hardware_name
from kpsvd_tune.launch import init_method
from kpsvd_tune.models import (
    base_fingerprint,
    base_of,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.models.offload import place
from kpsvd_tune.phase import (
    answering_cures,
    data_cures,
    decomposition_cures,
    loading_cures,
    training_cures,
    watched,
)
from kpsvd_tune.processes import end_processes, name_lost_process, on_main_process
from kpsvd_tune.recipe import DatasetRecipe, Recipe, recipe_to_yaml
from kpsvd_tune.report.card import adapter_card
from kpsvd_tune.report.results import LearnedReport, RankReport, Score
from kpsvd_tune.report.run import UNSCORED, ending
from kpsvd_tune.report.run_files import INSTALLED_KEY, KEPT_TEXT_KEY
from kpsvd_tune.runs.adapter_folder import (
    adapter_hash,
    check_own,
    holds_adapter,
    save_adapter,
)
from kpsvd_tune.runs.described import ROWS_KEY, describe_training
from kpsvd_tune.runs.directory import RunDirectory, Start, time_text
from kpsvd_tune.runs.find import ADAPTER_KEY, TEMPLATE_KEY, trained_as
from kpsvd_tune.runs.installed import installed_from
from kpsvd_tune.runs.ownership import is_run, refuse_inside_run
from kpsvd_tune.runs.record import RunEvents
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.training.accelerator import join, make_accelerator, shares_weights
from kpsvd_tune.training.cost import earlier_device_seconds, run_cost, start_usage
from kpsvd_tune.training.device_map import check_device_map, check_place
from kpsvd_tune.training.engines.deepspeed_config import zero_stage
from kpsvd_tune.training.from_adapter import find_adapter, load_adapted, write_ranks
from kpsvd_tune.training.global_batch import fit_global_batch
from kpsvd_tune.training.initialise import initialise
from kpsvd_tune.training.learned import measure_learned
from kpsvd_tune.training.loop import Training
from kpsvd_tune.training.precision import (
    PRECISION_KEY,
    Settled,
    asks_for_auto,
    going_on,
    settle_precision,
)
from kpsvd_tune.training.restrain import restrain
from kpsvd_tune.training.schedule import run_length
from kpsvd_tune.training.whole import whole_warnings
from kpsvd_tune.units import counted, duration
from kpsvd_tune.watch.before import row_warnings, without
from kpsvd_tune.watch.choice import bf16_fallback, rank_fallbacks

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "kpsvd-tune")

# Where run.json keeps the constants by which ways to compute are chosen.
COSTS_KEY = "costs"
# Parts of results.json that `eval RUN` writes as well.
_ADDED_BY_EVAL = ("scores", "base_scores", "score_files", "score_conditions")

# Figures of results.json that the last event of a run rests on.
_END_EVIDENCE = (
    *("steps", "train_loss", "validation_loss", "adapter_step", "adapter_validation_loss"),
    "wall_seconds",
)

_KEPT = "the training and finished completions are kept"


@dataclass(frozen=True)
class StartedModel:
    """The model as training finds it, the base with its adapter."""

    model: PeftModel
    recipe: Recipe  # with the energy threshold chosen in place of auto
    ranks: RankReport
    other_base: str | None = None  # says so where the adapter gone on from is of another base


@dataclass(frozen=True)
class TrainedModel:
    """What training leaves."""

    training: Training  # the loop, which knows how it went
    scores_before: Mapping[str, Sequence[Score]]  # before training, by name of the task


@contextmanager
def prepare_run(recipe: Recipe, events: Events, options: RunOptions) -> Iterator[Context]:
    """Refuse what cannot work, gather the processes and take the run's folder."""
    for doubt in _check(recipe):
        events.note(doubt)
    run = RunDirectory(recipe.output_dir)
    with watched() as phase, ExitStack() as stack:
        phase.enter("meeting the other ranks")
        stack.callback(end_processes)
        settled = _settle_precision(recipe, options)
        recipe = settled.recipe
        accelerator = make_accelerator(
            recipe.train, recipe.tracking, run.path / "logs", init_method()
        )

        def kept() -> str:
            if run.holds_checkpoint():
                return "The last checkpoint is whole"
            return "There is no checkpoint yet; what was finished before is kept"

        lost = name_lost_process(lambda: phase.name, run.path / ".ranks", kept=kept)
        is_sharded = zero_stage(accelerator) == 3
        _check_restrain(recipe, "DeepSpeed's ZeRO 3", is_sharded)
        _check_quantisation(recipe, "DeepSpeed's ZeRO 3", is_sharded)
        check_place(recipe, accelerator)

        def claim() -> None:
            if not is_run(run.path):
                refuse_inside_run(run.path, "output_dir")
            run.check_ours(options.resume)
            stack.enter_context(run.lock())

        with name_lost_process(lambda: phase.name):
            on_main_process(claim)
        # Only now, for the folder may have been refused.
        stack.enter_context(lost)
        recipe, options, fitted = on_main_process(
            lambda: _with_same_rows(recipe, run, options, accelerator.num_processes)
        )
        told = RunEvents(events, run, is_main=accelerator.is_main_process)
        usage = start_usage(accelerator, options.began)
        # One device a process.
        run.device_seconds = lambda: usage.seconds() * accelerator.num_processes
        if settled.note is not None:
            told.note(settled.note)
        about: dict[str, Any] = {COSTS_KEY: _choose_costs(run, options, accelerator.device)}
        stack.callback(use_costs, None)
        if settled.about is not None:
            about[PRECISION_KEY] = settled.about
        context = Context(recipe, run, accelerator, told, phase, options, usage, fitted, about)
        with _ending_recorded(context):
            yield context


def _choose_costs(run: RunDirectory, options: RunOptions, device: torch.device) -> dict[str, Any]:
    """Take the constants of this hardware for the choice of ways, or those that the run began with.

    Ways differ in how sums are rounded, so a run that goes on elsewhere keeps its own. Gives what
    run.json holds of them; equal in every process.
    """

    def choose() -> dict[str, Any]:
        known = None
        if options.resume != "never" and run.run_file.exists() and run.holds_checkpoint():
            # A run of an older version had the common ones.
            known = read_json(run.run_file).get(COSTS_KEY, {"hardware": "", "constants": {}})
        if known is not None:
            return dict(known)
        name = hardware_name(device)
        return {"hardware": name, "constants": to_record(table_of(name))}

    chosen = on_main_process(choose)
    use_costs(from_record(chosen["constants"]))
    return chosen


def _settle_precision(recipe: Recipe, options: RunOptions) -> Settled:
    """The recipe without `auto`, as the main process finds it; the same in every process."""
    if not asks_for_auto(recipe):
        return Settled(recipe)
    device = join(init_method())

    def settle() -> Settled:
        record = None if options.resume == "never" else going_on(recipe)
        return settle_precision(recipe, device, record)

    return on_main_process(settle)


def _with_same_rows(
    recipe: Recipe, run: RunDirectory, options: RunOptions, num_processes: int
) -> tuple[Recipe, RunOptions, str | None]:
    """The recipe fitted to another number of processes, what is allowed then, and what to tell."""
    if options.resume == "never" or not run.holds_checkpoint() or not run.run_file.exists():
        return recipe, options, None
    record = read_json(run.run_file)
    fitted = fit_global_batch(recipe, record, num_processes, options.allow_change)
    allowed = (*options.allow_change, *fitted.accepted)
    return fitted.recipe, replace(options, allow_change=allowed), fitted.note


@contextmanager
def _ending_recorded(context: Context) -> Iterator[None]:
    """Write down how the run ended where it did not reach its end, for its report."""
    try:
        yield
    except BaseException as error:
        ended = _how_it_ended(error, context.phase.name)
        context.events.ended(ended)
        if context.accelerator.is_main_process:
            is_stopped = isinstance(error, StoppedBySignal | KeyboardInterrupt)
            reason = str(error) if isinstance(error, KpsvdTuneError) and str(error) else ended
            # What goes wrong here would hide why the run ended.
            with suppress(KpsvdTuneError):
                if context.run.interrupted("stopped" if is_stopped else "failed", reason):
                    context.page.refresh(is_last=True)
        raise


def read_data(context: Context) -> RunInput:
    """Find the base model, read and tokenise the rows, and tell where the run begins."""
    recipe, phase = context.recipe, context.phase
    phase.enter("finding the base model")
    source = on_main_process(lambda: resolve_model(recipe.model.path, recipe.model.revision))
    tokenizer = load_tokenizer(source)
    phase.enter("reading and tokenising the data", data_cures(recipe))
    assert recipe.dataset is not None  # checked when the run was prepared
    dataset, adapter = recipe.dataset, find_adapter(recipe)
    # Before the rows are read, for it refuses too.
    warnings = list(whole_warnings(recipe, adapter))

    def read() -> tuple[Any, ...]:
        skeleton = load_skeleton(source)
        kept = None
        if recipe.restrain is not None:
            kept = read_kept_text(skeleton, tokenizer, recipe.restrain.text)
        found = read_rows(recipe, dataset, tokenizer, skeleton, context.events)
        for note in known_rows(recipe.evaluation, dataset, found):
            context.events.note(note)
        told = found.report.to_dict(), tokenizer.chat_template
        return found.train, found.validation, found.sha256, found.template, *told, kept

    train, validation, sha256, template, preflight, chat_template, kept = on_main_process(read)
    # Where the recipe names no chat template the rows decide which one is used.
    tokenizer.chat_template = chat_template
    length = run_length(
        recipe.train, len(train), len(validation), context.accelerator.num_processes
    )
    # A run that is under way goes on, whatever is thought of its settings by now.
    is_new = context.options.resume == "never" or not context.run.holds_checkpoint()
    if length.faults and is_new:
        raise RecipeError("\n".join(length.faults))
    base_files = on_main_process(lambda: base_fingerprint(source))
    identity = _identity(context, base_files, sha256, adapter, kept)
    rows = {"train": len(train), "validation": len(validation)}
    start = on_main_process(lambda: _begin(context, identity, template, rows))
    if not start.is_finished:
        context.events.begin(start.changed)
        if context.going_on is not None:
            context.events.note(context.going_on)
        file = context.run.preflight_file
        on_main_process(lambda: replace_file(file, to_json(preflight)))
        context.page.refresh()
        for note in length.notes:
            context.events.note(note)
        for warning in (*length.warnings, *warnings):
            context.events.tell(warning)
    return RunInput(
        source=source,
        base_files=base_files,
        tokenizer=tokenizer,
        dataset=trained_as(dataset, template),
        train=train,
        validation=validation,
        pad_token_id=pad_token_id(tokenizer),
        num_steps=length.num_steps,
        adapter=adapter,
        start=start,
        kept_text=kept,
    )


def earlier_results(context: Context) -> dict[str, Any]:
    """Say that the run is finished, and return the content of its results.json."""
    run, missing = context.run, ""
    results = on_main_process(lambda: _left_unscored(context))
    if UNSCORED in results:
        context.events.note(f"the training in {run.path} is finished; its scores are missing")
        return results
    if holds_adapter(run.adapter):
        check_own(run.adapter, read_json(run.run_file).get(ADAPTER_KEY))
    else:
        missing = " Its adapter is gone, and no checkpoint is left to make it from."
    context.events.note(
        f"the run in {run.path} is finished; nothing was done.{missing} To run it again, "
        "choose another output_dir or pass --resume never"
    )
    return results


def _left_unscored(context: Context) -> dict[str, Any]:
    """The results of a finished run; of one that is not scored yet, with the tasks typed now."""
    run, tasks = context.run, labelled(context.recipe.evaluation)
    results = read_json(run.results_file)
    if UNSCORED not in results:
        return results
    # They may be others: with fewer questions at a time, or none at all.
    replace_file(run.recipe_file, recipe_to_yaml(context.recipe).encode())
    del results[UNSCORED]
    if tasks:
        results[UNSCORED] = list(tasks)
    run.replace_results(results)
    return results


def start_model(context: Context, data: RunInput) -> StartedModel:
    """Give the base model its adapter: from a decomposition, or one that was saved."""
    recipe, phase, events = context.recipe, context.phase, context.events
    if data.adapter is None:
        kept = "finished matrices are kept"
        phase.enter("decomposing the base model", decomposition_cures(recipe), kept)
        recipe, decomposition = initialise(context, data)
        phase.enter("loading the base model", loading_cures(recipe.model.dtype))
        events.stage(f"loading {recipe.model.path}")
        is_shared = shares_weights(context.accelerator, recipe.train)
        model = adapt(
            recipe,
            data.source,
            decomposition,
            data.base_files,
            is_shared=is_shared,
            note=events.note,
        )
        return StartedModel(model, recipe, decomposition.report)
    phase.enter("loading the adapter and its base model", loading_cures(recipe.model.dtype))
    events.stage(f"loading {data.adapter} on {recipe.model.path}")
    model, other = load_adapted(context, data, data.adapter)
    ranks = on_main_process(lambda: write_ranks(model, recipe, context.run.init, events))
    return StartedModel(model, recipe, ranks, other)


def train_model(context: Context, data: RunInput, started: StartedModel) -> TrainedModel:
    """Score the model where the recipe asks for that, then train it."""
    recipe, model, phase, events = started.recipe, started.model, context.phase, context.events
    # While all weights lie on the CPU, so that rates do not depend on where they lie afterwards.
    rates = rate_factors(
        model, is_relative=recipe.adapter.rate == "relative", fetch=fetching(model)
    )
    phase.enter("placing the model", training_cures(recipe))
    place(model, recipe.model.device_map, context.accelerator.device, events.note)
    cures = answering_cures(recipe.evaluation)
    phase.enter("scoring the base model", cures, "finished completions are kept")
    tasks = {name: task for name, task in labelled(recipe.evaluation).items() if task.before}
    if scores_later(context):
        events.note(
            "evaluation: no process holds all weights, which answers need; a process of its own "
            "loads the model and scores it once the run is saved"
            + (", and what it was before the training as well" if tasks else "")
        )
        tasks = {}
    # Offsets are those of step 0 here, also when a run goes on: zero, which is the base model,
    # unless adapter.from gave others.
    folder = context.run.path / "evaluation" / "before"
    is_first, began = not folder.exists(), time.monotonic()
    before = _scorer(context, data).score_all(model, tasks, folder)
    scored = time.monotonic() - began
    cures = training_cures(recipe)
    phase.enter("preparing the training", cures)
    # The preflight held them against the configuration; this is the model itself.
    for part in (data.train, data.validation):
        check_known_tokens(part, model.get_input_embeddings().num_embeddings)
    for choice in rank_fallbacks(started.ranks):
        events.tell(choice)
    if recipe.train.precision == "bf16":
        # Devices may differ, and the main process alone tells.
        for slow in filter(None, gather_object([without_bf16(context.accelerator.device)])):
            events.tell(bf16_fallback(slow, "train.precision: bf16"))
    training = Training(
        model,
        data.train,
        data.validation,
        recipe.train,
        context.accelerator,
        context.run,
        pad_token_id=data.pad_token_id,
        checkpoint=data.start.checkpoint,
        settings=recipe.model_dump(mode="json"),
        rate_factors=rates,
        tell=events.tell,
    )
    events.mark_with(training.mark)
    if data.start.checkpoint is not None:
        events.note(f"continuing from {data.start.checkpoint}")
    total = training.num_steps
    done = training.progress.step
    going_on = f", of which {done} are done" if done else ""
    events.stage(f"training for {counted(total, 'step')}{going_on}")
    if tasks and is_first:
        # The time that is left of the training does not count it.
        events.note(f"scoring took {duration(scored)}, and is done again after the training")
    phase.enter(f"training, step {training.progress.step + 1} of {total}", cures)
    for metrics in training.steps():
        events.step(metrics, total)
        phase.enter(f"training, step {metrics.step + 1} of {total}", cures)
        context.page.refresh()
    events.end_progress()
    return TrainedModel(training, before)


def finish_run(
    context: Context, data: RunInput, started: StartedModel, trained: TrainedModel
) -> dict[str, Any]:
    """Score the trained model, save its adapter, write results.json and return its content."""
    recipe, run, training = started.recipe, context.run, trained.training
    results = training.result().to_dict() | training.halvings() | training.fallbacks()
    if recipe.restrain is not None:
        context.phase.enter("restraining the update", training_cures(recipe), _KEPT)
        report = restrain(context, data, started.model, recipe.restrain)
        results |= {"restraint": report.to_dict(), "text_loss_change": report.change}
        if report.strength:
            results["adapter_validation_loss"] = training.validate()
    context.phase.enter("scoring and saving", answering_cures(recipe.evaluation), _KEPT)
    weights = training.trained_weights()
    scorer, tasks = _scorer(context, data), labelled(recipe.evaluation)
    is_later = scores_later(context)
    after = scorer.score_all(
        started.model, {} if is_later else tasks, run.path / "evaluation" / "after"
    )
    results |= ending(results, from_adapter=data.adapter is not None)
    if started.other_base is not None:
        results["other_base"] = f"trained {started.other_base}"
    if is_later:
        results[UNSCORED] = list(tasks)
    else:
        results |= scorer.of_training(tasks, trained.scores_before, after)

    learned = _learned(context, started.model, results["adapter_step"])
    accelerator, before = context.accelerator, training.seconds_before
    record = read_json(run.run_file)
    earlier = earlier_device_seconds(record, before, accelerator.num_processes)
    results |= run_cost(context.usage, accelerator, recipe, earlier)

    def save() -> None:
        found = _with_earlier_scores(run, results)
        record = read_json(run.run_file)
        training = describe_training(str(run.adapter), recipe, started.ranks, record, found)
        base = base_of(data.source, recipe.model.path)
        card = adapter_card(training, base, recipe.adapter.from_)
        save_adapter(started.model, weights, data.tokenizer, run.adapter, card)
        run.update(**{ADAPTER_KEY: adapter_hash(run.adapter)})
        if learned is not None:
            replace_file(run.learned_file, to_json(learned.to_dict()))
        run.finish(found)

    on_main_process(save)
    context.events.note(f"adapter: {run.adapter}, results: {run.results_file}")
    evidence = {key: results[key] for key in _END_EVIDENCE if results.get(key) is not None}
    context.events.ended(f"The run is done after {counted(results['steps'], 'step')}.", evidence)
    on_main_process(lambda: context.page.refresh(is_last=True))
    if is_later:
        # The process that scores loads the whole model on the device of this one.
        training.free()
    return results


def scores_later(context: Context) -> bool:
    """Whether there is something to score, and no process holds the weights to do it with."""
    return bool(context.recipe.evaluation) and shares_weights(
        context.accelerator, context.recipe.train
    )


def _how_it_ended(error: BaseException, phase: str) -> str:
    """A sentence for the events of a run that did not reach its end."""
    # A signal outside of the training is turned into StoppedBySignal further out.
    if isinstance(error, StoppedBySignal | KeyboardInterrupt):
        return f"Stopped by a signal while {phase}; the same command goes on."
    said = str(error).splitlines()[0] if isinstance(error, KpsvdTuneError) and str(error) else ""
    return f"Ended by {said or type(error).__name__} while {phase}."


def _learned(context: Context, model: PeftModel, step: int) -> LearnedReport | None:
    """How far each layer has moved; None where no process has whole weights, and on the others."""
    accelerator = context.accelerator
    if shares_weights(accelerator, context.recipe.train) or not accelerator.is_main_process:
        return None
    return measure_learned(model, step)


def _check(recipe: Recipe) -> list[str]:
    """Refuse before the first long stage whatever can be refused; gives what looks wrong."""
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    is_sharded = recipe.train.parallel == "fsdp"
    _check_restrain(recipe, "train.parallel: fsdp", is_sharded)
    _check_quantisation(recipe, "train.parallel: fsdp", is_sharded)
    check_device_map(recipe)
    doubts = check_tasks(recipe.evaluation, recipe.dataset)
    find_adapter(recipe)
    return doubts


def _check_quantisation(recipe: Recipe, sharding: str, is_sharded: bool) -> None:
    if is_sharded and recipe.model.quantization is not None:
        raise RecipeError(
            f"model.quantization: {recipe.model.quantization}: quantised weights are not sharded "
            f"({sharding}); expected model.quantization: null, or train.parallel: ddp, where each "
            "process holds the whole quantised base"
        )


def _check_restrain(recipe: Recipe, sharding: str, is_sharded: bool) -> None:
    if is_sharded and recipe.restrain is not None:
        raise RecipeError(
            f"restrain: an update is not cut back on sharded weights ({sharding}); remove the "
            "section, or train without sharding"
        )


def read_rows(
    recipe: Recipe,
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    skeleton: PreTrainedModel,
    events: Events,
) -> PreparedData:
    """Read, tokenise and check the rows of a recipe, and tell what they look like."""
    events.stage(f"reading {source_names(dataset)}")
    data = prepare(
        dataset,
        tokenizer,
        seed=recipe.train.seed,
        progress=lambda done, total: events.advance("tokenising", done, total),
        limits=model_limits(skeleton),
    )
    events.note(data.cache_note)
    warnings = list(row_warnings(data.report))
    events.preflight(replace(data.report, warnings=without(data.report, warnings)))
    for warning in warnings:
        events.tell(warning)
    return data


def _identity(
    context: Context,
    base_files: Mapping[str, str],
    sha256: str,
    adapter: Path | None,
    kept: KeptText | None,
) -> dict[str, Any]:
    """What must be equal for a run to go on."""
    identity = {
        "recipe": context.recipe.model_dump(mode="json"),
        "base": base_files,
        "dataset": sha256,
        "num_processes": context.accelerator.num_processes,
    }
    if adapter is not None:
        identity["adapter"] = adapter_hash(adapter)
    if kept is not None:
        identity[KEPT_TEXT_KEY] = kept.sha256
    if (stage := zero_stage(context.accelerator)) is not None:
        identity["deepspeed_zero_stage"] = stage
    return identity


def _begin(
    context: Context, identity: Mapping[str, Any], template: str, rows: Mapping[str, int]
) -> Start:
    """Begin the run or find where it goes on, and record how it was started."""
    recipe, run, accelerator = context.recipe, context.run, context.accelerator
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        INSTALLED_KEY: installed_from(),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "seed": recipe.train.seed,
        "started": time_text(time.time() - context.usage.seconds()),
        TEMPLATE_KEY: template,
        ROWS_KEY: rows,
        # Where the values came from; recipe.yaml holds the values, and no part is read again.
        "recipe_parts": recipe.extends,
        **context.about,
    }
    return run.begin(
        recipe_to_yaml(recipe),
        identity,
        about,
        resume=context.options.resume,
        allow_change=context.options.allow_change,
        rebuild=not holds_adapter(run.adapter),
    )


def _scorer(context: Context, data: RunInput) -> Scorer:
    return Scorer(
        data.tokenizer,
        data.dataset,
        context.accelerator.device,
        context.events,
        context.options.sandbox,
    )


def _with_earlier_scores(run: RunDirectory, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The results with what `eval` has added to them, where a finished run is rebuilt."""
    earlier = read_json(run.results_file) if run.results_file.exists() else {}
    later = results.get(UNSCORED, ())
    for key, value in earlier.items():
        if key in _ADDED_BY_EVAL and isinstance(value, dict):
            kept = {name: each for name, each in value.items() if name not in later}
            results = {**results, key: {**kept, **results.get(key, {})}}
    return results
