"""Loading: dtype, missing weights, GGUF files that become ordinary models."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.errors import ModelError
from kpsvd_tune.models import (
    WeightReader,
    base_of,
    load_model,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_has_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    architectures.save("llama", tmp_path)
    model = load_model(resolve_model(str(tmp_path)), dtype, attn_implementation="eager")
    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    with pytest.raises(ModelError, match="model.dtype 'int8': expected one of float32, bfloat16"):
        load_model(resolve_model(str(tmp_path)), "int8")


def test_missing_weights_are_an_error_and_not_random_numbers(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no values for 1 weights.*layers.1.mlp.up_proj.weight"):
        load_model(resolve_model(str(tmp_path)), "float32")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_configuration_with_fewer_layers_than_the_files_is_refused(
    tmp_path: Path, streamed: bool
) -> None:
    architectures.save("llama", tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    source = resolve_model(str(tmp_path))
    words = r"files hold model\.layers\.1\.input_layernorm\.weight, .* counts fewer layers"
    with pytest.raises(ModelError, match=words):
        # The decomposition must not work for hours before it is found out.
        WeightReader(source, ["lm_head"]) if streamed else load_model(source, "float32")


def test_weights_of_another_kind_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    architectures.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # The second is known to transformers as a left-over of older versions.
    tensors["vision.0.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="kpsvd_tune"):
        load_model(resolve_model(str(tmp_path)), "float32")
        WeightReader(resolve_model(str(tmp_path)), ["lm_head"])
    (told,) = [each.getMessage() for each in caplog.records if each.name.startswith("kpsvd_tune")]
    assert "no place for vision.0.weight of its files; they are left out" in told


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    saved = architectures.save("gemma", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(resolve_model(str(tmp_path)), "float32")
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


@pytest.mark.slow
def test_a_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="its model_type 'vit' is not a causal language model of"):
        load_skeleton(resolve_model(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="its configuration cannot be read"):
        load_skeleton(resolve_model(str(tmp_path)))


def test_the_tokenizer_comes_from_the_same_folder(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny_model_dir)))
    assert tokenizer.decode(tokenizer("nuts")["input_ids"]) == "nuts"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(resolve_model(str(tmp_path)))


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(
    path: Path,
    has_rope_factors: bool = False,
    scaling: Mapping[str, Any] | None = None,  # of the rotary embedding, by llama.cpp's names
    more: Sequence[str] = (),  # names of vectors beside those of the model
) -> Path:
    """A one-layer Llama of random numbers, its matrices quantised to Q8_0."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    sizes = {
        "token_embd": (64, 32),
        "output": (64, 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    quantised = gguf.GGMLQuantizationType.Q8_0
    for name, size in sizes.items():
        data = gguf.quants.quantize(torch.randn(*size).numpy(), quantised)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantised)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    for key, value in (scaling or {}).items():
        kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        kinds[type(value)](f"llama.rope.scaling.{key}", value)
    for name in more:
        writer.add_tensor(name, torch.ones(32).numpy())
    if has_rope_factors:
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0] * 4 + [8.0] * 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("has_rope_factors", [True, False])
def test_factors_of_the_rotary_embedding_that_are_not_read_are_told(
    has_rope_factors: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", has_rope_factors)
    load_model(resolve_model(str(path)), "float32")
    told = "the file rescales the rotary embedding (rope_freqs), which transformers does not read"
    assert (told in caplog.text) == has_rope_factors


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_a_rescaled_rotary_embedding_of_a_gguf_file_is_the_models(
    scaling: dict[str, Any], rope: dict[str, Any], tmp_path: Path
) -> None:
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", scaling=scaling)))
    plain = load_model(resolve_model(str(write_gguf(tmp_path / "plain.gguf"))), "float32")
    config: Any = LlamaConfig(**plain.config.to_dict())
    config.rope_parameters = {**config.rope_parameters, **rope}
    expected = LlamaForCausalLM(config).model.rotary_emb
    loaded: Any = load_model(source, "float32")
    assert loaded.config.rope_parameters == config.rope_parameters
    own = loaded.model.rotary_emb
    assert torch.equal(own.inv_freq, expected.inv_freq)
    assert own.attention_scaling == expected.attention_scaling
    assert not torch.equal(own.inv_freq, plain.model.rotary_emb.inv_freq)
    # What is read without weights, from what was kept of the file, knows of it as well.
    assert load_skeleton(source).config.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "longrope", "factor": 8.0},
        {"type": "linear"},
        {"type": "yarn", "factor": 4.0, "original_context_length": 16, "attn_factor": 0.5},
    ],
)
def test_another_rescaling_of_the_rotary_embedding_is_refused(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", scaling=scaling)))
    for load in (load_skeleton, lambda each: load_model(each, "float32")):
        with pytest.raises(ModelError, match="in a way that cannot be computed here") as raised:
            load(source)
        assert f"llama.rope.scaling.type = {scaling['type']}" in str(raised.value)
        assert "expected the model's folder with config.json" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.0.ffn_up.bias", "blk.1.attn_norm.weight"]
)
def test_tensors_of_a_gguf_file_without_a_place_are_refused(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", more=[name])
    with pytest.raises(ModelError, match=f"the file holds {name}, for which transformers has no"):
        load_model(resolve_model(str(path)), "float32")


@pytest.mark.slow
def test_a_gguf_model_is_saved_like_any_other(gguf_path: Path, tmp_path: Path) -> None:
    model = load_model(resolve_model(str(gguf_path)), "float32")
    model.save_pretrained(tmp_path)
    again = load_model(resolve_model(str(tmp_path)), "float32")
    expected = model.state_dict()
    assert set(expected) == set(again.state_dict())
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert "quantization_config" not in again.config.to_dict()


@pytest.mark.slow
def test_a_load_of_a_gguf_file_makes_the_table_of_names_once(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    made = []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return gguf.TensorNameMap(*arguments)

    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    source = resolve_model(str(gguf_path))
    first = load_model(source, "float32").state_dict()
    assert len(made) == 1
    # Nothing of it is left behind.
    assert gguf.get_tensor_name_map is counted
    second = load_model(source, "float32").state_dict()
    assert len(made) == 2
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_line_of_a_card_loads_a_gguf_base(gguf_path: Path) -> None:
    line = base_of(resolve_model(str(gguf_path))).loading
    assert 'gguf_file="tiny.gguf"' in line
    line = line.replace("FOLDER_OF_THE_BASE_MODEL", str(gguf_path.parent))
    names: dict[str, Any] = {}
    exec(f"from transformers import AutoModelForCausalLM\n{line}", names)
    expected = load_model(resolve_model(str(gguf_path)), "float32").state_dict()
    for name, value in names["base"].state_dict().items():
        assert torch.equal(value.float(), expected[name]), name


def test_a_gguf_skeleton_has_the_names_and_the_reader_the_dequantised_weights(
    gguf_path: Path,
) -> None:
    source = resolve_model(str(gguf_path))
    names = target_names(load_skeleton(source), "all-linear")
    assert len(names) == 7
    model = load_model(source, "float32")
    reader = WeightReader(source, names)
    for name in names:
        assert reader.location(name) is None
        weight = architectures.weight_of(model, name)
        assert torch.equal(reader.load(name), weight), name
        assert reader.size(name) == tuple(weight.shape)


def test_without_the_gguf_package_the_install_line_is_given(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ModelError, match=r"pip install 'kpsvd-tune\[gguf\]'"):
        load_model(resolve_model(str(gguf_path)), "float32")


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": "many"},
        {"hidden_size": -16},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
    ],
)
def test_impossible_values_of_the_configuration_are_refused(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    architectures.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ModelError, match="no model can be built from its config|cannot be read"):
        load_skeleton(resolve_model(str(tmp_path)))


def test_a_cut_file_of_weights_is_named(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"\(model.safetensors\) are cut or damaged \(Safetensor"):
        load_model(resolve_model(str(tmp_path)), "float32")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_pickled_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    architectures.save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"\(pytorch_model.bin\) are cut or damaged .*fetch the"):
        load_model(resolve_model(str(tmp_path)), "float32")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[1, 2]"),
        ("tokenizer.json", '{"model": 5}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", "[" * 10_000),
    ],
)
def test_a_tokenizer_of_wrong_types_is_a_model_error(
    tiny_model_dir: Path, tmp_path: Path, file: str, content: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded: .*fetch them again"):
        load_tokenizer(resolve_model(str(folder)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "its configuration cannot be read|no model can be built"),
        ("[" * 10_000, "its configuration cannot be read|no model can be built"),
        ('{"model_type": ["llama"]}', "its configuration cannot be read|no model can be built"),
        ('{"model_type": "llama", "hidden_size": "x"}', "no model can be built"),
        (
            '{"model_type": "llama", "num_hidden_layers": 5000000}',
            "num_hidden_layers 5,000,000; expected at most 4,096",
        ),
        (
            '{"model_type": "mixtral", "num_local_experts": 5000000}',
            "num_local_experts 5,000,000; expected at most 4,096",
        ),
    ],
)
def test_a_configuration_of_wrong_types_or_sizes_is_a_model_error(
    tiny_model_dir: Path, tmp_path: Path, content: str, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        load_skeleton(resolve_model(str(folder)))


def test_code_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at a terminal; here nobody is asked."""
    architectures.save("llama", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    file.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ModelError, match="brings Python code of its own, .* is never run here"):
        load_model(resolve_model(str(tmp_path)), "float32")
    assert not ran.exists()
