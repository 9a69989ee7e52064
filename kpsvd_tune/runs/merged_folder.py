"""How the rows of a training were read and written, as a merged model keeps it.

Who scores or asks a merged model has no recipe at hand. So merge_report.json holds, under
`trained_as`, the keys of the run's dataset section that say how a question is put, and under
`asked_with` there the template that an answer alone is asked for with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kpsvd_tune.data.read.sources import shared_settings
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.storage.json_files import read_json

MERGE_REPORT = "merge_report.json"
_ASKED_WITH = "asked_with"
_CURE = "was it edited or cut? Restore it, or remove the file and give template and columns"


def trained_as(runs: Sequence[tuple[DatasetRecipe | None, str | None]]) -> dict[str, Any]:
    """What is kept of the trainings of adapters that are merged; {} where they differ in it.

    Of each run its dataset section and the template that its answers are asked for with; None
    where the adapter's run is not known.
    """
    found = [_kept(*run) for run in runs]
    return found[0] if all(each == found[0] for each in found) else {}


def _kept(dataset: DatasetRecipe | None, asked_with: str | None) -> dict[str, Any]:
    if dataset is None:
        return {}
    like = shared_settings(dataset)
    return {
        "template": dataset.template,
        "columns": dict(like.columns),
        "ignore_columns": list(like.ignore_columns),
        "learn": dataset.learn,
        _ASKED_WITH: asked_with,
    }


def kept_training(folder: Path) -> tuple[DatasetRecipe | None, str | None]:
    """What a merged model keeps: a dataset section, with its report as the path, and a template.

    The template is that which an answer is asked for with. Both are None where the folder holds no
    merged model, or one that keeps nothing.

    Raises:
        InputError: The report cannot be read.
    """
    file = folder / MERGE_REPORT
    if not file.is_file():
        return None, None
    kept = read_json(file, error=InputError, cure=_CURE).get("trained_as")
    if not kept:
        return None, None
    if not isinstance(kept, Mapping):
        raise InputError(f"{file}: trained_as is {kept!r}; expected template and columns: {_CURE}")
    section = {key: value for key, value in kept.items() if key != _ASKED_WITH}
    try:
        dataset = DatasetRecipe.model_validate({**section, "path": str(file)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: trained_as.{key}: {first['msg']}: {_CURE}") from error
    template = kept.get(_ASKED_WITH, dataset.template)
    if not isinstance(template, str):
        raise InputError(f"{file}: trained_as.{_ASKED_WITH}: {template!r} is no template: {_CURE}")
    return dataset, template
