"""Two processes: gradients of DDP and FSDP2 are those of one process with both batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from peft import get_peft_model
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig

STEPS = 3
TESTS = Path(__file__).parents[1]
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from adapter.test_parallel import work\n"
    "work(*sys.argv[2:5], rank=int(sys.argv[5]))"
)


def make_model(shape: str) -> Any:
    """Two adapted layers of sizes that two processes divide unevenly, equal in every process."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 15))
    config = KpsvdConfig(target_modules=["0", "2"], rank=3, factor_shape=shape)
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def train(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in batches:
        # Two micro steps a step: gradient accumulation.
        for part in batch.chunk(2):
            (model(part).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_values(model: nn.Module) -> list[Tensor]:
    return [whole(p).detach().clone() for p in model.parameters() if p.requires_grad]


def work(folder: str, kind: str, shape: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model(shape)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    batches = torch.load(f"{folder}/batches.pt")
    # A micro step of one process is the union of the two processes' micro steps.
    train(model, [torch.cat([c.chunk(2)[rank] for c in batch.chunk(2)]) for batch in batches])
    values = trained_values(model)
    if rank == 0:
        torch.save(values, f"{folder}/values.pt")
    # DDP frees its group with the interpreter locked, which the group's thread may wait for (torch
    # 2.13): it may not be the last to hold it.
    del model
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["thin", "balanced"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind: str, shape: str, tmp_path: Path) -> None:
    batches = [torch.randn(16, 24) for _ in range(STEPS)]
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-c", PROGRAM, str(TESTS), str(tmp_path), kind, shape]
    ranks = [warm.Popen([*command, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    model = make_model(shape)
    start = trained_values(model)
    train(model, batches)
    for found, alone, before in zip(
        torch.load(tmp_path / "values.pt"), trained_values(model), start, strict=True
    ):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(alone, before)
