"""Which modules are adapted, with which factors, and whether the base model is the right one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    align_module_device,
    has_offloaded_params,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base import Unchecked, check_base
from kpsvd_tune.adapter.config import KpsvdConfig
from kpsvd_tune.adapter.layer import KpsvdLayer, KpsvdLinear
from kpsvd_tune.adapter.targets import modules_by_name, plain_name, saved_whole_notes, target_names
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import (
    KPSVD,
    KroneckerShape,
    LayerSpectrum,
    auto_shape,
    choose_ranks,
    choose_shape,
    kpsvd,
)


class KpsvdModel(BaseTuner):
    """Injects KPSVD layers into a model; see :class:`peft.tuners.tuners_utils.BaseTuner`."""

    prefix = "kpsvd_"
    tuner_layer_cls = KpsvdLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject an adapter; decompose first when its configuration has no layers yet.

        With a state dict the layers are those that it has tensors of, as PEFT has it; PEFT warns
        where the configuration says otherwise.

        Raises:
            AdapterError: No layer is matched, a target cannot be adapted, or every rank is 0; or
                the adapter's name is none that torch can hold.
        """
        if not adapter_name or "." in adapter_name:
            raise AdapterError(
                f"adapter name {adapter_name!r}: expected one that is not empty and has no dot, "
                "for names of parameters are made of it"
            )
        config: Any = self.peft_config[adapter_name]
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if config.is_to_decompose:
            layers, self._factors = _decompose(model, config)
            config.take_layers(layers, self, adapter_name)
        self._stated = _stated_layers(state_dict or {})
        overrides = config.rank_pattern
        try:
            # PEFT warns of patterns that match no adapted module; rank 0 is meant to adapt none.
            config.rank_pattern = _with_effect(overrides, config.layers)
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
            if state_dict is not None:
                config.layers = {
                    name: config.layers.get(name) or layer for name, layer in self._stated.items()
                }
        finally:
            self._factors, self._stated = {}, {}
            config.rank_pattern = overrides
            config.note_targets()

    @staticmethod
    def _check_target_module_exists(
        config: KpsvdConfig,  # type: ignore[override]
        key: str,
    ) -> Any:
        found: Any = check_target_module_exists(config, key)
        if isinstance(found, _ExcludedModule):
            return found
        return plain_name(key) in (config.layers or {})

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
        name = plain_name(current_key)
        layer = (config.layers or {}).get(name) or self._stated.get(name)
        if layer is None:
            raise AdapterError(f"{name}: the adapter has no factors for this module")
        if not isinstance(target, KpsvdLayer):
            new = KpsvdLinear(target, adapter_name)
            self._replace_module(parent, target_name, new, target)
            target = new
        target.update_layer(
            adapter_name,
            KroneckerShape(*layer["shape"]),
            layer["rank"],
            config.dropout,
            factors=self._factors.get(name),
            inference_mode=config.inference_mode,
            path=config.path,
            is_at_base=config.init_weights,
        )
        if name not in self._factors and layer.get("fingerprint") is not None:
            # Factors are to come from a file.
            made_for = config.base_model_name_or_path or "an unnamed model"
            target.kpsvd_unchecked[adapter_name] = Unchecked(
                name, layer["fingerprint"], str(made_for)
            )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's version also assigns the child's weight, which a wrapper computes (the rows of
        # trainable_token_indices), and casts and moves; update_layer has put factors in place.
        setattr(parent, child_name, new_module)

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
        state_dict = _named_as_in(model, state_dict)
        _check_loaded(model, adapter_name, state_dict)
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
        # They come from a decomposition of this base.
        layer.kpsvd_unchecked.pop(adapter_name, None)


def kpsvd_layers(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[tuple[str, KpsvdLayer]]:
    """Yield the adapted layers that hold an adapter, named as in the unwrapped model."""
    for name, module in model.named_modules():
        if isinstance(module, KpsvdLayer) and adapter_name in module.kpsvd_left:
            yield plain_name(name).removeprefix("base_model.model."), module


@torch.no_grad()
def _decompose(
    model: nn.Module, config: KpsvdConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """Spectra of all matched layers first, then the rules, then the factors of the chosen ranks."""
    rule = config.rank_rule()
    targets = config.asked_targets()
    if not targets:
        raise AdapterError(
            "KpsvdConfig needs target_modules: 'all-linear', a list of names, or a regex"
        )
    excluded = config.exclude_modules
    names = target_names(
        model,
        targets if isinstance(targets, str) else sorted(targets),
        sorted(excluded) if isinstance(excluded, set) else excluded,
        config.modules_to_save or (),
        config.task_type,
    )
    for note in saved_whole_notes(model, config.modules_to_save or ()):
        warnings.warn(note, stacklevel=2)
    modules = modules_by_name(model)
    decompositions: dict[str, KPSVD] = {}
    for name in names:
        weight = base_weight(modules[name], name)
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
    return layers, factors


def _stated_layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape and rank of the layers that a state dict has both offsets of, by plain name."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, _, part = plain_name(key).rpartition(".")
        tensors.setdefault(module.removeprefix("base_model.model."), {})[part] = value
    return {
        name: {
            "shape": [*parts["kpsvd_left"].shape[1:], *parts["kpsvd_right"].shape[1:]],
            "rank": len(parts["kpsvd_left"]),
        }
        for name, parts in tensors.items()
        if "kpsvd_left" in parts and "kpsvd_right" in parts
    }


def _with_effect(overrides: Mapping[str, Any], names: Iterable[str] | None) -> dict[str, Any]:
    """The rank overrides that match an adapted layer, in PEFT's way of matching."""
    return {
        pattern: value
        for pattern, value in overrides.items()
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names or ())
    }


def _shape(weight: Tensor, config: KpsvdConfig) -> KroneckerShape:
    if config.factor_shape == "auto":
        return auto_shape(weight, seed=config.seed).shape
    out_features, in_features = weight.shape
    return choose_shape(out_features, in_features, config.factor_shape).shape


def base_weight(module: nn.Module | KpsvdLayer, name: str = "a layer") -> Tensor:
    """The weight of an adapted or plain layer as (out, in), dequantised; fetched if offloaded.

    Raises:
        AdapterError: The weight is nowhere: the model was made on the meta device and not loaded.
    """
    # A throw-away wrapper finds the dequantisation of the layer's kind.
    layer = module if isinstance(module, KpsvdLayer) else KpsvdLinear(module, "default")
    base = layer.get_base_layer()
    with align_module_device(base):
        weight = layer.get_base_weight()
        if weight.is_meta:
            raise AdapterError(
                f"{name} has no weight to decompose, it is on the meta device: load the model's "
                "weights first (from_pretrained), or add the adapter before the model is offloaded"
            )
        # What is fetched is let go of again.
        weight = weight.clone() if has_offloaded_params(base) else weight
    return weight.T if isinstance(base, Conv1D) else weight


def _named_as_in(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put torch.compile's ``_orig_mod`` into keys or take it out, as the model has it."""
    own = {plain_name(name): name for name, _ in model.named_modules()}
    own |= {f"base_model.model.{plain}": f"base_model.model.{name}" for plain, name in own.items()}
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        plain = plain_name(key)
        module = plain
        while module not in own and module:
            module = module.rpartition(".")[0]
        renamed[own[module] + plain.removeprefix(module) if module else key] = value
    return renamed


def _check_loaded(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Compare every layer with what was stored when the adapter was made."""
    plain = {plain_name(key): value for key, value in state_dict.items()}
    for name, layer in kpsvd_layers(model, adapter_name):
        unchecked = layer.kpsvd_unchecked.pop(adapter_name, None)
        factors = [
            next((v for k, v in plain.items() if k.endswith(f"{name}.{part}")), None)
            for part in ("kpsvd_left0", "kpsvd_right0")
        ]
        if unchecked is None or factors[0] is None or factors[1] is None:
            continue
        given = getattr(getattr(model, "config", None), "_name_or_path", "") or "unnamed"
        check_base(layer, adapter_name, unchecked, (factors[0], factors[1]), given)
