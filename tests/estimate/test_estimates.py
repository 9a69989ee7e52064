"""The parts of a plan by themselves: what a trace counts, batches, and times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from kpsvd_tune.adapter import kernel
from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.estimate import trace as tracing
from kpsvd_tune.estimate.batches import batches_of, full_batches
from kpsvd_tune.estimate.memory import optimiser_bytes
from kpsvd_tune.estimate.time import (
    FEWEST_STEPS,
    Ahead,
    Speed,
    decomposition_seconds,
    measure_speed,
    seconds_by_steps,
    step_seconds,
)
from kpsvd_tune.estimate.trace import LiveBytes, MicroStep, Trace, trace_step
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models.loading import build_model
from kpsvd_tune.recipe import Recipe, TrainRecipe

STEP = MicroStep(rows=2, tokens=64, supervised=40)


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    return LlamaConfig(**{**sizes, **heads, **changes})


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "model", "dtype": "float32"},
            "train": {"precision": "no", **train},
            "output_dir": "run",
        }
    )


def layers(of: LlamaConfig, rank: int = 2) -> list[LayerPlan]:
    with torch.device("meta"):
        model = build_model(of)
    found = []
    for name in target_names(model, "all-linear"):
        linear: Any = model.get_submodule(name)
        size = (linear.out_features, linear.in_features)
        plan = LayerPlan.of_weight(name, size, "balanced")
        found.append(LayerPlan(name, plan.shape, rank=rank))
    return found


def test_a_tensor_counts_while_it_is_held() -> None:
    layer = nn.Linear(16, 16)
    with LiveBytes(layer) as live:
        kept = torch.zeros(256)
        assert live.live == 1024
        view = kept.view(16, 16)
        assert live.live == 1024
        out = layer(view)
        assert live.live == 2048
        assert live.multiply_adds == 16**3
        del out
        assert (live.live, live.peak) == (1024, 2048)
        del kept, view
    assert live.live == 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_layers_are_in_proportion(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    own = recipe(gradient_checkpointing=checkpointing)
    found = trace_step(config(), own, layers(config()), STEP)
    assert 0 < found.in_layers < found.activations
    monkeypatch.setattr(tracing, "_DEPTHS", (6, 6))
    whole = trace_step(config(), own, layers(config()), STEP)
    # What grows with the number of layers is known by two depths alone.
    assert found == replace(whole, in_layers=found.in_layers)


@pytest.mark.slow
def test_what_costs_memory_shows() -> None:
    def activations(step: MicroStep = STEP, **train: Any) -> int:
        return trace_step(config(), recipe(**train), layers(config()), step).activations

    plain = activations()
    assert activations(gradient_checkpointing=True) < plain / 2
    assert activations(MicroStep(4, 64, 80)) > 1.8 * plain
    # Only supervised positions have logits: 40 more of them, in float32, at least three times.
    assert activations(MicroStep(2, 64, 80)) - plain >= 3 * 40 * 300 * 4
    assert activations(MicroStep(1, 128, 40), packing=True) > 0.8 * plain


@pytest.mark.slow
def test_nothing_of_a_trace_is_left(tiny_model: nn.Module) -> None:
    trace_step(config(), recipe(), layers(config()), STEP)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    logits = tiny_model(input_ids=ids).logits
    assert type(logits) is torch.Tensor
    assert bool(torch.isfinite(logits).all())


class Rows:
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self.num_supervised = self.lengths // 2

    def __len__(self) -> int:
        return len(self.lengths)


def test_batches_are_those_that_the_sampler_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = Rows([10, 20, 30, 40])
    train = TrainRecipe(batch_size=4)
    found = batches_of(made, train, 1)
    assert found.largest == MicroStep(4, 40, 50)
    assert found.tokens_per_step == 100
    assert batches_of(made, train, 1, multiple=16).largest.tokens == 48
    assert batches_of(made, train, 1, max_length=25).largest == MicroStep(4, 25, 50)
    packed = TrainRecipe(batch_size=4, packing=True)
    assert batches_of(made, packed, 1).largest == MicroStep(1, 100, 50)
    # More forward passes than are looked at: the longest rows may meet.
    monkeypatch.setattr("kpsvd_tune.estimate.batches._LOOKED_AT", 1)
    assert batches_of(made, TrainRecipe(batch_size=2), 50).largest == MicroStep(2, 40, 35)


def test_rows_that_were_not_read_are_the_longest() -> None:
    found = full_batches(TrainRecipe(batch_size=2, gradient_accumulation=3), 16, 2)
    assert (found.largest, found.tokens_per_step) == (MicroStep(2, 16, 32), 192)
    assert (found.size_until(1), found.size_until(4)) == (96, 384)
    packed = full_batches(TrainRecipe(batch_size=2, packing=True), 16)
    assert packed.largest == MicroStep(1, 32, 32)


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [("adamw", 2), ("sgd", 0), ("torch.optim.RMSprop", 1)],
)
def test_state_of_optimisers(optimizer: str, copies: int) -> None:
    found = optimiser_bytes(TrainRecipe(optimizer=optimizer), 1_000_000)
    assert found == pytest.approx(copies * 1_000_000, rel=0.01)


def line(step: int, size: int, own: float, seconds: float, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: a step of `own` seconds that ended at `seconds`."""
    return {
        "step": step,
        "tokens": size,
        "tokens_per_second": size / own,
        "seconds": seconds,
    } | more


def equal_steps(size: int) -> Any:
    return lambda step: size * step


def test_five_steps_tell_the_time_of_a_run() -> None:
    ahead = Ahead(100, equal_steps(100))
    # Two seconds before the first step, which also warms up, and a second each.
    lines = [line(1, 100, 9.0, 11.0), *(line(n, 100, 1.0, 10.0 + n) for n in range(2, 6))]
    assert len(lines) == FEWEST_STEPS
    assert seconds_by_steps(lines, ahead) == pytest.approx(110)
    assert seconds_by_steps(lines[:4], ahead) is None
    assert seconds_by_steps([], ahead) is None
    assert seconds_by_steps([{**each, "skipped": "loss"} for each in lines], ahead) is None
    # A forward pass is at most half of a step of the same tokens, and the one before the first
    # step took two seconds, with warming up.
    held_out = Ahead(100, equal_steps(100), validation_size=200, eval_every=25)
    assert seconds_by_steps(lines, held_out) == pytest.approx(110 + 4)
    large = replace(held_out, validation_size=1000)
    assert seconds_by_steps(lines, large) == pytest.approx(110 + 8)
    # A checkpoint is counted by its size until one was seen; the last step has a validation too.
    saved = replace(held_out, save_every=10, checkpoint_bytes=400_000_000)
    assert seconds_by_steps(lines, saved) == pytest.approx(110 + 4 + 8 * 2)


def test_what_was_seen_between_steps_is_expected_again() -> None:
    ahead = Ahead(
        20, equal_steps(10), validation_size=30, eval_every=2, save_every=5, checkpoint_bytes=10**9
    )
    lines, now = [], 3.0
    for step in range(1, 8):
        now += 1.0
        lines.append(line(step, 10, 1.0, now, validation_loss=None if step % 2 else 2.0))
        # Waiting for rows, a validation after each second step, a checkpoint after the fifth.
        now += 0.5 + (4.0 if step % 2 == 0 else 0.0) + (7.0 if step == 5 else 0.0)
    whole = 3.0 + 20 * 1.5 + 10 * 4.0 + 2 * 7.0 - 0.5
    found = seconds_by_steps(lines, ahead)
    assert found == pytest.approx(whole, rel=0.05)


def test_a_run_that_logs_now_and_then_tells_its_time_too() -> None:
    ahead = Ahead(100, equal_steps(100))
    assert seconds_by_steps([line(10, 100, 1.0, 12.0)], ahead) == pytest.approx(102)


def test_a_step_takes_products_and_traffic() -> None:
    low, high = step_seconds(Trace(0, 10**9, 10**9), 2, Speed(1e9, 1e9))
    assert low < 4.0 < high


@pytest.mark.slow
def test_probes_of_this_machine() -> None:
    speed = measure_speed(torch.device("cpu"), torch.float32)
    assert speed.multiply_adds > 1e7
    assert speed.traffic > 1e7
    plan = LayerPlan.of_weight("a", (64, 64), "balanced")
    one = decomposition_seconds([plan], 4, 5e-3, torch.device("cpu"))
    assert one > 0
    assert decomposition_seconds([], 4, 5e-3, torch.device("cpu")) == 0
    large = LayerPlan.of_weight("b", (4096, 4096), "balanced")
    assert decomposition_seconds([large], 2, 5e-3, torch.device("cpu")) > one


def test_a_gpu_is_imagined_with_its_own_sizes_of_steps() -> None:
    """Chunks that stay in a CPU's cache would starve a GPU, which therefore holds larger ones."""
    x = torch.zeros(4096, 8)
    here = kernel.chunk_tokens(x, 4096)
    with kernel.imagined_on("cuda"):
        assert kernel.device_kind(x) == "cuda"
        assert kernel.chunk_tokens(x, 4096) > here
    assert kernel.device_kind(x) == "cpu"
    on_cpu, on_gpu = (
        trace_step(config(), recipe(), layers(config()), STEP, kind) for kind in ("cpu", "cuda")
    )
    assert on_gpu.activations > 0
    assert on_cpu.multiply_adds > 0
