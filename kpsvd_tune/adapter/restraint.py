"""An update cut back where it acts on other text than the text that it was trained on.

All forms but ``both`` are linear in what they train: theta, as a matrix, changes the output of a
token by theta times features f of the layer's input. Cut back with strength s, theta' minimises

    E_trained ||(theta' - theta) f||^2 + s E_other ||theta' f||^2,

the mean squares over the tokens of either text, so theta' = theta M (M + s G)^-1 with the second
moments M = E_trained f f^T and G = E_other f f^T. Where the two texts use other directions little
of the update is lost; with equal moments it shrinks by 1 / (1 + s), as ``both`` does always. A
layer that the other text does not reach, such as one for some tokens only, has G = 0 and stays as
trained; where only the other text reaches it, M is not known and the update shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kpsvd_tune.adapter.layer import KpsvdLayer
from kpsvd_tune.adapter.model import kpsvd_layers

# Entries of features that are made at a time.
_ENTRIES = 1 << 23
# Added to the diagonal of the moments, as a share of its mean: directions that no text uses.
_RIDGE = 1e-6


class Restraint:
    """The update of an adapter as it was trained, to be cut back by any strength, and again.

    Args:
        model: A PEFT model with KPSVD layers, in evaluation mode.
        trained: Batches of token ids (1, tokens) that it was trained on; the model is run on them.
        other: Batches of text whose outputs are to stay as they are.
        adapter_name: The adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[Tensor],
        other: Iterable[Tensor],
        adapter_name: str = "default",
    ) -> None:
        self._name = adapter_name
        self._layers = dict(kpsvd_layers(model, adapter_name))
        self._held = {
            name: [part.detach().clone() for part in layer.trained(adapter_name)]
            for name, layer in self._layers.items()
        }
        self._own, self._other = self._collect(model, trained), self._collect(model, other)

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Give the model the update cut back by a strength of 0 (as trained) or more."""
        for name, layer in self._layers.items():
            held, own, other = self._held[name], self._own.get(name), self._other.get(name)
            if strength == 0 or name not in self._other:
                new = held
            elif own is None or other is None:
                new = [part / (1 + strength) for part in held]
            else:
                new = [self._cut(layer, held[0], own, strength * other)]
            for part, values in zip(layer.trained(self._name), new, strict=True):
                part.copy_(values)

    def _cut(self, layer: KpsvdLayer, trained: Tensor, own: Tensor, other: Tensor) -> Tensor:
        form = layer.kpsvd_form[self._name]
        own = own + _RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
        # theta M (M + s G)^-1, transposed, as both are symmetric.
        theta = form.as_rows(trained).cpu().double()
        cut = torch.linalg.solve(own + other, own @ theta.T).T
        return form.from_rows(cut.to(trained))

    @torch.no_grad()
    def _collect(self, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor | None]:
        """The mean of f f^T over all samples of features, float64 (k, k), of each layer reached.

        A layer is reached where it is called with a token that its update acts on. One whose form
        is not linear has no features, and None in place of the mean.
        """
        sums: dict[str, Tensor | None] = {}
        counts = dict.fromkeys(self._layers, 0)

        def add(name: str, layer: KpsvdLayer, arguments: Sequence[Any]) -> None:
            form, tensors = layer.kpsvd_form[self._name], layer.tensors(self._name)
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            if not len(x):
                return
            step = max(1, _ENTRIES // max(1, form.num_features))
            for part in torch.split(x, step):
                features = form.features(part, tensors)
                if features is None:
                    sums[name] = None
                    return
                counts[name] += len(features)
                product = (features.T @ features).cpu().double()
                if product.any():
                    earlier = sums.get(name)
                    sums[name] = product if earlier is None else earlier + product

        def hook(name: str, layer: Any) -> Any:
            return layer.register_forward_pre_hook(lambda _, given: add(name, layer, given))

        hooks = [hook(name, layer) for name, layer in self._layers.items()]
        try:
            for ids in batches:
                model(input_ids=ids)
        finally:
            for each in hooks:
                each.remove()
        return {
            name: None if found is None else found / counts[name] for name, found in sums.items()
        }
