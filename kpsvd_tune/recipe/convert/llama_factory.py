"""The YAML of LLaMA-Factory: `llamafactory-cli train FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kpsvd_tune.recipe.convert import keys
from kpsvd_tune.recipe.convert.keys import (
    Rules,
    Target,
    always_told,
    mapped,
    modules,
    no,
    says,
    to,
    when_true,
)
from kpsvd_tune.recipe.convert.trainer import TRAINER

_INFO = "dataset_info.json"
_FORMS = ("alpaca", "sharegpt", "openai")
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
    "messages": "conversations",
}


def rows_of(settings: dict[str, Any], folder: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """The data sets that a configuration names, each with what dataset_info.json says of it.

    That file is looked for in `dataset_dir`, from here and from the configuration's folder.
    """
    named = settings.get("dataset") or []
    names = named.split(",") if isinstance(named, str) else named
    names = names if isinstance(names, list) else [names]
    where = settings.get("dataset_dir") or "data"
    known: dict[str, Any] = {}
    if isinstance(where, str):
        for place in (Path(where), folder / where):
            try:
                known = json.loads((place / _INFO).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(known, dict):
                known = {
                    name: {**entry, "folder": place}
                    for name, entry in known.items()
                    if isinstance(entry, dict)
                }
                break
            known = {}
    return [(str(each).strip(), known.get(str(each).strip())) for each in names]


def set_rows(target: Target, settings: dict[str, Any], folder: Path) -> None:
    """Set dataset.path and what belongs to it."""
    found = []
    is_text = settings.get("stage") == "pt"
    most = settings.get("max_samples")
    if most is not None and not _is_number(most):
        target.leave("max_samples", most, "expected a whole number above 0: every row is taken")
    for name, entry in rows_of(settings, folder):
        source: dict[str, Any] = {"path": name}
        if entry is None:
            target.leave(
                f"dataset {name}",
                name,
                f"a name of its list of data sets ({_INFO}), which is not here: set dataset.path "
                "to the file or hub id, and columns",
            )
        else:
            source = _source(target, name, entry, is_text=is_text)
        if "split" in source and _is_number(most):
            source["split"] = f"{source['split']}[:{most}]"
        found.append(source)
    if len(found) == 1:
        for key, value in found[0].items():
            target.set(f"dataset.{key}", value, "dataset")
    elif found:
        target.set("dataset.path", found, "dataset")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _source(target: Target, name: str, entry: dict[str, Any], *, is_text: bool) -> dict[str, Any]:
    rest = dict(entry)
    folder = rest.pop("folder")
    file = rest.pop("file_name", None)
    hub = rest.pop("hf_hub_url", None)
    source: dict[str, Any] = {"path": hub or (str(folder / str(file)) if file else name)}
    form = rest.pop("formatting", "alpaca")
    if form not in _FORMS:
        target.leave(f"dataset {name}: formatting", form, "not known here: read as alpaca's rows")
    columns = rest.pop("columns", None) or {}
    given: dict[str, Any] = columns if isinstance(columns, dict) else {}
    if given is not columns:
        target.leave(f"dataset {name}: columns", columns, "expected a mapping: not carried over")
    tags = rest.pop("tags", None)
    if is_text:
        # All of one column is learnt there, whatever it is called.
        source["format"] = "text"
        source["columns"] = {"text": given.get("prompt", "instruction")}
        given = {key: value for key, value in given.items() if key != "prompt"}
    elif form == "openai" or (isinstance(tags, dict) and tags.get("role_tag") == "role"):
        # Messages as OpenAI writes them.
        source["format"] = "chat"
        source["columns"] = {"messages": given.get("messages", "messages")}
        given = {key: value for key, value in given.items() if key != "messages"}
        tags = None
    else:
        source["format"] = "sharegpt" if form == "sharegpt" else "alpaca"
    known = {} if is_text else _COLUMNS
    named = {known[key]: value for key, value in given.items() if key in known}
    if named:
        source["columns"] = {**source.get("columns", {}), **named}
    if "subset" in rest:
        source["name"] = rest.pop("subset")
    if "split" in rest:
        source["split"] = rest.pop("split")
    others = {key: value for key, value in given.items() if key not in known}
    others |= rest | ({"tags": tags} if tags else {})
    for key, value in others.items():
        target.leave(f"dataset {name}: {key}", value, "no counterpart: see docs/data.md")
    return source


@says("pt: `dataset.format: text`; sft: nothing; others are refused")
def _stage(target: Target, source: str, value: Any) -> None:
    if value == "pt":
        target.set("dataset.format", "text", source)


@says("none: here a KPSVD adapter is trained in any case")
def _kind(target: Target, source: str, value: Any) -> None:
    if value != "lora":
        target.leave(source, value, "all or other weights were trained; here a KPSVD adapter is")


@says("`dataset.split: train[:N]`")
def _most_rows(target: Target, source: str, value: Any) -> None:
    if _is_number(value):
        target.set("dataset.split", f"train[:{value}]", source)


@says("`dataset.path`, `format`, `columns`, by dataset_info.json where that is found")
def _dataset(target: Target, source: str, value: Any) -> None:
    """Set by :func:`set_rows`, which needs other keys too."""


LLAMA_FACTORY: Rules = {
    **TRAINER,
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "flash_attn": no("set model.attn_implementation; transformers chooses"),
    "trust_remote_code": no("code of a model's repository is never run"),
    "adapter_name_or_path": no("a LoRA cannot be trained on as KPSVD: merge it into the base"),
    "quantization_bit": mapped("model.quantization", {"4": "nf4", "8": "int8"}, keys.QUANTISED),
    "quantization_method": no("it is bitsandbytes that quantises here"),
    "stage": _stage,
    "finetuning_type": _kind,
    "lora_rank": always_told(keys.RANK),
    "lora_alpha": always_told(keys.SCALE),
    "lora_dropout": to("adapter.dropout"),
    "lora_target": modules,
    "additional_target": keys.list_of("adapter.modules_to_save"),
    "use_rslora": no(keys.SCALE),
    "use_dora": no(keys.VARIANT),
    "pissa_init": no(keys.VARIANT),
    "loraplus_lr_ratio": no("one rate for both factors: a ratio of 4 was worse (docs/study.md)"),
    "dataset": _dataset,
    "dataset_dir": _dataset,
    "eval_dataset": no("held-out rows: set dataset.validation to a file"),
    "template": keys.chat_template,
    "enable_thinking": no("set dataset.template_arguments: {enable_thinking: ...}"),
    "default_system": no("system messages are those of the rows"),
    "tool_format": no("calls are written by the chat template"),
    "cutoff_len": to("dataset.max_length"),
    "max_samples": _most_rows,
    "val_size": to("dataset.validation"),
    "train_on_prompt": no(keys.PROMPTS),
    "mask_history": when_true("dataset.learn", "last"),
    "streaming": to("dataset.streaming"),
    "packing": keys.packing,
    "neat_packing": keys.packing,
    "preprocessing_num_workers": no(keys.SPEED),
    "preprocessing_batch_size": no(keys.SPEED),
    "overwrite_cache": no(keys.SPEED),
    "tokenized_path": no("rows are tokenised anew, and kept in a cache"),
    "plot_loss": no("report.html in the run's folder shows the curves"),
    "save_only_model": no("a checkpoint holds all that an exact resume needs"),
    "include_num_input_tokens_seen": no("metrics.jsonl counts tokens"),
}
