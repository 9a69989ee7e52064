"""Merging: equal to the adapter on its base, proved from the files, and honest about rounding."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from random_adapter import add_offsets
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError, MergeError, ResourceError
from kpsvd_tune.merge import merging, proof
from kpsvd_tune.merge.files import for_both_versions, tokenizer_for_both_versions
from kpsvd_tune.merge.loaded import merge_into as add_updates
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.results import MergeReport


def merge_into(model: Any, tokenizer: Any, output: Path, **settings: Any) -> MergeReport:
    wanted = merging.MergeSettings(**settings)
    with ConsoleEvents() as events:
        return merging.merge_loaded(model, tokenizer, output, wanted, events)


def adapted(model: Any, scale: float = 0.05, **options: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
    peft = get_peft_model(model, KpsvdConfig(**(settings | options)))
    add_offsets(peft, scale)
    return peft


@pytest.mark.slow
def test_merged_folder_is_the_adapted_model(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    peft = adapted(tiny_model).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = peft(ids).logits
    output = tmp_path / "merged"
    report = merge_into(peft, tokenizer, output, adapter="run", dtype="float32")
    assert report.passed
    assert (report.max_logit_difference or 0) < 1e-4
    assert report.top1_agreement == 1.0
    assert report.min_kept_share == pytest.approx(1.0, abs=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(output).eos_token == "</s>"
    stored = json.loads((output / "merge_report.json").read_text())
    assert stored["passed"] is True
    content = (output / "model.safetensors").read_bytes()
    assert stored["weight_files"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert stored["max_logit_difference"] == report.max_logit_difference
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| largest logit difference | {report.max_logit_difference:.3g} |" in card


@pytest.mark.slow
def test_files_of_a_merge(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "merged"
    merge_into(adapted(tiny_model), tokenizer, output, adapter="run", dtype="float32")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge_report.json"} <= names
    assert not any("kpsvd" in key for key in load_file(output / "model.safetensors"))
    assert list(output.parent.iterdir()) == [output]
    assert output.stat().st_mode & 0o077 == 0o077 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.slow
def test_modules_to_save_reach_the_merged_weights(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    peft = adapted(tiny_model, modules_to_save=["model.norm"]).eval()
    report = merge_into(peft, tokenizer, tmp_path / "m", adapter="run", dtype="float32")
    assert report.passed


@pytest.mark.slow
def test_small_updates_lost_in_bf16_are_told(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """An update far below the spacing of bf16 weights is rounded away almost whole."""
    base = tiny_model.to(torch.bfloat16).to(torch.float32)
    report = merge_into(
        adapted(base, scale=5e-5),
        tokenizer,
        tmp_path / "m",
        adapter="run",
        dtype="bfloat16",
    )
    assert report.min_kept_share < 0.5
    assert "use --dtype float32" in report.warnings[0]
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_kept_share_is_measured_by_the_rule(tiny_model: Any) -> None:
    """Against the definition, written out for one layer."""
    peft = adapted(tiny_model, scale=3e-3, target_modules=["model.layers.0.mlp.up_proj"])
    layer = peft.base_model.model.model.layers[0].mlp.up_proj
    delta = layer.get_delta_weight("default").double()
    weight = layer.get_base_layer().weight.detach()
    rounded = (weight + delta.float()).bfloat16().double() - weight.double()
    expected = float((rounded * delta).sum() / (delta * delta).sum())
    weight = weight.clone()
    (share,) = add_updates(peft, torch.bfloat16)[1].kept.values()
    assert share == pytest.approx(expected, rel=1e-6)
    assert 0 < share < 1.5


@pytest.mark.slow
def test_a_wrong_merge_fails_the_proof(
    tiny_model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The proof must see a file that differs from what was meant to be written."""
    original = LlamaForCausalLM.save_pretrained

    def save_other(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.model.layers[0].mlp.up_proj.weight.mul_(1.05)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_other)
    report = merge_into(
        adapted(tiny_model), tokenizer, tmp_path / "m", adapter="r", dtype="float32"
    )
    assert not report.passed


def test_a_broken_adapter_is_named(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    peft = adapted(tiny_model)
    with torch.no_grad():
        layer = peft.base_model.model.model.layers[1].self_attn.v_proj
        layer.kpsvd_left["default"][0, 0, 0] = float("inf")
    with pytest.raises(MergeError, match=r"logits of the adapter .* not finite for prompt 1"):
        merge_into(peft, tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    tiny_model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(ResourceError, match=r"needs \d+ kB on disk and .* has 10 bytes free"):
        merge_into(adapted(tiny_model), tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_update_is_named_though_no_prompt_shows_it(tiny_model: Any) -> None:
    peft = adapted(tiny_model)
    with torch.no_grad():
        layer = peft.base_model.model.model.layers[1].self_attn.v_proj
        layer.kpsvd_left["default"][0, 0, 0] = float("inf")
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.v_proj: .* not finite"):
        add_updates(peft, torch.float32)


def test_a_number_that_is_none_in_a_later_prompt_fails_the_proof() -> None:
    """Python's max() keeps the first of two when the second is NaN."""
    whole, broken = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 1.0]] * 2)
    difference, _ = proof.difference([whole, whole], [whole, broken])
    assert math.isnan(difference)


@pytest.mark.parametrize("damage", ["nan", "zero"])
def test_logits_that_prove_nothing_fail_the_proof(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    peft = adapted(tiny_model)
    head = peft.base_model.model.lm_head
    with torch.no_grad():
        if damage == "nan":
            # Of one token, which only the last prompt has.
            used = set(tokenizer(proof.PROMPTS[-1]).input_ids)
            for prompt in proof.PROMPTS[:-1]:
                used -= set(tokenizer(prompt).input_ids)
            peft.get_input_embeddings().weight[min(used)] = float("nan")
        else:
            head.weight.zero_()
    words = "are not finite for prompt 4" if damage == "nan" else "are all 0 for prompt 1"
    with pytest.raises(MergeError, match=f"logits of the adapter on its base {words}"):
        merge_into(peft, tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_merged_logits_that_are_not_finite_leave_nothing(
    tiny_model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LlamaForCausalLM.save_pretrained

    def save_other(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.model.norm.weight[0] = float("nan")
        original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_other)
    with pytest.raises(MergeError, match="logits of the merged model are not finite"):
        merge_into(adapted(tiny_model), tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_weight_that_is_not_adapted_and_not_finite_is_named(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Finite in float32, infinite in float16; its token is in no prompt."""
    peft = adapted(tiny_model)
    with torch.no_grad():
        peft.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Z"), 0] = 1e6
    with pytest.raises(MergeError, match=r"model.embed_tokens.weight: not finite in float16"):
        merge_into(peft, tokenizer, tmp_path / "m", adapter="r", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "words"),
    [(0.0, "the adapter changes nothing"), (1e-4, "could not tell the merged model from the base")],
)
def test_an_adapter_that_the_proof_cannot_see_is_told(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, scale: float, words: str
) -> None:
    peft = adapted(tiny_model, scale=scale)
    report = merge_into(peft, tokenizer, tmp_path / "m", adapter="r", dtype="bfloat16")
    assert words in report.warnings[-1]
    assert (report.adapter_logit_difference == 0) == (scale == 0)


@pytest.mark.slow
def test_files_that_transformers_4_reads(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Version 4 takes rope_theta 10000 in silence where only rope_parameters has it."""
    tiny_model.config.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
    tiny_model.config.torch_dtype = torch.float32
    base = tmp_path / "base"
    tiny_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = json.loads((base / "config.json").read_text())
    # As version 4 wrote it: the base's own keys stay.
    old = {key: value for key, value in settings.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 100000.0, "torch_dtype": "float32", "own_key": 1}
    (base / "config.json").write_text(json.dumps(old))
    for place, known in (("of files", base), ("without files", None)):
        base_model = LlamaForCausalLM.from_pretrained(base)
        merge_into(
            adapted(base_model),
            tokenizer,
            tmp_path / place,
            adapter="r",
            dtype="bfloat16",
            base_folder=known,
        )
        found = json.loads((tmp_path / place / "config.json").read_text())
        assert found["rope_theta"] == 100000.0
        assert found["dtype"] == found["torch_dtype"] == "bfloat16"
        if known:
            assert found == old | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
            name = "tokenizer.json"
            assert (tmp_path / place / name).read_bytes() == (base / name).read_bytes()
            own = json.loads((base / "tokenizer_config.json").read_text())
            kept = json.loads((tmp_path / place / "tokenizer_config.json").read_text())
            assert kept == (tokenizer_for_both_versions(own) or own)
        else:
            assert found["rope_parameters"]["rope_theta"] == 100000.0


def test_scaled_rotary_embeddings_and_parts_have_the_keys_of_both_versions() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    inner = {"model_type": "llama", "rope_parameters": rope}
    found = for_both_versions({"text_config": inner, "quantization_config": {"bits": 4}}, "float16")
    assert "quantization_config" not in found
    assert found["text_config"]["rope_theta"] == 5e5
    assert found["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.slow
def test_what_a_killed_merge_left_is_removed_and_one_at_work_is_not(
    tiny_model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    left, at_work, other = (
        tmp_path / name for name in (".m.aaaaaaaa.tmp", ".m.bbbbbbbb.tmp", ".m.settings")
    )
    for folder in (left, at_work, other):
        folder.mkdir()
    held = os.open(at_work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    merge_into(adapted(tiny_model), tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    os.close(held)
    assert {each.name for each in tmp_path.iterdir()} == {"m", at_work.name, other.name}


@pytest.mark.slow
def test_the_room_that_a_killed_merge_took_counts_as_free(
    tiny_model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = tmp_path / ".m.aaaaaaaa.tmp"
    left.mkdir()

    def usage(path: object) -> Any:
        return SimpleNamespace(free=0 if left.exists() else 10**9)

    monkeypatch.setattr("shutil.disk_usage", usage)
    merge_into(adapted(tiny_model), tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("place", ["base", "base/inside", "."])
def test_an_output_on_the_input_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(InputError, match="would write over or into the input"):
        merging.check_output(tmp_path / place, [tmp_path / "base"])


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(InputError, match="exists and is not empty: name another folder"):
        merging.check_output(tmp_path / "out", [tmp_path / "base"])


@pytest.mark.slow
def test_conv1d_layers_merge(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    model_factory: Callable[..., LlamaForCausalLM],
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=24,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    peft = adapted(GPT2LMHeadModel(config).eval())
    report = merge_into(peft, tokenizer, tmp_path / "m", adapter="r", dtype="float32")
    assert report.passed
    assert (report.max_logit_difference or 0) < 1e-4


@pytest.mark.slow
def test_tokens_that_were_added_for_the_adapter_come_along(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    # Room for more tokens than there are, as padded vocabularies have.
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = tmp_path / "adapter"
    config = KpsvdConfig(target_modules=["q_proj"], rank=1, init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(adapter))
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(adapter)
    merged = tmp_path / "merged"
    assert cli.run(["merge", str(adapter), "--output", str(merged)]) == 0
    text = "a<tool>b</tool>"
    found = AutoTokenizer.from_pretrained(merged)(text).input_ids
    assert found == tokenizer(text).input_ids
    assert len(tokenizer) - 1 in found


def test_a_tokenizer_that_only_version_5_knows_is_written_for_both(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # All tests share the fixture.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>", "<|end_call|>"]})
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    found = tokenizer_for_both_versions(written)
    assert found is not None
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<|call|>", "<|end_call|>"]
    assert tokenizer_for_both_versions(found) is None
    file.write_text(json.dumps(found), encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    text = "nuts<|call|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
