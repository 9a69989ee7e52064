"""4-bit weights on a CPU: not packed anew by bitsandbytes, and refused where it misreads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import base_weight
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import AdapterError, ModelError
from kpsvd_tune.hardware import four_bits
from kpsvd_tune.models import load_model, resolve_model
from kpsvd_tune.models.quantised import quantisation_config

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
TOKENS = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
Model = Any


def layers(model: Model) -> dict[str, Any]:
    kind = bitsandbytes.nn.Linear4bit
    return {name: each for name, each in model.named_modules() if isinstance(each, kind)}


def bits(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's packed weight and its scales."""
    return {
        name: (each.weight.detach().clone(), each.weight.quant_state.absmax.clone())
        for name, each in layers(model).items()
    }


def input_gradient(model: Model) -> Tensor:
    """Of the loss in training, for the model's first input, so that it passes all layers."""
    x: Any = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model.train()(inputs_embeds=x, labels=TOKENS).loss.backward()
    found: Tensor = x.grad
    return found


@pytest.fixture
def units_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes takes this CPU for one with avx512_bf16, which it may be."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def by_our_loader(folder: Path) -> Model:
    return load_model(resolve_model(str(folder)), "float32", quantization="nf4")


def by_transformers(folder: Path) -> Model:
    config = quantisation_config("nf4", torch.float32)
    load: Any = AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, quantization_config=config)


def adapted_by_peft(folder: Path) -> Model:
    return get_peft_model(by_transformers(folder), KpsvdConfig(target_modules=["q_proj"]))


@pytest.mark.usefixtures("units_for_bfloat16")
@pytest.mark.parametrize("make", [by_our_loader, adapted_by_peft])
def test_evaluation_leaves_the_weights_and_the_gradient_as_they_are(
    make: Callable[[Path], Model], tiny_model_dir: Path
) -> None:
    model = make(tiny_model_dir)
    assert layers(model)
    stored, gradient = bits(model), input_gradient(model)
    with torch.no_grad():
        model.train()
        in_training = model(TOKENS).logits
        assert torch.equal(model.eval()(TOKENS).logits, in_training)
    for name, pair in bits(model).items():
        assert all(map(torch.equal, pair, stored[name]))
    assert torch.equal(input_gradient(model), gradient)


@pytest.mark.usefixtures("units_for_bfloat16")
def test_weights_that_were_packed_anew_are_put_back_for_an_adapter(tiny_model_dir: Path) -> None:
    model = by_transformers(tiny_model_dir)
    before = {name: base_weight(layer) for name, layer in layers(model).items()}
    for layer in layers(model).values():
        # As its first pass in evaluation mode does on such a CPU.
        pack = functional._convert_weight_packed_for_cpu
        layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
        assert layer.weight.quant_state.packing_format_for_cpu
    # An adapter on one kind of layer looks after all of them.
    get_peft_model(model, KpsvdConfig(target_modules=["q_proj"]))
    found = layers(model)
    assert not any(each.weight.quant_state.packing_format_for_cpu for each in found.values())
    for name, weight in before.items():
        now = base_weight(found.get(name) or found[f"{name}.base_layer"])
        # The scales were rounded to 8 bits of bfloat16, and to 8 bits of bitsandbytes again.
        assert (now - weight).norm() < 2**-7 * weight.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scoring_in_between_changes_no_step(
    kind: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text('{"question": "Red?", "answer": "No."}\n', encoding="utf-8")
    losses = []
    for name, held_out in ("unscored", 0), ("scored", str(others)):
        folder = tmp_path / name
        recipe = write_recipe(
            dataset={"validation": held_out},
            model={"quantization": kind},
            adapter={"rank": {"method": "fixed", "max": 2}},
            train={"max_steps": 4, "eval_every": 1, "learning_rate": 0.01},
            output_dir=str(folder),
        )
        assert cli.run(["train", str(recipe), "--offline"]) == 0
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize("width", [16, 33, 48, 64, 72, 80, 192])
def test_a_width_counts_as_misread_where_the_numbers_are_wrong(width: int) -> None:
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    pairs = packed.flatten().long()
    codes = state.code[torch.stack([pairs >> 4, pairs & 15], 1).flatten()]
    expected = (codes.view(-1, 64) * state.absmax[:, None]).view_as(weight)
    is_right = torch.equal(functional.dequantize_4bit(packed, state), expected)
    assert four_bits._is_misread(width, 64, "nf4") is not is_right
    assert is_right or width % 64


def test_a_base_whose_weights_would_be_misread_is_refused(
    model_factory: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_factory(intermediate_size=80).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(four_bits, "_is_misread", lambda *_: True)
    with pytest.raises(ModelError) as caught:
        by_our_loader(tmp_path)
    for part in (
        "bitsandbytes dequantises the 4-bit weights of model.layers.0.mlp.down_proj, model.",
        "wrongly on this CPU: it does so where the number of inputs, here 80, is not a whole",
        "expected plain weights (model.quantization: null), or model.quantization: int8",
    ):
        assert part in str(caught.value)
    with pytest.raises(AdapterError, match="here 80, .* expected a base with plain or 8-bit"):
        adapted_by_peft(tmp_path)
    # Whole blocks are read rightly, and never tried.
    load_model(resolve_model(str(tmp_path)), "float32", quantization="int8")
    monkeypatch.setattr(four_bits, "_is_misread", lambda *_: False)
    by_our_loader(tmp_path)


def test_a_plan_refuses_what_the_loading_would_refuse(
    model_factory: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    model_factory(intermediate_size=80).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = write_recipe(model={"path": str(base), "quantization": "nf4"}, train={"max_steps": 1})
    monkeypatch.setattr(four_bits, "_is_misread", lambda *_: True)
    assert cli.run(["plan", str(recipe), "--offline"]) == 2
    told = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj" in told
    assert "here 80, is not a whole number of the blocks" in told
    # 8 bits have no such blocks, and whole blocks are never tried.
    assert cli.run(["plan", str(recipe), "--offline", "model.quantization=int8"]) == 0
    monkeypatch.setattr(four_bits, "_is_misread", lambda *_: False)
    assert cli.run(["plan", str(recipe), "--offline"]) == 0


def test_commands_do_not_pass_on_that_an_unused_kernel_is_missing(tmp_path: Path) -> None:
    """bitsandbytes says so when it is imported on a CPU with units for bfloat16."""
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.NOTSET)
    assert cli.run(["generate", str(tmp_path / "none"), "Hello", "--offline"]) == 2
    assert not logger.getChild("backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)
