"""A layer's update made ready for inference: what does not depend on the input, kept.

One token through a small layer takes some tens of microseconds, less than it takes to choose a way
and to stack the factors. So both are done once, and every call only checks that they still hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpsvd_tune.adapter.kernel import chunk_tokens, no_view, rows_of
from kpsvd_tune.adapter.ways import Batched, Flat

if TYPE_CHECKING:
    from kpsvd_tune.adapter.layer import KpsvdLinear

# Above, the choice of a way takes no noticeable share of the call, and depends on the tokens.
READY_TOKENS = 64
# Up to so many tokens a CPU takes the update's products in float32 beside a 16-bit base: a small
# product in 16 bits takes it 30 us to begin, one in float32 5 (docs/log.md).
_FLOAT_TOKENS = 4
PLAIN = (Tensor, nn.Parameter)


class ReadyUpdate:
    """The stacked factors of a layer's only active adapter, for inputs of one size.

    Valid while the factors are the same frozen tensors at the same versions and addresses. For
    writes that change no version, as through ``.data``, the layer drops this at every
    differentiated call and whenever it is moved, cast, or put into a mode.
    """

    def __init__(
        self,
        layer: KpsvdLinear,
        name: str,
        x: Tensor,
        way: type[Flat] | type[Batched],
        dtype: torch.dtype,
    ) -> None:
        self.name, self.x_shape, self.x_dtype, self.dtype = name, x.shape, x.dtype, dtype
        self.way, self.is_flat = way, way is Flat
        self.device_kind = x.device.type
        self.base = cast(nn.Linear, layer.base_layer)
        form = layer.kpsvd_form[name]
        self.parts = (*form.trained, *form.frozen)
        self.factors = tuple(_held(layer, part, name) for part in self.parts)
        self.versions = [_version(factor) for factor in self.factors]
        # Its mode alone counts: it may be set without the layer's, to sample with dropout.
        self.dropout = layer.kpsvd_dropout[name]
        self.state = (self.dropout.training, layer._active_adapter)
        # Kept tensors must not be inference tensors: a later call may be outside that mode.
        with torch.inference_mode(False), torch.no_grad():
            left, self.right = form.terms(self.factors, dtype)
            terms, self.p, self.q = self.right.shape
            self.left = way.arrange(left, self.p)
            self.right_t = self.right.view(terms * self.p, self.q).T
        self.out_features = self.base.out_features
        self.tokens = x.numel() // x.shape[-1]
        self.rows = self.left.shape[0] if self.is_flat else self.left.shape[1]
        largest = chunk_tokens(self.right, self.rows * self.p)
        self.is_chunked = not self.is_flat and self.tokens > largest
        self.repeated = self.left.expand(self.tokens, *self.left.shape)

    def fits(self, layer: KpsvdLinear, x: Tensor) -> bool:
        """Whether this is what the layer has to compute for x."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if x.shape != self.x_shape or x.dtype != self.x_dtype or x.device.type != self.device_kind:
            return False
        if layer._disable_adapters or layer.merged_adapters:
            return False
        if (self.dropout.training, layer._active_adapter) != self.state:
            return False
        base = layer._modules["base_layer"]
        if base is not self.base or base._forward_hooks or base._forward_pre_hooks:
            return False
        # Offloading replaces a layer's forward and leaves its weight elsewhere.
        if "forward" in base.__dict__ or type(base._parameters["weight"]) not in PLAIN:
            return False
        if torch.is_autocast_enabled(self.device_kind):
            return False
        for part, factor, version in zip(self.parts, self.factors, self.versions, strict=True):
            if _version(factor) != version or _held(layer, part, self.name) is not factor:
                return False
            if factor.requires_grad:
                return False
        return True

    def apply(self, x: Tensor) -> Tensor:
        """Return the base's output with the update, (.., out)."""
        parameters = self.base._parameters
        y = functional.linear(x, cast(Tensor, parameters["weight"]), parameters["bias"])
        if y.dtype != self.dtype:
            return self._add(y.to(self.dtype), x.to(self.dtype)).to(y.dtype)
        return self._add(y, x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        if self.is_chunked:
            total = rows_of(y)
            self.way.add_update(total, rows_of(x), self.left, self.right)
            return no_view(total.view(y.shape))
        # The same two products as add_update's, with as few calls as can be.
        inner = torch.mm(x.reshape(-1, self.q), self.right_t)
        if self.is_flat:
            y.view(-1, self.out_features).addmm_(inner.view(-1, self.rows), self.left)
        elif self.tokens == 1:
            y.view(-1, self.p).addmm_(self.left, inner.view(self.rows, self.p))
        else:
            blocks = y.view(self.tokens, self.out_features // self.p, self.p)
            blocks.baddbmm_(self.repeated, inner.view(self.tokens, self.rows, self.p))
        return y


def can_make_ready(factors: tuple[Tensor, ...], tokens: int) -> bool:
    """Whether an update is worth making ready: few tokens, and factors with versions."""
    if tokens > READY_TOKENS or torch.compiler.is_compiling():
        return False
    return not any(factor.is_inference() for factor in factors)


def ready_dtype(dtype: torch.dtype, tokens: int, device_kind: str) -> torch.dtype:
    """The dtype of the products of an update that is made ready, which training takes in dtype."""
    is_small = device_kind == "cpu" and tokens <= _FLOAT_TOKENS
    return torch.promote_types(dtype, torch.float32) if is_small else dtype


def _held(layer: KpsvdLinear, part: str, name: str) -> Tensor:
    # Past nn.Module's attribute lookup, which costs more than the comparison it is for.
    container = layer._modules[part]
    assert container is not None
    held = container._parameters.get(name)
    return cast(Tensor, container._buffers[name] if held is None else held)


def _version(factor: Tensor) -> tuple[int, int]:
    # An assignment to .data changes the address alone.
    return factor._version, factor.data_ptr()
