"""The adapted linear map as one differentiable operation that keeps only its input.

Written by hand because autograd would keep the stacked factors, the intermediate products of all
2r terms, and in 16 bits a copy of x; here everything but x, W and the factors is computed again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kpsvd_tune.adapter import kernel
from kpsvd_tune.adapter.forms import Form, Plan
from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.hardware.bf16 import multiplies_narrow


class KpsvdFunction(torch.autograd.Function):
    """y = x (W + Delta)^T + bias, or y = result + x Delta^T when the base layer ran elsewhere.

    Gradients of x, of ``result`` and of what the form trains; all else is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (.., in)
        # the base layer's output (.., out), or None to compute it from weight
        result: Tensor | None,
        weight: Tensor | None,  # W (out, in), or None when result is given
        bias: Tensor | None,  # (out,)
        form: Form,
        plan: Plan,
        dtype: torch.dtype,  # in which the update is computed
        base_dtype: torch.dtype,  # in which the base layer computes
        *tensors: Tensor,  # the form's, trained ones first
    ) -> Tensor:
        """Compute y, (.., out)."""
        ctx.save_for_backward(x, weight, *tensors)
        ctx.form, ctx.plan, ctx.dtype, ctx.base_dtype = form, plan, dtype, base_dtype
        ctx.is_autocast = ambient_autocast(x) is not None
        with outside_autocast(x, ctx.is_autocast):
            terms = form.terms(tensors, torch.promote_types(dtype, torch.float32))
            y = _forward(x, result, weight, bias, terms, plan, dtype, base_dtype)
        return kernel.no_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, result and what is trained."""
        # Autograd runs this outside of autocast, torch.compile in the state of the forward pass.
        with outside_autocast(gy, ctx.is_autocast):
            return _backward(ctx, gy)


def _forward(
    x: Tensor,
    result: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: tuple[Tensor, Tensor],
    plan: Plan,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
) -> Tensor:
    # Only where the base computes in dtype too: at zero offsets y must have the base's bits.
    is_exact = base_dtype == dtype and torch.finfo(dtype).bits >= 32
    if plan.update is Dense and weight is not None and is_exact:
        return functional.linear(x, kernel.dense_weight(*terms, weight), bias)
    y = base_output(x, weight, bias, base_dtype) if result is None else result
    if plan.update is Dense:
        delta = kernel.dense_weight(*terms, None).to(dtype)
        if y.dtype == dtype and torch.finfo(dtype).bits < 32:
            # The sum is taken in float32 and rounded once; a product of its own would be rounded.
            total = kernel.rows_of(y.clone() if result is not None else y)
            return kernel.no_view(total.addmm_(kernel.rows_of(x).to(dtype), delta.T).view(y.shape))
        update = functional.linear(x.to(dtype), delta)
        return (y + update).to(y.dtype) if result is not None else y.add_(update)
    way = plan.update
    left = way.arrange(terms[0].to(dtype), terms[1].shape[1])
    return add_activations(y, x, left, terms[1].to(dtype), way, in_place=result is None)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *tensors = ctx.saved_tensors
    form, plan, dtype, base_dtype = ctx.form, ctx.plan, ctx.dtype, ctx.base_dtype
    needs_x, needs_result, *_ = ctx.needs_input_grad
    flat_gy = kernel.rows_of(gy)
    # Large products in 16 bits where the device has units for them; what they round was rounded
    # as coarsely in gy and x.
    large_dtype = base_dtype if multiplies_narrow(base_dtype, kernel.device_kind(x)) else dtype
    large_gy, wide_gy = flat_gy.to(large_dtype), flat_gy.to(dtype)
    gx = projected = None
    gradients: list[Tensor | None] = [None] * len(tensors)
    if needs_x:
        if weight is not None and torch.finfo(large_dtype).bits < 32:
            # Never W + Delta, rounded to 16 bits: two products.
            gx, weight = torch.mm(large_gy, weight.to(large_dtype)), None
        left, right = form.terms(tensors, torch.promote_types(dtype, torch.float32))
        if plan.update is Dense:
            gx = Dense.add_transposed(gx, large_gy, weight, left, right)
        else:
            gx = None if gx is None else gx.to(dtype)
            gx, projected = _input_gradient(gx, wide_gy, weight, left, right, plan.update)
        gx = gx.to(x.dtype).view(x.shape)
    if any(ctx.needs_input_grad[-len(tensors) :]):
        flat_x = kernel.rows_of(x)
        operands, factor_dtype = (flat_x.to(dtype), wide_gy, projected), dtype
        if plan.gradient is Dense:
            operands = flat_x.to(large_dtype), large_gy, None
            # The weight gradient is rounded once; what is made of it is not.
            factor_dtype = torch.promote_types(dtype, torch.float32)
        found = form.gradients(plan.gradient, operands, tensors, factor_dtype)
        for index, gradient in enumerate(found):
            gradients[index] = gradient.to(tensors[index].dtype)
    return gx, gy if needs_result else None, *[None] * 6, *gradients


def update_dtype(base: torch.dtype, factors: torch.dtype, device_kind: str) -> torch.dtype:
    """The dtype in which x Delta^T is computed beside a base that computes in ``base``.

    In 16 bits where the base does and the device multiplies them fast: that loses 2^-8 of Delta at
    most, which W + Delta in 16 bits would lose of W. Products are added up in float32 by the
    device, and factors, their gradients and the optimiser's state stay float32. Elsewhere at least
    float32.
    """
    if multiplies_narrow(base, device_kind):
        return base
    return torch.promote_types(torch.promote_types(factors, base), torch.float32)


def base_output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute x W^T + bias as the base layer computes it, with the same bits."""
    assert weight is not None
    bias = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), bias)


def add_activations(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    way: type[Flat] | type[Batched],
    in_place: bool,
) -> Tensor:
    """Return y + x Delta^T in y's dtype; the sum is taken in the factors' dtype, rounded once."""
    total = kernel.rows_of(y.to(right.dtype, copy=not in_place))
    way.add_update(total, kernel.rows_of(x).to(right.dtype), left, right)
    return kernel.no_view(total.to(y.dtype).view(y.shape))


def _input_gradient(
    gx: Tensor | None,
    gy: Tensor,
    weight: Tensor | None,
    left: Tensor,
    right: Tensor,
    way: type[Flat] | type[Batched],
) -> tuple[Tensor, Tensor | None]:
    """Return gx + gy (W + Delta), and the projection of gy on the left factors if it was made.

    ``gx`` None stands for zero, ``weight`` None for a W that ``gx`` has already or never gets.
    """
    if gx is None:
        size = left.shape[2] * right.shape[2]
        gx = gy.new_zeros(len(gy), size) if weight is None else torch.mm(gy, weight.to(gy.dtype))
    return gx, way.add_transposed(gx, gy, left.to(gy.dtype), right.to(gy.dtype))


def ambient_autocast(x: Tensor) -> torch.dtype | None:
    """The dtype of the surrounding autocast region if it concerns x; float64 is left alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def outside_autocast(x: Tensor, is_autocast: bool) -> AbstractContextManager[object]:
    """A context in which products keep the dtype they are given."""
    if not is_autocast:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
