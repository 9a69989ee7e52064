"""The sources that a recipe names, each with its own settings, and how their rows are mixed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.rows.sampler import permutation
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe, SourceRecipe


@dataclass(frozen=True)
class SourceSettings:
    """How one source is read: the recipe's keys, those of the dataset section filled in.

    Attributes:
        path: File or hub id.
        name: Configuration on the hub, or several.
        split: Split.
        format: Form of the rows, or auto.
        columns: Column of each role.
        ignore_columns: Columns that are read as if they were not there.
        template: Text template, or chat.
        weight: Times each row is seen in an epoch.
        names_template: Whether the recipe writes a template rather than leaving the default.
        drops_faulty: Whether rows that cannot be read are left out rather than refused.
    """

    path: str
    name: str | Sequence[str] | None
    split: str
    format: str
    columns: Mapping[str, str]
    ignore_columns: Sequence[str]
    template: str
    weight: float = 1.0
    names_template: bool = False
    drops_faulty: bool = False


def training_sources(dataset: DatasetRecipe) -> list[SourceSettings]:
    """The sources of `dataset.path`, in their order."""
    paths = dataset.path if isinstance(dataset.path, list) else [dataset.path]
    return [
        _settings(dataset, each if isinstance(each, SourceRecipe) else SourceRecipe(path=each))
        for each in paths
    ]


def validation_source(dataset: DatasetRecipe, path: str) -> SourceSettings:
    """A validation file; it belongs to no configuration or split of the training data."""
    own = SourceRecipe(path=path, split="train")
    return _settings(dataset.model_copy(update={"name": None}), own)


def source_names(dataset: DatasetRecipe) -> str:
    """The sources as a message lists them."""
    return ", ".join(source.path for source in training_sources(dataset))


def check_ignored(found: Collection[str], settings: Sequence[SourceSettings]) -> None:
    """Refuse a column to leave out that no row has, which is a slip of the pen.

    Args:
        found: Columns to leave out that rows of any source have.
        settings: The sources.

    Raises:
        DataError: No row has such a column.
    """
    wanted = {name: None for each in settings for name in each.ignore_columns}
    if missing := [name for name in wanted if name not in found]:
        labels = ", ".join(each.path for each in settings)
        raise DataError(
            f"dataset.ignore_columns names {missing[0]!r}, and no row of {labels} has such a "
            "column; expected names of columns that are there: correct or remove it"
        )


def mix(places: NDArray[np.int64], weight: float, key: str) -> NDArray[np.int64]:
    """Repeat or thin out the rows of a source by its weight.

    Each row occurs floor(weight) times; of the rest, round(fraction * rows) rows chosen at random
    occur once more. The choice is a function of the key alone, so it is the same in every epoch
    and after a resume.

    Args:
        places: (rows,) places of the source's rows.
        weight: Above 0. A weight that would keep no row keeps one.
        key: Seeds the choice.

    Returns:
        (rows seen in an epoch,) places, those of a row side by side.
    """
    whole = int(weight)
    num_more = round((weight - whole) * len(places))
    if whole == 0 and len(places):
        num_more = max(1, num_more)
    times = np.full(len(places), whole)
    times[np.asarray(permutation(len(places), key))[:num_more]] += 1
    return np.repeat(places, times)


def _settings(dataset: DatasetRecipe, source: SourceRecipe) -> SourceSettings:
    columns = dataset.columns if source.columns is None else source.columns
    return SourceSettings(
        path=source.path,
        name=dataset.name if source.name is None else source.name,
        split=source.split or dataset.split,
        format=source.format or dataset.format,
        columns=cast(Mapping[str, str], columns),
        ignore_columns=(
            dataset.ignore_columns if source.ignore_columns is None else source.ignore_columns
        ),
        template=source.template or dataset.template,
        weight=source.weight,
        names_template=source.template is not None or "template" in dataset.model_fields_set,
        drops_faulty=dataset.on_bad_row == "drop",
    )
