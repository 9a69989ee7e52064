"""One place chooses the device; what it is called, and what it cannot do, is told."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kpsvd_tune import processes
from kpsvd_tune.errors import ModelError, RecipeError
from kpsvd_tune.hardware import devices
from kpsvd_tune.models import ModelSource, loading
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training import accelerator


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plants what devices the machine has."""

    def plant(cuda: bool = False, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)

    return plant


@pytest.mark.parametrize(
    ("cuda", "mps", "kind"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_a_gpu_comes_before_apples_and_that_before_the_cpu(
    cuda: bool, mps: bool, kind: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(cuda, mps)
    # Generation, scoring, a training that is yet to start, and plans.
    assert devices.own_device().type == kind
    assert processes.device().type == kind
    assert accelerator.join().type == kind
    assert devices.own_device(on_cpu=True).type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes.device().type == "cpu"


def test_weights_are_decomposed_beside_a_device_without_float64() -> None:
    assert devices.decomposing_device(torch.device("mps")) == torch.device("cpu")
    assert devices.decomposing_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_the_processor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    text = "processor\t: 0\nmodel\t\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"
    info.write_text(text + text.replace("Some", "Another"), encoding="utf-8")
    monkeypatch.setattr(devices, "_CPU_INFO", info)
    assert devices.hardware_name(torch.device("cpu")) == "Some CPU @ 2 GHz"
    monkeypatch.setattr(devices, "_CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert devices.hardware_name(torch.device("cpu")) == "arm"
    about = SimpleNamespace(name="NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    assert devices.hardware_name(torch.device("cuda")) == "NVIDIA X"


def test_another_device_than_the_cpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    def module(device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(device.type))

    monkeypatch.setattr(torch, "get_device_module", module)
    devices.wait_for(torch.device("cpu"))
    devices.wait_for(torch.device("mps"))
    assert waited == ["mps"]


@pytest.mark.parametrize(
    ("kind", "processes", "precision", "message"),
    [
        ("cpu", 1, "fp16", "train.precision: fp16 needs a GPU; use bf16 or no on a CPU"),
        ("mps", 1, "fp16", "train.precision: fp16 is not supported on mps; expected"),
        ("mps", 2, "no", "2 processes cannot share Apple's mps; train with one process"),
        ("mps", 1, "bf16", None),
        ("cuda", 2, "fp16", None),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    kind: str, processes: int, precision: Any, message: str | None
) -> None:
    found: Any = SimpleNamespace(device=torch.device(kind), num_processes=processes)
    recipe = TrainRecipe(precision=precision)
    if message is None:
        accelerator._check_device(recipe, found)
        return
    with pytest.raises(RecipeError, match=message):
        accelerator._check_device(recipe, found)


def test_a_quantised_base_is_refused_on_mps(machine: Any) -> None:
    machine(mps=True)
    source = ModelSource("m", "folder", Path("m"), ())
    with pytest.raises(ModelError, match="nf4 is not supported on Apple's mps; expected null"):
        loading._check_quantisable(source, None, "nf4")
