"""Weights that processes share out are read part by part, and train as if each had loaded all."""

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

import architectures
import pytest
import torch
import warm
from architectures import CONFIGS, save

from kpsvd_tune.models import load_model, resolve_model
from kpsvd_tune.models.checkpoint import tied_names
from kpsvd_tune.models.streamed import load_streamed, streamed_weights, to_be_filled

SCRIPT = Path(__file__).with_name("sharded_start_processes.py")
CASES = tuple(runpy.run_path(str(SCRIPT))["CASES"])
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}


def pickle(model: Any, folder: Path) -> None:
    """Save a model as older versions of transformers did."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.fixture(scope="module", params=["fsdp", "zero3"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What two ranks left behind, which were started once for all tests."""
    folder = tmp_path_factory.mktemp(request.param)
    for architecture in ("llama", "qwen2", "gemma", "mixtral", "gpt2"):
        save(architecture, folder / "bases" / architecture)
    pickle(architectures.make("llama"), folder / "bases" / "pickled")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    if request.param == "fsdp":
        environment |= {"ACCELERATE_USE_CPU": "true"}
    elif find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    else:
        settings = folder / "deepspeed.json"
        keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        automatic = dict.fromkeys((*keys, "gradient_clipping"), "auto")
        settings.write_text(json.dumps(automatic | {"zero_optimization": ZERO}))
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
    parallel = "fsdp" if request.param == "fsdp" else "ddp"
    ranks = [
        warm.Popen(
            [sys.executable, str(SCRIPT), str(folder), parallel],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


def seen(folder: Path, case: str, start: str, rank: int) -> Any:
    return json.loads((folder / f"{case}-{start}-{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_starts_train_to_the_same_bits(folder, case):
    for rank in (0, 1):
        old, new = (seen(folder, case, start, rank) for start in ("old", "new"))
        for key in ("losses", "norms", "weights", "records", "buffers"):
            assert new[key] == old[key], key
        assert len(new["losses"]) == 3
        assert new["meta"] == []
        # What the adapter knows its base by is there, and not only equal.
        assert all(any(map(any, record)) for record in new["records"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_process_ever_holds_all_weights(folder, case):
    for rank in (0, 1):
        found = seen(folder, case, "new", rank)
        assert found["notes"] == []
        # Half of them, and the tensor that is shared out now, which is large in a model so small.
        assert found["most"] <= 0.75 * found["whole"]
        assert found["held"] <= 0.65 * found["whole"]
    assert found["most"] or "zero3" in folder.name, "nothing was read"
    assert seen(folder, case, "new", 0)["most"] > 0
    assert seen(folder, case, "old", 0)["most"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_that_something_else_refers_to_are_given_back(folder, case):
    """DeepSpeed's hooks outlive the training; fully_shard's go with the model."""
    for rank in (0, 1):
        found = seen(folder, case, "new", rank)
        assert found["freed"] == (0 if folder.name.startswith("zero3") else found["held"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_read_is_the_model_that_would_be_loaded(tmp_path, architecture, dtype):
    save(architecture, tmp_path)
    source = resolve_model(str(tmp_path), None)
    whole, found = load_model(source, dtype), load_streamed(source, dtype)
    assert not isinstance(found, str)
    weights = streamed_weights(found)
    assert weights is not None
    assert found.config.to_dict() == whole.config.to_dict()
    assert not found.training
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name
    parameters = dict(found.named_parameters(remove_duplicate=False))
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert parameters[name].is_meta
        value = weights.read(name)
        assert value.dtype == parameters[name].dtype == parameter.dtype
        assert torch.equal(value, parameter), name
        rows = len(parameter) // 2, len(parameter)
        assert torch.equal(weights.read(name, rows), parameter[slice(*rows)]), name
    # Tied parameters are one, with several places.
    assert tied_names(found) == tied_names(whole)
    assert [name for name, places, _ in to_be_filled(found) if len(places) > 1] == [
        name for name, _ in whole.named_parameters() if name in tied_names(whole)
    ]


def test_a_part_is_read_without_the_rest(tmp_path, monkeypatch):
    save("llama", tmp_path)
    source = resolve_model(str(tmp_path), None)
    found = load_streamed(source, "bfloat16")
    assert not isinstance(found, str)
    weights = streamed_weights(found)
    assert weights is not None
    sizes = []
    empty = torch.empty

    def measured(*size: Any, **options: Any) -> Any:
        sizes.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr("kpsvd_tune.models.stream.torch.empty", measured)
    weights.read("model.embed_tokens.weight", (16, 32))
    # Of 64 rows of 16 numbers, stored in float32.
    assert sizes == [16 * 16 * 4]


def test_bases_that_are_not_read_so_say_why(tmp_path):
    model = architectures.make("qwen2")
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    file = tmp_path / "old" / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    reason = load_streamed(resolve_model(str(tmp_path / "old"), None), "float32")
    assert reason == "pytorch_model.bin was written by torch before 1.6, and is read as a whole"
    apart = {name: value.clone() for name, value in model.state_dict().items()}
    apart["lm_head.weight"] += 1
    torch.save(apart, file)
    reason = load_streamed(resolve_model(str(tmp_path / "old"), None), "float32")
    assert isinstance(reason, str)
    assert reason.startswith("its files hold different values for ")
    assert reason.endswith(", tied by config.json")
