"""The mean gradient of the loss with respect to frozen weights, a few matrices at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.training.loss import MicroBatch, SummedTokenLoss

# Gradients held at a time: the batches are run again for each group of matrices.
GROUP_BYTES = 2 << 30


def mean_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[MicroBatch],
    *,
    group_bytes: int = GROUP_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Give the gradient of the mean token loss for one weight after the other.

    The model is left as it was: frozen or not, and without gradients.

    Args:
        model: A causal language model without an adapter, on its device.
        names: Modules with a ``weight`` of their own.
        batches: The loss is the mean over the supervised tokens of all of them.
        group_bytes: Memory for gradients, in the weights' dtype, at a time; at least one matrix
            is held.
        progress: Called with passes done and in all.

    Yields:
        Module name and gradient, shaped as the module stores its weight, float32.

    Raises:
        NonFiniteError: A gradient is infinite or NaN.
    """
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    groups: list[list[str]] = [[]]
    held = 0
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        if groups[-1] and held + size > group_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    was_trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    token_loss = SummedTokenLoss(model.eval())
    num_supervised = max(1, sum(batch.num_supervised for batch in batches))
    done = 0
    try:
        for group in groups:
            model.requires_grad_(False)
            for name in group:
                weights[name].requires_grad_(True)
            for batch in batches:
                device = next(model.parameters()).device
                (token_loss(**batch.to(device)) / num_supervised).backward()
                done += 1
                if progress is not None:
                    progress(done, len(groups) * len(batches))
            for name in group:
                gradient = weights[name].grad
                assert isinstance(gradient, Tensor)
                weights[name].grad = None
                if not torch.isfinite(gradient).all():
                    raise NonFiniteError(
                        f"adapter.init: gradient: the gradient of {name} is not finite on the "
                        "first batches; use adapter.init: weight, or model.dtype: float32"
                    )
                yield name, gradient.float()
    finally:
        model.train(was_training)
        for parameter, trained in was_trained.items():
            parameter.requires_grad_(trained)
            parameter.grad = None
