"""Keys of transformers' TrainingArguments, which LLaMA-Factory and trl share."""

from __future__ import annotations

from typing import Any

from kpsvd_tune.recipe.convert import keys
from kpsvd_tune.recipe.convert.keys import (
    Rule,
    Rules,
    Target,
    no,
    positive_steps,
    says,
    to,
    when_true,
)

OPTIMISERS = {
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"
    ),
    "sgd": "sgd",
    "adafactor": "adafactor",
    "rmsprop": "torch.optim.RMSprop",
}
SCHEDULES = {
    each: each
    for each in (
        *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts"),
        *("cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
    )
}


@says("`train.optimizer`; 8-bit and paged kinds become adamw")
def optimiser(target: Target, source: str, value: Any) -> None:
    """8-bit and paged kinds of AdamW become AdamW, which is told."""
    name = str(value).lower()
    if value is None:
        return
    if name in OPTIMISERS:
        target.set("train.optimizer", OPTIMISERS[name], source)
    elif "adamw" in name:
        target.set("train.optimizer", "adamw", source)
        target.leave(
            source, value, "adamw in 32 bits instead; the state of so few parameters is small"
        )
    else:
        target.leave(source, value, "not among ours (docs/hosts.md): the recipe takes adamw")


def precision(name: str) -> Rule:
    """bf16 or fp16: a switch, or `full`; or `auto`, which is left to the machine here too."""

    def rule(target: Target, source: str, value: Any) -> None:
        train = target.content.setdefault("train", {})
        if value in keys.NOTHING:
            train.setdefault("precision", "no")
            return
        is_auto = name == "bf16" and value == "auto"
        target.set("train.precision", "auto" if is_auto else name, source)
        dtype = "auto" if is_auto else {"bf16": "bfloat16", "fp16": "float16"}[name]
        target.content.setdefault("model", {}).setdefault("dtype", dtype)

    return Rule("`train.precision`, `model.dtype`", rule)


@says("`train.epochs`, unless steps are given")
def epochs(target: Target, source: str, value: Any) -> None:
    """Passes over the rows, where steps do not count."""
    if value is not None and "max_steps" not in target.content.get("train", {}):
        target.set("train.epochs", value, source)


@says("`train.max_steps`")
def steps(target: Target, source: str, value: Any) -> None:
    """Steps, which count alone."""
    if value in (None, -1, 0):
        return
    target.set("train.max_steps", value, source)
    target.content["train"].pop("epochs", None)
    target.taken.pop("train.epochs", None)


@says("`train.warmup_steps`; a share: `train.warmup_ratio`")
def warmup(target: Target, source: str, value: Any) -> None:
    """Steps to warm up in; a number below 1 is a share."""
    if value is None:
        return
    if value == 0:
        # Files name both, and the one above 0 counts; the recipe would warm up by itself.
        if not target.has("train.warmup_steps") and not target.has("train.warmup_ratio"):
            target.set("train.warmup_ratio", 0.0, source)
        return
    is_share = source.endswith("ratio") or (isinstance(value, float) and value < 1)
    target.set(f"train.{'warmup_ratio' if is_share else 'warmup_steps'}", value, source)


def track(target: Target, name: str, source: str) -> None:
    """Add one of ours to the trackers."""
    named = target.content.get("tracking", [])
    target.set("tracking", [*named, *({name} - set(named))], source)


@says("`tracking`: tensorboard and wandb")
def trackers(target: Target, source: str, value: Any) -> None:
    """Those of ours among the trackers."""
    names = value if isinstance(value, list) else [value]
    ours = [each for each in names if each in ("tensorboard", "wandb")]
    for each in ours:
        track(target, each, source)
    others = [each for each in names if each not in (*ours, *keys.NOTHING)]
    if others:
        target.leave(source, value, "not among ours: read metrics.jsonl in the run's folder")


@says("`train.gradient_checkpointing`")
def checkpointing(target: Target, source: str, value: Any) -> None:
    """Gradient checkpointing of any kind."""
    target.set("train.gradient_checkpointing", value not in keys.NOTHING, source)


_ADAM = "set it in train.optimizer_args; the optimiser's default holds"
_ELSEWHERE = "belongs to how a command is called here, and not to a recipe"

TRAINER: Rules = {
    "output_dir": to("output_dir"),
    "per_device_train_batch_size": to("train.batch_size"),
    "gradient_accumulation_steps": to("train.gradient_accumulation"),
    "learning_rate": keys.always_told(keys.RATE),
    "max_steps": steps,
    "num_train_epochs": epochs,
    "lr_scheduler_type": keys.mapped(
        "train.scheduler", SCHEDULES, "not among ours (docs/hosts.md): the recipe takes cosine"
    ),
    "lr_scheduler_kwargs": to("train.scheduler_args"),
    "warmup_ratio": warmup,
    "warmup_steps": warmup,
    "weight_decay": to("train.weight_decay"),
    "max_grad_norm": to("train.max_grad_norm"),
    "optim": optimiser,
    "bf16": precision("bf16"),
    "fp16": precision("fp16"),
    "gradient_checkpointing": checkpointing,
    "group_by_length": to("train.group_by_length"),
    "logging_steps": positive_steps("train.log_every"),
    "eval_steps": positive_steps("train.eval_every"),
    "save_steps": positive_steps("train.save_every"),
    "save_total_limit": positive_steps("train.keep_checkpoints"),
    "load_best_model_at_end": when_true("train.keep", "best"),
    "seed": to("train.seed"),
    "dataloader_num_workers": to("train.num_workers"),
    "report_to": trackers,
    "adam_beta1": no(_ADAM),
    "adam_beta2": no(_ADAM),
    "adam_epsilon": no(_ADAM),
    "optim_args": no(_ADAM),
    "deepspeed": no(keys.CLUSTER),
    "fsdp": no(keys.CLUSTER),
    "fsdp_config": no(keys.CLUSTER),
    "ddp_timeout": no(keys.CLUSTER),
    "resume_from_checkpoint": no("a run goes on by itself from its last checkpoint"),
    "per_device_eval_batch_size": no("held-out rows are taken in batches of train.batch_size"),
    "eval_strategy": no("held-out rows are looked at every train.eval_every steps"),
    "save_strategy": no("checkpoints are written every train.save_every steps"),
    "logging_strategy": no("metrics are written every train.log_every steps"),
    "gradient_checkpointing_kwargs": no(keys.SPEED),
    "tf32": no(keys.SPEED),
    "torch_compile": no(keys.SPEED),
    "use_liger_kernel": no(keys.SPEED),
    "do_train": no(_ELSEWHERE),
    "do_eval": no("held-out rows are looked at in any case; see evaluation for tasks"),
    "overwrite_output_dir": no("a folder of another run is never overwritten: --resume never"),
    "run_name": no("runs are called after their folder"),
    "push_to_hub": no("kpsvd-tune push, after the run"),
    "hub_model_id": no("kpsvd-tune push --repo, after the run"),
    "neftune_noise_alpha": no("there is no noise on embeddings here"),
    "metric_for_best_model": no("the best step is that of the lowest validation loss"),
}
