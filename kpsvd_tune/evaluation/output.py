"""Where `eval` puts its completions and scores, and how a run takes them up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import CheckpointError, InputError, ResourceError
from kpsvd_tune.evaluation.completions import COMPLETIONS_FILE, POINTS_FILE, SETTINGS_FILE
from kpsvd_tune.evaluation.evaluate import rows_source
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.run import score_label
from kpsvd_tune.runs.adapter_folder import update_card
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.find import Found
from kpsvd_tune.runs.ownership import refuse_foreign, refuse_inside_run
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.storage.paths import check_replaceable, check_writable, expand

RESULTS_FILE = "results.json"
# What an evaluation leaves beside its answers, and keys by which such a file is known.
_KEYS = {
    RESULTS_FILE: {"task", "scores"},
    SETTINGS_FILE: {"task"},
    POINTS_FILE: {"scorer", "points"},
}


def output_folder(
    source: str, found: Found, task: EvaluationRecipe, output: Path | None, base_only: bool
) -> Path:
    """The folder for completions and scores, which can be written.

    It is `output` where that was typed, else a folder for this task inside the run, which `source`
    was then; with `base_only` another one.

    Raises:
        InputError: There is no run to put it in, or the folder is another's or cannot be written.
    """
    if output is not None:
        refuse_inside_run(output, "--output")
        _check_ours(output)
    elif found.recipe is None:
        raise InputError(f"{source} is no run, so say where completions go: --output DIR")
    else:
        output = _folder(expand(source), task, base_only)
    check_writable(output)
    check_replaceable(output, (COMPLETIONS_FILE, *_KEYS))
    return output


def keep_scores(folder: Path, result: dict[str, Any], run: Path | None, events: Events) -> None:
    """Write the scores beside the completions, and to the results and the card of the run, if any.

    Where the run cannot take them up, that is told as a note.
    """
    durable.make_folder(folder)
    durable.replace_file(folder / RESULTS_FILE, to_json(result))
    if run is not None:
        _record(RunDirectory(run), result, events)


def _check_ours(output: Path) -> None:
    """Refuse an output folder that holds anything but an earlier evaluation."""
    kept = (each.name for each in output.glob("previous-*"))
    refuse_foreign(output, (COMPLETIONS_FILE, *_KEYS, *kept), "--output")
    for file, keys in ((output / name, keys) for name, keys in _KEYS.items()):
        if file.is_file() and not keys <= read_json(file, error=InputError).keys():
            raise InputError(
                f"--output: {file} is not of an evaluation, and would be replaced; name another "
                "folder"
            )


def _folder(run: Path, task: EvaluationRecipe, base_only: bool) -> Path:
    """Where a run keeps the completions of a task: one folder for each source of rows."""
    results = RunDirectory(run).results_file
    cure = "was it edited or cut? Restore it from a copy, or keep the scores apart with --output"
    known = read_json(results, error=InputError, cure=cure) if results.exists() else {}
    name = re.sub(r"[^\w.-]+", "-", score_label(known, task.task, rows_source(task)))
    return run / "evaluation" / f"{'base-' if base_only else ''}{name}"


def _record(run: RunDirectory, result: Mapping[str, Any], events: Events) -> None:
    """Put scores among the results of a finished run; the latest of a task on a file stand there.

    Scores on another file get a name of their own.
    """
    if not (run.run_file.exists() and run.results_file.exists()):
        events.note(f"{run.path} has no results.json to add the scores to")
        return
    try:
        base_only = result["model"] == "base model"
        with run.lock():
            status = read_json(run.run_file).get("status")
            if status != "finished":
                # The results are of an earlier end, and the training goes on from there.
                events.note(f"{run.path} is {status}: the scores are not added to its results.json")
                return
            results = read_json(run.results_file)
            place, name = "base_scores" if base_only else "scores", result["task"]
            name = score_label(results, name, result["file"])
            asked = f"{name}, base model" if base_only else name
            results.setdefault(place, {})[name] = result["scores"]
            results.setdefault("score_files", {})[name] = result["file"]
            results.setdefault("score_conditions", {})[asked] = result["conditions"]
            run.replace_results(results)
            update_card(run.adapter, results)
    except (CheckpointError, ResourceError) as error:
        events.note(f"the scores were not added to {run.results_file}: {error}")
