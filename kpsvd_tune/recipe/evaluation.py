"""The keys of one task that a model is scored on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from kpsvd_tune.recipe.dataset import Columns
from kpsvd_tune.recipe.values import (
    Number,
    PathOrList,
    PathText,
    Section,
    Text,
    TextOrList,
    conflict,
)

# The prompt of another harness, and the tasks it exists for.
HARNESS_PROMPTS = {"lm-eval": ("gsm8k", "mbpp"), "bigcode": ("mbpp",)}
# Tasks that measure a loss and write no answer.
LOSS_TASKS = ("loss", "forgetting")
_NEED_A_PATH = ("exact_match", *LOSS_TASKS)


class EvaluationRecipe(Section):
    """One task to score the model on."""

    task: Literal["gsm8k", "math", "mbpp", "exact_match", "loss", "forgetting"] = Field(
        description="scorer and prompt"
    )
    path: PathOrList | None = Field(
        default=None,
        validate_default=True,
        description="hub id or local file; null: the task's own; for forgetting a text file",
    )
    name: TextOrList | None = Field(
        default=None, description="configuration on the hub, or a list of them"
    )
    split: Text = Field(default="test", description="split to score")
    limit: int | None = Field(default=None, ge=1, description="rows to score; null: all")
    before: bool = Field(default=False, description="score the base model too, before training")
    max_new_tokens: int = Field(
        default=256, ge=1, le=10**7, description="longest answer, in tokens"
    )
    batch_size: int = Field(default=16, ge=1, le=65_536, description="prompts generated together")
    columns: Columns = Field(
        default_factory=Columns, description="column of each role, where its name differs"
    )
    template: Text | None = Field(
        default=None, description="as in dataset; null: that of the dataset"
    )
    learn: Literal["all", "last", "each"] | None = Field(
        default=None,
        description="assistant turns of a chat that the task loss counts, as in dataset; null: "
        "those of the dataset",
    )
    prompt: Literal["template", "lm-eval", "bigcode"] = Field(
        default="template",
        description="the template's prompt, or that of another harness: lm-eval for gsm8k and "
        "mbpp, bigcode for mbpp",
    )
    shots: int | None = Field(
        default=None,
        ge=0,
        description="worked examples before each question; null: as many as the prompt has (5 for "
        "gsm8k and 3 for mbpp in lm-eval, else none)",
    )
    shots_path: PathText | None = Field(
        default=None,
        description="hub id or local file of the worked examples; null: the task's training rows",
    )
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None,
        description="texts that end an answer; null: those of the prompt, or the start of the "
        "template",
    )
    temperature: Number = Field(
        default=0.0, ge=0, description="0: the likeliest token; above: samples"
    )
    samples: int = Field(
        default=1, ge=1, le=100_000, description="answers to each question; pass@k needs k or more"
    )
    sampling_seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of the sampling")
    window: int = Field(
        default=1024, ge=2, description="tokens of a row (loss) or of a window (forgetting)"
    )

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
