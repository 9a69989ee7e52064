"""adapter_config.json, as PEFT writes it beside a LoRA."""

from __future__ import annotations

from kpsvd_tune.recipe.convert import keys
from kpsvd_tune.recipe.convert.keys import Rule, Rules, Target, always_told, modules, no, says, to


@says("none: another start of LoRA; ours is the weight's own terms")
def _start(target: Target, source: str, value: object) -> None:
    if value not in (*keys.NOTHING, True):
        target.leave(source, value, "another start of LoRA; ours is the weight's own terms")


@says("nothing: it says what the file is")
def _says_what_it_is(target: Target, source: str, value: object) -> None:
    """It asks for nothing."""


_LABELS: tuple[str, ...] = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "runtime_config"),
)
_LABELLED: dict[str, Rule] = dict.fromkeys(_LABELS, _says_what_it_is)

PEFT: Rules = {
    **_LABELLED,
    "base_model_name_or_path": to("model.path"),
    "revision": to("model.revision"),
    "target_modules": modules,
    "exclude_modules": to("adapter.exclude_modules"),
    "modules_to_save": keys.list_of("adapter.modules_to_save"),
    "lora_dropout": to("adapter.dropout"),
    "r": always_told(keys.RANK),
    "lora_alpha": always_told(keys.SCALE),
    "use_rslora": no(keys.SCALE),
    "alpha_pattern": no(keys.SCALE),
    "rank_pattern": no("ranks of single layers: set adapter.rank.overrides"),
    "use_dora": no(keys.VARIANT),
    "use_qalora": no(keys.VARIANT),
    "init_lora_weights": _start,
    "bias": no("biases are not trained"),
    "lora_bias": no("biases are not trained"),
    "layers_to_transform": no(
        "layers by number: adapter.target_modules takes a regular expression; until then all "
        "layers are adapted"
    ),
    "layers_pattern": no("see layers_to_transform"),
    "layer_replication": no("layers are never repeated here"),
    "target_parameters": no("parameters that are no linear layers are not adapted"),
    "trainable_token_indices": no("single rows of the embedding are not trained by `train`"),
}
