"""The command `eval`: score a run or a model, or stored completions again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kpsvd_tune.commands.options import (
    SOURCE,
    AllowCode,
    AllowOtherBase,
    BaseOnly,
    BaseOption,
    Debug,
    DryRun,
    DtypeOption,
    Gpus,
    Json,
    Offline,
    Processes,
    SandboxOption,
    check_devices,
    emit,
    launch_processes,
    prepare_libraries,
)
from kpsvd_tune.errors import InputError, RecipeError
from kpsvd_tune.evaluation.completions import read_completions
from kpsvd_tune.evaluation.sandbox.run import Sandbox
from kpsvd_tune.evaluation.scoring import (
    check_code_execution,
    missing_scorers,
    score_completions,
    stored_task,
)
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.events import Events
from kpsvd_tune.phase import answering_cures, loading_cures, watched
from kpsvd_tune.recipe import EvaluationRecipe, evaluation_section, load_recipe
from kpsvd_tune.recipe.paths import check_source
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.run import UNSCORED, as_mapping
from kpsvd_tune.report.run_files import is_finished
from kpsvd_tune.report.work import WorkPlan, show_work
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.paths import check_writable, expand, kind_of, siblings

# Keys of an evaluation that belong to its rows.
_OF_THE_ROWS = {"path", "name", "split", "limit", "columns", "ignore_columns", "shots_path"}


class _Model(NamedTuple):
    """Which model is scored, as it was typed."""

    source: str
    base: str | None
    dtype: str | None
    base_only: bool
    allow_other_base: bool


def evaluate(
    source: Annotated[str | None, SOURCE] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Keys of the recipe's evaluation: template=chat"
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="gsm8k, math, mbpp, exact_match, label, json, text, loss, forgetting or lm_eval.",
            autocompletion=lambda: list(TASKS),
        ),
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="The questions: file or hub id; default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions to ask.")] = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples before each question.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default: the likeliest token.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Answers to each question, for pass@k.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer, in tokens; default 256, for label by the labels."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions answered together; default 16.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the completions.")
    ] = None,
    base_only: BaseOnly = False,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    dtype: DtypeOption = None,
    stored: Annotated[
        Path | None,
        typer.Option("--rescore", metavar="FILE", help="Score stored completions again."),
    ] = None,
    allow_code_execution: AllowCode = False,
    sandbox: SandboxOption = "bwrap",
    gpus: Gpus = None,
    processes: Processes = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a run or a model on a task, or score stored completions again."""
    if stored is not None:
        _rescore(stored, task, as_json, allow_code_execution, sandbox)
        return
    if source is None:
        raise InputError("eval needs a RUN_OR_MODEL, or --rescore FILE")
    check_source(source, base)
    given = {
        "task": task,
        "path": path,
        "limit": limit,
        "shots": shots,
        "temperature": temperature,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    options = {key: value for key, value in given.items() if value is not None}
    # Before the processes start and the libraries are loaded: nothing is to be waited for.
    allowed = sandbox if allow_code_execution else None
    model = _Model(source, base, dtype, base_only, allow_other_base)
    if not (options or overrides or output or base_only) and (left := _left_unscored(source)):
        if dry_run:
            check_devices(gpus, processes)
            prepare_libraries(offline, debug)
            plans = _plans_of_left(model, left, on_cpu=processes is not None)
            emit({"tasks": plans}, as_json, _show_plans)
            return
        check_code_execution([each.task for each in left], allowed)
        launch_processes(gpus, processes)
        prepare_libraries(offline, debug)
        with ConsoleEvents() as events:
            results = _score_left(model, allowed, events)
            emit(results, as_json, view.show_results)
        return
    wanted = _task(source, options, overrides or ())
    if dry_run:
        check_devices(gpus, processes)
        prepare_libraries(offline, debug)
        emit(_planned(model, wanted, output, on_cpu=processes is not None), as_json, show_work)
        return
    check_code_execution([wanted.task], allowed)
    launch_processes(gpus, processes)
    prepare_libraries(offline, debug)
    with ConsoleEvents() as events:
        result = _score(model, wanted, output, allowed, events)
        emit(result, as_json, view.show_scores)


def _left_unscored(source: str) -> list[EvaluationRecipe]:
    """The tasks that a finished run still has to be scored on; none of what is no such run."""
    run = expand(source)
    recipe, record, results = (run / name for name in ("recipe.yaml", "run.json", "results.json"))
    if not (recipe.is_file() and record.is_file() and results.is_file()):
        return []
    is_left = is_finished(read_json(record)) and UNSCORED in read_json(results, error=InputError)
    return load_recipe(recipe, of_run=True).evaluation if is_left else []


def _plans_of_left(
    model: _Model, left: Sequence[EvaluationRecipe], *, on_cpu: bool
) -> list[WorkPlan]:
    """What scoring a run would do that its training has left unscored, task by task."""
    from kpsvd_tune.estimate.verbs import evaluation_work
    from kpsvd_tune.evaluation.evaluate import labelled
    from kpsvd_tune.hardware.devices import own_device
    from kpsvd_tune.runs.find import find, resolve_base

    found, folder = find(model.source), expand(model.source) / "evaluation" / "after"
    source = resolve_base(found, model.source, model.base, with_weights=False)
    known, device = model.dtype or found.dtype, own_device(on_cpu)
    return [
        evaluation_work(found, source, task, known, folder / name, device)
        for name, task in labelled(left).items()
    ]


def _show_plans(found: Mapping[str, Sequence[WorkPlan]]) -> None:
    for plan in found["tasks"]:
        show_work(plan)


def _score_left(model: _Model, sandbox: Sandbox | None, events: Events) -> Mapping[str, Any]:
    """Score a run on the tasks that its training has left unscored; gives its results."""
    from kpsvd_tune.evaluation.unscored import UnscoredRun
    from kpsvd_tune.processes import device, end_processes, on_main_process
    from kpsvd_tune.runs.directory import RunDirectory
    from kpsvd_tune.runs.find import find, resolve_base

    found, run = find(model.source), RunDirectory(expand(model.source))
    # A run that trained on another base than its first adapter's was allowed to.
    is_other = "other_base" in read_json(run.results_file)
    with watched() as phase, ExitStack() as stack:
        stack.callback(end_processes)
        place = device()
        base = on_main_process(lambda: resolve_base(found, model.source, model.base))
        dtype, allowed = model.dtype or found.dtype, model.allow_other_base or is_other
        return UnscoredRun(
            run, found, base, dtype, place, events, phase, sandbox, allow_other_base=allowed
        ).score()


def _planned(
    model: _Model, wanted: EvaluationRecipe, output: Path | None, *, on_cpu: bool
) -> WorkPlan:
    """What scoring would do and take; the model is found, and not loaded."""
    from kpsvd_tune.estimate.verbs import evaluation_work
    from kpsvd_tune.evaluation.output import output_folder
    from kpsvd_tune.evaluation.room import with_room
    from kpsvd_tune.hardware.devices import own_device
    from kpsvd_tune.models import load_tokenizer
    from kpsvd_tune.runs.find import find, resolve_base

    found = find(model.source)
    folder = output_folder(model.source, found, wanted, output, model.base_only)
    source = resolve_base(found, model.source, model.base, with_weights=False)
    known = model.dtype or found.dtype
    wanted = with_room(wanted, found.dataset, load_tokenizer(source, found.adapter), folder)
    return evaluation_work(found, source, wanted, known, folder, own_device(on_cpu))


def _score(
    model: _Model,
    wanted: EvaluationRecipe,
    output: Path | None,
    sandbox: Sandbox | None,
    events: Events,
) -> dict[str, Any]:
    """Score one model on one task, and keep the scores."""
    from kpsvd_tune.evaluation.evaluate import Scorer, check_tasks
    from kpsvd_tune.evaluation.output import keep_scores, output_folder
    from kpsvd_tune.evaluation.room import with_room
    from kpsvd_tune.processes import device, end_processes, on_main_process
    from kpsvd_tune.runs.find import find, load, place_loaded, resolve_base

    found = find(model.source)
    if wanted.task == "forgetting" and (found.adapter is None or model.base_only):
        raise InputError("forgetting compares an adapter with its base: give a run or an adapter")
    folder = output_folder(model.source, found, wanted, output, model.base_only)
    run = None if found.recipe is None else expand(model.source)
    if run is not None:
        # The scores lie in the output folder all the same.
        try:
            check_writable(run)
        except InputError as error:
            events.note(f"the scores will not be added to the run: {error}")
    if found.asked_by is not None:
        events.note(found.asked_by)
    for doubt in check_tasks([wanted], found.dataset):
        events.note(doubt)
    with watched() as phase, ExitStack() as stack:
        stack.callback(end_processes)
        place = device()
        place_of_base = on_main_process(lambda: resolve_base(found, model.source, model.base))
        events.stage(f"loading {place_of_base.path}")
        known = model.dtype or found.dtype
        phase.enter("loading the model", loading_cures(known, "--dtype"))
        options = {"base_only": model.base_only, "allow_other_base": model.allow_other_base}
        loaded = load(found, place_of_base, known, **options)
        place_loaded(found, loaded, place, events.note)
        wanted = with_room(wanted, found.dataset, loaded.tokenizer, folder)
        kept = f"completions that are finished are kept in {folder}"
        phase.enter(f"scoring {wanted.task}", answering_cures([wanted]), kept)
        scorer = Scorer(loaded.tokenizer, found.dataset, place, events, sandbox)
        result = scorer.result(loaded, wanted, folder)
        is_adapted = found.adapter is not None
        result["model"] = "base model" if model.base_only else "adapter" if is_adapted else "model"
        on_main_process(lambda: keep_scores(folder, result, run, events))
    return result


def _task(source: str, options: Mapping[str, Any], overrides: Sequence[str]) -> EvaluationRecipe:
    """What to score: the run's own task of that name where it has one, changed as was typed."""
    recipe = expand(source) / "recipe.yaml"
    own = load_recipe(recipe, of_run=True).evaluation if recipe.is_file() else []
    name = options.get("task", own[0].task if len({each.task for each in own}) == 1 else None)
    if name is None:
        among = f"; the run's own are {', '.join(each.task for each in own)}" if own else ""
        raise InputError(f"say what to score, as in --task gsm8k{among}")
    keys = next((each.model_dump() for each in own if each.task == name), {})
    if "path" in options:
        # Other questions: what the recipe says of its own may not hold for them.
        keys = {key: value for key, value in keys.items() if key not in _OF_THE_ROWS}
    try:
        # The base model alone is scored by --base-only.
        return evaluation_section({**keys, "task": name, "before": False}, options, overrides)
    except RecipeError as error:
        if kind_of(source) is not None:
            raise
        # Of a run its recipe would have told the rest. A hub id is no fault.
        raise RecipeError(f"{error}\nno run is in {source}{siblings(source)}") from error


def _rescore(
    file: Path, task: str | None, as_json: bool, is_allowed: bool, sandbox: Sandbox
) -> None:
    task = task or stored_task(file)
    if task is None:
        raise InputError(f"say whose scorers to use for {file}, as in --task gsm8k")
    allowed = sandbox if is_allowed else None
    check_code_execution([task], allowed)
    with ConsoleEvents() as events:
        scores = score_completions(
            task,
            read_completions(file),
            progress=lambda done, total: events.advance("running programs", done, total),
            sandbox=allowed,
        )
        for note in missing_scorers(task):
            events.note(note)
    emit({"scores": as_mapping(scores)}, as_json, lambda r: view.show_scores({"task": task, **r}))
