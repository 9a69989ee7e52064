"""Healthy runs of many kinds give no warning; a planted fault of each kind gives its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import kpsvd_tune.training.loop as loop
import kpsvd_tune.training.watching as watching
from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.report.results import Event
from kpsvd_tune.training import Training

STEPS = 60


def counting_rows(num_rows: int, seed: int = 0, length: int = 9) -> list[TokenizedRow]:
    """Rows that count up by one from a random token: something that can be learnt, and held out."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        size = length + int(torch.randint(-4, 5, (), generator=generator))
        first = int(torch.randint(0, 40, (), generator=generator))
        ids = [first + place for place in range(size)]
        rows.append(TokenizedRow(tuple(ids), (-100, *ids[1:]), row=number))
    return rows


def kpsvd_model(model_factory: Callable[..., Any], seed: int = 0, **settings: Any) -> Any:
    model = model_factory(seed)
    torch.manual_seed(1)
    values: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "rank": 2} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, KpsvdConfig(**values))


def lora_model(model_factory: Callable[..., Any], seed: int = 0) -> Any:
    model = model_factory(seed)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


class Told:
    """Collects what is told, each code once with the first event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        if event.code not in self.codes or event.kind == "fallback":
            self.events.append(event)

    @property
    def codes(self) -> list[str]:
        return [event.code for event in self.events]


@pytest.fixture
def watched(start_training: Callable[..., Training]) -> Callable[..., Told]:
    """Trains a model to its end, and gives what was told."""

    def train(model: Any, **changes: Any) -> Told:
        told = Told()
        values: dict[str, Any] = {
            "train": counting_rows(64),
            "validation": counting_rows(8, seed=1),
            "max_steps": STEPS,
            "batch_size": 4,
            "eval_every": 20,
            "save_every": 30,
            "learning_rate": 3e-3,
        }
        values |= changes
        list(start_training(model=model, tell=told, **values).steps())
        return told

    return train


HEALTHY: dict[str, dict[str, Any]] = {
    "the default form": {},
    "every linear layer": {"model": {"target_modules": "all-linear"}},
    "thin factors": {"model": {"factor_shape": "thin"}},
    "the left factors alone": {"model": {"form": "left"}},
    "the right factors alone": {"model": {"form": "right"}},
    "a core": {"model": {"form": "core", "rank": 4}},
    "factors of 8 numbers": {"model": {"form": "left", "factor_size": 8}},
    "rank 4": {"model": {"rank": 4}},
    "attention alone": {"model": {"target_modules": ["q_proj", "v_proj"]}},
    "dropout": {"model": {"dropout": 0.1}},
    "another model": {"model": {"seed": 7}},
    "a LoRA": {"model": "lora"},
    "a high rate": {"learning_rate": 1e-2},
    "a low rate": {"learning_rate": 1e-4},
    "a constant rate": {"scheduler": "constant"},
    "a linear schedule with a long warm-up": {"scheduler": "linear", "warmup_ratio": 0.3},
    "SGD": {"optimizer": "sgd", "learning_rate": 1e-1},
    "packed rows": {"packing": True},
    "accumulated steps": {"batch_size": 2, "gradient_accumulation": 2},
    "single rows, all of them different": {"batch_size": 1, "rows": 240},
    "few rows, seen often, with the best step kept": {
        "rows": 12,
        "keep": "best",
        "early_stopping": {"patience": 2},
    },
    "no held-out rows": {"validation": [], "eval_every": 0},
    "bfloat16": {"precision": "bf16"},
    "no clipping": {"max_grad_norm": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gives_no_warning(
    name: str, watched: Callable[..., Told], model_factory: Callable[..., Any]
) -> None:
    changes = dict(HEALTHY[name])
    settings = changes.pop("model", {})
    if "rows" in changes:
        changes["train"] = counting_rows(changes.pop("rows"))
    is_lora = settings == "lora"
    model = lora_model(model_factory) if is_lora else kpsvd_model(model_factory, **settings)
    told = watched(model, **changes)
    assert told.events == []


def plant_spike(model: Any, _: pytest.MonkeyPatch) -> None:
    """Logits of one step that are far too sure of themselves."""
    calls = []

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        calls.append(model.training)
        return output * 200 if model.training and sum(calls) == 30 else output

    model.get_output_embeddings().register_forward_hook(hook)


def plant_dead_layer(model: Any, _: pytest.MonkeyPatch) -> None:
    """A layer whose gradients are zero, as behind a gate that is shut."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layers.0.self_attn.q_proj" in name:
            parameter.register_hook(torch.zeros_like)


def plant_tiny_weight(model: Any, _: pytest.MonkeyPatch) -> None:
    """A weight that its offsets outgrow at once."""
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data *= 1e-4


def plant_slow_steps(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which steps take ten times as long from the middle of the run on."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1 if now[0] < 200 else 10
        return now[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=monotonic))


def plant_full_disk(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        watching, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=10**6))
    )


def plant_full_memory(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "tightest_memory", lambda: (10**6, 10**9, "the container's"))


def plant_nothing(_: Any, __: pytest.MonkeyPatch) -> None:
    pass


def other_rows() -> list[TokenizedRow]:
    """Rows of tokens that no training row has, so that training makes them less likely."""
    rows = counting_rows(8, seed=1)
    shifted = [tuple(token + 150 for token in row.input_ids) for row in rows]
    return [TokenizedRow(ids, (-100, *ids[1:]), row=n) for n, ids in enumerate(shifted)]


PLANTED: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "loss_spike": (plant_spike, {}),
    "divergence": (
        plant_nothing,
        {
            "validation": other_rows,
            "modules_to_save": ["lm_head"],
            "eval_every": 10,
            "learning_rate": 1e-2,
        },
    ),
    "dead_layers": (plant_dead_layer, {}),
    "exploding_offsets": (plant_tiny_weight, {}),
    "clipping": (plant_nothing, {"max_grad_norm": 1e-4}),
    "slow": (plant_slow_steps, {}),
    "disk_low": (plant_full_disk, {}),
    "memory_low": (plant_full_memory, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_gives_its_own_warning_and_no_other(
    code: str,
    watched: Callable[..., Told],
    model_factory: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant, changes = PLANTED[code]
    changes = dict(changes)
    if "validation" in changes:
        changes["validation"] = changes["validation"]()
    model = kpsvd_model(model_factory, modules_to_save=changes.pop("modules_to_save", None))
    plant(model, monkeypatch)
    told = watched(model, **changes)
    assert told.codes == [code]
    (event,) = told.events
    assert event.kind == "warning"
    assert event.step is not None
    assert event.evidence
    assert event.cure


def test_a_continued_session_looks_at_the_steps_before_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = {
        "step": 1,
        "epoch": 0.1,
        "loss": None,
        "learning_rate": 1e-3,
        "grad_norm": 2.5,
        "tokens": 10,
        "tokens_per_second": 5.0,
        "seconds": 1.0,
        "skipped": "step 1: the loss is nan",
    }
    # A line of another version, or an edited one, is passed over.
    file.write_text("\n".join([json.dumps(line), "{", json.dumps({"step": 2}), json.dumps(line)]))
    found = watching._last_lines(file)
    assert [metrics.grad_norm for metrics in found] == [2.5, 2.5]
    assert watching._last_lines(tmp_path / "missing") == []
