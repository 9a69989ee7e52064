"""The files beside merged weights: configuration, tokenizer and processors, as the base has them.

transformers 5 writes configurations in which version 4 finds no base of the rotary embedding and
takes 10000 in silence, and names classes of tokenizers that version 4 does not know. A merge
changes nothing in either, so the base's own files are kept, and both versions' keys written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.storage.json_files import read_json, to_json

_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "spiece.model"),
)
_OF_PROCESSORS = tuple(
    f"{kind}_config.json" for kind in ("preprocessor", "processor", "video_preprocessor")
)


def keep_base_files(
    folder: Path,
    base: Path | None,
    dtype: str,
    has_own_tokenizer: bool = False,
    is_untied: bool = False,
) -> None:
    """Give a merged model the base's own files where the merge changed nothing in them.

    The chat template that transformers saved stays. `base` is None for a single file such as GGUF;
    `has_own_tokenizer` says that the tokenizer written is another than the base's, `is_untied` that
    embeddings which were one tensor are two now.
    """
    written = read_json(folder / "config.json")
    config = written
    if base is not None and (base / "config.json").is_file():
        own = read_json(base / "config.json")
        # The language model alone of a model of several kinds has another configuration.
        same = all(own.get(key) == written.get(key) for key in ("model_type", "architectures"))
        config = own if same else written
        for name in (*_OF_PROCESSORS, *(() if has_own_tokenizer else _OF_TOKENIZER)):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
    if is_untied:
        config = untied(config)
    (folder / "config.json").write_bytes(to_json(for_both_versions(config, dtype)))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and (known := tokenizer_for_both_versions(read_json(tokenizer))):
        tokenizer.write_bytes(to_json(known))


def add_end_tokens(folder: Path, ends: Sequence[int]) -> list[int]:
    """Have whoever serves a merged model stop at the tokens that answers end with.

    Those that its generation_config.json does not name, or config.json where there is no such file,
    join the others there; gives them. The base may never have stopped at the end of a turn.
    """
    file, config = folder / "generation_config.json", read_json(folder / "config.json")
    content = read_json(file) if file.is_file() else {}
    if not file.is_file():
        kept = ("bos_token_id", "pad_token_id")
        content = {key: config[key] for key in kept if config.get(key) is not None}
    known = content.get("eos_token_id", config.get("eos_token_id"))
    held = known if isinstance(known, list) else [] if known is None else [known]
    if added := [each for each in ends if each not in held]:
        file.write_bytes(to_json({**content, "eos_token_id": [*held, *added]}))
    return added


def copy_configurations(folder: Path, base: Path) -> None:
    """Copy the base's configurations of the model and of its generation, where it has one."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose input and output embeddings are two tensors."""
    content = {**config, "tie_word_embeddings": False}
    for key, value in config.items():
        if (
            key.endswith("_config")
            and isinstance(value, Mapping)
            and "tie_word_embeddings" in value
        ):
            content[key] = {**value, "tie_word_embeddings": False}
    return content


def tokenizer_for_both_versions(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tokenizer's configuration as transformers 4 reads it too; None where nothing changes."""
    content = dict(config)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in version 4
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    return content if content != dict(config) else None


def for_both_versions(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration with the keys of transformers 4 and 5, for plain weights of `dtype`."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    content |= {"dtype": dtype, "torch_dtype": dtype}
    rope = content.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        content.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            content.setdefault("rope_scaling", scaling)
    for key, value in content.items():
        if key.endswith("_config") and isinstance(value, Mapping) and "model_type" in value:
            content[key] = for_both_versions(value, dtype)
    return content
