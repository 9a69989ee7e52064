"""The part of a base model's configuration that changes what it computes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import nn

# Names, versions, how a model is stored, run, trained or decoded; sizes of tables of tokens show
# in the weights. Each part of a nested key is compared.
_BOOKKEEPING = re.compile(
    r"_.*|name_or_path|.*version|(torch_)?dtype|quantization_config|architectures|auto_map"
    r"|use_cache|return_dict|torchscript|output_(\w*attentions|hidden_states|router_logits|past)|gradient_checkpointing|attn_implementation"
    r"|experts_implementation|chunk_size_feed_forward|pretraining_tp|vocab_size|tokenizer_class"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|\w*token_ids?|\w*token_index|(?!token_dropout$)\w*dropout\w*|\w*_pdrop|\w*drop_path\w*|layerdrop"
    r"|initializer_\w+|\w*loss_coef\w*"
)
# What counts positions from the padding token, as in RoBERTa.
_POSITIONS = "create_position_ids_from_input_ids"


def values_of(model: nn.Module) -> dict[str, Any]:
    """What of a model's configuration decides its outputs, by key; nested keys have dots.

    A model that is not of transformers and holds none of transformers has no values.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    config: Any = next((each for each in configs if hasattr(each, "to_dict")), None)
    if config is None:
        return {}
    exempt = {"pad_token_id"} if any(map(_counts_from_padding, model.modules())) else set()
    leaves = dict(_leaves(config.to_dict(), exempt))
    values: dict[str, Any] = json.loads(json.dumps(leaves, default=str))
    types = [value for key, value in values.items() if "rope_type" in key]
    is_rotary = any("rope" in key or "rotary" in key for key in values)
    if is_rotary and all(value in (None, "default") for value in types):
        # Unscaled rotary embeddings do not depend on the longest text, and position tables are
        # weights, which are compared as such.
        values = {k: v for k, v in values.items() if not k.endswith("max_position_embeddings")}
    return values


def hash_of(values: Mapping[str, Any]) -> int:
    """23 bits of a hash of the values, never 0."""
    text = json.dumps({key: _plain(value) for key, value in sorted(values.items())})
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**23 - 1) + 1


def differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The keys that have other values, with both; keys that one side lacks are not compared.

    Another version of transformers knows other keys, with defaults that change nothing.
    """
    return [
        f"{key} {found[key]!r} instead of {stored[key]!r}"
        for key in sorted(stored.keys() & found.keys())
        if _plain(stored[key]) != _plain(found[key])
    ]


def _counts_from_padding(module: nn.Module) -> bool:
    kind = type(module)
    code = vars(sys.modules.get(kind.__module__, sys))
    is_position = "Position" in kind.__name__ and getattr(module, "padding_idx", None) is not None
    return is_position or hasattr(module, _POSITIONS) or _POSITIONS in code


def _leaves(
    values: Mapping[Any, Any], exempt: Set[str] = frozenset(), path: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings but bookkeeping; ``exempt`` keys are none here."""
    for key, value in values.items():
        if _BOOKKEEPING.fullmatch(str(key)) and key not in exempt:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, exempt, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _plain(value: Any) -> Any:
    """Numbers as six digits: formats such as GGUF round them to float32."""
    if isinstance(value, int) and abs(value) > 2**1000:
        return str(value)  # no float holds it
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return [_plain(each) for each in value] if isinstance(value, list) else value
