"""The whole life of an adapter on many architectures: start, gradients, disable, reload, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ZOO, output_of
from peft import PeftModel, get_peft_model

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.idle import idle_layers, unreached_layers
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.targets import untouched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_an_adapter_lives_on_every_architecture(name: str, tmp_path: Path) -> None:
    kind = ZOO[name]()
    # Frozen, as PEFT does: torch multiplies strided inputs with frozen weights in another order.
    base = kind.make().requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        before = output_of(base, kind.inputs)
    model: Any = get_peft_model(base, KpsvdConfig(target_modules="all-linear", rank=1))
    adapted = [name for name, _ in kpsvd_layers(model)]
    assert adapted
    assert not set(adapted) & {name for name, _ in untouched(base, adapted)}
    with torch.no_grad():
        assert torch.equal(output_of(model, kind.inputs), before), "the start is not the base"

    loss = output_of(model, kind.inputs).float().square().sum()
    unreached = unreached_layers(model, loss)
    loss.backward()
    idle = idle_layers(model)
    assert idle == unreached
    expected = [layer for layer in adapted if any(part in layer for part in kind.idle)]
    assert idle == expected, "layers without gradients"
    assert all(any(part in layer for layer in idle) for part in kind.idle)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(0.05 * torch.randn_like(parameter))
        moved = output_of(model, kind.inputs)
        assert not torch.equal(moved, before)
        with model.disable_adapter():
            assert torch.equal(output_of(model, kind.inputs), before), "disabled is not the base"
        model.save_pretrained(tmp_path)
        fresh = kind.make()
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(output_of(loaded, kind.inputs), moved), "loaded is not what was saved"
        merged = output_of(model.merge_and_unload(), kind.inputs)
    # Relative to the largest entry, in float32, through a few layers.
    assert (merged - moved).abs().max() <= 2e-6 * moved.abs().max(), "merged is another model"


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 45
