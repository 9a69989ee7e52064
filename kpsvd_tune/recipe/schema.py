"""The recipe as a closed schema: every key, its type, its range, its default and its meaning.

Plain values only, no behaviour. A key that is not here is a fault, never ignored. Rules between
keys are checked on the later key of the pair and reported as a `conflict` with the other key's
name, so that faults elsewhere in the section do not hide them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from kpsvd_tune.recipe.adapter import AdapterRecipe
from kpsvd_tune.recipe.dataset import DatasetRecipe
from kpsvd_tune.recipe.evaluation import EvaluationRecipe
from kpsvd_tune.recipe.values import (
    Arguments,
    Number,
    Optimizer,
    OutputFolder,
    PathText,
    Precision,
    Scheduler,
    Section,
    Text,
    conflict,
    show,
)


class ModelRecipe(Section):
    """The base model."""

    path: PathText = Field(
        description="hub id, local folder, file.gguf, or package:NAME/FILE.gguf inside an "
        "installed package"
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="type the base weights are loaded in"
    )
    attn_implementation: Text | None = Field(
        default=None,
        description="attention of transformers (eager, sdpa, ...); null lets it choose",
    )

    @field_validator("path")
    @classmethod
    def _check_package(cls, path: str) -> str:
        if path.startswith("package:"):
            name, _, file = path.removeprefix("package:").partition("/")
            if not (name and file):
                raise ValueError(f"got {show(path)}; expected package:NAME/FILE.gguf")
        return path


class EarlyStopping(Section):
    """Stop when the validation loss no longer falls."""

    patience: int = Field(ge=1, description="evaluations without a gain before the run stops")
    min_delta: Number = Field(
        default=0.0, ge=0, description="smallest fall of the loss that is a gain"
    )


class NonfiniteRecipe(Section):
    """How far `train.on_nonfinite` goes before the run ends all the same."""

    max_streak: int = Field(default=3, ge=1, description="skip: most steps skipped in a row")
    max_total: int = Field(default=20, ge=1, description="skip: most steps skipped in all")
    max_retries: int = Field(default=2, ge=1, description="retry: returns to the last checkpoint")
    retry_factor: Number = Field(
        default=0.5, gt=0, le=1, description="retry: what each return multiplies the rate by"
    )


class TrainRecipe(Section):
    """The training loop."""

    max_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps; null: by epochs"
    )
    epochs: Number = Field(
        default=1.0, gt=0, description="passes over the rows, when max_steps is null"
    )
    batch_size: int = Field(
        default=4, ge=1, le=65_536, description="rows per process and micro step"
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=65_536, description="micro steps per optimiser step"
    )
    packing: bool = Field(
        default=False,
        description="lay the rows of a micro batch end to end, without padding: the same rows, "
        "loss and steps in less time; a model that lets rows see each other is refused",
    )
    group_by_length: bool = Field(
        default=False,
        description="make steps of rows of similar length, which spares padding; other steps",
    )
    optimizer: Optimizer = Field(
        default="adamw", description="optimiser: a short name, or torch.optim.CLASS"
    )
    optimizer_args: Arguments = Field(
        default_factory=dict, description="arguments of the optimiser, such as {betas: [0.9, 0.99]}"
    )
    learning_rate: Number = Field(default=1e-3, gt=0, le=1, description="highest learning rate")
    scheduler: Scheduler = Field(
        default="cosine", description="learning-rate schedule of transformers"
    )
    scheduler_args: Arguments = Field(
        default_factory=dict, description="arguments of the schedule, such as {min_lr_rate: 0.1}"
    )
    warmup_ratio: Number = Field(
        default=0.03, ge=0, le=1, description="share of the steps to warm up in"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="steps to warm up in; null: by warmup_ratio"
    )
    weight_decay: Number = Field(
        default=0.0, ge=0, description="decay of the offsets: towards the base"
    )
    max_grad_norm: Number | None = Field(
        default=1.0, gt=0, description="gradient clipping; null: none"
    )
    precision: Precision = Field(default="bf16", description="mixed precision: no, bf16 or fp16")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory"
    )
    log_every: int = Field(default=1, ge=1, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(
        default=50, ge=0, description="steps between validations; 0: at the end only"
    )
    save_every: int = Field(
        default=50, ge=0, description="steps between checkpoints; 0: at the end only"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="newest checkpoints to keep, besides the best one"
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="step that the adapter is of: the last, or the one with the lowest "
        "validation loss",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of everything random")
    num_workers: int = Field(
        default=0, ge=0, le=256, description="processes that prepare batches; 0: none"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="how several processes share work"
    )
    on_nonfinite: Literal["abort", "skip", "retry"] = Field(
        default="abort",
        description="where a loss or gradient is infinite or NaN: end the run, skip the step, or "
        "retry from the last checkpoint with a lower rate",
    )
    nonfinite: NonfiniteRecipe = Field(
        default_factory=NonfiniteRecipe, description="limits of on_nonfinite: skip and retry"
    )
    on_oom: Literal["stop", "halve"] = Field(
        default="stop",
        description="where memory runs out in a micro step: end the run, or halve the micro batch "
        "and double the accumulation for the rest of the run: the same rows and update a step, up "
        "to rounding; one process only",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="stop when the validation loss no longer falls; null: never"
    )

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: str, info: ValidationInfo) -> str:
        if value == "best" and info.data.get("eval_every") == 0:
            raise conflict(
                "best needs validations during the run to choose among; set eval_every",
                "eval_every",
            )
        return value

    @field_validator("on_oom")
    @classmethod
    def _check_on_oom(cls, value: str, info: ValidationInfo) -> str:
        if value == "halve" and info.data.get("batch_size") == 1:
            raise conflict(
                "halve needs a batch_size of 2 or more, for one row cannot be halved; with less "
                "memory try gradient_checkpointing, or a lower dataset.max_length",
                "batch_size",
            )
        return value

    @field_validator("early_stopping")
    @classmethod
    def _check_early_stopping(
        cls, value: EarlyStopping | None, info: ValidationInfo
    ) -> EarlyStopping | None:
        if value is not None and info.data.get("eval_every") == 0:
            raise conflict("needs validations during the run; set eval_every", "eval_every")
        return value


class CompareRecipe(Section):
    """What `compare` measures beside the validation loss."""

    test: PathText | None = Field(
        default=None, description="rows that no choice looks at: a file, as dataset.path"
    )
    forgetting: PathText | None = Field(
        default=None, description="a UTF-8 text of another kind, to see what training forgets"
    )
    price_per_hour: Number | None = Field(
        default=None, gt=0, description="price of an hour of one device; null: no costs"
    )
    currency: Text = Field(default="USD", description="of that price")


class Recipe(Section):
    """One run, from the base model to the scores."""

    model: ModelRecipe = Field(description="the base model, at least {path: ...}")
    dataset: DatasetRecipe | None = Field(
        default=None, description="the rows to learn from; null where nothing is trained"
    )
    adapter: AdapterRecipe = Field(
        default_factory=AdapterRecipe, description="the Kronecker adapter"
    )
    train: TrainRecipe = Field(default_factory=TrainRecipe, description="the training loop")
    evaluation: list[EvaluationRecipe] = Field(
        default_factory=list, description="tasks to score the trained model on"
    )
    compare: CompareRecipe = Field(
        default_factory=CompareRecipe, description="what `compare` measures besides"
    )
    output_dir: OutputFolder = Field(description="folder of the run, such as runs/my_run")
    tracking: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="trackers to log to"
    )

    @field_validator("train")
    @classmethod
    def _check_held_out(cls, train: TrainRecipe, info: ValidationInfo) -> TrainRecipe:
        dataset = info.data.get("dataset")
        wants = "early_stopping" if train.early_stopping else "keep: best"
        needs = train.early_stopping is not None or train.keep == "best"
        if needs and dataset is not None and dataset.validation == 0:
            raise ValueError(f"{wants} needs held-out rows; set dataset.validation above 0")
        return train
