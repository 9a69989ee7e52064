"""The YAML of trl's scripts: `trl sft --config FILE`."""

from __future__ import annotations

from typing import Any

from kpsvd_tune.recipe.convert import keys
from kpsvd_tune.recipe.convert.keys import (
    Rules,
    Target,
    always_told,
    modules,
    no,
    says,
    to,
    when_true,
)
from kpsvd_tune.recipe.convert.trainer import TRAINER


@says("none: here an adapter is trained in any case")
def _use_peft(target: Target, source: str, value: Any) -> None:
    if value in keys.NOTHING:
        target.leave(source, value, "all weights were trained; here an adapter is")


@says("`model.dtype`")
def _dtype(target: Target, source: str, value: Any) -> None:
    if value in ("float32", "bfloat16", "float16"):
        target.set("model.dtype", value, source)
    elif value is not None:
        target.leave(source, value, "expected a type by its name: the default of model.dtype holds")


@says("`dataset.columns.text`")
def _text_column(target: Target, source: str, value: Any) -> None:
    if value not in (None, "text"):
        target.set("dataset.columns", {"text": value}, source)


@says("`dataset.max_length`")
def _longest(target: Target, source: str, value: Any) -> None:
    if value is None:
        target.leave(source, value, "rows have no limit there; here dataset.max_length cuts them")
    else:
        target.set("dataset.max_length", value, source)


@says("none: only answers are learnt here; false there learns the prompts as well")
def _only_answers(target: Target, source: str, value: Any) -> None:
    if value is False:
        target.leave(source, value, keys.PROMPTS)


TRL: Rules = {
    **TRAINER,
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "attn_implementation": to("model.attn_implementation"),
    "trust_remote_code": no("code of a model's repository is never run"),
    "dataset_name": to("dataset.path"),
    "dataset_config": to("dataset.name"),
    "dataset_train_split": to("dataset.split"),
    "dataset_test_split": no("held-out rows are told by dataset.validation: a share, or a file"),
    "dataset_streaming": to("dataset.streaming"),
    "dataset_text_field": _text_column,
    "dataset_num_proc": no(keys.SPEED),
    "max_length": _longest,
    "max_seq_length": _longest,
    "packing": keys.packing,
    "packing_strategy": no("rows of a micro batch are laid end to end, and never cut to fit"),
    "padding_free": no("train.packing spares padding as well"),
    "eval_packing": no(keys.SPEED),
    "assistant_only_loss": _only_answers,
    "completion_only_loss": _only_answers,
    "chat_template_path": to("dataset.chat_template"),
    "eos_token": no("the tokenizer's own end token, or the template's, is learnt"),
    "pad_token": no("padding is masked, whatever the token is"),
    "use_peft": _use_peft,
    "lora_r": always_told(keys.RANK),
    "lora_alpha": always_told(keys.SCALE),
    "lora_dropout": to("adapter.dropout"),
    "lora_target_modules": modules,
    "lora_modules_to_save": keys.list_of("adapter.modules_to_save"),
    "lora_target_parameters": no("parameters that are no linear layers are not adapted"),
    "lora_task_type": no("a causal language model is trained"),
    "use_rslora": no(keys.SCALE),
    "use_dora": no(keys.VARIANT),
    "load_in_8bit": when_true("model.quantization", "int8"),
    "load_in_4bit": when_true("model.quantization", "nf4"),
    "bnb_4bit_quant_type": no("four bits are nf4"),
    "use_bnb_nested_quant": no("the scales of nf4 are always quantised too"),
}
