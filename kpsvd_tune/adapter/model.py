"""Which modules are adapted, with which factors, and whether the base model is the right one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.config import KpsvdConfig
from kpsvd_tune.adapter.layer import KpsvdLayer, KpsvdLinear
from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import (
    KPSVD,
    KroneckerShape,
    LayerSpectrum,
    auto_shape,
    choose_ranks,
    choose_shape,
    kpsvd,
    rearrange,
)

# How far <W, A0_1 kron B0_1> of the right base may be from the stored number, relative to it.
# Rounding W to 16 bits moves the product by about 2^-9 ||W|| / (sqrt(out in) sigma_1) of its
# size, below 1e-3 even for tiny layers; 4-bit weights by a few per cent.
FINGERPRINT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
FINGERPRINT_TOLERANCE_16_BIT = 5e-3
FINGERPRINT_TOLERANCE_QUANTISED = 1e-1


class KpsvdModel(BaseTuner):
    """Injects KPSVD layers into a model; see :class:`peft.tuners.tuners_utils.BaseTuner`."""

    prefix = "kpsvd_"
    tuner_layer_cls = KpsvdLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter; decompose first when its configuration has no layers yet.

        Raises:
            AdapterError: No layer is matched, a target cannot be adapted, or every rank is 0.
        """
        config: Any = self.peft_config[adapter_name]
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if config.layers is None:
            # A copy, so that one config object given to two models decomposes each of them.
            config, self._factors = _decompose(model, config)
            self.peft_config[adapter_name] = config
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._factors = {}

    @staticmethod
    def _check_target_module_exists(
        config: KpsvdConfig,  # type: ignore[override]
        key: str,
    ) -> Any:
        found: Any = check_target_module_exists(config, key)
        return found if isinstance(found, _ExcludedModule) else key in (config.layers or {})

    def _create_and_replace(
        self,
        config: KpsvdConfig,  # type: ignore[override]  # PEFT gives a method its own kind
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if config.layers is None or current_key not in config.layers:
            raise AdapterError(f"{current_key}: the adapter has no factors for this module")
        layer = config.layers[current_key]
        if not isinstance(target, KpsvdLayer):
            new = KpsvdLinear(target, adapter_name)
            self._replace_module(parent, target_name, new, target)
            target = new
        target.update_layer(
            adapter_name,
            KroneckerShape(*layer["shape"]),
            layer["rank"],
            config.dropout,
            factors=self._factors.get(current_key),
            inference_mode=config.inference_mode,
            path=config.path,
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names silently for methods that do not implement mixed batches.
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "adapter_names (a different adapter for each row of a batch) is not supported by "
                "KPSVD: use set_adapter and one batch per adapter"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: KpsvdConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        # Every way to load an adapter passes here, with the base and the stored factors at hand.
        _check_base(model, config, adapter_name, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def load_factors(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str = "default"
) -> None:
    """Fill the frozen factors of an injected adapter.

    Args:
        model: A model with KPSVD layers, wrapped by PEFT or not.
        factors: Module name to A0 (r, m, n) and B0 (r, p, q).
        adapter_name: The adapter.

    Raises:
        AdapterError: A layer has no factors, or factors of another size.
    """
    for name, layer in kpsvd_layers(model, adapter_name):
        if name not in factors:
            raise AdapterError(f"{name}: no factors were given for this layer")
        given = factors[name]
        for buffers, value in zip((layer.kpsvd_left0, layer.kpsvd_right0), given, strict=True):
            held = buffers[adapter_name]
            if held.shape != value.shape:
                raise AdapterError(
                    f"{name}: factor of size {tuple(value.shape)}, expected {tuple(held.shape)}"
                )
            held.copy_(value)


def kpsvd_layers(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[tuple[str, KpsvdLayer]]:
    """Yield the adapted layers that hold an adapter, named as in the unwrapped model."""
    for name, module in model.named_modules():
        if isinstance(module, KpsvdLayer) and adapter_name in module.kpsvd_left:
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def _decompose(
    model: nn.Module, config: KpsvdConfig
) -> tuple[KpsvdConfig, dict[str, tuple[Tensor, Tensor]]]:
    """Spectra of all matched layers first, then the rules, then the factors of the chosen ranks."""
    rule = config.rank_rule()
    names = target_names(
        model,
        config.target_modules or [],
        config.exclude_modules,
        config.modules_to_save or (),
    )
    decompositions: dict[str, KPSVD] = {}
    for name in names:
        weight = base_weight(model.get_submodule(name))
        try:
            shape = _shape(weight, config)
            terms = kpsvd(weight, shape, rule.window, seed=config.seed)
        except ValueError as error:
            raise AdapterError(f"{name}: {error}") from error
        decompositions[name] = terms
    spectra = [
        LayerSpectrum(name, tuple(terms.values.tolist()), terms.squared_norm, terms.shape)
        for name, terms in decompositions.items()
    ]
    try:
        choices = choose_ranks(spectra, rule, config.rank_pattern)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    chosen = {choice.name: choice.rank for choice in choices if choice.rank > 0}
    if not chosen:
        raise AdapterError("every layer got rank 0: raise rank.min, rank.energy or rank.budget")
    factors = {name: decompositions[name].factors(rank) for name, rank in chosen.items()}
    layers = {
        name: {
            "shape": list(decompositions[name].shape.as_tuple()),
            "rank": rank,
            "fingerprint": float(decompositions[name].values[0] ** 2),
        }
        for name, rank in chosen.items()
    }
    filled = copy.copy(config)
    filled.layers = layers
    # PEFT warns of patterns that match no adapted module; rank 0 is meant to adapt none.
    filled.rank_pattern = {
        pattern: value
        for pattern, value in config.rank_pattern.items()
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in layers)
    }
    return filled, factors


def _shape(weight: Tensor, config: KpsvdConfig) -> KroneckerShape:
    if config.factor_shape == "auto":
        return auto_shape(weight, seed=config.seed).shape
    out_features, in_features = weight.shape
    return choose_shape(out_features, in_features, config.factor_shape).shape


def base_weight(module: nn.Module | KpsvdLayer) -> Tensor:
    """The weight of an adapted or plain layer as (out, in), dequantised."""
    if isinstance(module, KpsvdLayer):
        weight, base = module.get_base_weight(), module.get_base_layer()
    else:
        # A throw-away wrapper finds the dequantisation of the layer's kind.
        wrapper = KpsvdLinear(module, "default")
        weight, base = wrapper.get_base_weight(), module
    return weight.T if isinstance(base, Conv1D) else weight


@torch.no_grad()
def _check_base(
    model: nn.Module, config: KpsvdConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Compare <W, A0_1 kron B0_1> with the number stored when the adapter was made."""
    if not config.layers:
        return
    for name, layer in kpsvd_layers(model, adapter_name):
        expected = config.layers.get(name, {}).get("fingerprint")
        left0, right0 = (
            next((v for k, v in state_dict.items() if k.endswith(f"{name}.{part}")), None)
            for part in ("kpsvd_left0", "kpsvd_right0")
        )
        weight: Tensor = layer.weight
        if expected is None or left0 is None or right0 is None or weight.device.type == "meta":
            continue
        shape = layer.kpsvd_shape[adapter_name]
        rearranged = rearrange(base_weight(layer).float(), shape)
        a, b = (factor[0].flatten().to(rearranged) for factor in (left0, right0))
        found = float(a @ (rearranged @ b))
        if layer.quantization_backend is not None:
            tolerance = FINGERPRINT_TOLERANCE_QUANTISED
        else:
            tolerance = FINGERPRINT_TOLERANCE.get(weight.dtype, FINGERPRINT_TOLERANCE_16_BIT)
        if not abs(found - expected) <= tolerance * abs(expected):
            made_for = config.base_model_name_or_path or "an unnamed model"
            given = getattr(getattr(model, "config", None), "_name_or_path", "") or "unnamed"
            raise AdapterError(
                f"this adapter was trained on another base model: {name} projects to {found:.6g} "
                f"on its first term, expected {expected:.6g} (within {tolerance:g} of it). The "
                f"adapter names {made_for!r} as its base, the model given is {given!r}."
            )
