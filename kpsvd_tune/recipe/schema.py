"""The recipe as a closed schema: every key, its type, its range, its default and its meaning.

Plain values only, no behaviour. A key that is not here is a fault, never ignored. Rules between
keys are checked on the later key of the pair and reported as a `conflict` with the other key's
name, so that faults elsewhere in the section do not hide them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from kpsvd_tune.recipe.adapter import AdapterRecipe
from kpsvd_tune.recipe.dataset import DatasetRecipe
from kpsvd_tune.recipe.evaluation import EvaluationRecipe
from kpsvd_tune.recipe.values import (
    Arguments,
    Number,
    Optimizer,
    OutputFolder,
    Parts,
    PathText,
    Precision,
    Scheduler,
    Section,
    Text,
    conflict,
    key,
    show,
)


class ModelRecipe(Section):
    """The base model."""

    path: PathText = Field(
        description="hub id, local folder, file.gguf, or package:NAME/FILE.gguf inside an "
        "installed package"
    )
    revision: Text | None = key(None, "branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "bfloat16",
        "type the base weights are loaded in; auto: bfloat16 with precision bf16, float16 with "
        "fp16, float32 with no",
    )
    quantization: Literal["nf4", "int8"] | None = key(
        None,
        "keep the base's linear layers in 4 (nf4) or 8 bits (int8) while training; the weights are "
        "decomposed before, and an adapter is merged, in full precision",
    )
    device_map: Literal["auto"] | None = key(
        None,
        "auto: decoder blocks that do not fit on the card stay in the host's memory, and are "
        "copied for each use; one process; training needs train.gradient_checkpointing",
    )
    attn_implementation: Text | None = key(
        None, "attention of transformers (eager, sdpa, ...); null lets it choose"
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
    min_delta: Number = key(0.0, "smallest fall of the loss that is a gain", ge=0)


class NonfiniteRecipe(Section):
    """How far `train.on_nonfinite` goes before the run ends all the same."""

    max_streak: int = key(3, "skip: most steps skipped in a row", ge=1)
    max_total: int = key(20, "skip: most steps skipped in all", ge=1)
    max_retries: int = key(2, "retry: returns to the last checkpoint", ge=1)
    retry_factor: Number = key(0.5, "retry: what each return multiplies the rate by", gt=0, le=1)


def _check_name(name: Any) -> Any:
    if name == "smaller_rank":
        raise ValueError(
            "smaller_rank is none of them: another rank is another adapter, with factors and an "
            "optimiser state of its own; lower adapter.rank.max and start with --resume never"
        )
    return name


Fallback = Annotated[Literal["skip_batch", "lower_rate", "keep_best"], BeforeValidator(_check_name)]


class TrainRecipe(Section):
    """The training loop."""

    max_steps: int | None = key(None, "optimiser steps; null: by epochs", ge=1)
    epochs: Number = key(1.0, "passes over the rows, when max_steps is null", gt=0)
    batch_size: int = key(4, "rows per process and micro step", ge=1, le=65_536)
    gradient_accumulation: int = key(1, "micro steps per optimiser step", ge=1, le=65_536)
    packing: bool = key(
        False,
        "lay the rows of a micro batch end to end, without padding: the same rows, "
        "loss and steps in less time; a model that lets rows see each other is refused",
    )
    group_by_length: bool = key(
        False, "make steps of rows of similar length, which spares padding; other steps"
    )
    optimizer: Optimizer = key("adamw", "optimiser: a short name, or torch.optim.CLASS")
    optimizer_args: Arguments = key({}, "arguments of the optimiser, such as {betas: [0.9, 0.99]}")
    learning_rate: Number = key(1e-3, "highest learning rate", gt=0, le=1)
    scheduler: Scheduler = key("cosine", "learning-rate schedule of transformers")
    scheduler_args: Arguments = key({}, "arguments of the schedule, such as {min_lr_rate: 0.1}")
    warmup_ratio: Number = key(0.03, "share of the steps to warm up in", ge=0, le=1)
    warmup_steps: int | None = key(None, "steps to warm up in; null: by warmup_ratio", ge=0)
    weight_decay: Number = key(0.0, "decay of the offsets: towards the base", ge=0)
    max_grad_norm: Number | None = key(1.0, "gradient clipping; null: none", gt=0)
    precision: Precision = key(
        "bf16",
        "mixed precision: no, bf16 or fp16; auto: bf16 where this machine multiplies it at full "
        "speed, else no; a run keeps what it began with",
    )
    gradient_checkpointing: bool = key(False, "recompute activations: less memory")
    log_every: int = key(1, "steps between lines of metrics.jsonl", ge=1)
    eval_every: int = key(50, "steps between validations; 0: at the end only", ge=0)
    save_every: int = key(50, "steps between checkpoints; 0: at the end only", ge=0)
    keep_checkpoints: int = key(2, "newest checkpoints to keep, besides the best one", ge=1)
    keep: Literal["last", "best"] = key(
        "last", "step that the adapter is of: the last, or the one with the lowest validation loss"
    )
    seed: int = key(0, "seed of everything random", ge=0, le=2**32 - 1)
    num_workers: int = key(0, "processes that prepare batches; 0: none", ge=0, le=256)
    parallel: Literal["ddp", "fsdp"] = key("ddp", "how several processes share work")
    on_nonfinite: Literal["abort", "skip", "retry"] = key(
        "abort",
        "where a loss or gradient is infinite or NaN: end the run, skip the step, or "
        "retry from the last checkpoint with a lower rate",
    )
    nonfinite: NonfiniteRecipe = key(NonfiniteRecipe(), "limits of on_nonfinite and of fallback")
    fallback: list[Fallback] = key(
        [],
        "what may happen by itself where a loss is not finite or the run diverges, the first "
        "that is not used up: skip_batch (not finite only), lower_rate (from the last good "
        "checkpoint), keep_best (stop); in place of on_nonfinite",
    )
    on_oom: Literal["stop", "halve"] = key(
        "stop",
        "where memory runs out in a micro step: end the run, or halve the micro batch "
        "and double the accumulation for the rest of the run: the same rows and update a step, up "
        "to rounding; one process only",
    )
    early_stopping: EarlyStopping | None = key(
        None, "stop when the validation loss no longer falls; null: never"
    )

    @field_validator("keep", "early_stopping")
    @classmethod
    def _check_validations(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in (None, "last") and info.data.get("eval_every") == 0:
            said = "best needs validations during the run to choose among"
            if value != "best":
                said = "needs validations during the run"
            raise conflict(f"{said}; set eval_every", "eval_every")
        return value

    @field_validator("fallback")
    @classmethod
    def _check_fallback(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: one stands there twice; name each once")
        if value and (old := info.data.get("on_nonfinite", "abort")) != "abort":
            new = {"skip": "skip_batch", "retry": "lower_rate"}[old]
            raise conflict(
                f"on_nonfinite is {old}, and both decide what follows a loss that is not finite; "
                f"leave on_nonfinite out, and name {new} here",
                "on_nonfinite",
            )
        if "keep_best" in value and info.data.get("eval_every") == 0:
            raise conflict(
                "keep_best needs validations during the run to choose among; set eval_every",
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


class RestrainRecipe(Section):
    """What training may make the model forget: its update is cut back until that holds."""

    text: PathText = Field(
        description="a UTF-8 text of the kind that is to be known as well as before; half of it "
        "shows the model's inputs, the other half measures"
    )
    limit: Number = key(0.01, "largest rise of the loss on that text, in nats a token", ge=0)


class CompareRecipe(Section):
    """What `compare` measures beside the validation loss."""

    test: PathText | None = key(None, "rows that no choice looks at: a file, as dataset.path")
    forgetting: PathText | None = key(
        None, "a UTF-8 text of another kind, to see what training forgets"
    )
    price_per_hour: Number | None = key(
        None, "price of an hour of one device, also for `plan`; null: no costs", gt=0
    )
    currency: Text = key("USD", "of that price")


class Recipe(Section):
    """One run, from the base model to the scores."""

    # Of a recipe that was read, the names of all parts it was made of. It tells where the values
    # came from and is none of them, so it is not written into what a run knows itself by.
    extends: Parts = Field(
        default=[],
        exclude=True,
        description="recipes or parts that this file adds to and changes: paths from this file, or "
        "names that `recipes list` shows, such as [models/qwen3-0.6b, tasks/chat]; of two the "
        "later one wins",
    )
    model: ModelRecipe = Field(description="the base model, at least {path: ...}")
    dataset: DatasetRecipe | None = key(
        None, "the rows to learn from; null where nothing is trained"
    )
    adapter: AdapterRecipe = key(AdapterRecipe(), "the Kronecker adapter")
    train: TrainRecipe = key(TrainRecipe(), "the training loop")
    restrain: RestrainRecipe | None = key(
        None, "what the trained model may forget, at least {text: ...}; null: not looked at"
    )
    evaluation: list[EvaluationRecipe] = key([], "tasks to score the trained model on")
    compare: CompareRecipe = key(CompareRecipe(), "what `compare` measures besides")
    output_dir: OutputFolder = Field(description="folder of the run, such as runs/my_run")
    tracking: list[Literal["tensorboard", "wandb"]] = key([], "trackers to log to")

    @model_validator(mode="after")
    def _place_tasks(self) -> Recipe:
        for number, each in enumerate(self.evaluation):
            each.stands_at(f"evaluation.{number}.")
        return self

    @field_validator("train")
    @classmethod
    def _check_held_out(cls, train: TrainRecipe, info: ValidationInfo) -> TrainRecipe:
        dataset = info.data.get("dataset")
        wants = "early_stopping" if train.early_stopping else "keep: best"
        needs = train.early_stopping is not None or train.keep == "best"
        if "keep_best" in train.fallback and not needs:
            wants, needs = "fallback: keep_best", True
        if needs and dataset is not None and dataset.validation == 0:
            raise ValueError(f"{wants} needs held-out rows; set dataset.validation above 0")
        return train
