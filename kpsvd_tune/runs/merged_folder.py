"""How the rows of a training were read and written, as a merged model keeps it.

Who scores or asks a merged model has no recipe at hand. So merge_report.json holds, under
`trained_as`, the keys of the run's dataset section that say how a question is put.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.storage.json_files import read_json

MERGE_REPORT = "merge_report.json"
_KEPT = ("template", "columns", "learn")
_CURE = "was it edited or cut? Restore it, or remove the file and give template and columns"


def trained_as(datasets: Sequence[DatasetRecipe | None]) -> dict[str, Any]:
    """What is kept of the trainings of adapters that are merged; {} where they differ in it.

    A dataset is None where the adapter's run is not known.
    """
    found = [{} if each is None else each.model_dump(include=set(_KEPT)) for each in datasets]
    return found[0] if all(each == found[0] for each in found) else {}


def kept_dataset(folder: Path) -> DatasetRecipe | None:
    """The dataset section with what a merged model keeps of it, and its report as the path.

    None where the folder holds no merged model, or one that keeps nothing.

    Raises:
        InputError: The report cannot be read.
    """
    file = folder / MERGE_REPORT
    if not file.is_file():
        return None
    kept = read_json(file, error=InputError, cure=_CURE).get("trained_as")
    if not kept:
        return None
    if not isinstance(kept, Mapping):
        raise InputError(f"{file}: trained_as is {kept!r}; expected template and columns: {_CURE}")
    try:
        return DatasetRecipe.model_validate({**kept, "path": str(file)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: trained_as.{key}: {first['msg']}: {_CURE}") from error
