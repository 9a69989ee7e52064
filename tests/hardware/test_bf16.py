"""Where bfloat16 counts as fast: by the kind of device, and on a CPU by a probe."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from kpsvd_tune.hardware import bf16
from kpsvd_tune.hardware.bf16 import bf16_speed, multiplies_narrow, without_bf16

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="X"))


@pytest.mark.parametrize("gpu", [(7, 5)], indirect=True)
def test_a_gpu_before_ampere_takes_float32(gpu: None) -> None:
    found = bf16_speed(CUDA)
    assert not found.is_fast
    assert found.why == "X (compute capability 7.5) has no units for bfloat16"
    assert without_bf16(CUDA) == "X"


@pytest.mark.parametrize("gpu", [(8, 0), (9, 0), (12, 0)], indirect=True)
def test_a_gpu_from_ampere_on_takes_bfloat16_without_a_probe(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "probe_ratio", None)
    found = bf16_speed(CUDA)
    assert (found.is_fast, found.ratio) == (True, None)
    assert "multiplies bfloat16 natively" in found.why
    assert without_bf16(CUDA) is None


def test_a_cpu_without_units_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", False)
    monkeypatch.setattr(bf16, "probe_ratio", None)
    found = bf16_speed(CPU)
    assert (found.is_fast, found.ratio) == (False, None)
    assert "has no units for bfloat16" in found.why
    assert not multiplies_narrow(torch.bfloat16, "cpu")


@pytest.mark.parametrize(("ratio", "is_fast"), [(1.4, False), (1.5, True), (7.2, True)])
def test_a_cpu_with_units_is_held_to_its_probe(
    ratio: float, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", True)
    monkeypatch.setattr(bf16, "probe_ratio", lambda: ratio)
    found = bf16_speed(CPU)
    assert (found.is_fast, found.ratio) == (is_fast, ratio)
    assert f"bfloat16 was {ratio} x as fast as float32 on this CPU" in found.why
    assert ("1.5 x are asked for" in found.why) is not is_fast
    assert multiplies_narrow(torch.bfloat16, "cpu")
    assert not multiplies_narrow(torch.float16, "cpu")


def test_mps_takes_float32_since_nothing_else_was_tried() -> None:
    assert bf16_speed(MPS) == bf16.Bf16(False, "bfloat16 has not been tried on mps")
    assert without_bf16(MPS) is None


def test_the_probe_ends_in_time_and_measures_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the test decides what the ratio is; that bfloat16 is slow is planted."""
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    calls: list[torch.dtype] = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        calls.append(x.dtype)
        clock["now"] += 0.02 if x.dtype == torch.bfloat16 else 0.06

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert bf16.probe_ratio() == pytest.approx(3.0)
    assert clock["now"] <= 1.0
    assert calls.count(torch.bfloat16) == calls.count(torch.float32) >= 3


def test_the_probe_runs_on_this_machine() -> None:
    began = time.perf_counter()
    assert bf16.probe_ratio(0.05) > 0
    assert time.perf_counter() - began < 30
