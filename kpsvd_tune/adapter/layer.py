"""A linear layer with a KPSVD adapter in offset form.

The base weight W stays untouched. With frozen factors A0, B0 and trainable offsets a, b

    Delta = sum_k (A0_k + a_k) kron (B0_k + b_k) - A0_k kron B0_k
          = sum_k (A0_k + a_k) kron b_k + a_k kron B0_k,

so 2r Kronecker terms, exactly zero while a = b = 0.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import KroneckerShape, kron_apply, kron_sum


class KpsvdLayer(BaseTunerLayer):
    """The adapters of one layer: factors by adapter name, merging and switching."""

    adapter_layer_names = ("kpsvd_left", "kpsvd_right")
    other_param_names = ("kpsvd_left0", "kpsvd_right0", "kpsvd_dropout", "kpsvd_shape")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.kpsvd_left = nn.ParameterDict()
        self.kpsvd_right = nn.ParameterDict()
        self.kpsvd_left0 = BufferDict(persistent=True)
        self.kpsvd_right0 = BufferDict(persistent=True)
        self.kpsvd_dropout = nn.ModuleDict()
        self.kpsvd_shape: dict[str, KroneckerShape] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._weight_before_merge: Tensor | None = None

    def update_layer(
        self,
        adapter_name: str,
        shape: KroneckerShape,
        rank: int,
        dropout: float,
        factors: tuple[Tensor, Tensor] | None = None,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter with zero offsets.

        Args:
            adapter_name: Its name.
            shape: The Kronecker shape; must have the base layer's sizes.
            rank: Number of terms, at least 1.
            dropout: Probability of dropping an input of the update.
            factors: A0 (rank, m, n) and B0 (rank, p, q), or None for zeros that a state dict
                or :func:`load_factors` fills.
            inference_mode: Whether the offsets are created frozen.

        Raises:
            AdapterError: The shape does not fit the base layer.
        """
        sizes = base_sizes(self.get_base_layer())
        if (shape.out_features, shape.in_features) != sizes:
            raise AdapterError(
                f"the adapter's factor shape (m, n, p, q) = {shape.as_tuple()} belongs to a weight "
                f"of size {(shape.out_features, shape.in_features)}, this layer has {sizes}: is "
                "this the base model that the adapter was trained on?"
            )
        self.kpsvd_shape[adapter_name] = shape
        left = torch.zeros(rank, shape.m, shape.n)
        right = torch.zeros(rank, shape.p, shape.q)
        left0, right0 = factors if factors is not None else (left, right)
        self.kpsvd_left[adapter_name] = nn.Parameter(left)
        self.kpsvd_right[adapter_name] = nn.Parameter(right)
        self.kpsvd_left0[adapter_name] = left0.detach().float().clone()
        self.kpsvd_right0[adapter_name] = right0.detach().float().clone()
        self.kpsvd_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's version also casts to the base's dtype and upcasts again afterwards, which would
        # round the factors of a bf16 base. Factors stay float32, so only the device changes.
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if target is None or target.type == "meta":
            return
        for container in (self.kpsvd_left, self.kpsvd_right, self.kpsvd_left0, self.kpsvd_right0):
            if adapter_name in container and container[adapter_name].device.type != "meta":
                container[adapter_name] = container[adapter_name].to(target)

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the 2r terms of Delta, (2r, m, n) and (2r, p, q), in the factors' dtype."""
        a, b = self.kpsvd_left[adapter_name], self.kpsvd_right[adapter_name]
        left0, right0 = self.kpsvd_left0[adapter_name], self.kpsvd_right0[adapter_name]
        return torch.cat([left0 + a, a]), torch.cat([b, right0])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return Delta in the layout of the base weight: (out, in), or (in, out) for Conv1D.

        float32, on the factors' device.
        """
        with torch.no_grad():
            delta = kron_sum(*self.terms(adapter_name))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of the given (default: active) adapters to the base weight.

        The weight before the first merge is kept, so that unmerging restores its bits.

        Args:
            safe_merge: Refuse a result with non-finite entries.
            adapter_names: Adapters to merge.

        Raises:
            ValueError: ``safe_merge`` met a non-finite entry.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.kpsvd_left:
                continue
            weight = self.get_base_weight()
            merged = (weight.float() + self.get_delta_weight(name).to(weight.device)).to(
                weight.dtype
            )
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"merging adapter {name!r} gives non-finite weights: the adapter is broken"
                )
            if self._weight_before_merge is None:
                self._weight_before_merge = weight.clone()
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged or self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's convert_to_lora works: it does, the update is additive."""
        return True


class KpsvdLinear(nn.Module, KpsvdLayer):
    """An adapted nn.Linear or Conv1D."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        KpsvdLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the active adapters: (.., in) to (.., out)."""
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name not in self.kpsvd_left:
                continue
            left, right = self.terms(name)
            inputs = self.kpsvd_dropout[name](x).to(left.dtype)
            result = (result + kron_apply(inputs, left, right)).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "kpsvd." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantisation of the base layer, if any."""
        return str(quantization_extra_repr(self))


def base_sizes(base_layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; packed quantised weights know their sizes as attributes."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[1], base_layer.weight.shape[0]
    return int(base_layer.out_features), int(base_layer.in_features)
