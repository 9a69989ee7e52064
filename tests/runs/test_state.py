"""A state goes through safetensors and JSON and comes back the same, bits and types."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kpsvd_tune.errors import CheckpointError, NonFiniteError
from kpsvd_tune.runs.state import (
    TrainingState,
    from_files,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    pack,
    random_state,
    to_files,
    unpack,
)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def make_state(**changes: Any) -> TrainingState:
    values: dict[str, Any] = {
        "step": 3,
        "offsets": {"left": torch.arange(6.0).view(2, 3), "right": torch.arange(4).bfloat16()},
        "optimizer": {"state": {"left": {"step": torch.tensor(3.0)}}, "groups": []},
        "scheduler": {"last_epoch": 3},
        "random": [random_state()],
        "progress": {"loss": 0.1},
        "metrics_bytes": 17,
    }
    return TrainingState(**(values | changes))


def in_order(value: Any) -> Any:
    """A mapping sorted by key: safetensors keeps tensors by name and not in order."""
    return dict(sorted(value.items())) if isinstance(value, dict) else value


TREES = [
    {"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "fused": None, "maximize": False, "step": 2**60},
    {0: {"exp_avg": torch.randn(3)}, 1: {"exp_avg": torch.randn(2, 2)}},
    [(), [], {}, "", (1, [2, (3,)])],
    {"$tensor": "a name that is no tensor"},
    {"$tuple": [1]},
    {"$items": torch.ones(1)},
    {("a", 1): 2.0, None: True},
    {"tiny": 5e-324, "negative": -0.0},
    {"scalar": torch.tensor(1.5, dtype=torch.float64), "bytes": torch.arange(5, dtype=torch.uint8)},
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_a_tree_comes_back_with_its_types(tree):
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(tree, tensors)))
    assert_same(unpack(packed, tensors), tree)


@pytest.mark.parametrize("leaf", [np.float64(1.0), {1, 2}, float("nan"), object()])
def test_what_json_cannot_hold_is_refused_by_name(leaf):
    with pytest.raises(TypeError, match=r"group/0/lr is "):
        pack({"group": [{"lr": leaf}]}, {})


def test_a_state_comes_back_through_its_files():
    state = make_state()
    back = from_files(dict(to_files(state)))
    for name in TrainingState.__dataclass_fields__:
        assert_same(in_order(getattr(back, name)), in_order(getattr(state, name)))


def test_tied_and_strided_tensors_are_written():
    tensor = torch.randn(3, 4)
    state = make_state(offsets={"a": tensor, "tied": tensor, "turned": tensor.T})
    assert_same(in_order(from_files(dict(to_files(state))).offsets), state.offsets)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["offsets", "optimizer"])
def test_non_finite_tensors_are_never_written(place, value):
    bad: dict[str, Any] = {"offsets": {"w": torch.tensor([1.0, value])}}
    if place == "optimizer":
        bad = {"optimizer": {"state": {"w": torch.tensor(value)}}}
    with pytest.raises(NonFiniteError, match=r"step 3: .*w holds an infinite or NaN number"):
        list(to_files(make_state(**bad)))


def test_a_missing_file_is_named():
    files = dict(to_files(make_state()))
    del files["optimizer.safetensors"]
    with pytest.raises(CheckpointError, match=r"lacks 'optimizer\.safetensors'"):
        from_files(files)


def parameters() -> dict[torch.Tensor, str]:
    torch.manual_seed(0)
    return {nn.Parameter(torch.randn(3, 2)): "a", nn.Parameter(torch.randn(4)): "b"}


def take_steps(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in names:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW([{"params": [each], "lr": 0.1} for each in p], amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ],
    ids=["adamw", "groups", "sgd", "adafactor"],
)
def test_an_optimiser_goes_on_bit_for_bit(make):
    names = parameters()
    optimizer = make(list(names))
    take_steps(optimizer, names, seed=1)
    state = make_state(optimizer=optimizer_state(optimizer, names))
    copies: dict[torch.Tensor, str] = {
        nn.Parameter(p.detach().clone()): name for p, name in names.items()
    }
    resumed = make(list(copies))
    load_optimizer_state(resumed, from_files(dict(to_files(state))).optimizer, copies)
    assert_same(
        optimizer_state(resumed, copies)["groups"], optimizer_state(optimizer, names)["groups"]
    )
    take_steps(optimizer, names, seed=2)
    take_steps(resumed, copies, seed=2)
    for left, right in zip(names, copies, strict=True):
        assert torch.equal(left, right)


def test_an_optimiser_of_other_parameters_is_refused():
    names = parameters()
    state = optimizer_state(torch.optim.SGD(list(names), lr=0.1), names)
    other: dict[torch.Tensor, str] = {nn.Parameter(torch.zeros(1)): "c"}
    with pytest.raises(CheckpointError, match=r"2 parameters in 1 groups, the run's has 1 in 1"):
        load_optimizer_state(torch.optim.SGD(list(other), lr=0.1), state, other)


def test_every_generator_goes_on():
    draw = lambda: (  # noqa: E731
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
        np.random.normal(),
        torch.rand(3).tolist(),
    )
    draw()  # leaves the second half of a gaussian pair behind, in python's and numpy's generator
    state = from_files(dict(to_files(make_state(random=[random_state()])))).random[0]
    expected = [draw(), draw()]
    load_random_state(state)
    assert [draw(), draw()] == expected
