"""Export to GGUF: written by the base's own GGUF file, read back by transformers, llama.cpp."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from kill_moments import check_full_disks, check_kills
from peft import PeftModel, get_peft_model
from random_adapter import add_offsets
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import ExportError, ModelError
from kpsvd_tune.export import gguf as exporting
from kpsvd_tune.export.gguf import kept_share
from kpsvd_tune.export.gguf_model import GgufModel, check_rope, from_file_order, to_file_order
from kpsvd_tune.merge.update import Term
from kpsvd_tune.models import load_model, resolve_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


TOKENS = [*alphabet(), "<s>", "</s>", "ab"]


def make_model(kind: str = "llama", **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    of_config, of_model = KINDS[kind]
    settings = {**SIZES, "vocab_size": len(TOKENS), "tie_word_embeddings": True, **options}
    if kind == "qwen3":
        settings["head_dim"] = 128  # the one that transformers supposes of such a file
    model: PreTrainedModel = of_model(of_config(**settings)).eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            # Vectors too, which begin as ones and zeros, and so would not tell a mistake.
            each.copy_(torch.randn(each.shape) * 0.1 + (1.0 if "norm" in name else 0.0))
    return model


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def file_name(key: str) -> str:
    for long, short in NAMES.items():
        key = key.replace(long, short)
    return key


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Row by row: entry i of the first half of a head, then entry i of its second half."""
    size = len(weight) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_base(path: Path, model: PreTrainedModel, **metadata: Any) -> Path:
    """A GGUF file of a model as llama.cpp's converter writes it, in Q8_0."""
    config: Any = model.config
    kind = config.model_type
    writer = GGUFWriter(path, kind)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if kind == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_key_value("quantize.imatrix.file", "another.dat", GGUFValueType.STRING)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data, name = weight.numpy(), file_name(key)
        if kind == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "_q" in name else config.num_key_value_heads
            data = interleaved(data, heads)
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            q8_0 = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(data, q8_0), raw_dtype=q8_0)
    if "rope__factors" in metadata:
        writer.add_tensor("rope_freqs.weight", metadata["rope__factors"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def save_adapter(base: Path, folder: Path, scale: float = 0.05, **options: Any) -> Path:
    """An adapter with random offsets on a base in a GGUF file or a folder."""
    is_file = base.suffix == ".gguf"
    model: Any = read(base) if is_file else AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 1, "factor_shape": "thin"}
    peft: Any = get_peft_model(model, KpsvdConfig(**(settings | options)))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    add_offsets(peft, scale)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> Any:
    """The merged model by another way than the export's: PEFT's own merge."""
    model = read(base) if base.suffix == ".gguf" else AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    return adapted.merge_and_unload().eval()


def export(adapter: Path, output: Path, *options: str) -> int:
    command = ["export", str(adapter), "--to", "gguf", "--output", str(output), *options]
    return cli.run(command)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.gguf", make_model())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_adapter_on_its_base(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", make_model(kind))
    adapter = save_adapter(base, tmp_path / "adapter")
    assert export(adapter, tmp_path / "out", "--dtype", "float32") == 0
    found, expected = read(tmp_path / "out" / "model.gguf"), merged_by_peft(base, adapter)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        one, other = found(input_ids=ids).logits, expected(input_ids=ids).logits
        plain = read(base)(input_ids=ids).logits
    assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
    assert float((plain - other).abs().max()) > 0.05 * float(other.abs().max())
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["architecture"] == kind
    assert report["min_kept_share"] == pytest.approx(1, abs=1e-5)
    assert (report["warnings"], report["notes"]) == ([], [])


def tensors(path: Path) -> dict[str, Any]:
    return {each.name: each for each in GGUFReader(path).tensors}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_every_number_is_within_the_rounding_of_its_type(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert export(adapter, output, "--dtype", dtype) == 0
    before, after = tensors(base), tensors(output / "model.gguf")
    assert list(before) == list(after)
    names = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    exact = merged_by_peft(base, adapter).state_dict()
    found = read(output / "model.gguf").state_dict()
    num_adapted = 0
    for key, weight in exact.items():
        name = file_name(key)
        if name == "output.weight":
            continue
        stored = after[name]
        if "_proj" not in key:
            # Untouched: not a bit of it is another.
            assert stored.tensor_type == before[name].tensor_type
            assert stored.data.tobytes() == before[name].data.tobytes()
            continue
        num_adapted += 1
        assert stored.tensor_type.name == names[dtype]
        if dtype == "q8_0":
            blocks = weight.reshape(-1, 32)
            # Half a step, and the rounding of the step itself to float16, times 127.
            most = blocks.abs().amax(1, keepdim=True) / 127 * (0.5 + 127 * 2**-11) + 1e-7
            assert ((found[key].reshape(-1, 32) - blocks).abs() <= most).all(), key
        else:
            half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
            assert ((found[key] - weight).abs() <= half * weight.abs() + 2e-7).all(), key
    assert num_adapted == 14
    report = json.loads((output / "export_report.json").read_text())
    assert report["num_copied"] == len(before) - 14
    assert report["file_logit_difference"] < 1e-4
    assert report["max_logit_difference"] < report["adapter_logit_difference"]
    assert len(report["kept_share"]) == 14
    assert (report["tolerance"] is None) == (dtype == "q8_0")


@pytest.mark.slow
def test_metadata_are_those_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "out") == 0
    old, new = (GGUFReader(each).fields for each in (base, tmp_path / "out" / "model.gguf"))
    own = {"general.file_type", "general.quantization_version"}
    assert new.keys() - old.keys() == own
    assert old.keys() - new.keys() == {"quantize.imatrix.file"}
    for key in new.keys() & old.keys():
        if not key.startswith("GGUF."):
            assert new[key].contents() == old[key].contents(), key
            assert new[key].types == old[key].types, key
    assert new["general.file_type"].contents() == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "are copied from the base's file in the types that they have there" in card
    assert "settings are those of base.gguf" in card
    assert "llama-cli -m model.gguf" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_a_dry_run_says_what_it_takes(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter, tmp_path / "out", "--dry-run", "--json", "--dtype", "q8_0") == 0
    work = json.loads(capsys.readouterr().out)
    assert ["architecture", "llama"] in work["steps"]
    assert ["tokenizer and settings of", str(base)] in work["steps"]
    assert not (tmp_path / "out").exists()
    assert export(adapter, tmp_path / "out", "--dtype", "q8_0") == 0
    written = (tmp_path / "out" / "model.gguf").stat().st_size
    (least, most) = work["disk"]["needed_bytes"]
    assert least == most
    assert written <= most < 1.2 * written


@pytest.mark.slow
def test_the_template_and_the_end_of_answers_are_those_of_the_training(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    tokenizer.chat_template = "{{ 'Q: ' + messages[0]['content'] }}"
    tokenizer.eos_token = "ab"
    tokenizer.save_pretrained(adapter)
    assert export(adapter, tmp_path / "out", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[0] == "The chat template is the one that the adapter was trained with."
    assert notes[1].startswith("Answers end with the token ab, as the adapter was trained")
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 258
    assert "tokenizer.ggml.eot_token_id" not in fields


@pytest.mark.slow
def test_a_file_names_what_ends_the_turns_of_a_chat(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + bos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(adapter)
    assert export(adapter, tmp_path / "out", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[1].startswith("Answers of chats end with the token ")
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 257
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.bos_token_id == 256


def save_folder(folder: Path, model: PreTrainedModel, base: Path) -> Path:
    """The same model as a folder of safetensors, with the tokenizer of a GGUF file."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_base_in_a_folder_takes_the_metadata_of_a_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_folder(tmp_path / "base", make_model(), base)
    adapter, output = save_adapter(folder, tmp_path / "adapter"), tmp_path / "out"
    assert export(adapter, output) == 2
    words = said(capsys)
    assert "is no GGUF file, and only llama.cpp's converter knows what such a file must" in words
    assert "--metadata-from FILE.gguf. Or merge, and let llama.cpp's own converter write" in words
    assert export(adapter, output, "--metadata-from", str(tmp_path / "no.gguf")) == 2
    assert "no.gguf: there is no such file; expected a GGUF file of the base" in said(capsys)

    assert export(adapter, output, "--metadata-from", str(base), "--dtype", "float32") == 0
    found, expected = read(output / "model.gguf"), merged_by_peft(folder, adapter)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        far = (found(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max()
    assert float(far) < 1e-5
    # Nothing of the other file's numbers: its weights were rounded to Q8_0.
    embedding = tensors(output / "model.gguf")["token_embd.weight"]
    assert np.array_equal(embedding.data, make_model().state_dict()["model.embed_tokens.weight"])
    report = json.loads((output / "export_report.json").read_text())
    assert (report["num_copied"], report["metadata_from"]) == (0, "base.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms_norm_eps": 1e-3}, "says rms_norm_eps 9.999999974752427e-07, and the base's confi"),
        ({"num_hidden_layers": 3}, "says num_hidden_layers 2, and the base's configuration 3"),
        ({"rope_theta": 5e5}, "says rope_theta 10000.0, and the base's configuration 500000.0"),
        ({"kind": "qwen2"}, "is of the architecture llama, and the base is qwen2: expected a GGUF"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_metadata_of_another_model_are_refused(
    change: dict[str, Any], words: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    if theta := change.pop("rope_theta", None):
        change["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    folder = save_folder(tmp_path / "base", make_model(**change), base)
    adapter = save_adapter(folder, tmp_path / "adapter")
    assert export(adapter, tmp_path / "out", "--metadata-from", str(base)) == 2
    assert words in said(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_vocabulary_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    assert export(adapter, tmp_path / "out") == 2
    words = said(capsys)
    assert "has another vocabulary than the model: '<new>' is not there under the same" in words
    assert "a tokenizer that the training did not change" in words
    assert not (tmp_path / "out").exists()


LLAMA_CPP = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 128, 1
parameters.cpuparams.n_threads, parameters.warmup = 1, False
server = xllamacpp.Server(parameters)
asked = {"prompt": sys.argv[2], "n_predict": 6, "temperature": 0, "n_probs": 5}
print(json.dumps(server.handle_completions(asked)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_llama_cpp_says_what_the_adapter_says(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    assert export(adapter, tmp_path / "out", "--dtype", dtype) == 0
    prompt = "cabbage and bread"  # with the one merge of the vocabulary
    model = merged_by_peft(base, adapter)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert 258 in ids
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    file = str(tmp_path / "out" / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, file, prompt],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    steps = found["choices"][0]["logprobs"]["content"]
    assert found["usage"]["prompt_tokens"] == ids.shape[1]
    if dtype == "float16":
        assert [each["id"] for each in steps] == answer.tolist()
    tolerance = {"float16": 0.02, "q8_0": 0.1}[dtype]
    for each in steps[0]["top_logprobs"]:
        assert each["logprob"] == pytest.approx(float(expected[each["id"]]), abs=tolerance)


def test_rows_interleave_the_halves_of_heads() -> None:
    rows = torch.arange(16)
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert to_file_order(rows, 2).tolist() == expected
    weight = torch.randn(24, 5)
    assert torch.equal(torch.from_numpy(interleaved(weight.numpy(), 3)), to_file_order(weight, 3))
    assert torch.equal(from_file_order(to_file_order(weight, 3), 3), weight)


def test_rotations_must_be_the_models(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model: Any = make_model(rope_parameters=rope)
    used = model.model.rotary_emb.inv_freq
    plain = 1e4 ** (-torch.arange(len(used)) / len(used))
    assert not torch.allclose(used, plain)

    def file(factors: Any) -> Any:
        found = SimpleNamespace(path="f.gguf", rescales_rope=factors is not None)
        found.tensors = {} if factors is None else {"rope_freqs.weight": factors}
        found.values = lambda name: found.tensors[name]
        return found

    check_rope(file(plain / used), model)
    check_rope(file(None), make_model())
    for wrong in (None, torch.ones(len(used)), torch.ones(3)):
        with pytest.raises(ModelError, match=r"f.gguf and the .*rope_type 'llama3'\) give differ"):
            check_rope(file(wrong), model)
    with pytest.raises(ModelError, match="give different rotary"):
        check_rope(file(plain / used), make_model())


@pytest.mark.slow
def test_a_base_whose_rotations_are_rescaled_is_merged_and_has_no_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    scaling = {
        "llama__rope__scaling__type": ("linear", GGUFValueType.STRING),
        "llama__rope__scaling__factor": (8.0, GGUFValueType.FLOAT32),
    }
    base = write_base(tmp_path / "base.gguf", make_model(rope_parameters=rope), **scaling)
    # transformers alone would load it with other rotations.
    monkeypatch.setitem(
        globals(), "read", lambda file: load_model(resolve_model(str(file)), "float32")
    )
    adapter, merged = save_adapter(base, tmp_path / "adapter"), tmp_path / "merged"
    options = ["-o", str(tmp_path / "out"), "--base", str(base)]
    assert cli.run(["export", str(adapter), "--to", "lora", *options]) == 1
    told = said(capsys)
    assert "base.gguf rescales its rotary embedding (linear), which transformers does not" in told
    assert "expected the base's folder with safetensors (--base), or serve the merged" in told
    assert not (tmp_path / "out").exists()
    assert cli.run(["merge", str(adapter), "-o", str(merged), "--base", str(base)]) == 0
    written = json.loads((merged / "config.json").read_text())["rope_parameters"]
    assert (written["rope_type"], written["factor"]) == ("linear", 8.0)


def test_what_is_left_of_an_update() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, 2).double(), torch.randn(2, 2, 4).double()
    delta = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    base = torch.randn(6, 8).double()
    terms = [Term(left, right)]
    assert kept_share(terms, base + delta, base + delta) == pytest.approx(1)
    assert kept_share(terms, base + delta, base) == pytest.approx(0)
    assert kept_share(terms, base + delta, base + 0.25 * delta) == pytest.approx(0.25)
    assert kept_share([Term(0 * left, right)], base, base) == 1


@pytest.mark.slow
def test_an_update_below_the_step_of_q8_0_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", scale=1e-5)
    assert export(adapter, tmp_path / "out", "--dtype", "q8_0", "--json") == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("little of the training may be left; use --dtype float16" in w for w in warnings)
    assert any(
        w.startswith("rounding to q8_0 lost part of the update in ") and "of 14 layers" in w
        for w in warnings
    )


@pytest.mark.slow
def test_a_whole_embedding_that_parts_from_its_twin_is_written(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, that the two part
        adapter, output = save_adapter(base, tmp_path / "adapter", **options), tmp_path / "out"
        expected = merged_by_peft(base, adapter)
    assert export(adapter, output, "--dtype", "float32") == 0
    assert "output.weight" in tensors(output / "model.gguf")
    found = read(output / "model.gguf")
    assert torch.allclose(found.lm_head.weight, expected.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        # Wrong in the file alone, and wrong in what it is compared with too.
        ("both", "the GGUF file gives other logits in transformers than the weights that were wr"),
        ("file", "_proj.weight: what Q8_0 holds of it is "),
    ],
)
def test_a_wrong_order_of_rows_fails_the_proof(
    wrong: str,
    words: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = "kpsvd_tune.export.gguf_writing."
    monkeypatch.setattr(place + "to_file_order", lambda rows, _: rows)
    if wrong == "both":
        monkeypatch.setattr(place + "from_file_order", lambda rows, _: rows)
    assert export(adapter, tmp_path / "out", "--dtype", "q8_0") == 1
    told = said(capsys)
    assert words in told
    assert "othing was" in told
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "base.gguf", "cache"}


def test_a_difference_that_is_no_number_fails() -> None:
    report: Any = SimpleNamespace(
        file_logit_difference=0.0, max_logit_difference=float("nan"), tolerance=0.1
    )
    with pytest.raises(ExportError, match="than the adapter on its base: .* nan, and at most 0.1"):
        exporting._check_proof(report, 1e-5)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        assert export(adapter, tmp_path / "out") == 1
    assert "the GGUF file needs 1" in (words := said(capsys))
    assert "has 1.0 kB free: make room or choose another --output" in words
    right = GGUFWriter.open_output_file

    def limited(self: Any, path: Any = None) -> None:
        """The disk is full from the tensors on, as /dev/full says it."""
        right(self, path)
        stream = self.fout[0]
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())

    monkeypatch.setattr(GGUFWriter, "open_output_file", limited)
    assert export(adapter, tmp_path / "out") == 1
    words = said(capsys)
    assert "out: No space left on device; free some space, or choose an --output on ano" in words
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "base.gguf", "cache"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_export_that_is_ended_leaves_nothing_that_looks_whole(
    number: signal.Signals, base: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "model"
    command = [sys.executable, "-m", "kpsvd_tune", "export", str(adapter)]
    command += ["--to", "gguf", "--output", str(output)]
    with (tmp_path / "log").open("w") as log:
        process = warm.Popen(command, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    # Killed while the folder is being filled, which a hidden folder beside it shows.
    while not list(tmp_path.glob("out/.model.*.tmp/model.gguf")) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    os.killpg(process.pid, number)
    process.wait(60)
    assert not output.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        words = " ".join((tmp_path / "log").read_text().split())
        assert "stopped by SIGINT while exporting the adapter; nothing was written" in words
        assert list(output.parent.iterdir()) == []
        return
    assert export(adapter, output) == 0
    assert list(output.parent.iterdir()) == [output]


def test_options_of_the_other_form_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:
        assert cli.run(["export", "runs/my", *arguments]) == 2
        return said(capsys)

    gguf, lora = ("--to", "gguf", "-o", "out"), ("--to", "lora", "-o", "out")
    asked = "is an option of --to lora, and --to gguf was asked for"
    assert f"--lossy {asked}" in refusal(*gguf, "--lossy")
    assert f"--max-rank {asked}" in refusal(*gguf, "--max-rank", "8")
    assert "--metadata-from is an option of --to gguf" in refusal(*lora, "--metadata-from", "x")
    assert "--dtype q8_0: a LoRA has float32, bfloat16" in refusal(*lora, "--dtype", "q8_0")
    words = refusal("--to", "gguf", "-o", "my.gguf")
    assert "--output my.gguf: expected the name of a new folder, in which model.gguf, a re" in words
    assert "--output my" in words


def test_files_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.gguf").write_bytes(b"something else, of more than a few bytes")
    with pytest.raises(ModelError, match=r"text.gguf is no whole GGUF file: GGUF magic invalid"):
        GgufModel(tmp_path / "text.gguf")

    def file(name: str, kind: str, **metadata: Any) -> Path:
        writer = GGUFWriter(tmp_path / name, kind)
        for key, value in metadata.items():
            writer.add_key_value(key.replace("__", "."), *value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    words = r"of the architecture 'gpt2', whose tensors are not known here; expected llama, qwen2, "
    with pytest.raises(ModelError, match=words):
        GgufModel(file("gpt2.gguf", "gpt2"))
    parts = {"split__count": (3, GGUFValueType.UINT16)}
    with pytest.raises(ModelError, match="is one of 3 parts of a model; expected one file"):
        GgufModel(file("parts.gguf", "llama", **parts))
    nested = {"general__x": ([[1], [2]], GGUFValueType.ARRAY)}
    with pytest.raises(ModelError, match=r"general\.x is an array of arrays"):
        GgufModel(file("nested.gguf", "llama", **nested)).metadata()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'kpsvd-tune\[gguf\]'"):
        GgufModel(tmp_path / "gpt2.gguf")


def is_whole(folder: Path) -> bool:
    """Whether an exported folder is there; if so it must be whole and proved."""
    if not folder.exists():
        return False
    report = json.loads((folder / "export_report.json").read_text())
    file = folder / report["file"]
    assert file.stat().st_size == report["num_bytes"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == report["sha256"]
    assert len(tensors(file)) == report["num_tensors"]
    assert (folder / "README.md").is_file()
    return True


@pytest.fixture
def work(base: Path, tmp_path: Path) -> Callable[[], int]:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    # There already, so that every export does the same.
    output = tmp_path / "out" / "m"
    assert export(adapter, output) == 0
    shutil.rmtree(output)
    return lambda: export(adapter, output)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_at_any_of_20_moments(
    work: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = check_kills(work, is_whole, tmp_path / "out" / "m", monkeypatch)
    assert {"makedirs", "write", "fsync", "replace"} <= set(names)


class Filling:
    """A stream on a disk that is full after so many bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, data: bytes) -> int:
        taken = bytes(data)[: max(0, self._room - self._stream.tell())]
        self._stream.write(taken)
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.slow
def test_a_disk_that_fills_at_any_of_10_offsets(
    work: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the file, which gguf's own writer writes; what lies beside it is written durably."""
    folder = tmp_path / "out" / "m"
    assert work() == 0
    assert is_whole(folder)
    size = (folder / "model.gguf").stat().st_size
    shutil.rmtree(folder)
    right = GGUFWriter.open_output_file
    for room in (number * (size - 1) // 9 for number in range(10)):
        capsys.readouterr()

        def limited(self: Any, path: Any = None, room: int = room) -> None:
            right(self, path)
            self.fout[0] = Filling(self.fout[0], room)

        with monkeypatch.context() as patch:
            patch.setattr(GGUFWriter, "open_output_file", limited)
            assert work() == 1, room
        words = "m: No space left on device; free some space, or choose an --output on another"
        assert words in said(capsys), room
        assert list((tmp_path / "out").iterdir()) == [], room
    assert work() == 0
    assert is_whole(folder)


@pytest.mark.slow
def test_a_disk_that_fills_beside_the_file(
    work: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_full_disks(work, is_whole, tmp_path / "out" / "m", monkeypatch, capsys, offsets=3)
