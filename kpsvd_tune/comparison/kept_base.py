"""The base model of many trials: loaded once, and given to each as if it had just been loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kpsvd_tune.decompose.start import load_base
from kpsvd_tune.models import ModelSource
from kpsvd_tune.processes import device
from kpsvd_tune.recipe import Recipe

# Weights are added up as whole numbers of their own width, so that any changed bit shows.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptBase:
    """The base model of a recipe, on the device of this process.

    Modules are copied for each trial and weights are shared: a trial may put on adapters, freeze,
    replace modules, or give a parameter other values (as PiSSA does), and none of it reaches the
    next. Only values that are written over in place would; weights are added up for that, and
    loaded anew where the sum is another. Quantised ones are loaded for each trial: what belongs to
    them lies beside the weight, where a copy would lose it.
    """

    def __init__(self, source: ModelSource, recipe: Recipe) -> None:
        self._source, self._recipe = source, recipe
        self._model: Any = None
        self._sums: list[int] = []
        self.num_loads = 0

    def fresh(self) -> Any:
        """The model without any trace of the trials before."""
        if self._recipe.model.quantization is not None:
            self.num_loads += 1
            return load_base(self._source, self._recipe).to(device())
        if self._model is None or _sums(self._model) != self._sums:
            self._model = None  # before another takes as much memory
            self._model = load_base(self._source, self._recipe).to(device())
            self._sums = _sums(self._model)
            self.num_loads += 1
        # By the identity of what is shared: a parameter of the copy's own, with the same memory.
        shared = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for parameter in self._model.parameters()
        }
        return copy.deepcopy(self._model, shared)


def _sums(model: nn.Module) -> list[int]:
    return [_sum(parameter.detach()) for parameter in model.parameters()]


def _sum(values: Tensor) -> int:
    whole = values.contiguous().view(_WHOLE[values.element_size()])
    return int(whole.sum(dtype=torch.int64))
