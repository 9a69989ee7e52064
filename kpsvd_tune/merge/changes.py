"""What adapters change in a base, told without its weights: updates, and modules trained whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base import (
    check_rest,
    check_weight,
    noted_distances,
    other_base_allowed,
)
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import InputError, some_of
from kpsvd_tune.merge.update import Term
from kpsvd_tune.models import ModelSource, load_skeleton
from kpsvd_tune.models.stream import read_tensor, tensors_of
from kpsvd_tune.runs.adapter_folder import WEIGHTS
from kpsvd_tune.runs.find import load_adapter, other_base_note

_NAME = "default"  # of an adapter in a model of its own


@dataclass(frozen=True)
class Part:
    """An adapter that is merged, and how much of its update."""

    folder: Path
    weight: float = 1.0


@dataclass
class Changes:
    """What adapters change in one base.

    Attributes:
        layers: For each adapted layer the adapters on it, as (weight, layer on the meta device).
        replaced: The values of parameters and buffers of modules that were trained whole.
        rows: Rows of a parameter that were trained: their numbers, and their values.
        other_base: Says so where the base is another than an adapter's.
        distances: How far layers' weights are from the quantised ones that an adapter was trained
            on, relative to their norm.
    """

    layers: dict[str, list[tuple[float, Any]]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    other_base: str | None = None
    distances: dict[str, float] = field(default_factory=dict)
    _models: list[Any] = field(default_factory=list)
    _allowed: bool = False
    _differences: list[str] = field(default_factory=list)

    def add(self, part: Part, source: ModelSource) -> None:
        """Read another adapter, which is compared with the base's configuration."""
        skeleton = load_skeleton(source)
        # On the meta device modules that are trained whole would be filled with nothing.
        model: Any
        model, other = load_adapter(skeleton, part.folder, self._allowed, low_cpu_mem_usage=True)
        self.other_base = self.other_base or other
        self._models.append(model)
        for name, layer in kpsvd_layers(model):
            self.layers.setdefault(name, []).append((part.weight, layer))
        replaced, rows = _trained_whole(model.base_model.model, part.folder)
        check_whole([*replaced, *rows], [*self.replaced, *self.rows], part)
        self.replaced |= replaced
        self.rows |= rows

    def is_transposed(self, name: str) -> bool:
        """Whether a layer's weight is stored as (in, out)."""
        return isinstance(self.layers[name][0][1].get_base_layer(), Conv1D)

    def terms(self, name: str) -> list[Term]:
        """The update of a layer's weight, in the weight's own layout."""
        found = terms_of([(weight, layer, _NAME) for weight, layer in self.layers[name]])
        return [each.transposed() for each in found] if self.is_transposed(name) else found

    def check_layer(self, name: str, weight: Tensor) -> None:
        """Compare an adapted weight with what the adapters stored of it.

        AdapterError: it is of another base, or the factors are another layer's.
        """
        with self._noting(), noted_distances() as far:
            for _, layer in self.layers[name]:
                check_weight(layer, _NAME, weight)
        self.distances |= far

    def check_rest(self, fetch: Callable[[str], Tensor | None]) -> bool:
        """Compare the weights that no adapter lies on; False where that was not possible.

        `fetch` reads a weight by its name in the model. AdapterError: they are of another base.
        """
        is_compared = True
        with self._noting():
            for model in self._models:
                layers = dict(kpsvd_layers(model))
                held: list[Any] = [each.kpsvd_base for each in layers.values()]
                records = [dict(each.items()).get(_NAME) for each in held]
                record = next((each for each in records if each is not None and each.any()), None)
                if record is not None:
                    is_compared &= check_rest(
                        model, layers, _NAME, record, model.peft_config[_NAME], fetch=fetch
                    )
        return is_compared

    def conclude(self) -> str | None:
        """The note on another base that was accepted, once all was compared."""
        return self.other_base or other_base_note(self._differences)

    def _noting(self) -> ExitStack:
        stack = ExitStack()
        if self._allowed:
            found = stack.enter_context(other_base_allowed())
            stack.callback(lambda: self._differences.extend(found))
        return stack


def changes_of(parts: Sequence[Part], source: ModelSource, allow_other_base: bool) -> Changes:
    """What adapters change in a base whose configuration alone is read.

    InputError: two adapters have trained the same module whole, or a share of one is asked for.
    AdapterError: an adapter is damaged, or of another base.
    """
    changes = Changes(_allowed=allow_other_base)
    for part in parts:
        changes.add(part, source)
    return changes


@torch.no_grad()
def terms_of(adapted: Sequence[tuple[float, Any, str]]) -> list[Term]:
    """The update of one weight (out, in), in float64.

    By the adapters on it, as (weight, layer, the adapter's name).
    """
    terms = []
    for weight, layer, adapter in adapted:
        tensors = [each.detach().cpu().double() for each in layer.tensors(adapter)]
        left, right = layer.kpsvd_form[adapter].terms(tensors)
        terms.append(Term(left, right, weight))
    return terms


def check_whole(names: Sequence[str], others: Sequence[str], part: Part) -> None:
    """Refuse modules trained whole that another adapter has too, or of which a share is asked."""
    if both := sorted(set(names) & set(others)):
        raise InputError(
            f"{part.folder} and another adapter have both trained {some_of(both)} whole, and one "
            "model holds one of them: merge one adapter, or train the others without these "
            "modules_to_save"
        )
    if names and part.weight != 1:
        raise InputError(
            f"{part.folder} has trained {some_of(sorted(names))} whole, and the weight "
            f"{part.weight:g} is asked for: a module that was trained whole is taken as it is; "
            "expected the weight 1, or an adapter without modules_to_save"
        )


def _trained_whole(
    model: Any, folder: Path
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """The values of modules that were trained whole, and of single rows of embeddings."""
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained: Any = module.modules_to_save[_NAME]
            for inner, value in trained.state_dict().items():
                if not value.is_meta:
                    replaced[f"{name}.{inner}"] = value.detach()
        elif isinstance(module, TrainableTokensWrapper):
            adapter: Any = module.token_adapter
            if adapter.tied_adapter is not None:
                continue
            key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
            values = read_tensor(tensors_of(folder / WEIGHTS)[key])
            rows[f"{name}.weight"] = torch.tensor(adapter.token_indices[_NAME]), values
    return replaced, rows
