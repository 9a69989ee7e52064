"""A linear layer with KPSVD adapters, whose base weight stays untouched; see :mod:`.forms`."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base import RECORD, Place, base_sizes, check_loaded
from kpsvd_tune.adapter.costs import costs_of
from kpsvd_tune.adapter.forms import FROZEN, TRAINED, Form
from kpsvd_tune.adapter.function import (
    KpsvdFunction,
    add_activations,
    ambient_autocast,
    base_output,
    outside_autocast,
    update_dtype,
)
from kpsvd_tune.adapter.inference import PLAIN, ReadyUpdate, can_make_ready, ready_dtype
from kpsvd_tune.adapter.kernel import device_kind
from kpsvd_tune.adapter.ways import Dense
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import kron_sum


@dataclass(frozen=True)
class _Kept:
    """The base weight before the first merge.

    A packed one is kept as it is, with its scales: packed again from what it is dequantised to, it
    would be another.
    """

    weight: Tensor
    attributes: dict[str, Any] | None = None  # of a packed weight
    state: Any = None  # where the layer holds the scales

    @classmethod
    def of(cls, layer: KpsvdLayer, weight: Tensor) -> _Kept:
        if layer.quantization_backend is None:
            return cls(weight.clone())
        base: Any = layer.get_base_layer()
        return cls(base.weight, dict(vars(base.weight)), copy.copy(getattr(base, "state", None)))

    def put_back(self, layer: KpsvdLayer) -> None:
        """Give the weight back; the model may have been moved or cast since."""
        if self.attributes is None:
            layer.set_base_weight(self.weight.to(layer.get_base_weight()))
            return
        base: Any = layer.get_base_layer()
        device = base.weight.device
        vars(self.weight).update(self.attributes)
        base.weight = self.weight
        if self.state is not None:
            base.state = self.state
        if self.weight.device != device:
            base.to(device)


class KpsvdLayer(BaseTunerLayer):
    """The adapters of one layer: factors by adapter name, merging and switching."""

    adapter_layer_names = TRAINED
    other_param_names = (
        *FROZEN,
        "kpsvd_dropout",
        "kpsvd_form",
        "kpsvd_drawn",
        "kpsvd_path",
        "kpsvd_unchecked",
        "kpsvd_base",
        "kpsvd_seen",
        "kpsvd_place",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.out_features, self.in_features = base_sizes(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.kpsvd_left = nn.ParameterDict()
        self.kpsvd_right = nn.ParameterDict()
        self.kpsvd_core = nn.ParameterDict()
        self.kpsvd_left0 = BufferDict(persistent=True)
        self.kpsvd_right0 = BufferDict(persistent=True)
        self.kpsvd_dropout = nn.ModuleDict()
        self.kpsvd_form: dict[str, Form] = {}
        # Whether a seed gives an adapter's frozen factors, so that no file holds them.
        self.kpsvd_drawn: dict[str, bool] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._before_merge: _Kept | None = None
        self.kpsvd_path: dict[str, str] = {}
        # Places of adapters whose base was not compared yet.
        self.kpsvd_unchecked: dict[str, Place] = {}
        # The record of the base that the adapter was made on, zeros where none was stored, and
        # what of it has been compared with this base.
        self.kpsvd_base = BufferDict(persistent=True)
        self.kpsvd_seen: dict[str, tuple[float, ...]] = {}
        self.kpsvd_place: dict[str, Place] = {}
        self._ready: ReadyUpdate | None = None

    def update_layer(
        self,
        adapter_name: str,
        form: Form,
        dropout: float,
        frozen: tuple[Tensor, ...] | None = None,
        inference_mode: bool = False,
        path: str = "auto",
        is_at_base: bool = True,
        is_drawn: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            form: What is trained, with its Kronecker shape, which must have the base layer's sizes,
                and its number of terms, at least 1.
            dropout: Probability of dropping an input of the update.
            frozen: The form's frozen tensors, float32, or None for zeros that a state dict
                or :func:`load_factors` fills.
            inference_mode: Whether what is trained is created frozen.
            path: How the update is applied: auto, activations or weight.
            is_at_base: Whether training starts at the base model; if not, the update is about as
                large as the terms (form both) or as the weight.
            is_drawn: Whether a seed gives the frozen tensors, so that no file holds them.

        Raises:
            AdapterError: The shape does not fit the base layer.
        """
        sizes = (self.out_features, self.in_features)
        shape = form.shape
        if (shape.out_features, shape.in_features) != sizes:
            raise AdapterError(
                f"the adapter's factor shape (m, n, p, q) = {shape.as_tuple()} belongs to a weight "
                f"of size {(shape.out_features, shape.in_features)}, this layer has {sizes}: is "
                "this the base model that the adapter was trained on?"
            )
        self.kpsvd_form[adapter_name], self.kpsvd_drawn[adapter_name] = form, is_drawn
        self.kpsvd_path[adapter_name] = path
        for part, tensor in zip(form.trained, form.start(frozen, is_at_base), strict=True):
            self._held(part)[adapter_name] = nn.Parameter(tensor)
        # What a file fills stays on the meta device where PEFT saves that memory.
        is_meta = self._held(form.trained[0])[adapter_name].is_meta
        if frozen is None:
            device = "meta" if is_meta else None
            frozen = tuple(torch.zeros(form.size(part), device=device) for part in form.frozen)
        for part, tensor in zip(form.frozen, frozen, strict=True):
            self._held(part).register_buffer(
                adapter_name, tensor.detach().float().clone(), persistent=not is_drawn
            )
        record = torch.zeros(RECORD, dtype=torch.int32)
        is_to_come = is_meta and (is_drawn or frozen[0].is_meta)
        self.kpsvd_base[adapter_name] = record.to("meta" if is_to_come else frozen[0].device)
        self.kpsvd_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's version also casts to the base's dtype and upcasts again afterwards, which would
        # round the factors of a bf16 base. Factors stay float32, so only the device changes.
        of_base: Any = self._get_base_layer_device_and_dtype
        target = device or of_base(self.get_base_layer())[0]
        if target is None or target.type == "meta":
            return
        for part in (*TRAINED, *FROZEN, "kpsvd_base"):
            held = self._held(part)
            if adapter_name not in held or held[adapter_name].device.type == "meta":
                continue
            moved = held[adapter_name].to(target)
            if isinstance(held, BufferDict):
                # An assignment would make a drawn factor one that files hold.
                held._buffers[adapter_name] = moved
            else:
                held[adapter_name] = moved

    def _held(self, part: str) -> Any:
        return getattr(self, part)

    def tensors(self, adapter_name: str) -> tuple[Tensor, ...]:
        """Return an adapter's tensors in the order of its form: trained ones, then frozen ones."""
        form = self.kpsvd_form[adapter_name]
        return tuple(self._held(part)[adapter_name] for part in (*form.trained, *form.frozen))

    def trained(self, adapter_name: str) -> tuple[Tensor, ...]:
        """Return what is trained of an adapter."""
        parts = self.kpsvd_form[adapter_name].trained
        return tuple(self._held(part)[adapter_name] for part in parts)

    def frozen(self, adapter_name: str) -> tuple[Tensor, ...]:
        """Return an adapter's frozen tensors."""
        parts = self.kpsvd_form[adapter_name].frozen
        return tuple(self._held(part)[adapter_name] for part in parts)

    def stored(self, adapter_name: str) -> tuple[str, ...]:
        """The containers whose tensors of an adapter its file holds."""
        form = self.kpsvd_form[adapter_name]
        return form.trained if self.kpsvd_drawn[adapter_name] else (*form.trained, *form.frozen)

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the s terms of Delta, (s, m, n) and (s, p, q), in the factors' dtype."""
        return self.kpsvd_form[adapter_name].terms(self.tensors(adapter_name))

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
            if name not in self.kpsvd_form:
                continue
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name).to(weight.device)
            # Wider than both, and rounded once.
            merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(
                weight.dtype
            )
            if safe_merge and not torch.isfinite(merged).all():
                kind = "NaNs" if merged.isnan().any() else "Infinite values"
                # The words are PEFT's: code that catches them finds them.
                raise ValueError(
                    f"{kind} detected in the merged weights. The adapter {name} seems to be broken"
                )
            if self._before_merge is None:
                self._before_merge = _Kept.of(self, weight)
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged or self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._before_merge.put_back(self)
        self._before_merge = None
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
        ready = self._ready
        if ready is not None and not args and not kwargs and ready.fits(self, x):
            return ready.apply(x)
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        names = [name for name in self.active_adapters if name in self.kpsvd_form]
        if len(names) == 1 and not args and not kwargs and self._can_fuse(names[0], x):
            return self._adapted(names[0], x, None)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._adapted(name, self.kpsvd_dropout[name](x), result)
        return result

    def _can_fuse(self, name: str, x: Tensor) -> bool:
        """Whether the base layer's product may be taken inside the adapter's operation.

        Only where calling the base layer does nothing but multiply: a plain frozen nn.Linear, not
        hooked (offloading moves weights in hooks), not quantised, not sharded.
        """
        base = self.base_layer
        if type(base) is not nn.Linear or self.quantization_backend is not None:
            return False
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
            return False
        if base._backward_hooks or base._backward_pre_hooks:
            return False
        weight = base.weight
        if type(weight) not in PLAIN or any(p.requires_grad for p in base.parameters()):
            return False
        dropout = self.kpsvd_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return False
        return weight.dtype == x.dtype or ambient_autocast(x) is not None

    def _adapted(self, name: str, x: Tensor, result: Tensor | None) -> Tensor:
        """The base's output with one adapter's update; ``result`` None fuses the base layer."""
        tensors = self.tensors(name)
        weight = bias = None
        if result is None:
            base = cast(nn.Linear, self.base_layer)
            weight, bias = base.weight, base.bias
        autocast_dtype = ambient_autocast(x)
        base_dtype = autocast_dtype or x.dtype
        kind = device_kind(x)
        dtype = update_dtype(base_dtype, tensors[0].dtype, kind)
        is_differentiated = torch.is_grad_enabled()
        tokens = x.numel() // x.shape[-1]
        path = self.kpsvd_path[name]
        keeps = (
            not is_differentiated
            and result is None
            and autocast_dtype is None
            and path != "weight"
            and can_make_ready(tensors, tokens)
        )
        if keeps:
            # Kept factors cost nothing to stack again, while W + Delta would have to be built.
            path, dtype = "activations", ready_dtype(dtype, tokens, kind)
        # A base layer that computes for itself leaves nothing to add Delta to.
        can_add = weight is not None and torch.finfo(base_dtype).bits >= 32
        form = self.kpsvd_form[name]
        plan = form.plan(tokens, path, is_differentiated, can_add, costs_of(kind, dtype))
        way = plan.update
        if is_differentiated or way is Dense:
            if is_differentiated and not torch.compiler.is_compiling():
                self._ready = None
            adapted: Tensor = KpsvdFunction.apply(  # type: ignore[no-untyped-call]
                x, result, weight, bias, form, plan, dtype, base_dtype, *tensors
            )
            return adapted
        if keeps:
            ready = ReadyUpdate(self, name, x, way, dtype)
            # Factors that are trained are stacked anew at each call: optimisers without gradients,
            # evolution strategies and averages of weights write them past their versions.
            self._ready = None if any(each.requires_grad for each in tensors) else ready
            return ready.apply(x)
        with outside_autocast(x, autocast_dtype is not None):
            left, right = form.terms(tensors, dtype)
            left = way.arrange(left, right.shape[1])
            y = base_output(x, weight, bias, base_dtype) if result is None else result
            return add_activations(y, x, left, right, way, in_place=result is None)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; factors that were loaded past PEFT are first compared with the base."""
        self._ready = None
        check_loaded(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Moving and casting write past the factors' versions.
        self._ready = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __repr__(self) -> str:
        return "kpsvd." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantisation of the base layer, if any."""
        return str(quantization_extra_repr(self))
