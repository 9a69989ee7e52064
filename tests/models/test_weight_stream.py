"""Streamed weights are the loaded model's weights, bit for bit, whatever their names on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.errors import ModelError
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    load_model,
    load_skeleton,
    resolve_model,
)
from kpsvd_tune.models import stream as stream_module


def targets(source: ModelSource) -> list[str]:
    return target_names(load_skeleton(source), "all-linear")


def _read_all(source: ModelSource) -> None:
    reader = WeightReader(source, targets(source))
    for name in reader.names:
        reader.load(name)


def refuse_to_load(*args: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_weights_are_streamed_bit_for_bit_without_loading_the_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures.save(architecture, tmp_path, max_shard_size="5KB")
    source = resolve_model(str(tmp_path))
    assert len(source.weight_files) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(stream_module, "load_plain_model", refuse_to_load)
    names = targets(source)
    assert len(names) >= 8
    reader = WeightReader(source, names)
    for name in names:
        assert torch.equal(reader.load(name), architectures.weight_of(loaded, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_keeps_its_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = architectures.make("llama")
    nn.Module.to(model, dtype)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj"
    weight = WeightReader(resolve_model(str(tmp_path)), [name]).load(name)
    assert weight.dtype == dtype
    assert torch.equal(weight, architectures.weight_of(model, name))


def test_a_checkpoint_of_the_bare_base_model_is_read_by_its_short_names(tmp_path: Path) -> None:
    model = architectures.make("gpt2")
    base: Any = model.base_model
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "transformer.h.0.attn.c_attn.weight" not in load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    reader = WeightReader(resolve_model(str(tmp_path)), ["transformer.h.0.attn.c_attn"])
    assert reader.location("transformer.h.0.attn.c_attn") is not None
    weight = reader.load("transformer.h.0.attn.c_attn")
    assert weight.shape == (48, 16)
    assert torch.equal(weight, architectures.weight_of(model, "transformer.h.0.attn.c_attn"))


def test_a_fused_layout_falls_back_to_the_loaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = architectures.CONFIGS["llama"]()
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.self_attn"
        parts = [tensors.pop(f"{stem}.{side}_proj.weight") for side in "qkv"]
        tensors[f"{stem}.qkv_proj.weight"] = torch.cat(parts)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds the table
    table: Any = conversion_mapping._checkpoint_conversion_mapping_cache
    splitting = WeightConverter(
        ["self_attn.qkv_proj.weight"],
        [f"self_attn.{side}_proj.weight" for side in "qkv"],
        operations=[Chunk(dim=0)],
    )
    monkeypatch.setitem(table, "llama", [splitting])
    source = resolve_model(str(tmp_path))
    names = targets(source)
    reader = WeightReader(source, names)
    fused = {name for name in names if reader.location(name) is None}
    assert fused == {name for name in names if name[-6:] in ("q_proj", "k_proj", "v_proj")}
    for name in names:
        assert torch.equal(reader.load(name), architectures.weight_of(model, name)), name


def test_pickled_weights_come_from_the_loaded_model(tmp_path: Path) -> None:
    model = architectures.save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source = resolve_model(str(tmp_path))
    name = "model.layers.0.mlp.down_proj"
    weight = WeightReader(source, [name]).load(name)
    assert torch.equal(weight, architectures.weight_of(model, name))


def mixed(folder: Path, bin_first: bool) -> Any:
    """A checkpoint of two shards, one pickled and one of safetensors, as an index lists them."""
    model = architectures.save("llama", folder)
    (folder / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    halves = [dict(list(state.items())[k::2]) for k in (0, 1)]
    names = ["a.bin", "b.safetensors"] if bin_first else ["b.bin", "a.safetensors"]
    torch.save(halves[0], folder / names[0])
    save_file(halves[1], folder / names[1], {"format": "pt"})
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_shards_of_two_formats_load_where_transformers_loads_them(tmp_path: Path) -> None:
    model = mixed(tmp_path, bin_first=True)
    source = resolve_model(str(tmp_path))
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    reader = WeightReader(source, names)
    for name in names:
        assert torch.equal(reader.load(name), architectures.weight_of(model, name))
    loaded = load_model(source, "float32").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_shards_of_two_formats_are_refused_where_transformers_cannot_load_them(
    tmp_path: Path,
) -> None:
    mixed(tmp_path, bin_first=False)
    with pytest.raises(SafetensorError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lists a\.safetensors and, of another format, b\.bin; tr"
    ):
        resolve_model(str(tmp_path))


def test_sizes_are_known_without_reading(tmp_path: Path) -> None:
    architectures.save("gpt2", tmp_path)
    reader = WeightReader(resolve_model(str(tmp_path)), ["transformer.h.0.mlp.c_fc"])
    assert reader.size("transformer.h.0.mlp.c_fc") == (64, 16)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    source = resolve_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"ends inside the tensor .* at least .*; fetch it"):
        _read_all(source)


def test_garbage_instead_of_a_header_is_named(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    source = resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="model.safetensors is not a safetensors file"):
        WeightReader(source, ["model.layers.0.mlp.up_proj"])


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_of_another_size_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    rewrite(tmp_path, "model.layers.0.mlp.up_proj.weight", torch.zeros(24, 15))
    with pytest.raises(
        ModelError, match=r"up_proj is stored with size \(24, 15\).*says \(24, 16\)"
    ):
        WeightReader(resolve_model(str(tmp_path)), ["model.layers.0.mlp.up_proj"])


def test_a_packed_quantised_weight_is_refused_by_name(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    packed = torch.zeros(24 * 8, 1, dtype=torch.uint8)
    rewrite(tmp_path, "model.layers.0.mlp.up_proj.weight", packed)
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj is stored as U8, a packed quant"):
        WeightReader(resolve_model(str(tmp_path)), ["model.layers.0.mlp.up_proj"])


def test_a_quantised_layout_whose_library_is_missing_names_it(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    rewrite(tmp_path, "model.layers.0.mlp.up_proj.weight", None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = WeightReader(resolve_model(str(tmp_path)), ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ModelError, match="cannot be loaded: ImportError: .*GPTQ"):
        reader.load("model.layers.0.mlp.up_proj")


def test_a_weight_that_no_file_holds_is_not_made_up(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    rewrite(tmp_path, "model.layers.0.mlp.up_proj.weight", None)
    reader = WeightReader(resolve_model(str(tmp_path)), ["model.layers.0.mlp.up_proj"])
    with pytest.raises(
        ModelError, match="no values for 1 weights, the first is model.layers.0.mlp.up_proj.weight"
    ):
        reader.load("model.layers.0.mlp.up_proj")


def with_header(folder: Path, **changed: object) -> None:
    """Write another header entry of the first layer's up_proj over the one that is there."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.layers.0.mlp.up_proj.weight"] |= changed
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_offsets": []}, r"up_proj.weight has the data_offsets \[\]"),
        ({"data_offsets": [0]}, r"up_proj.weight has the data_offsets \[0\]"),
        ({"data_offsets": [1536, 0]}, r"up_proj.weight has the data_offsets \[1536, 0\]"),
        ({"data_offsets": [0, 1000]}, "needs 1,536 bytes, and its data_offsets hold 1,000"),
        ({"data_offsets": "0-1536"}, "up_proj.weight has the data_offsets '0-1536'"),
        ({"shape": [24, "16"]}, r"up_proj.weight has the shape \[24, '16'\]"),
        ({"data_offsets": [10**9, 10**9 + 1536]}, "ends inside the tensor model.layers.0.mlp.up"),
    ],
)
@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
def test_a_header_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, changed: dict[str, object], message: str, target: str
) -> None:
    architectures.save("llama", tmp_path)
    with_header(tmp_path, **changed)
    with pytest.raises(ModelError, match=rf"(?s)model.safetensors .*{message}.*; fetch it again"):
        WeightReader(resolve_model(str(tmp_path)), [f"model.layers.0.mlp.{target}"])


@pytest.mark.parametrize("content", [b"[1]", b'{"a": {}}', b'{"a": 1}'])
def test_a_header_of_another_form_is_named(tmp_path: Path, content: bytes) -> None:
    architectures.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(ModelError, match="is not a safetensors file: .*; fetch it again"):
        WeightReader(resolve_model(str(tmp_path)), ["model.layers.0.mlp.up_proj"])
