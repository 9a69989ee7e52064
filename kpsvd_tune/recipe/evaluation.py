"""The keys of one task that a model is scored on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from kpsvd_tune.recipe.dataset import Columns, check_ignored
from kpsvd_tune.recipe.values import (
    Number,
    PathOrList,
    PathText,
    Section,
    Text,
    TextOrList,
    conflict,
    key,
)

# The prompt of another harness, and the tasks it exists for.
HARNESS_PROMPTS = {"lm-eval": ("gsm8k", "mbpp"), "bigcode": ("mbpp",)}
# Tasks that measure a loss and write no answer.
LOSS_TASKS = ("loss", "forgetting")
# Tasks for rows of one's own that `init` can choose among.
OWN_ROWS_TASKS = ("exact_match", "label", "json", "text", "loss")
# Keys that the command `eval` has an option for; it takes the others as KEY=VALUE.
_OPTIONS = frozenset(
    {"task", "path", "limit", "shots", "temperature", "samples", "max_new_tokens", "batch_size"}
)
# Keys that mean the same in the section `dataset`.
_AS_IN_DATASET = frozenset(
    {"path", "name", "split", "columns", "ignore_columns", "template", "learn"}
)
_NEED_A_PATH = ("exact_match", "label", "json", "text", *LOSS_TASKS)


class EvaluationRecipe(Section):
    """One task to score the model on."""

    task: Literal[
        "gsm8k",
        "math",
        "mbpp",
        "exact_match",
        "label",
        "json",
        "text",
        "loss",
        "forgetting",
        "lm_eval",
    ] = Field(description="scorer and prompt")
    path: PathOrList | None = key(
        None,
        "hub id or local file; null: the task's own; for forgetting a text file; for lm_eval a "
        "folder of task files",
        validate_default=True,
    )
    name: TextOrList | None = key(
        None,
        "configuration on the hub, or a list of them; for lm_eval its tasks",
        validate_default=True,
    )
    split: Text = key("test", "split to score")
    limit: int | None = key(None, "rows to score; null: all", ge=1)
    before: bool = key(False, "score the base model too, before training")
    max_new_tokens: int = key(256, "longest answer, in tokens", ge=1, le=10**7)
    batch_size: int = key(16, "prompts generated together", ge=1, le=65_536)
    columns: Columns = key({}, "column of each role, where its name differs")
    ignore_columns: list[Text] | None = key(
        None,
        "columns of one's own rows that are left out, as if they were not there; null: those of "
        "the dataset",
    )
    template: Text | None = key(None, "as in dataset; null: that of the dataset")
    learn: Literal["all", "last", "each"] | None = key(
        None,
        "assistant turns of a chat that the task loss counts, as in dataset; null: "
        "those of the dataset",
    )
    prompt: Literal["template", "lm-eval", "bigcode"] = key(
        "template",
        "the template's prompt, or that of another harness: lm-eval for gsm8k and "
        "mbpp, bigcode for mbpp",
    )
    shots: int | None = key(
        None,
        "worked examples before each question; null: as many as the prompt has (5 for "
        "gsm8k and 3 for mbpp in lm-eval, else none)",
        ge=0,
    )
    shots_path: PathText | None = key(
        None, "hub id or local file of the worked examples; null: the task's training rows"
    )
    stop: list[Annotated[str, Field(min_length=1)]] | None = key(
        None, "texts that end an answer; null: those of the prompt, or the start of the template"
    )
    temperature: Number = key(0.0, "0: the likeliest token; above: samples", ge=0)
    samples: int = key(1, "answers to each question; pass@k needs k or more", ge=1, le=100_000)
    sampling_seed: int = key(0, "seed of the sampling", ge=0, le=2**32 - 1)
    labels: list[Text] | None = key(
        None, "label: the labels there are; null: those of the rows", min_length=2
    )
    json_schema: PathText | None = key(
        None, "json: a file with the JSON schema that answers have to follow; null: none"
    )
    window: int = key(1024, "tokens of a row (loss) or of a window (forgetting)", ge=2)
    _where: str = PrivateAttr("")

    def stands_at(self, where: str) -> None:
        """Remember what a user writes before its keys.

        That is "evaluation.0." of a recipe, "--" of the command `eval`, and "dataset." where the
        section is not written and has its columns from there.
        """
        self._where = where

    def written(self, key: str) -> str:
        """What a user writes for a key: evaluation.0.columns, --path; a section alone, columns."""
        if self._where == "--":
            return f"--{key.replace('_', '-')}" if key in _OPTIONS else key
        if self._where == "dataset." and key not in _AS_IN_DATASET:
            return f"evaluation.{key}"
        return self._where + key

    @field_validator("path")
    @classmethod
    def _check_path(
        cls, value: str | list[str] | None, info: ValidationInfo
    ) -> str | list[str] | None:
        task = info.data.get("task")
        if value is None and task in _NEED_A_PATH:
            raise conflict(f"{task} has no data of its own; give a path", "task")
        if task == "forgetting" and not isinstance(value, str):
            raise conflict("forgetting reads one text file; give its path", "task")
        return value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("task") == "lm_eval":
            raise conflict("lm_eval needs the names of its tasks, such as name: my_task", "task")
        return value

    @field_validator("labels", "json_schema")
    @classmethod
    def _check_use(cls, value: Any, info: ValidationInfo) -> Any:
        task = info.data.get("task")
        owner = "label" if info.field_name == "labels" else "json"
        if value is not None and task not in (owner, None):
            raise conflict(f"only the task {owner} uses it, and task is {task}", "task")
        return value

    @field_validator("ignore_columns")
    @classmethod
    def _check_ignored(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if value and (task := info.data.get("task")) not in (*OWN_ROWS_TASKS, None):
            raise conflict(f"{task} reads the columns that it needs alone; remove it", "task")
        check_ignored(value or [], info.data.get("columns", {}))
        return value

    @field_validator("before")
    @classmethod
    def _check_before(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("task") == "forgetting":
            raise conflict("forgetting is measured against the base model anyway", "task")
        return value

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str, info: ValidationInfo) -> str:
        task = info.data.get("task")
        if task is not None and task not in HARNESS_PROMPTS.get(value, (task,)):
            known = [name for name, tasks in HARNESS_PROMPTS.items() if task in tasks]
            names = " or ".join(["template", *known])
            raise conflict(f"there is no {value} prompt for {task}; expected {names}", "task")
        return value

    @field_validator("samples")
    @classmethod
    def _check_samples(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("temperature") == 0:
            raise conflict(
                "at temperature 0 all samples of a question are equal; set temperature above 0, "
                "such as 0.8",
                "temperature",
            )
        return value
