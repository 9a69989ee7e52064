"""Adapters on bases of 4 and 8 bits: exactness, PEFT's doors, training, resume, merge, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.errors import ModelError
from kpsvd_tune.models import WeightReader, load_model, load_plain_model, resolve_model
from kpsvd_tune.models.quantised import QUANTISATIONS, weight_bytes
from kpsvd_tune.recipe import load_recipe
from kpsvd_tune.storage.commit import read_committed

LAYER = "model.layers.0.mlp.up_proj"
TOKENS = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
kinds = pytest.mark.parametrize("kind", QUANTISATIONS)


def quantised(folder: Path, kind: str, dtype: str = "float32") -> Any:
    return load_model(resolve_model(str(folder)), dtype, quantization=kind).eval()


def adapted(base: Any, **changes: Any) -> Any:
    settings = {"target_modules": "all-linear", "rank": {"method": "fixed", "max": 2}, **changes}
    return get_peft_model(base, KpsvdConfig(**settings)).eval()


@torch.no_grad()
def move(model: Any) -> None:
    """Give the adapter an update."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def run(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a recipe of six steps with checkpoints on a quantised base."""

    def write(kind: str, **model: Any) -> Path:
        known = load_recipe(write_recipe()).model
        return write_recipe(
            model={"path": known.path, "dtype": "float32", "quantization": kind, **model},
            adapter={"rank": {"method": "fixed", "max": 2}},
            train={
                "batch_size": 2,
                "precision": "no",
                "max_steps": 6,
                "save_every": 2,
                "keep_checkpoints": 9,
                "learning_rate": 0.01,
            },
        )

    return write


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["both", "left", "core"])
def test_a_fresh_adapter_is_the_quantised_base(
    kind: str, dtype: str, form: str, tiny_model_dir: Path
) -> None:
    base = quantised(tiny_model_dir, kind, dtype)
    before = logits(base)
    model = adapted(base, form=form)
    assert torch.equal(logits(model), before)
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert trained
    # Both start at a Delta of 0, where the gradient is not.
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in trained)


@kinds
def test_the_output_is_that_of_the_dequantised_weights_and_the_update(
    kind: str, tiny_model_dir: Path
) -> None:
    """In the base's own arithmetic: int8 multiplies in 8 bits, so its base's output is taken."""
    base = quantised(tiny_model_dir, kind)
    layer = base.get_submodule(LAYER)
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    model = adapted(base)
    move(model)
    held: Any
    (held,) = [found for name, found in kpsvd_layers(model) if name == LAYER]
    delta: Tensor = held.get_delta_weight("default")
    got = held(x)
    assert torch.allclose(got, expected + x @ delta.T, atol=1e-5)
    if kind == "nf4":
        dense = x @ (base_weight(held) + delta).T
        assert torch.allclose(got, dense, atol=1e-4)


@kinds
def test_peft_saves_loads_disables_merges_and_gives_the_bits_back(
    kind: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = quantised(tiny_model_dir, kind)
    plain = logits(base)
    model = adapted(base)
    move(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(quantised(tiny_model_dir, kind), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)
    again.merge_adapter()
    # W + Delta is quantised anew, as PEFT does it.
    merged = logits(again)
    assert not torch.equal(merged, plain)
    assert (merged - expected).abs().max() < 0.15 * expected.abs().max()
    again.unmerge_adapter()
    assert torch.equal(logits(again), expected)
    again.merge_adapter()
    again.unmerge_adapter()
    assert torch.equal(logits(again), expected)


@kinds
def test_an_adapter_of_another_base_is_refused(
    kind: str, model_factory: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for seed in (0, 1):
        model_factory(seed=seed).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    adapted(quantised(tmp_path / "0", kind)).save_pretrained(tmp_path / "adapter")
    # Other bits of the same base are the same base.
    PeftModel.from_pretrained(quantised(tmp_path / "0", "nf4"), tmp_path / "adapter")
    PeftModel.from_pretrained(
        load_model(resolve_model(str(tmp_path / "0")), "float32"), tmp_path / "adapter"
    )
    with pytest.raises(Exception, match="trained on another base model"):
        PeftModel.from_pretrained(quantised(tmp_path / "1", kind), tmp_path / "adapter")


@kinds
def test_bytes_are_known_before_loading(
    kind: str, tiny_model: LlamaForCausalLM, tiny_model_dir: Path
) -> None:
    model = quantised(tiny_model_dir, kind, "bfloat16")
    scales = 0
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if kind == "int8" and getattr(weight, "SCB", None) is not None:
            scales += weight.SCB.nbytes
        if kind == "nf4" and (state := getattr(weight, "quant_state", None)) is not None:
            scales += state.absmax.nbytes + state.state2.absmax.nbytes
    held = sum(each.nbytes for each in model.parameters()) + scales
    assert weight_bytes(tiny_model, torch.bfloat16, kind) == held
    assert weight_bytes(tiny_model, torch.bfloat16) == 2 * tiny_model.num_parameters()


@kinds
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    kind: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(kind)
    assert run("train", path, "--offline") == 0
    shutil.move(tmp_path / "run", tmp_path / "whole")
    assert run("train", path, "--offline", "train.max_steps=6") == 0
    # As it was after step 2.
    folder = tmp_path / "run"
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(folder / "checkpoints" / name)
    shutil.rmtree(folder / "adapter")
    (folder / "results.json").unlink()
    assert run("train", path, "--offline") == 0
    folders = tmp_path / "whole", folder
    pair = [read_committed(each / "checkpoints" / "step-000006") for each in folders]
    for name in pair[0]:
        if name.endswith(".safetensors"):
            assert pair[0][name] == pair[1][name]
    weights = [load_file(each / "adapter" / "adapter_model.safetensors") for each in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@kinds
@pytest.mark.parametrize("proof", ["tensors", "both"])
def test_a_run_merges_into_full_precision_and_says_how_far_that_is(
    kind: str,
    proof: str,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("train", recipe(kind), "--offline") == 0
    merged = tmp_path / "merged"
    assert run("merge", tmp_path / "run", "-o", merged, "--proof", proof, "--offline") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "was trained on a quantised base and merged into full precision" in said
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["passed"]
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    # The distance that is told is that of the weights.
    source = load_recipe(tmp_path / "run" / "recipe.yaml").model.path
    plain: Any = load_plain_model(resolve_model(source), "float32")
    packed = quantised(Path(source), kind)
    names = list(report["deviation"])
    far = [
        float((base_weight(packed.get_submodule(n)) - plain.get_submodule(n).weight).norm())
        / float(plain.get_submodule(n).weight.detach().norm())
        for n in names
    ]
    told = float(report["notes"][-1].split("layers are ")[1].split(" %")[0]) / 100
    mean = (sum(each**2 for each in far) / len(far)) ** 0.5
    assert told == pytest.approx(mean, rel=0.35)


def test_a_run_is_used_on_the_base_that_it_was_trained_on(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", recipe("nf4"), "--offline") == 0
    loaded: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append((arguments, options))
        return load_model(*arguments, **options)

    monkeypatch.setattr("kpsvd_tune.runs.find.load_model", load)
    assert run("generate", tmp_path / "run", "Hello", "--max-new-tokens", 2) == 0
    assert loaded[0][1]["quantization"] == "nf4"


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
def test_an_adapter_alone_tells_that_its_base_was_quantised(
    command: str,
    recipe: Callable[..., Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("train", recipe("nf4"), "--offline", "adapter.factor_shape=thin") == 0
    adapter, output = tmp_path / "run" / "adapter", tmp_path / "output"
    asked = [
        "--task",
        "loss",
        "--path",
        rows_file,
        "columns={prompt: question, completion: answer}",
    ]
    options = {
        "eval": [*asked, "-o", output],
        "generate": ["Hello", "--max-new-tokens", 2],
        "export": ["--to", "lora", "-o", output],
    }[command]
    capsys.readouterr()
    assert run(command, adapter, *options) == 0
    told = " ".join(capsys.readouterr().err.split())
    done = {"eval": "scored in", "generate": "answers in", "export": "exported for"}[command]
    if command == "export":
        told = " ".join(json.loads((output / "export_report.json").read_text())["warnings"])
    assert f"The adapter was trained on a quantised base and {done} full precision: the we" in told
    if command == "eval":
        results = json.loads((output / "results.json").read_text())
        assert "on a plain base, where the adapter was trained on a quantised one" in str(results)


@kinds
def test_trials_share_no_quantised_weights(kind: str, recipe: Callable[..., Path]) -> None:
    wanted = load_recipe(recipe(kind))
    kept = KeptBase(resolve_model(wanted.model.path), wanted)
    first = kept.fresh().eval()
    expected = logits(first)
    move(adapted(first))
    assert torch.equal(logits(kept.fresh().eval()), expected)


@kinds
def test_a_base_that_comes_quantised_is_decomposed_trained_and_merged(
    kind: str,
    recipe: Callable[..., Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tmp_path / "packed"
    quantised(tiny_model_dir, kind).save_pretrained(base)
    for file in tiny_model_dir.glob("*token*"):
        shutil.copy(file, base)
    packed = load_model(resolve_model(str(base)), "float32")
    found = WeightReader(resolve_model(str(base)), [LAYER]).load(LAYER)
    assert "is stored quantised: its dequantised weights are taken" in caplog.text
    assert torch.equal(found, base_weight(packed.get_submodule(LAYER)).float())
    path = recipe(kind, path=str(base), quantization=None)
    assert run("train", path, "--offline", "adapter.factor_shape=thin") == 0
    lora = tmp_path / "lora"
    assert run("export", tmp_path / "run", "--to", "lora", "-o", lora, "--offline") == 0
    exported = json.loads((lora / "export_report.json").read_text())
    assert exported["max_logit_difference"] <= exported["tolerance"]
    assert "the LoRA was compared on its dequantised weights" in " ".join(exported["warnings"])
    merged = tmp_path / "merged"
    assert run("merge", tmp_path / "run", "-o", merged, "--offline") == 0
    assert json.loads((merged / "merge_report.json").read_text())["passed"]
    plain = load_model(resolve_model(str(merged)), "float32")
    assert type(plain.get_submodule(LAYER)) is torch.nn.Linear
    with pytest.raises(ModelError, match=r"is quantised already \(bitsandbytes\), and model.quant"):
        load_model(resolve_model(str(base)), "float32", quantization="nf4")


@kinds
def test_conv1d_layers_are_trained_and_merged_as_linear_ones(
    kind: str,
    recipe: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """transformers packs the (in, out) of GPT-2's layers as (out, in)."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=1,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    name = "transformer.h.0.attn.c_proj"
    base, packed = tmp_path / "base", tmp_path / "packed"
    original: Any = GPT2LMHeadModel(config)
    original.save_pretrained(base)
    quantised(base, kind).save_pretrained(packed)
    for folder in (base, packed):
        tokenizer.save_pretrained(folder)
    plain: Any = load_plain_model(resolve_model(str(packed)), "float32")
    assert type(plain.get_submodule(name)) is Conv1D
    expected = original.get_submodule(name).weight
    assert (plain.get_submodule(name).weight - expected).norm() < 0.15 * expected.norm()
    for number, (folder, quantization) in enumerate([(base, kind), (packed, None)]):
        path = recipe(kind, path=str(folder), quantization=quantization)
        trained, merged = tmp_path / f"run{number}", tmp_path / f"merged{number}"
        assert run("train", path, "--offline", f"output_dir={trained}") == 0
        assert run("merge", trained, "-o", merged, "--offline") == 0
        assert json.loads((merged / "merge_report.json").read_text())["passed"]
    # A run on plain weights is one on their quantised ones, and the other way round.
    path = recipe(kind, path=str(base), quantization=None)
    follows = f"adapter={{from: {tmp_path / 'run0'}}}"
    assert run("train", path, "--offline", f"output_dir={tmp_path / 'next'}", follows) == 0


@kinds
def test_quantised_weights_are_not_trained_whole(
    kind: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = recipe(kind)
    assert run("train", path, "--offline", "adapter.modules_to_save=[mlp]") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "modules_to_save 'mlp' means quantised weights (model.layers.0.mlp." in said
    assert "model.quantization: null" in said
    # Those that transformers leaves plain may be.
    assert run("train", path, "--offline", "adapter.modules_to_save=[lm_head]") == 0
    # Also of an adapter that was trained on plain ones.
    plain = "model.quantization=null", "adapter.modules_to_save=[mlp]"
    folder = tmp_path / "plain"
    assert run("train", path, "--offline", f"output_dir={folder}", *plain) == 0
    capsys.readouterr()
    follows = f"adapter={{from: {folder}}}", f"output_dir={tmp_path / 'next'}"
    assert run("train", path, "--offline", *follows) == 2
    assert "modules_to_save 'mlp' means quantised weights" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "methods"), [("nf4", "pissa, lokr"), ("int8", "pissa")])
def test_methods_that_need_plain_weights_are_not_compared_on_quantised_ones(
    kind: str, methods: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--methods", "kpsvd,pissa,lokr", "--budgets", "2k", "--offline"
    assert run("compare", recipe(kind), *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"model.quantization: {kind}: PEFT cannot train {methods} on such weights" in said
    assert "--methods without them" in said


def test_what_cannot_be_quantised_is_refused(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe("nf4")
    assert run("train", path, "--offline", "train.parallel=fsdp") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "quantised weights are not sharded (train.parallel: fsdp)" in said
    assert run("train", path, "--offline", "model.quantization=int4") == 2
    assert "nf4" in capsys.readouterr().err
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert run("train", path, "--offline") == 2
    assert "pip install 'kpsvd-tune[quant]'" in " ".join(capsys.readouterr().err.split())
