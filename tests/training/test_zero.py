"""Two processes under DeepSpeed (CPU, gloo) are one process without it, at every ZeRO stage."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import warm
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from safetensors.torch import load

from kpsvd_tune.storage.commit import read_committed

RANK = Path(__file__).with_name("zero_processes.py")
RUNS = Path(__file__).with_name("two_processes.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
    # PEFT 0.21 still asks transformers 5.23 for the old name of a property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
TENSORS = ("offsets.safetensors", "optimizer.safetensors", "random.safetensors")


@pytest.fixture(scope="module", params=[0, 1, 2, 3], ids=lambda stage: f"stage{stage}")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What two ranks left behind at one stage, started once for all tests."""
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "deepspeed.json"
    # The threshold keeps small weights whole everywhere, and these are all small.
    zero = {"stage": request.param, "stage3_param_persistence_threshold": 0}
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings.write_text(json.dumps(dict.fromkeys(names, "auto") | {"zero_optimization": zero}))
    environment = os.environ | {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        warm.Popen(
            [sys.executable, str(RANK), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    errors = "\n".join(error for _, error in said)
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    # Standard output is for results.
    assert [output for output, _ in said] == ["", ""]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    runs = runpy.run_path(str(RUNS))
    train = runs["train"]
    train(folder, "plain", batch_size=4)
    train(folder, "clipped", batch_size=4, **runpy.run_path(str(RANK))["CLIPPED"])
    train(folder, "sgd", batch_size=4, optimizer="sgd")

    def plant(model: Any, step: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "1")
            runs["plant_nan_once"](model, step)

    train(folder, "skip", batch_size=4, plant=plant, on_nonfinite="skip")
    # The precision is part of Accelerate's state, of which a process has one.
    AcceleratorState._reset_state(True)
    train(folder, "bf16", batch_size=4, precision="bf16")
    return folder


def seen(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def flat(weights: dict[str, Any]) -> list[float]:
    return [value for rows in weights.values() for row in rows for value in row]


def saved(folder: Path, name: str, step: int = 4) -> dict[str, bytes]:
    return read_committed(folder / name / "checkpoints" / f"step-{step:06d}")


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("plain", "plain", 1e-5),
        ("accumulated", "plain", 1e-5),
        ("checkpointing", "plain", 1e-5),
        ("clipped", "clipped", 1e-5),
        ("sgd", "sgd", 1e-5),
        # Rounding to 8 bits differs with the shapes of the batches.
        ("bf16", "bf16", 5e-3),
    ],
)
def test_losses_and_factors_are_those_without_deepspeed(folder, one, name, reference, tolerance):
    expected, found = seen(one, reference), seen(folder, name)
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "epoch", "step"):
        assert [m[key] for m in found["metrics"]] == pytest.approx(
            [m[key] for m in expected["metrics"]], rel=10 * tolerance if "bf" in name else tolerance
        )
    for key in ("train_loss", "validation_loss", "validation_loss_before"):
        assert found["result"][key] == pytest.approx(expected["result"][key], rel=tolerance)
    assert found["result"]["trainable_parameters"] == expected["result"]["trainable_parameters"]
    assert flat(found["weights"]) == pytest.approx(flat(expected["weights"]), abs=tolerance)
    assert seen(folder, name, 1)["weights"] == found["weights"]


def test_weights_are_shared_out_at_stage_3_alone(folder, one):
    held = seen(folder, "plain")["num_held"]
    assert held == (0 if folder.name.startswith("stage3") else seen(one, "plain")["num_held"])


def test_a_checkpoint_holds_what_one_without_deepspeed_holds(folder, one):
    for name in ("plain", "sgd"):
        with_it, without = saved(folder, name), saved(one, name)
        for file in TENSORS[:2]:
            expected, found = load(without[file]), load(with_it[file])
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                assert found[key].shape == value.shape
                assert found[key].allclose(value, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize(("parts", "whole"), [("parts", "whole"), ("signal", "plain")])
def test_a_resumed_run_is_the_uninterrupted_run(folder, parts, whole):
    first = {"parts": 3, "signal": 2}[parts]
    resumed = seen(folder, f"{parts}+resumed", 1)
    # A validation put off is made up first.
    assert [m["step"] for m in resumed["metrics"]] == list(range(first, 5))
    found, expected = saved(folder, parts), saved(folder, whole)
    for file in TENSORS:
        assert found[file] == expected[file], file
    states = [json.loads(each["state.json"]) for each in (found, expected)]
    for state in states:
        del state["metrics_bytes"], state["progress"]["seconds"]
        # Two processes do not hold the same memory.
        del state["progress"]["peak_memory_bytes"]
    assert states[0] == states[1]


def test_a_nan_on_one_process_stops_both_before_the_step(folder):
    for rank in (0, 1):
        kind, code, message = seen(folder, "nan", rank)["error"]
        assert (kind, code) == ("NonFiniteError", 3)
        assert message.startswith("step 3: the loss is nan on process 1, in one of the rows ")
    step_2 = load(saved(folder, "nan", 2)["offsets.safetensors"])
    weights = seen(folder, "nan")["weights"]
    assert {name: value.tolist() for name, value in step_2.items()} == weights


def test_a_signal_to_one_process_stops_both_at_the_same_step(folder):
    for rank in (0, 1):
        assert seen(folder, "signal", rank)["error"][:2] == ["StoppedBySignal", 143]


def test_both_processes_skip_the_same_step_and_go_on(folder, one):
    for rank in (0, 1):
        metrics = seen(folder, "skip", rank)["metrics"]
        assert [each["skipped"] is not None for each in metrics] == [False, False, True, False]
    assert seen(folder, "skip", 0)["weights"] == seen(folder, "skip", 1)["weights"]
    # Nothing of the gradients that were left out is in the step after.
    assert flat(seen(folder, "skip")["weights"]) == pytest.approx(
        flat(seen(one, "skip")["weights"]), abs=1e-5
    )


def test_both_processes_go_back_together(folder):
    for rank in (0, 1):
        outcome = seen(folder, "retry", rank)
        assert outcome["error"] is None
        rates = [each["learning_rate"] for each in outcome["metrics"]]
        assert rates == [0.01, 0.01, 0.005, 0.005]
    assert seen(folder, "retry", 0)["weights"] == seen(folder, "retry", 1)["weights"]
