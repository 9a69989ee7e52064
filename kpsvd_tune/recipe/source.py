"""One of several sources of rows: what may differ from the dataset section, and its weight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from kpsvd_tune.recipe.columns import Columns
from kpsvd_tune.recipe.values import Number, PathText, Section, Text, TextOrList

Format = Literal["auto", "prompt-completion", "alpaca", "chat", "sharegpt", "text"]


class SourceRecipe(Section):
    """One source in a list of them; null takes what the dataset section says."""

    path: PathText = Field(description="hub id, or a local .jsonl, .json, .csv or .parquet file")
    weight: Number = Field(
        default=1.0,
        gt=0,
        le=1000,  # a slip such as 1e9 would fill the memory with numbers of rows
        description="times that each of its rows is seen in an epoch; 0.5: half of the rows, once",
    )
    name: TextOrList | None = Field(
        default=None, description="configuration on the hub, or a list of them"
    )
    split: Text | None = Field(default=None, description="split to train on")
    format: Format | None = Field(default=None, description="form of its rows")
    columns: Columns | None = Field(
        default=None, description="column of each role, where its name differs"
    )
    ignore_columns: list[Text] | None = Field(
        default=None, description="columns that are meant to be left out, as if they were not there"
    )
    template: Text | None = Field(default=None, description="as in dataset, for this source")


def _kind(value: object) -> str:
    if isinstance(value, dict | SourceRecipe):
        return "mapping"
    return "list" if isinstance(value, list) else "scalar"


_Source = Annotated[
    Annotated[PathText, Tag("scalar")] | Annotated[SourceRecipe, Tag("mapping")],
    Discriminator(_kind),
]
Sources = Annotated[
    Annotated[PathText, Tag("scalar")]
    | Annotated[SourceRecipe, Tag("mapping")]
    | Annotated[Annotated[list[_Source], Field(min_length=1)], Tag("list")],
    Discriminator(_kind),
]
