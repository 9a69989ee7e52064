"""`adapter.from`: training goes on from a saved adapter, and nothing is decomposed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kpsvd_tune.adapter  # noqa: F401  registers KPSVD with PEFT
from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.live import ConsoleEvents


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        train={"max_steps": 10, "save_every": 2, "eval_every": 5, "learning_rate": 1e-2},
        output_dir=str(tmp_path / "first"),
    )


PREFIX = "base_model.model."
RANKS = "adapter.rank={window: 8, max: 4}"


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def first(recipe: Path, tmp_path: Path) -> Path:
    """A finished run of ten steps."""
    assert cli.run(["train", str(recipe), RANKS, "adapter.modules_to_save=[norm]"]) == 0
    return tmp_path / "first"


@pytest.mark.slow
def test_the_second_run_begins_where_the_first_ended(
    recipe: Path,
    first: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kpsvd_tune.training.stages.initialise", None)
    second = tmp_path / "second"
    options = [f"adapter.from={first / 'adapter'}", f"output_dir={second}"]
    assert cli.run(["train", str(recipe), *options, "adapter.rate=relative"]) == 0
    before, after = results(first), results(second)
    assert after["validation_loss_before"] == before["validation_loss"]
    assert after["validation_loss"] < after["validation_loss_before"]
    assert after["steps"] == 10
    assert after["trainable_parameters"] == before["trainable_parameters"]
    # Frozen factors are the first run's, to the bit; what is trained has moved.
    old, new = tensors(first), tensors(second)
    assert old.keys() == new.keys()
    assert {name for name in old if torch.equal(old[name], new[name])} == {
        name for name in old if name.endswith(("left0", "right0", "base"))
    }
    # The rank report tells the ranks, and the singular values that the factors still hold.
    reports = [
        json.loads((run / "init" / "rank_report.json").read_text()) for run in (first, second)
    ]
    for told, found in zip(reports[0]["layers"], reports[1]["layers"], strict=True):
        assert (found["name"], found["rank"], found["bound_by"]) == (
            told["name"],
            told["rank"],
            "from",
        )
        assert found["singular_values"] == pytest.approx(
            told["singular_values"][: told["rank"]], rel=1e-5
        )
        assert found["energy_total"] == pytest.approx(told["energy_total"], rel=1e-4)
    for key in ("modules", "trainable_parameters", "base_parameters"):
        assert reports[0]["totals"][key] == reports[1]["totals"][key]
    assert reports[0]["untouched"] == reports[1]["untouched"]
    assert (
        f"went on from the adapter {first.name}." in (second / "adapter" / "README.md").read_text()
    )
    capsys.readouterr()
    assert cli.run(["report", str(second)]) == 0
    assert "14 matrices" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert cli.run(["merge", str(second), "--output", str(merged)]) == 0
    ids = torch.arange(16)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted: Any = PeftModel.from_pretrained(base, second / "adapter").eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        found_logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(found_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_second_run_goes_on_to_the_same_bits(
    recipe: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    # A run stands for its adapter.
    start = ["train", str(recipe), f"adapter.from={first}", "train.optimizer=torch.optim.RAdam"]
    assert cli.run([*start, f"output_dir={tmp_path / 'whole'}"]) == 0
    original = ConsoleEvents.step

    def interrupt(self: ConsoleEvents, step: Any, total: int) -> None:
        original(self, step, total)
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ConsoleEvents, "step", interrupt)
    assert cli.run([*start, f"output_dir={tmp_path / 'parts'}"]) == 130
    monkeypatch.setattr(ConsoleEvents, "step", original)
    assert cli.run([*start, f"output_dir={tmp_path / 'parts'}"]) == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert results(tmp_path / "whole")["train_loss"] == results(tmp_path / "parts")["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["{run}", "{run}/adapter", "{run}/../first"])
def test_a_run_does_not_go_on_from_what_it_would_replace(
    recipe: Path, first: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    before = results(first)
    option = f"adapter.from={path.format(run=first)}"
    for options in ([], ["--resume", "never"]):
        assert cli.run(["train", str(recipe), option, *options]) == 2
        assert "is what this run itself would write" in capsys.readouterr().err
    assert results(first) == before
    assert not (first / "previous").exists()


@pytest.mark.slow
def test_a_damaged_adapter_is_named(
    recipe: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    start = ["train", str(recipe), f"adapter.from={first}", f"output_dir={tmp_path / 'second'}"]
    merge = ["merge", str(first), "--output", str(tmp_path / "merged")]
    file = first / "adapter" / "adapter_model.safetensors"
    # Copies, for what was read is a view of the file.
    whole = {name: tensor.clone() for name, tensor in tensors(first).items()}
    # As of an older version: without it the damage must be found in the file itself.
    (first / "adapter" / "manifest.json").unlink()
    facts = json.loads((first / "run.json").read_text())
    del facts["adapter_sha256"]
    (first / "run.json").write_text(json.dumps(facts))
    for damage in ("cut", "less"):
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            name = next(each for each in sorted(whole) if "kpsvd" in each)
            save_file({key: value for key, value in whole.items() if key != name}, file)
        for command in (start, merge):
            assert cli.run(command) == 2
            err = capsys.readouterr().err
            assert (f"{file} is damaged" if damage == "cut" else name.removeprefix(PREFIX)) in err
            assert ("damaged" if damage == "cut" else "adapter's weights lack") in err


@pytest.mark.slow
def test_another_adapter_in_the_same_place_is_noticed(
    recipe: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", str(recipe), f"adapter.from={first}", f"output_dir={tmp_path / 'second'}"]
    assert cli.run(start) == 0
    assert cli.run(["train", str(recipe), RANKS, "train.seed=1", "--resume", "never"]) == 0
    assert cli.run(start) == 1
    assert "adapter: " in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(
    recipe: Path,
    first: Path,
    tmp_path: Path,
    model_factory: Any,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    model_factory(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    options = [f"adapter.from={first}", f"model.path={other}", f"output_dir={tmp_path / 'second'}"]
    assert cli.run(["train", str(recipe), *options]) == 2
    assert "this adapter was trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "second" / "adapter").exists()


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        (
            "train",
            ["adapter.from={tmp}"],
            "adapter.from: {tmp} is a folder; expected a fini",
        ),
        ("train", ["adapter.from={tmp}/none"], "adapter.from: there is no folder {tmp}/none"),
        (
            "train",
            ["adapter.from={tmp}", "adapter.rank.max=3"],
            "adapter.from: the adapter there has its rank; take that key out of this section",
        ),
        (
            "validate",
            ["adapter.from={tmp}", "adapter.init=random", "adapter.target_modules=[q_proj]"],
            "the adapter there has its target_modules, init; take those keys out",
        ),
        ("init-only", ["adapter.from={tmp}"], "adapter.from: that adapter's ranks stay as they"),
    ],
)
def test_what_contradicts_is_refused(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    options: list[str],
    message: str,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given = [option.format(tmp=empty) for option in options]
    assert cli.run([verb, str(recipe), *given]) == 2
    assert message.format(tmp=empty) in capsys.readouterr().err


def test_an_adapter_of_another_method_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert cli.run(["train", str(recipe), f"adapter.from={lora}"]) == 2
    assert "is a LORA adapter: expected one of KPSVD" in capsys.readouterr().err
