"""The YAML of axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.recipe.convert import keys
from kpsvd_tune.recipe.convert.keys import (
    Rule,
    Rules,
    Target,
    always_told,
    mapped,
    modules,
    no,
    positive_steps,
    says,
    to,
    when_true,
)
from kpsvd_tune.recipe.convert.trainer import (
    SCHEDULES,
    TRAINER,
    checkpointing,
    epochs,
    optimiser,
    precision,
    steps,
    track,
    warmup,
)

# Its types of rows -> the form of ours.
_FORMS = {
    "alpaca": "alpaca",
    "chat_template": "chat",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}
_COLUMNS = {
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field": "text",
    "text_column": "text",
}


@says("`dataset.path`, `format`, `columns`, `name`, `split`")
def _rows(target: Target, source: str, value: Any) -> None:
    """Its list of data sets, each with a path, a type and columns."""
    if value in keys.NOTHING:
        return
    if target.has("dataset.path"):
        target.leave(
            source, value, "another list of data sets was taken; add these to dataset.path"
        )
        return
    listed = value if isinstance(value, list) else [value]
    found = [_source(target, f"{source}[{at}]", each) for at, each in enumerate(listed)]
    if source == "pretraining_dataset":
        found = [{**each, "format": each.get("format", "text")} for each in found]
    if len(found) == 1:
        for key, each in found[0].items():
            target.set(f"dataset.{key}", each, f"{source}[0]")
    else:
        target.set("dataset.path", found, source)


def _source(target: Target, place: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return {"path": given}
    rest = {key: value for key, value in given.items() if value not in keys.NOTHING}
    files = rest.pop("data_files", None)
    source: dict[str, Any] = {"path": rest.pop("path", None)}
    if files is not None:
        source["path"] = files[0] if isinstance(files, list) and len(files) == 1 else files
    rest.pop("ds_type", None)
    kind = rest.pop("type", None)
    columns: dict[str, Any] = {}
    if isinstance(kind, Mapping):
        # Rows of columns that it names itself.
        rest |= {key: value for key, value in kind.items() if value not in keys.NOTHING}
        source["format"] = "alpaca"
    elif kind is not None:
        name, *more = str(kind).split(".")
        if name in _FORMS:
            source["format"] = _FORMS[name]
        if name == "alpaca" or name not in _FORMS or more:
            target.leave(
                f"{place}.type", kind, "its words around a prompt are its own: set dataset.template"
            )
    for key, role in _COLUMNS.items():
        if key in rest:
            columns[role] = rest.pop(key)
    if columns:
        source["columns"] = columns
    for key in ("name", "split"):
        if key in rest:
            source[key] = rest.pop(key)
    for key, value in rest.items():
        target.leave(f"{place}.{key}", value, "no counterpart: see docs/data.md for what rows hold")
    return source


@says("`train.scheduler: cosine_with_min_lr`")
def _least_rate(target: Target, source: str, value: Any) -> None:
    if value is not None:
        target.set("train.scheduler", "cosine_with_min_lr", source)
        target.set("train.scheduler_args.min_lr_rate", value, source)


def _attention(name: str) -> Rule:
    return when_true("model.attn_implementation", name)


@says("none: here a KPSVD adapter is trained in any case; `qlora` is `model.quantization: nf4`")
def _adapter(target: Target, source: str, value: Any) -> None:
    if value == "qlora":
        target.set("model.quantization", "nf4", source)
    elif value != "lora":
        target.leave(source, value, "all weights were trained, or another adapter; here KPSVD is")


@says("`tracking: [wandb]`")
def _watched(target: Target, source: str, value: Any) -> None:
    if value not in keys.NOTHING:
        track(target, "wandb", source)


@says("`tracking: [tensorboard]`")
def _board(target: Target, source: str, value: Any) -> None:
    if value not in keys.NOTHING:
        track(target, "tensorboard", source)


_PER_EPOCH = "there are no evaluations or checkpoints by epochs: set train.eval_every or save_every"
_TOKENS = "tokens are those of the model's tokenizer"

AXOLOTL: Rules = {
    "base_model": to("model.path"),
    "revision_of_model": to("model.revision"),
    "adapter": _adapter,
    "datasets": _rows,
    "pretraining_dataset": _rows,
    "test_datasets": no("held-out rows: set dataset.validation to a file"),
    "chat_template": keys.chat_template,
    "chat_template_jinja": no("write it to a file, and set dataset.chat_template to that"),
    "sequence_len": to("dataset.max_length"),
    "excess_length_strategy": mapped(
        "dataset.too_long", {"drop": "drop", "truncate": "cut"}, "rows above max_length are cut"
    ),
    "min_sample_len": to("dataset.min_length"),
    "val_set_size": to("dataset.validation"),
    "dataset_exact_deduplication": to("dataset.deduplicate"),
    "streaming": to("dataset.streaming"),
    "sample_packing": keys.packing,
    "train_on_inputs": no(keys.PROMPTS),
    "group_by_length": to("train.group_by_length"),
    "micro_batch_size": to("train.batch_size"),
    "gradient_accumulation_steps": to("train.gradient_accumulation"),
    "num_epochs": epochs,
    "max_steps": steps,
    "learning_rate": always_told(keys.RATE),
    "lr_scheduler": mapped(
        "train.scheduler", SCHEDULES, "not among ours (docs/hosts.md): the recipe takes cosine"
    ),
    "lr_scheduler_kwargs": to("train.scheduler_args"),
    "cosine_min_lr_ratio": _least_rate,
    "warmup_steps": warmup,
    "warmup_ratio": warmup,
    "optimizer": optimiser,
    "optim_args": no("set it in train.optimizer_args"),
    "weight_decay": to("train.weight_decay"),
    "max_grad_norm": to("train.max_grad_norm"),
    "bf16": precision("bf16"),
    "fp16": precision("fp16"),
    "bfloat16": precision("bf16"),
    "float16": precision("fp16"),
    "gradient_checkpointing": checkpointing,
    "logging_steps": positive_steps("train.log_every"),
    "eval_steps": positive_steps("train.eval_every"),
    "save_steps": positive_steps("train.save_every"),
    "evals_per_epoch": no(_PER_EPOCH),
    "saves_per_epoch": no(_PER_EPOCH),
    "save_total_limit": positive_steps("train.keep_checkpoints"),
    "early_stopping_patience": positive_steps("train.early_stopping.patience"),
    "load_best_model_at_end": when_true("train.keep", "best"),
    "seed": to("train.seed"),
    "dataloader_num_workers": to("train.num_workers"),
    "output_dir": to("output_dir"),
    "wandb_project": _watched,
    "use_wandb": _watched,
    "use_tensorboard": _board,
    **dict.fromkeys(
        ("wandb_entity", "wandb_name", "wandb_watch", "wandb_log_model", "wandb_run_id"),
        no("runs are called after their folder, and only numbers are sent"),
    ),
    "use_mlflow": no("not among our trackers: read metrics.jsonl in the run's folder"),
    "flash_attention": _attention("flash_attention_2"),
    "sdp_attention": _attention("sdpa"),
    "eager_attention": _attention("eager"),
    "attn_implementation": to("model.attn_implementation"),
    "lora_r": always_told(keys.RANK),
    "lora_alpha": always_told(keys.SCALE),
    "lora_dropout": to("adapter.dropout"),
    "lora_target_modules": modules,
    "lora_target_linear": when_true("adapter.target_modules", "all-linear"),
    "lora_modules_to_save": keys.list_of("adapter.modules_to_save"),
    "lora_model_dir": no("a LoRA cannot be trained on as KPSVD: merge it into the base first"),
    "lora_fan_in_fan_out": no(keys.SPEED),
    "peft_use_dora": no(keys.VARIANT),
    "peft_use_rslora": no(keys.SCALE),
    "peft_init_lora_weights": no(keys.VARIANT),
    "peft_layers_to_transform": no(
        "layers by number: adapter.target_modules takes a regular expression; until then all "
        "layers are adapted"
    ),
    "loraplus_lr_ratio": no("one rate for both factors: a ratio of 4 was worse (docs/study.md)"),
    "load_in_8bit": when_true("model.quantization", "int8"),
    "load_in_4bit": when_true("model.quantization", "nf4"),
    "gptq": no(keys.QUANTISED),
    "deepspeed": no(keys.CLUSTER),
    "fsdp": no(keys.CLUSTER),
    "fsdp_config": no(keys.CLUSTER),
    "special_tokens": no(_TOKENS),
    "tokens": no(_TOKENS),
    "added_tokens_overrides": no(_TOKENS),
    "tokenizer_config": no(_TOKENS),
    **dict.fromkeys(
        ("tf32", "eval_sample_packing", "pad_to_sequence_len", "dataset_prepared_path")
        + ("dataset_processes", "gradient_checkpointing_kwargs", "torch_compile")
        + ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
        no(keys.SPEED),
    ),
    **dict.fromkeys(
        ("model_type", "tokenizer_type"), no("classes are those that the configuration names")
    ),
    "trust_remote_code": no("code of a model's repository is never run"),
    "resume_from_checkpoint": TRAINER["resume_from_checkpoint"],
    "hub_model_id": TRAINER["hub_model_id"],
    "neftune_noise_alpha": TRAINER["neftune_noise_alpha"],
    "loss_watchdog_threshold": no("docs/watching.md says what is watched, and train.fallback"),
    "loss_watchdog_patience": no("see loss_watchdog_threshold"),
    "plugins": no("code of other packages is never run"),
    "strict": no("unknown keys are always errors here"),
}
