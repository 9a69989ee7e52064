"""Load a base model, its tokenizer, or its skeleton without weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
from _pickle import UnpicklingError  # the class alone: nothing is unpickled here
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from kpsvd_tune.errors import KpsvdTuneError, ModelError, some_of
from kpsvd_tune.hardware.devices import own_device
from kpsvd_tune.models.gguf_head import gguf_config, gguf_tokenizer, tensors_watched
from kpsvd_tune.models.quantised import dequantised, quantisation_config, settle_quantised
from kpsvd_tune.models.source import ModelSource
from kpsvd_tune.storage.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
# In a GGUF file the name of the tensor of rotary factors, and the bytes that names lie in.
_ROPE_FACTORS, _GGUF_HEAD = (b"rope_freqs.weight", b"rope_factors_long.weight"), 1 << 26
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a file that is cut, empty or overwritten raises in the library that reads it.
DAMAGED = (SafetensorError, EOFError, UnpicklingError)
# Of layers, and of experts in a layer; the largest models have a few hundred.
_MOST_MODULES = 4096
# What a configuration of the right form with impossible values raises.
_IMPOSSIBLE = (StrictDataclassError, AttributeError, TypeError, ArithmeticError, RuntimeError)


def load_model(
    source: ModelSource,
    dtype: str,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load the base model on the CPU in evaluation mode, in float32, bfloat16 or float16.

    A GGUF file is dequantised, and the result counts as an ordinary model, so that
    ``save_pretrained`` writes it. Without `attn_implementation` transformers chooses the attention.
    With a `quantization`, nf4 or int8, the linear layers are quantised while they are loaded.

    Raises:
        ModelError: The files are damaged or not a causal language model, weights are missing, the
            ``gguf`` or ``bitsandbytes`` package is not installed, or the model cannot be quantised.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ModelError(f"model.dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "config": _config(source)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        _check_quantisable(source, options["config"], quantization)
        options["quantization_config"] = quantisation_config(quantization, DTYPES[dtype])
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    # Typed as returning the model alone, whatever is asked for.
    load: Any = AutoModelForCausalLM.from_pretrained
    is_gguf = source.kind == "gguf"
    watched: Any = tensors_watched() if is_gguf else nullcontext(())
    with _reading(f"model {source.path!r} cannot be loaded"), watched as homeless:
        try:
            model, info = load(
                source.folder, local_files_only=True, output_loading_info=True, **options
            )
        except DAMAGED as error:
            if is_out_of_memory(error):
                raise
            files = ", ".join(file.name for file in source.weight_files[:3])
            # torch adds a page of advice to some of these.
            reason = (str(error).splitlines() or [""])[0].split(". ")[0]
            raise ModelError(
                f"model {source.path!r}: its weight files ({files}) are cut or damaged "
                f"({type(error).__name__}: {reason}); fetch the model again"
            ) from error
    # transformers fills what a checkpoint lacks with random numbers and a warning.
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {source.path!r}: its files hold no values for {len(missing)} weights, the "
            f"first is {missing[0]}; the download is incomplete or belongs to another architecture"
        )
    # Without those that transformers knows to ignore.
    extra = sorted(info["unexpected_keys"])
    refuse_more_layers(source, extra, model.state_dict())
    if extra:
        warn_of_extra(source, extra)
    if is_gguf:
        _refuse_homeless(source, homeless)
        _forget_quantisation(model)
        _warn_of_rotations(source)
    settle_quantised(model, source.path)
    loaded: PreTrainedModel = model
    return loaded


def _refuse_homeless(source: ModelSource, names: Sequence[str]) -> None:
    """Refuse a GGUF file with tensors that transformers would leave out of the model."""
    if names:
        raise ModelError(
            f"model {source.path!r}: the file holds {some_of(names)}, for which transformers has "
            "no place in a model of this architecture and size, so that another model would be "
            "loaded; expected the model's folder with config.json and safetensors"
        )


def warn_of_extra(source: ModelSource, extra: Sequence[str]) -> None:
    """Tell of stored tensors that no part of the model is made of."""
    _log.warning(
        "model %r: its configuration has no place for %s of its files; they are left out",
        source.path,
        some_of(extra),
    )


def load_plain_model(source: ModelSource, dtype: str) -> PreTrainedModel:
    """Load the base model as :func:`load_model` does, with plain weights in any case.

    Raises:
        ModelError: As :func:`load_model`, or transformers cannot dequantise the weights.
    """
    model: Any = load_model(source, dtype)
    if getattr(model, "hf_quantizer", None) is not None:
        _log.warning(
            "model %r is stored quantised: its dequantised weights are taken, which differ from "
            "those that it was made from",
            source.path,
        )
        with _reading(
            f"model {source.path!r}: its quantised weights cannot be made plain again",
            "use the checkpoint that it was made from",
        ):
            model = dequantised(model).to(DTYPES[dtype])
        _forget_quantisation(model)
        # How packed tensors were read, which save_pretrained would undo; the rest it finds again.
        model._weight_conversions = None
    plain: PreTrainedModel = model
    return plain


def _check_quantisable(source: ModelSource, config: Any, quantization: str) -> None:
    """Refuse to quantise what transformers does not, or what has been quantised before."""
    if own_device().type == "mps":
        raise ModelError(
            f"model.quantization: {quantization} is not supported on Apple's mps; expected null, "
            "or ACCELERATE_USE_CPU=true in the environment, which trains on the CPU"
        )
    if source.kind == "gguf":
        raise ModelError(
            f"model {source.path!r} is a GGUF file, which is dequantised while it is loaded, and "
            f"model.quantization is {quantization}: expected a folder or hub model with plain "
            "weights, or model.quantization: null"
        )
    if (known := getattr(config, "quantization_config", None)) is not None:
        kind = known.get("quant_method") if isinstance(known, dict) else known.quant_method
        raise ModelError(
            f"model {source.path!r} is quantised already ({getattr(kind, 'value', kind)}), and "
            f"model.quantization is {quantization}: expected a model with plain weights, or "
            "model.quantization: null"
        )


def refuse_more_layers(source: ModelSource, extra: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a configuration that counts fewer layers or experts than its files hold.

    Names in `extra`, from which no weight came, must not be `known` ones with other numbers.
    """
    kinds = {_NUMBER.sub("#", name) for name in known}
    more = sorted(name for name in extra if _NUMBER.sub("#", name) in kinds)
    if more:
        raise ModelError(
            f"model {source.path!r}: its files hold {some_of(more)}, for which its configuration "
            "has no place: config.json counts fewer layers than there are, and a part of the model "
            "would be loaded; expected the config.json that belongs to the weights: fetch it again"
        )


def load_skeleton(
    source: ModelSource,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    *,
    with_buffers: bool = False,
) -> PreTrainedModel:
    """Build the model from its configuration alone, on the meta device: names and sizes.

    Without a dtype it is the configuration's. `with_buffers` makes the buffers for real.

    Raises:
        ModelError: The configuration is not one of a causal language model, or holds impossible
            values.
    """
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as transformers_version

    config = _config(source)
    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        # transformers' own message lists every class it knows.
        raise ModelError(
            f"model {source.path!r}: its model_type {config.model_type!r} is not a causal "
            f"language model of transformers {transformers_version}"
        )
    place = init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta")
    with _building(source), place:
        model = build_model(config, dtype, attn_implementation)
    if with_buffers:
        # Each name was given a parameter of its own.
        model.tie_weights()
    return model


def build_model(
    config: Any, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a causal language model from its configuration, on the default device.

    Without a dtype it is the configuration's, and without an attention transformers chooses.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(copy.deepcopy(config), **options)
    return model


def load_tokenizer(source: ModelSource, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or that of an adapter trained on it, whose folder is given.

    The chat template is the adapter's where it has one: the training may have used another than
    the model's. So is the tokenizer where that splits texts otherwise.

    Raises:
        ModelError: The source holds no tokenizer, or the adapter's cannot be read.
    """
    from transformers import AutoTokenizer

    _require_gguf(source)
    with _reading(
        f"model {source.path!r}: its tokenizer cannot be loaded",
        "expected the tokenizer files that belong to the model: fetch them again",
    ):
        tokenizer: PreTrainedTokenizerBase
        if source.kind == "gguf":
            tokenizer = gguf_tokenizer(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        # Values of wrong types, as of model_max_length, show when they are first used.
        tokenizer("a")
    if adapter is not None:
        tokenizer = _of_adapter(adapter, tokenizer)
    return tokenizer


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers split every text into the same tokens; chat templates may differ."""
    return (
        one.get_vocab() == other.get_vocab()
        and one.special_tokens_map == other.special_tokens_map
        and _rules(one) == _rules(other)
    )


def _rules(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    # The state of the last call.
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}


def _of_adapter(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with: its own where it has one that differs."""
    from transformers import AutoTokenizer

    template = adapter / "chat_template.jinja"
    # Beside several templates lies a folder of the others; those are the model's own.
    if template.is_file() and not (adapter / "additional_chat_templates").exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not (adapter / "tokenizer_config.json").is_file():
        return tokenizer
    with _reading(
        f"{adapter}: the tokenizer beside the adapter cannot be loaded",
        "expected the files as they were saved, or none: then the base's are taken",
    ):
        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            adapter, local_files_only=True, trust_remote_code=False
        )
    if isinstance(own.chat_template, str):
        # transformers 4 may have written it into tokenizer_config.json.
        tokenizer.chat_template = own.chat_template
    if same_tokenizer(own, tokenizer):
        return tokenizer
    own.chat_template = own.chat_template or tokenizer.chat_template
    known, found = tokenizer.get_vocab(), own.get_vocab()
    moved = sorted(token for token in known if found.get(token) != known[token])
    if moved:
        _log.warning(
            "%s has a tokenizer of its own, in which %s of the base's vocabulary are other tokens "
            "or none; the adapter's tokenizer is taken",
            adapter,
            some_of([repr(token) for token in moved]),
        )
    return own


def _config(source: ModelSource) -> PretrainedConfig:
    from transformers import AutoConfig

    _require_gguf(source)
    unreadable = f"model {source.path!r}: its configuration cannot be read"
    with _reading(unreadable, "fetch it again"), _building(source, _IMPOSSIBLE):
        if source.kind == "gguf":
            return gguf_config(source)
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise ModelError(
                f"model {source.path!r} brings Python code of its own, and code beside a model is "
                "never run here; expected an architecture that transformers itself knows: take a "
                "checkpoint of one, or a newer transformers that has this one"
            ) from error
    _check_sizes(source, config)
    return config


def _check_sizes(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuse numbers of modules that no model has: building them would take for ever."""
    configs = [config, *(each for each in vars(config).values() if hasattr(each, "model_type"))]
    for each in configs:
        for key, value in vars(each).items():
            if (
                isinstance(value, int)
                and value > _MOST_MODULES
                and ("layers" in key or "experts" in key or key in ("n_layer", "depth"))
            ):
                raise ModelError(
                    f"model {source.path!r}: its configuration says {key} {value:,}; expected at "
                    f"most {_MOST_MODULES:,}: is this the config.json of these weights? Fetch it "
                    "again"
                )


@contextmanager
def _reading(
    fault: str, cure: str = "", kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what a library raises over files, which may hold anything, into a ModelError.

    Errors of ours stay what they are, and so do those of the machine's memory.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, KpsvdTuneError) or is_out_of_memory(error):
            raise
        raise ModelError(f"{fault}: {_said(error)}{'; ' if cure else ''}{cure}") from error


def _building(
    source: ModelSource, kinds: tuple[type[Exception], ...] = (Exception,)
) -> AbstractContextManager[None]:
    return _reading(
        f"model {source.path!r}: no model can be built from its configuration",
        "expected the config.json that belongs to the weights: fetch it again",
        kinds,
    )


def _said(error: Exception) -> str:
    """What a library said, on one line of bounded length, with its kind where it said little."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else text[:297] + "..."
    return shown if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {shown}"


def _require_gguf(source: ModelSource) -> None:
    if source.kind == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model {source.path!r} is a GGUF file, and reading it needs the gguf package; "
            "install it with: pip install 'kpsvd-tune[gguf]'"
        )


def _warn_of_rotations(source: ModelSource) -> None:
    """Tell of a GGUF file whose factors of the rotary embedding transformers does not read.

    Llama 3.1 and its kin are stored so; without the factors long texts are read in another way.
    """
    with source.weight_files[0].open("rb") as file:
        # The names of the tensors follow the vocabulary, which takes a few megabytes.
        head = file.read(_GGUF_HEAD)
        if not any(name in head for name in _ROPE_FACTORS):
            return
    _log.warning(
        "model %r: the file rescales the rotary embedding (rope_freqs), which transformers does "
        "not read from GGUF: texts are read otherwise than by llama.cpp, long ones most. Use the "
        "model's folder with config.json and safetensors instead",
        source.path,
    )


def _forget_quantisation(model: Any) -> None:
    # The weights are plain floats now, but transformers still marks the model as quantised and
    # refuses to save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
