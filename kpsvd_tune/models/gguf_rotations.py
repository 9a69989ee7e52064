"""The rescaled rotary embedding of a GGUF file, which transformers does not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kpsvd_tune.errors import ModelError, some_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What llama.cpp writes beside the kind, and the name in transformers' configuration.
_KEYS = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
_WANTED = {"linear": {"factor"}, "yarn": {"factor", "original_context_length"}}
# Says how the checkpoint came about, and changes no number.
_IGNORED = {"type", "finetuned"}


def with_rotations(
    config: PretrainedConfig, metadata: Mapping[str, Any], path: str
) -> PretrainedConfig:
    """Put the rescaling of the metadata, linear or yarn, into a configuration, and give it back.

    Args:
        config: As transformers reads it from the file, with the base frequency alone.
        metadata: Plain values by their keys; arrays may be missing.
        path: Names the file in messages.

    Raises:
        ModelError: A rescaling of another kind, or with values that are not known here.
    """
    prefix = f"{metadata.get('general.architecture')}.rope.scaling."
    own = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    # llama.cpp takes a factor without a kind for a linear one.
    kind = own.get("type", "linear" if "factor" in own else "none")
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    # transformers reads those of some architectures itself.
    if kind == "none" or rope.get("rope_type", "default") != "default":
        return config
    used = own.keys() - _IGNORED
    # Beside layers of several kinds the file does not say which ones are rescaled.
    is_one = "rope_theta" in rope
    # A linear rescaling knows no original length; some files give it all the same.
    used -= {"original_context_length"} if kind == "linear" else set()
    if not is_one or used != _WANTED.get(kind):
        values = some_of([f"{prefix}{key} = {own[key]}" for key in sorted(own)], 4)
        raise ModelError(
            f"model {path!r}: the file rescales the rotary embedding in a way that cannot be "
            f"computed here ({values}), and without it the model would be another one; expected "
            "the model's folder with config.json and safetensors"
        )
    config.rope_parameters = {**rope, "rope_type": kind, **{_KEYS[key]: own[key] for key in used}}
    return config
