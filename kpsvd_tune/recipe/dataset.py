"""The dataset section: sources of rows, the roles of columns, how rows are written and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.errors import did_you_mean
from kpsvd_tune.recipe.values import (
    CLOSED,
    Number,
    PathText,
    PlainValues,
    Section,
    Text,
    TextOrList,
    Validation,
    conflict,
    key,
    show,
)
from kpsvd_tune.storage.paths import exists, siblings

# Those that come with kpsvd-tune.
CHAT_TEMPLATES = (
    *("chatml", "command-r", "deepseek", "deepseek-r1", "gemma", "llama2", "llama3", "mistral"),
    *("phi3", "phi4", "phi4-mini", "qwen3", "zephyr"),
)
Format = Literal["auto", "prompt-completion", "alpaca", "chat", "sharegpt", "text"]


class Columns(TypedDict, total=False):
    """Which column of the dataset plays which role."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]  # pydantic's documented place for it
    prompt: Annotated[Text, Field(description="column with the prompt")]
    completion: Annotated[Text, Field(description="column with the text to learn")]
    system: Annotated[Text, Field(description="column with the system prompt")]
    instruction: Annotated[Text, Field(description="column with an alpaca instruction")]
    input: Annotated[Text, Field(description="column with an alpaca input")]
    output: Annotated[Text, Field(description="column with an alpaca output")]
    history: Annotated[Text, Field(description="column with earlier rounds of an alpaca row")]
    messages: Annotated[Text, Field(description="column with a list of chat messages")]
    conversations: Annotated[Text, Field(description="column with a sharegpt conversation")]
    text: Annotated[Text, Field(description="column with plain text, all of it learnt")]


def check_ignored(ignored: Sequence[str], columns: Columns) -> None:
    """Refuse, as a conflict with `columns`, to leave out a column that they name."""
    named = {str(name).split(".")[0] for name in columns.values()}
    if both := [name for name in ignored if name in named]:
        raise conflict(
            f"leaves out the column {both[0]!r}, which columns names; remove it from one of the "
            "two",
            "columns",
        )


class SourceRecipe(Section):
    """One source in a list of them; null takes what the dataset section says."""

    path: PathText = Field(description="hub id, or a local .jsonl, .json, .csv or .parquet file")
    weight: Number = key(
        1.0,
        "times that each of its rows is seen in an epoch; 0.5: half of the rows, once",
        gt=0,
        le=1000,  # a slip such as 1e9 would fill the memory with numbers of rows
    )
    name: TextOrList | None = key(None, "configuration on the hub, or a list of them")
    split: Text | None = key(None, "split to train on")
    format: Format | None = key(None, "form of its rows")
    columns: Columns | None = key(None, "column of each role, where its name differs")
    ignore_columns: list[Text] | None = key(
        None, "columns that are meant to be left out, as if they were not there"
    )
    template: Text | None = key(None, "as in dataset, for this source")


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


class DatasetRecipe(Section):
    """The rows to learn from."""

    path: Sources = Field(
        description="hub id, or a local .jsonl, .json, .csv or .parquet file (also .gz or .zst), "
        "a folder or pattern of these, or a list; "
        "in a list {path: ..., weight: ...} gives a source settings of its own"
    )
    name: TextOrList | None = key(None, "configuration on the hub, or a list of them")
    split: Text = key("train", "split to train on")
    format: Format = key("auto", "form of the rows; auto decides by their columns and says why")
    columns: Columns = key({}, "column of each role, where its name differs")
    ignore_columns: list[Text] = key(
        [], "columns that are meant to be left out, as if they were not there"
    )
    template: Text = key(
        "Question: {prompt}\nAnswer: {completion}",
        "text with {prompt} and {completion}, or chat for the tokenizer's template",
    )
    chat_template: PathText | None = key(
        None,
        "chat template instead of the tokenizer's: a jinja file, or the name of one "
        "that comes with kpsvd-tune; evaluation, generate and the saved adapter use it too",
    )
    template_arguments: PlainValues = key(
        {}, "what the chat template is given besides, such as {enable_thinking: false}"
    )
    max_length: int = key(512, "longest row, in tokens; see too_long", ge=2)
    too_long: Literal["cut", "drop"] = key(
        "cut", "rows above max_length: cut them, or leave them out"
    )
    min_length: int = key(1, "shortest row, in tokens; shorter ones are left out", ge=1)
    learn: Literal["all", "last", "each"] = key(
        "all",
        "assistant turns of a chat to learn: all, the last one, or each as a row of "
        "its own behind what a model sees before it",
    )
    streaming: bool = key(False, "read hub sets as a stream, without keeping their files")
    on_bad_row: Literal["refuse", "drop"] = key(
        "refuse", "a row that cannot be read or written out: refuse the run, or leave it out"
    )
    max_bad_rows: Number = key(
        0.05, "drop: largest share of a source's rows to leave out", ge=0, le=1
    )
    deduplicate: bool = key(False, "train and validate on each distinct row once")
    validation: Validation = key(
        0.02, "held-out rows: a share of the rows, a number of rows, or a file; 0: none"
    )

    @field_validator("ignore_columns")
    @classmethod
    def _check_ignored(cls, value: list[str], info: ValidationInfo) -> list[str]:
        check_ignored(value, info.data.get("columns", {}))
        return value

    @field_validator("min_length")
    @classmethod
    def _check_min_length(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("max_length", value):
            raise conflict(
                f"is {value} and max_length is {info.data['max_length']}, so no row would be "
                "left; lower min_length or raise max_length",
                "max_length",
            )
        return value

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template != "chat" and "{completion}" not in template:
            raise ValueError(
                f"got {show(template)}; expected chat, or text that holds {{completion}}, such as "
                r'"Question: {prompt}\nAnswer: {completion}"'
            )
        return template


def chat_template_problem(value: str) -> str | None:
    """What is wrong with a value that is neither one of the names nor a file."""
    if value in CHAT_TEMPLATES or exists(value):
        return None
    hint = did_you_mean(value, CHAT_TEMPLATES) or siblings(value)
    return (
        f"got {value!r}, and there is no such file and no chat template of that name{hint}; "
        f"expected a jinja file, or one of {', '.join(CHAT_TEMPLATES)}"
    )
