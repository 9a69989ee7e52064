"""Memory of one micro step, found by running it on tensors that have sizes and no numbers.

The model is built from its configuration with torch's fake tensors, given adapted layers, and
called as the training loop calls it: forward, loss, backward. Whatever an operation returns is
counted from then until nothing holds it any more. So any architecture is counted by its own code,
gradient checkpointing and autocast included, and nothing is allocated or multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kpsvd_tune.adapter.forms import FORMS
from kpsvd_tune.adapter.kernel import imagined_on
from kpsvd_tune.adapter.layer import KpsvdLinear
from kpsvd_tune.adapter.targets import saved_modules
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models.loading import DTYPES, build_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.training.loss import SummedTokenLoss
from kpsvd_tune.training.step import enable_checkpointing

# Layers of a stack in the two traces. Two are the fewest in which one comes after another.
_DEPTHS = (2, 3)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MicroStep:
    """Sizes of one forward pass of one process."""

    rows: int  # of the batch; packed rows are one
    tokens: int  # of each of them, padding included
    supervised: int  # tokens of the batch that the loss counts

    @property
    def size(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Trace:
    """What a micro step takes."""

    activations: int  # most bytes at once beside weights, adapter and gradients
    multiply_adds: int  # of all products, forward and backward
    traffic: int  # bytes that operations read and write
    in_layers: int = 0  # of the activations, what grows with the number of layers

    def scaled(self, share: float) -> Trace:
        """That of a batch with this share of the tokens."""
        return Trace(*(round(share * each) for each in astuple(self)))

    def beyond(self, other: Trace, times: float) -> Trace:
        """This one with `times` what it has more than another."""
        return Trace(
            *(
                max(0, round(own + times * (own - others)))
                for own, others in zip(astuple(self), astuple(other), strict=True)
            )
        )


def trace_step(
    config: Any,
    recipe: Recipe,
    layers: Iterable[LayerPlan],
    step: MicroStep,
    device: str = "cpu",
) -> Trace:
    """Count the memory and the work of a micro step.

    A stack of many equal layers is traced twice with a few of them, and the rest is in proportion.

    Args:
        config: The configuration of the base model, as transformers has it.
        recipe: Its sections model, adapter and train.
        layers: The layers to adapt with their ranks; those of rank 0 are left alone.
        step: The sizes of the batch.
        device: The kind of device that adapted layers compute as on.
    """
    adapted = [plan for plan in layers if plan.rank > 0]

    def traced(depth: int) -> tuple[Trace, int]:
        # A thread has modes, autocast and scratch memory of its own: no fake tensor gets out of it.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_trace, config, recipe, adapted, step, depth, device).result()

    low, whole = traced(_DEPTHS[0])
    if whole <= _DEPTHS[0]:
        return low
    high, _ = traced(_DEPTHS[1])
    if whole <= _DEPTHS[1]:
        return high
    more = _DEPTHS[1] - _DEPTHS[0]
    found = high.beyond(low, (whole - _DEPTHS[1]) / more)
    each = max(0, high.activations - low.activations) / more
    return replace(found, in_layers=round(whole * each))


def _trace(
    config: Any,
    recipe: Recipe,
    layers: list[LayerPlan],
    step: MicroStep,
    depth: int,
    device: str,
) -> tuple[Trace, int]:
    """A trace with at most `depth` layers in each stack, and the layers of the longest stack."""
    train = recipe.train
    with FakeTensorMode(allow_non_fake_inputs=True), imagined_on(device):
        model = build_model(config, DTYPES[recipe.model.dtype], recipe.model.attn_implementation)
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        stacks = list(_stacks(model))
        whole = max(map(len, stacks), default=0)
        for stack in stacks:
            del stack[depth:]
        if train.gradient_checkpointing:
            enable_checkpointing(model)
        for names in saved_modules(model, recipe.adapter.modules_to_save).values():
            for name in names:
                model.get_submodule(name).requires_grad_(True)
        modules = dict(model.named_modules())
        for plan in layers:
            if plan.name in modules:
                _adapt(model, plan, recipe)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        loss = SummedTokenLoss(model)
        narrow = _AUTOCAST.get(train.precision, torch.bfloat16)
        with LiveBytes(model) as live:
            with torch.autocast("cpu", narrow, enabled=train.precision != "no"):
                value = loss(**_batch(step, packed=train.packing and train.batch_size > 1))
            value.backward()
    # From the second micro step on the gradients are there from the start.
    held = trained if train.gradient_accumulation == 1 else 0
    found = Trace(max(0, live.peak - held), live.multiply_adds, live.traffic)
    return found, whole


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules: layers one after another, and not the experts in them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield child
        else:
            yield from _stacks(child)


def _adapt(model: nn.Module, plan: LayerPlan, recipe: Recipe) -> None:
    """Put an adapter of that shape and rank on a layer, as KpsvdModel does."""
    parent, _, child = plan.name.rpartition(".")
    layer = KpsvdLinear(model.get_submodule(plan.name), "default")
    adapter = recipe.adapter
    form = FORMS[adapter.form](plan.shape, plan.rank)
    layer.update_layer("default", form, adapter.dropout, path=adapter.path)
    setattr(model.get_submodule(parent), child, layer)


def _batch(step: MicroStep, *, packed: bool) -> dict[str, Tensor]:
    """A micro batch of those sizes; what its numbers are does not matter."""
    size, kind = (step.rows, step.tokens), torch.int64
    batch = {
        "input_ids": torch.zeros(size, dtype=kind),
        "positions": torch.zeros(step.supervised, dtype=kind),
        "targets": torch.zeros(step.supervised, dtype=kind),
    }
    name = "position_ids" if packed else "attention_mask"
    return batch | {name: torch.ones(size, dtype=kind)}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, while something holds them; and work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.multiply_adds = self.traffic = 0
        # Views of weights and buffers are no new memory; the model keeps these from being reused.
        held = [*model.parameters(), *model.buffers()]
        self._known = {each.untyped_storage()._cdata for each in held}
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what it made."""
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        results = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        for each in results:
            self._note(each.untyped_storage())
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.multiply_adds += count(*args, **kwargs, out_val=made) // 2
        if not function.is_view:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.traffic += sum(each.nbytes for each in (*given, *results))
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._seen:
            return
        size = storage.nbytes()

        def forget(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
