"""The plan of a recipe on the tiny model: what is resolved, what it takes, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kpsvd_tune.commands import main as cli
from kpsvd_tune.estimate import memory
from kpsvd_tune.estimate import plan as plans
from kpsvd_tune.estimate.plan import _changes
from kpsvd_tune.estimate.time import Speed
from kpsvd_tune.recipe import Recipe


@pytest.fixture(autouse=True)
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of the machine take time, and what they find is not tested here."""
    monkeypatch.setattr(plans, "measure_speed", lambda *_: Speed(1e9, 1e9))
    monkeypatch.setattr("kpsvd_tune.estimate.passes.PassTimes.seconds", lambda *_: 0.1)
    monkeypatch.setattr("kpsvd_tune.estimate.loading.python_slowness", lambda: (1.0, 1.0))
    monkeypatch.setattr(plans, "decomposition_seconds", lambda todo, *_: float(len(todo)))


@pytest.fixture
def planned(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def make(*keys: str, **sections: Any) -> dict[str, Any]:
        recipe = write_recipe(**sections)
        assert cli.run(["plan", str(recipe), *keys, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return make


@pytest.mark.slow
def test_bounds_without_spectra_and_ranks_with_them(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kpsvd_tune.decompose.hashes.SETTLED_SECONDS", 0.0)
    before = planned()
    low, high = before["adapter"]["trainable_parameters"]
    assert low < high
    assert before["adapter"]["basis"].startswith("bounds of the ranks: 14 of 14 spectra")
    assert before["time"]["to_decompose"] == 14
    assert {kind["name"]: kind["count"] for kind in before["adapter"]["kinds"]}[
        "model.layers.*.mlp.up_proj"
    ] == 2
    assert not (tmp_path / "run").exists()
    recipe = write_recipe()
    assert cli.run(["init-only", str(recipe)]) == 0
    report = json.loads((tmp_path / "run" / "init" / "rank_report.json").read_text())
    after = planned()
    chosen = report["totals"]["trainable_parameters"]
    assert after["adapter"]["trainable_parameters"] == [chosen, chosen]
    assert low <= chosen <= high
    assert after["adapter"]["basis"].startswith("ranks by the spectra in the cache")
    assert after["time"]["to_decompose"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["adapter.rank.method=fixed", "adapter.rank.max=3"],
        ["adapter.form=left", "adapter.init=random", "adapter.rank.method=fixed"],
        ["adapter.form=core", "adapter.rank.method=fixed", "adapter.rank.max=2"],
    ],
)
def test_the_plan_is_what_the_run_then_is(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    keys: list[str],
) -> None:
    found = planned(*keys)
    assert cli.run(["train", str(write_recipe()), *keys]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    trained = results["trainable_parameters"]
    assert found["adapter"]["trainable_parameters"] == [trained, trained]
    assert found["data"]["steps"] == results["steps"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert found["data"]["tokens"] == sum(json.loads(line)["tokens"] for line in lines)
    size = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["adapter"]["file_bytes"][0] == pytest.approx(size, rel=0.15)


@pytest.mark.slow
def test_a_budget_bounds_what_is_trained(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned("adapter.rank.budget=3000", "adapter.rank.min=1")
    assert found["adapter"]["trainable_parameters"][1] <= 3000


@pytest.mark.slow
def test_rows_are_left_unread_when_asked(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(dataset={"max_length": 32}, train={"max_steps": 3})
    assert cli.run(["plan", str(recipe), "--without-rows", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["largest_batch"] == [2, 32, 64]
    assert (found["data"]["steps"], found["data"]["training_rows"]) == (3, None)
    assert not (tmp_path / "cache" / "kpsvd-tune" / "tokens").exists()


@pytest.mark.slow
def test_a_run_that_is_too_large_is_told_with_the_cheapest_cure(
    planned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {
        rows: planned(f"train.batch_size={rows}", dataset={"validation": 0})["host"]
        for rows in (1, 4)
    }
    assert peaks[1]["parts"]["activations"] < peaks[4]["parts"]["activations"]
    # Activations of the tiny model are lost in the size of Python, so Python is left out.
    monkeypatch.setattr(plans, "process_bytes", lambda: 0)
    monkeypatch.setattr(memory, "process_bytes", lambda: 0)
    parts = (peaks[1]["parts"], peaks[4]["parts"])
    low, high = (sum(v for k, v in each.items() if "Python" not in k) for each in parts)
    monkeypatch.setattr(memory, "free_memory", lambda: (low + high) // 2)
    found = planned("train.batch_size=4", dataset={"validation": 0})
    assert found["fits"] is False
    assert found["cure"].startswith("train.batch_size=")
    assert "train.gradient_accumulation=" in found["cure"]
    monkeypatch.setattr(memory, "free_memory", lambda: 10)
    assert planned("train.batch_size=4")["cure"] is None


@pytest.mark.slow
def test_money_is_told_where_there_is_a_price(
    planned: Callable[..., dict[str, Any]],
) -> None:
    found = planned("compare.price_per_hour=3600")
    time = found["time"]
    parts = [time[key] for key in ("training_seconds", "decomposition_range", "loading_seconds")]
    assert found["cost"] == pytest.approx([sum(each) for each in zip(*parts, strict=True)])
    assert time["decomposition_range"][0] < time["decomposition_seconds"]
    assert planned()["cost"] is None


@pytest.mark.slow
def test_scoring_is_in_the_time_and_the_money(
    planned: Callable[..., dict[str, Any]], rows_file: Path
) -> None:
    task = {"task": "exact_match", "path": str(rows_file), "max_new_tokens": 4, "before": False}
    task |= {"columns": {"prompt": "question", "completion": "answer"}}
    price = "compare.price_per_hour=3600"
    plain, once = planned(price), planned(price, evaluation=[task])
    twice = planned(price, evaluation=[task | {"before": True}])
    assert plain["time"]["scoring_seconds"] is None
    low, high = once["time"]["scoring_seconds"]
    assert 0 < low < high
    assert twice["time"]["scoring_seconds"] == pytest.approx([2 * low, 2 * high])
    more = [one - other for one, other in zip(once["cost"], plain["cost"], strict=True)]
    assert more == pytest.approx([low, high])
    assert any(line.startswith("scoring by products") for line in once["time"]["basis"])
    unread = planned("train.max_steps=2", "--without-rows", evaluation=[task])["time"]
    assert unread["scoring_seconds"] is None
    assert "the time of scoring is not estimated: the rows were not read" in unread["basis"]


def test_answers_that_do_not_suit_their_task_are_told(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "swapped.jsonl"
    text = "A chair with a back and {} legs, all of them of the same wood."
    lines = [{"prompt": "chairs", "completion": text.format(n)} for n in range(9)]
    rows.write_text("".join(json.dumps(each) + "\n" for each in lines))
    task = {"task": "label", "path": str(rows), "columns": {"completion": "completion"}}
    assert cli.run(["plan", str(write_recipe(evaluation=[task]))]) == 0
    said = capsys.readouterr().err
    assert "warning: evaluation of label: there are 9 different answers in 9 rows" in said


def test_a_scoring_that_holds_more_than_the_training_is_the_peak(
    planned: Callable[..., dict[str, Any]], rows_file: Path
) -> None:
    task = {"task": "exact_match", "path": str(rows_file), "batch_size": 4, "max_new_tokens": 4}
    task |= {"columns": {"prompt": "question", "completion": "answer"}}
    plain, small = planned(), planned(evaluation=[task])
    assert plain["host"]["peak_bytes"] == pytest.approx(small["host"]["peak_bytes"], rel=0.05)
    assert small["host"]["bound_by"] != "scoring"
    new = 10**7
    large = planned(evaluation=[task | {"max_new_tokens": new}])["host"]
    assert large["bound_by"] == "scoring"
    few = planned(evaluation=[task | {"max_new_tokens": new, "batch_size": 2}])["host"]
    process = large["parts"]["Python and libraries"]
    grown = (large["peak_bytes"] - process) / (few["peak_bytes"] - process)
    assert grown == pytest.approx(2, rel=0.02)
    assert any("a lower batch_size" in line for line in planned(evaluation=[task])["memory_basis"])


def test_steps_that_are_done_tell_the_time(
    planned: Callable[..., dict[str, Any]], write_recipe: Callable[..., Path]
) -> None:
    keys = {"train": {"max_steps": 6}}
    assert cli.run(["train", str(write_recipe(**keys))]) == 0
    found = planned(**keys)
    assert any("has done" in line for line in found["time"]["basis"])
    low, high = found["time"]["training_seconds"]
    assert high / low == pytest.approx(1.1 / 0.9)


@pytest.mark.slow
def test_text_says_all_of_it(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["plan", str(write_recipe()), "compare.price_per_hour=2"]) == 0
    out = capsys.readouterr().out
    for said in ("target modules", "activations", "it fits this machine", "USD", "adapter on disk"):
        assert said in out
    assert "lm_head (output head" in out


@pytest.mark.slow
def test_from_an_adapter(
    planned: Callable[..., dict[str, Any]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert cli.run(["train", str(write_recipe(train={"max_steps": 1}))]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = planned(adapter={"from": str(tmp_path / "run")}, output_dir=str(tmp_path / "next"))
    # No rule chooses what is taken as it is.
    assert found["rank_rule"] == "from"
    trained = results["trainable_parameters"]
    assert found["adapter"]["trainable_parameters"] == [trained, trained]
    assert found["time"]["to_decompose"] == 0


@pytest.mark.slow
def test_memory_of_a_gpu_is_apart_from_the_hosts(
    planned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 20))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    found = planned("adapter.rank.method=fixed")
    assert found["device"] == "cuda"
    assert "activations" in found["on_device"]["parts"]
    assert list(found["host"]["parts"]) == ["Python and libraries"]
    assert (found["on_device"]["free_bytes"], found["fits"]) == (10, False)


@pytest.mark.slow
def test_what_is_offloaded_counts_on_the_host(
    planned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (180_000, 180_000))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    keys = ["adapter.rank.method=fixed", "adapter.rank.max=4", "train.gradient_checkpointing=true"]
    whole = planned(*keys)
    found = planned(*keys, "model.device_map=auto")
    away = found["host"]["parts"]["weights that are offloaded"]
    # Both blocks of the tiny model, of which one at a time is on the device.
    assert away == 2 * 4 * (32 * (32 + 2 * 16 + 32 + 3 * 48) + 2 * 32)
    weights = [each["on_device"]["parts"]["weights"] for each in (whole, found)]
    assert weights[0] - weights[1] == away // 2
    assert any("copying of offloaded weights" in each for each in found["time"]["basis"])
    assert not any("copying of offloaded" in each for each in whole["time"]["basis"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    assert list(planned(*keys, "model.device_map=auto")["host"]["parts"]) == [
        "Python and libraries"
    ]


def test_offloading_is_proposed_after_four_bits_where_it_is_not_refused() -> None:
    def proposed(device: str = "cuda", processes: int = 1, **model: Any) -> list[set[str]]:
        content = {"model": {"path": "m", **model}, "train": {"batch_size": 1}, "output_dir": "x"}
        setting: Any = SimpleNamespace(
            recipe=Recipe.model_validate(content),
            device=torch.device(device),
            processes=processes,
            source=SimpleNamespace(kind="folder"),
        )
        return [set(keys) for keys, _, _ in _changes(setting, 64)]

    checkpointing, offloading = {"train.gradient_checkpointing"}, {"model.device_map"}
    four_bits = {"model.quantization"}
    assert proposed() == [checkpointing, checkpointing | four_bits, checkpointing | offloading]
    for refused in (
        proposed("cpu"),
        proposed(processes=2),
        proposed(quantization="int8"),
        proposed(device_map="auto"),
    ):
        assert not any(offloading <= keys for keys in refused)
    # The two are refused together.
    assert not any(four_bits <= keys for keys in proposed(device_map="auto"))
