"""Two processes (gloo, CPU) are one process with the same global batch, and stop together."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from safetensors.torch import load

from kpsvd_tune.report.events import read_events
from kpsvd_tune.storage.commit import read_committed
from kpsvd_tune.training.optim import SHARDABLE

SCRIPT = Path(__file__).with_name("two_processes.py")
pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 still asks transformers 5.23 for the old name of a property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind, started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        warm.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


def seen(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def flat(weights: dict[str, Any]) -> list[float]:
    return [value for rows in weights.values() for row in rows for value in row]


@pytest.mark.parametrize("name", ["plain", "accumulated", "packed", "grouped"])
def test_two_processes_equal_one(folder, tmp_path, name):
    # Packed rows are held against padded ones.
    changes = {"group_by_length": True} if name == "grouped" else {}
    runpy.run_path(str(SCRIPT))["train"](tmp_path, "one", batch_size=4, **changes)
    one, two = seen(tmp_path, "one"), seen(folder, name)
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "epoch", "step"):
        assert [m[key] for m in two["metrics"]] == pytest.approx(
            [m[key] for m in one["metrics"]], rel=1e-5
        )
    for key in ("train_loss", "validation_loss", "validation_loss_before"):
        assert two["result"][key] == pytest.approx(one["result"][key], rel=1e-5)
    assert flat(two["weights"]) == pytest.approx(flat(one["weights"]), abs=1e-5)


def test_all_processes_hold_the_same_weights_and_numbers(folder):
    for name in ("plain", "accumulated", "whole"):
        zero, one = seen(folder, name, 0), seen(folder, name, 1)
        assert zero["weights"] == one["weights"]
        losses = [[m["loss"] for m in each["metrics"]] for each in (zero, one)]
        assert losses[0] == losses[1]
        assert zero["result"]["validation_loss"] == one["result"]["validation_loss"]


def test_a_layer_that_nothing_calls_stops_no_process(folder):
    """DDP would wait for its gradient; the others are trained as they are without it."""
    zero, one, plain = seen(folder, "idle", 0), seen(folder, "idle", 1), seen(folder, "plain")
    assert zero["error"] is None
    assert zero["weights"] == one["weights"]
    assert any("idle" in name for name in zero["weights"])
    assert {n: each for n, each in zero["weights"].items() if "idle" not in n} == plain["weights"]
    losses = [[m["loss"] for m in each["metrics"]] for each in (zero, plain)]
    assert losses[0] == losses[1]


def test_only_one_process_writes_the_log(folder):
    lines = (folder / "plain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_resumed_run_is_the_uninterrupted_run(folder):
    assert [m["step"] for m in seen(folder, "parts+resumed", 1)["metrics"]] == [3, 4]
    saved = [
        read_committed(folder / name / "checkpoints" / "step-000004") for name in ("whole", "parts")
    ]
    for name in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert saved[0][name] == saved[1][name]
    random = [json.loads(each["state.json"])["random"] for each in saved]
    assert len(random[0]) == 2
    assert random[0] == random[1]


def test_processes_drop_out_different_units(folder):
    tensors = read_committed(folder / "whole" / "checkpoints" / "step-000004")
    random = load(tensors["random.safetensors"])
    assert not random["0/torch"].equal(random["1/torch"])


def test_a_nan_on_one_process_stops_both_before_the_step(folder):
    for rank in (0, 1):
        kind, code, message = seen(folder, "nan", rank)["error"]
        assert (kind, code) == ("NonFiniteError", 3)
        assert message.startswith("step 3: the loss is nan on process 1, in one of the rows ")
    assert seen(folder, "nan", 0)["weights"] == seen(folder, "nan", 1)["weights"]
    assert not (folder / "nan" / "checkpoints" / "step-000003").exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(folder):
    for rank in (0, 1):
        outcome = seen(folder, "signal", rank)
        assert outcome["error"][:2] == ["StoppedBySignal", 143]
    checkpoints = sorted(each.name for each in (folder / "signal" / "checkpoints").iterdir())
    # Step 2 was due for a validation, which is left to the run that goes on.
    assert checkpoints == ["step-000002-pending"]


def test_an_error_on_the_main_process_reaches_the_other(folder):
    assert [seen(folder, "main", rank) for rank in (0, 1)] == ["the disk is full"] * 2


SHARDED = ("sharded", "sharded-accumulated", "sharded-checkpointing", "sharded-packed")


@pytest.mark.parametrize("name", SHARDED)
def test_weights_shared_out_train_as_on_one_process(folder, tmp_path, name):
    runpy.run_path(str(SCRIPT))["train"](tmp_path, "one", batch_size=4)
    one, two = seen(tmp_path, "one"), seen(folder, name)
    assert two["kinds"] == ["DTensor"], "every parameter must be shared out, not copied"
    assert one["kinds"] == ["Parameter"]
    for key in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [m[key] for m in two["metrics"]] == pytest.approx(
            [m[key] for m in one["metrics"]], rel=1e-5
        )
    for key in ("train_loss", "validation_loss", "validation_loss_before"):
        assert two["result"][key] == pytest.approx(one["result"][key], rel=1e-5)
    assert flat(two["weights"]) == pytest.approx(flat(one["weights"]), abs=1e-5)
    assert seen(folder, name, 1)["weights"] == two["weights"]


def test_a_sharded_run_resumes_to_the_same_bits_and_its_checkpoint_is_whole(folder):
    assert [m["step"] for m in seen(folder, "sharded-parts+resumed", 1)["metrics"]] == [3, 4]
    saved = [
        read_committed(folder / name / "checkpoints" / "step-000004")
        for name in ("sharded", "sharded-parts", "plain")
    ]
    for name in ("offsets.safetensors", "optimizer.safetensors"):
        assert saved[0][name] == saved[1][name]
        # The same tensors with the same shapes as where every process holds everything.
        shapes = [{k: v.shape for k, v in load(each[name]).items()} for each in saved]
        assert shapes[0] == shapes[2]


def test_a_nan_in_a_sharded_run_stops_both(folder):
    for rank in (0, 1):
        assert seen(folder, "sharded-nan", rank)["error"][0] == "NonFiniteError"


def test_both_processes_skip_the_same_step(folder):
    for rank in (0, 1):
        metrics = seen(folder, "skip", rank)["metrics"]
        assert [each["skipped"] is not None for each in metrics] == [False, False, True, False]
        assert "the loss is nan on process 1" in metrics[2]["skipped"]
    assert seen(folder, "skip", 0)["weights"] == seen(folder, "skip", 1)["weights"]


def test_both_processes_go_back_together(folder):
    for rank in (0, 1):
        outcome = seen(folder, "retry", rank)
        assert outcome["error"] is None
        assert [each["step"] for each in outcome["metrics"]] == [1, 2, 3, 4]
        rates = [each["learning_rate"] for each in outcome["metrics"]]
        assert rates == [0.01, 0.01, 0.005, 0.005]
    assert seen(folder, "retry", 0)["weights"] == seen(folder, "retry", 1)["weights"]


def told(folder: Path, name: str) -> list[tuple[str, int | None]]:
    """Code and step of the warnings and fallbacks of a run."""
    found = read_events(folder / name)
    return [(each.code, each.step) for each in found if each.kind in ("warning", "fallback")]


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for what differs from one call to the next."""
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    other = ("seconds", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in each.items() if key not in other} for each in lines]


def decided(outcome: Any) -> dict[str, Any]:
    """Counters that decide, and the weights, of one process at the end."""
    other = ("seconds", "peak_memory_bytes")
    counters = {key: each for key, each in outcome["progress"].items() if key not in other}
    return counters | {"weights": outcome["weights"], "error": outcome["error"]}


@pytest.mark.parametrize("name", ["faults", "sharded-faults"])
def test_what_one_process_alone_meets_is_decided_alike_and_told_once(folder, name):
    zero, one = seen(folder, name, 0), seen(folder, name, 1)
    assert decided(zero) == decided(one)
    # Step 3 is skipped, step 4 leads back to step 2 with a lower rate; step 7 is skipped, and for
    # step 8 nothing is left but the best step.
    expected = [("skip_batch", 3), ("lower_rate", 3), ("skip_batch", 7), ("keep_best", 7)]
    assert told(folder, name) == expected
    assert all("on process 1" in event.text for event in read_events(folder / name))
    assert [each["step"] for each in zero["metrics"]] == [1, 2, 3, 3, 4, 5, 6, 7]
    assert zero["error"] is None
    assert zero["progress"]["keeps_best"]
    assert zero["result"]["adapter_step"] == zero["result"]["best_step"] < 7


def test_a_divergence_of_one_process_takes_both_back(folder):
    zero, one = seen(folder, "diverging", 0), seen(folder, "diverging", 1)
    assert decided(zero) == decided(one)
    assert [code for code, _ in told(folder, "diverging")] == ["divergence", "lower_rate"]
    assert zero["progress"]["num_retries"] == 1
    # Ten losses have to be bad; the start is the one checkpoint that is left of before.
    assert [each["step"] for each in zero["metrics"]][-14:] == [*range(1, 15)]
    for rank in (0, 1):
        outcome = seen(folder, "diverging-told", rank)
        assert outcome["error"] is None
        assert outcome["progress"]["num_retries"] == 0
    assert [code for code, _ in told(folder, "diverging-told")] == ["divergence"]


@pytest.mark.parametrize(("name", "first"), [("faults", 3), ("diverging", 1)])
def test_a_kill_after_a_fallback_changes_no_bit_on_two_processes(folder, name, first):
    assert seen(folder, f"{name}-parts")["progress"]["num_retries"] == 1
    for rank in (0, 1):
        resumed = seen(folder, f"{name}-parts+resumed", rank)
        assert decided(resumed) == decided(seen(folder, name, rank))
        # It went wrong again where it had, and fell back again.
        assert resumed["metrics"][0]["step"] == first
    assert logged(folder, f"{name}-parts") == logged(folder, name)
    assert told(folder, f"{name}-parts") == told(folder, name)
    newest = max(path.name for path in (folder / name / "checkpoints").glob("step-*"))
    for file in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        saved = [
            read_committed(folder / each / "checkpoints" / newest)[file]
            for each in (name, f"{name}-parts")
        ]
        assert saved[0] == saved[1]


def test_each_warning_of_two_processes_is_told_once_also_what_one_alone_sees(folder):
    codes = sorted(code for code, _ in told(folder, "watched"))
    assert codes == [
        "clipping",
        "dead_layers",
        "disk_low",
        "exploding_offsets",
        "loss_spike",
        "memory_low",
        "slow",
    ]
    events = {each.code: each for each in read_events(folder / "watched")}
    assert events["loss_spike"].step == 40
    assert events["memory_low"].text.startswith("On process 1, ")
    assert events["memory_low"].evidence["process"] == 1


@pytest.mark.parametrize("name", SHARDABLE)
def test_every_shardable_optimiser_trains_and_resumes(folder, name):
    """The resumed sharded run ends where the run with whole tensors ends."""
    whole, parts = seen(folder, f"ddp-{name}"), seen(folder, f"fsdp-{name}+resumed")
    assert [m["step"] for m in parts["metrics"]] == [3]
    assert flat(parts["weights"]) == pytest.approx(flat(whole["weights"]), rel=1e-4, abs=1e-6)
    assert parts["metrics"][-1]["loss"] == pytest.approx(whole["metrics"][-1]["loss"], rel=1e-5)
