"""Blocks that stay in the host's memory compute as if they lay on the card; a CPU stands for it.

The weights that a model holds between calls are put on the meta device, so that whatever uses them
there, instead of the copies on the card, fails as it would with a card.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import GROUPED, ZOO, output_of
from peft import get_peft_model
from random_adapter import add_offsets
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig, KpsvdLinear
from kpsvd_tune.errors import RecipeError, ResourceError
from kpsvd_tune.models import offload as offloading
from kpsvd_tune.models.offload import is_offloaded, num_that_fit, offload, place
from kpsvd_tune.training.step import enable_checkpointing

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).reshape(2, 12)


def weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the weights are that stay in the host's memory."""
    return [at for block in offloading._offloadable(model) for at in block.places]


def held(at: tuple[nn.Module, str]) -> Any:
    owner, name = at
    return owner._parameters[name]


def hide(places: list[tuple[nn.Module, str]]) -> None:
    for at in places:
        owner, name = at
        owner._parameters[name] = nn.Parameter(held(at).to("meta"), requires_grad=False)


def adapted(checkpointing: bool = False) -> Any:
    """A model of four blocks with an adapter that is not zero; the same one every time."""
    options = {**GROUPED, "num_hidden_layers": 4, "tie_word_embeddings": False}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**options))
    config = KpsvdConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])
    model = get_peft_model(base, config)
    add_offsets(model)
    if checkpointing:
        enable_checkpointing(model)
    return model


def free_for(model: nn.Module, num_blocks: int) -> int:
    """Free bytes with which so many first blocks lie on the card."""
    sizes = [offloading._bytes(map(held, block.places)) for block in offloading._offloadable(model)]
    assert sizes
    others = offloading._bytes([*model.parameters(), *model.buffers()]) - sum(sizes)
    state = 3 * offloading._bytes(p for p in model.parameters() if p.requires_grad)
    room = others + state + sum(sizes[:num_blocks]) + (num_blocks < len(sizes)) * max(sizes)
    return -int(-room // (1 - offloading.RESERVE))


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_losses_and_gradients_are_those_of_a_model_that_fits(num_kept: int) -> None:
    plain, model = adapted(checkpointing=True).train(), adapted(checkpointing=True).train()
    places = weights(model)
    found = offload(model, CPU, free_for(model, num_kept))
    assert (found.num_blocks, found.num_offloaded) == (4, 4 - num_kept)
    away = places[num_kept * len(places) // 4 :]
    assert found.offloaded_bytes == sum(held(at).nbytes for at in away)
    hide(away)
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert wanted
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, wanted[name]), name
    # Also after a recomputation, which ends in the middle of a forward pass.
    assert all(held(at).is_meta for at in away)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_alone_lets_go_of_the_copies(checkpointing: bool) -> None:
    model = adapted(checkpointing).train()
    places = weights(model)
    offload(model, CPU, free_for(model, 0))
    hide(places)
    copies: dict[int, list[weakref.ref[Any]]] = {}
    most = 0

    def look(module: Any, _inputs: Any) -> None:
        nonlocal most
        block = next(i for i, each in enumerate(blocks) if module in set(each.modules()))
        weight = getattr(module, "base_layer", module).weight
        assert not weight.is_meta
        copies.setdefault(block, []).append(weakref.ref(weight.untyped_storage()))
        most = max(most, sum(any(ref() is not None for ref in refs) for refs in copies.values()))

    blocks = model.get_base_model().model.layers
    for module in blocks.modules():
        # A layer with an adapter takes the base's weight without calling it.
        if isinstance(module, nn.Linear | KpsvdLinear):
            module.register_forward_pre_hook(look)
    loss = model(input_ids=IDS, labels=IDS).loss
    alive = sum(ref() is not None for refs in copies.values() for ref in refs)
    assert bool(alive) is not checkpointing
    loss.backward()
    assert most == (1 if checkpointing else 4), "blocks with weights on the card at once"
    assert not any(ref() is not None for refs in copies.values() for ref in refs)


def test_answers_are_those_of_a_model_that_fits() -> None:
    plain, model = adapted().eval(), adapted().eval()
    places = weights(model)
    offload(model, CPU, free_for(model, 0))
    hide(places)
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True}
    found = [
        each.generate(input_ids=IDS, return_dict_in_generate=True, **options)
        for each in (plain, model)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(*(torch.stack(each.scores) for each in found))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ZOO[name]()
    model = kind.make().requires_grad_(False)
    with torch.no_grad():
        wanted = output_of(model, kind.inputs)
    places = weights(model)
    if not places:
        with pytest.raises(RecipeError, match="does not say which of its modules are decoder"):
            offload(model, CPU, 10**9)
        return
    monkeypatch.setattr(offloading, "num_that_fit", lambda sizes, room: 0)
    offload(model, CPU, 10**9)
    hide(places)
    with torch.no_grad():
        assert torch.equal(output_of(model, kind.inputs), wanted)


def test_an_exception_leaves_no_copy_behind() -> None:
    model = adapted().eval()
    places = weights(model)
    offload(model, CPU, free_for(model, 0))
    hide(places)
    mlp = model.get_base_model().model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    handle = mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        model(IDS)
    assert all(held(at).is_meta for at in places)
    handle.remove()
    model(IDS)


def test_what_stays_on_the_card() -> None:
    model = adapted()
    ids = {id(held(at)) for at in weights(model)}
    names = [name for name, p in model.named_parameters() if id(p) not in ids]
    assert any("embed_tokens" in name for name in names)
    assert any("lm_head" in name for name in names)
    assert any("kpsvd_left" in name for name in names)
    assert not any(
        "base_layer" in name or "norm.weight" in name and "layers" in name for name in names
    )
    # Neither where nothing is trained.
    model.requires_grad_(False)
    ids = {id(held(at)) for at in weights(model)}
    assert names == [name for name, p in model.named_parameters() if id(p) not in ids]


def test_a_weight_with_two_places_stays_on_the_card(model_factory: Callable[..., Any]) -> None:
    model = model_factory().requires_grad_(False)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    owners = [owner for owner, _ in weights(model)]
    assert first.gate_proj in owners
    assert first.up_proj not in owners
    assert second.up_proj not in owners


@pytest.mark.parametrize(
    ("room", "fit"), [(29, 0), (30, 0), (40, 1), (49, 1), (50, 2), (69, 2), (70, 4), (99, 4)]
)
def test_blocks_that_fit(room: int, fit: int) -> None:
    # 30 is left for the largest unless all fit.
    assert num_that_fit([10, 10, 30, 20], room) == fit


def test_a_card_too_small_for_the_rest_is_refused() -> None:
    model = adapted()
    with pytest.raises(ResourceError, match=r"cpu has 1.0 kB free, and what model.device_map"):
        offload(model, CPU, 1000)
    assert not is_offloaded(model)


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    notes: list[str] = []
    place(model, None, CPU, notes.append)
    assert notes == []
    place(model, "auto", CPU, notes.append)
    assert "does nothing on a CPU" in notes[-1]
    free = free_for(model, 1)
    monkeypatch.setattr(offloading, "free_bytes", lambda device: 10 * free)
    place(model, "auto", CPU, notes.append)
    assert "everything fits on cpu, nothing is offloaded" in notes[-1]
    assert not is_offloaded(model)
    monkeypatch.setattr(offloading, "free_bytes", lambda device: free)
    place(model, "auto", CPU, notes.append)
    assert "1 of 4 decoder blocks are on cpu; the weights of 3, " in notes[-1]
    assert is_offloaded(model)
    # As before a training and in each task that is scored.
    place(model, "auto", CPU, notes.append)
    assert len(notes) == 3


def test_devices_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="mps has no memory of its own"):
        place(adapted(), "auto", torch.device("mps"), print)
    monkeypatch.setattr(offloading, "num_processes", lambda: 2)
    with pytest.raises(RecipeError, match=r"got 2 processes.*set train.parallel: fsdp"):
        place(adapted(), "auto", CPU, print)
