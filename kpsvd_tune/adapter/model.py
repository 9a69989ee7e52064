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
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter.base import (
    Fetch,
    Place,
    check_base,
    check_record,
    check_rest,
    check_weight,
    note_seen,
    record_base,
    remember,
    say_uncompared,
    weight_at_hand,
)
from kpsvd_tune.adapter.config import KpsvdConfig
from kpsvd_tune.adapter.forms import FORMS, FROZEN, LEFT, LEFT0, RIGHT, RIGHT0, Form
from kpsvd_tune.adapter.layer import KpsvdLayer, KpsvdLinear
from kpsvd_tune.adapter.targets import (
    check_saved_plain,
    modules_by_name,
    plain_name,
    saved_whole_notes,
    settle_quantised,
    target_names,
)
from kpsvd_tune.errors import AdapterError, some_of
from kpsvd_tune.linalg import (
    KPSVD,
    KroneckerShape,
    LayerPlan,
    choose_ranks,
    decompose_layer,
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
            AdapterError: No layer is matched, a target cannot be adapted, or every rank is 0; 4-bit
                weights are misread on this CPU; or the adapter's name is none that torch can hold.
        """
        if not adapter_name or "." in adapter_name:
            raise AdapterError(
                f"adapter name {adapter_name!r}: expected one that is not empty and has no dot, "
                "for names of parameters are made of it"
            )
        if isinstance(model, PeftModel):
            raise AdapterError(
                "this model has adapters of PEFT already: expected a plain model. Put another "
                "adapter beside them with add_adapter, or get the plain model back with unload or "
                "merge_and_unload"
            )
        settle_quantised(model)
        _unmerge(model)
        config: Any = self.peft_config[adapter_name]
        check_saved_plain(model, config.modules_to_save or ())
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._made: set[str] = set()  # the layers that are made here, of which no file tells
        if config.is_to_decompose:
            layers, self._factors = _decompose(model, config)
            self._made = set(layers)
            config.take_layers(layers, self, adapter_name)
        self._stated = _stated_layers(state_dict or {}, FORMS[config.form])
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
            _check_all_found(model, config, adapter_name)
            if self._made:
                made = dict(kpsvd_layers(model, adapter_name))
                record_base(model, made, adapter_name, config)
        finally:
            self._factors, self._made, self._stated = {}, set(), {}
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
        seed, frozen = config.frozen_seed, None
        if not layer or (seed is not None and layer.get("norm") is None):
            # No tensor tells what a seed and the configuration give.
            raise AdapterError(
                f"{name}: layers of the adapter's configuration lacks its "
                f"{'norm' if layer else 'shape, rank and norm'}, by which frozen_seed draws frozen "
                "factors; expected adapter_config.json as it was saved"
            )
        if not isinstance(target, KpsvdLayer):
            new = KpsvdLinear(target, adapter_name)
            self._replace_module(parent, target_name, new, target)
            target = new
        form = FORMS[config.form](KroneckerShape(*layer["shape"]), layer["rank"])
        if seed is not None:
            frozen = form.draw(seed, name, layer["norm"])
        elif name in self._factors:
            frozen = _frozen(form, self._factors[name], target, name)
        target.update_layer(
            adapter_name,
            form,
            config.dropout,
            frozen,
            inference_mode=config.inference_mode,
            path=config.path,
            is_at_base=config.init_weights,
            is_drawn=seed is not None,
        )
        place = target.kpsvd_place[adapter_name] = Place(
            name,
            remember(self.model),
            tuple(config.modules_to_save or ()),
            config.task_type,
            str(config.base_model_name_or_path or "an unnamed model"),
            layer.get("fingerprint"),
        )
        if name not in self._made:
            # Factors are to come from a file.
            target.kpsvd_unchecked[adapter_name] = place

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
        _unmerge(model)
        state_dict = _named_as_in(model, state_dict)
        _expect_records(model, adapter_name, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        remapped = _without_the_bases(model, remapped)
        _check_names(model, adapter_name, remapped)
        _check_sizes(model, remapped)
        _check_values(state_dict)
        _check_loaded(model, config, adapter_name, state_dict)
        return remapped


def load_factors(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    adapter_name: str = "default",
    fetch: Fetch | None = None,
) -> None:
    """Fill the frozen factors of an injected adapter.

    Args:
        model: A model with KPSVD layers, wrapped by PEFT or not.
        factors: Module name to A0 (r, m, n) and B0 (r, p, q), the weight's terms, of which the
            adapter's form takes what it freezes.
        adapter_name: The adapter.
        fetch: Reads a weight of the base by its name, where it is on the meta device.

    Raises:
        AdapterError: A layer has no factors, or factors of another size.
    """
    for name, layer in kpsvd_layers(model, adapter_name):
        if layer.kpsvd_drawn[adapter_name]:
            layer.kpsvd_unchecked.pop(adapter_name, None)
            continue
        if name not in factors:
            raise AdapterError(f"{name}: no factors were given for this layer")
        form = layer.kpsvd_form[adapter_name]
        for part, value in zip(FROZEN, factors[name], strict=True):
            if value.shape != form.size(part):
                raise AdapterError(
                    f"{name}: factor of size {tuple(value.shape)}, expected {form.size(part)}"
                )
        with weight_at_hand(layer, name, fetch if form.is_scaled else None):
            frozen = _frozen(form, factors[name], layer, name)
        for held, value in zip(layer.frozen(adapter_name), frozen, strict=True):
            held.copy_(value)
        # They come from a decomposition of this base.
        layer.kpsvd_unchecked.pop(adapter_name, None)
    configs: Any = model.peft_config
    layers = dict(kpsvd_layers(model, adapter_name))
    record_base(model, layers, adapter_name, configs[adapter_name], fetch)


def check_streamed(
    model: nn.Module, config: Any, fetch: Fetch, adapter_name: str = "default"
) -> None:
    """Compare a base on the meta device with what its adapter stored of it, as loading does.

    Raises:
        AdapterError: The adapter was made on another base.
    """
    layers = dict(kpsvd_layers(model, adapter_name))
    record: Tensor | None = None
    for name, layer in layers.items():
        weight = fetch(f"{name}.weight")
        if weight is not None:
            check_weight(layer, adapter_name, weight)
        held: Any = layer.kpsvd_base
        record = dict(held.items()).get(adapter_name, record)
    if record is not None and record.any():
        check_rest(model, layers, adapter_name, record, config, fetch=fetch)


def kpsvd_layers(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[tuple[str, KpsvdLayer]]:
    """Yield the adapted layers that hold an adapter, named as in the unwrapped model."""
    for name, module in model.named_modules():
        if isinstance(module, KpsvdLayer) and adapter_name in module.kpsvd_form:
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
    plans: list[LayerPlan] = []
    terms: dict[str, KPSVD] = {}
    for name in names:
        weight = base_weight(modules[name], name)
        rows, columns = weight.shape
        try:
            plan = LayerPlan.of_weight(
                name, (rows, columns), config.factor_shape, config.form, config.factor_size
            )
            if config.frozen_seed is not None:
                plan = plan.with_random_terms(float(weight.float().square().sum()), rule.window)
            else:
                plan, terms[name] = decompose_layer(
                    plan, weight, rule.window, tolerance=rule.tolerance, seed=config.seed
                )
        except ValueError as error:
            raise AdapterError(f"{name}: {error}") from error
        plans.append(plan)
    try:
        ranked = choose_ranks(plans, rule)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    chosen = [plan for plan in ranked if plan.rank > 0]
    if zero := [plan.name for plan in ranked if plan.squared_norm == 0]:
        warnings.warn(
            f"{some_of(zero)}: the weight is zero, which has no terms to start from; no adapter "
            "goes there",
            stacklevel=2,
        )
    if not chosen:
        raise AdapterError("every layer got rank 0: raise rank.min, rank.energy or rank.budget")
    layers = {plan.name: plan.settings(is_of_weight=bool(terms)) for plan in chosen}
    return layers, {
        plan.name: terms[plan.name].factors(plan.rank) for plan in chosen if plan.name in terms
    }


def _unmerge(model: nn.Module) -> None:
    """Give the base its own weights back: with an update in them it is another base."""
    merged = [m for m in model.modules() if isinstance(m, KpsvdLayer) and m.merged]
    if merged:
        # The words are PEFT's, which does the same later.
        warnings.warn(
            "Adapter cannot be set when the model is merged. Unmerging the model first.",
            stacklevel=3,
        )
    for layer in merged:
        layer.unmerge()


def _frozen(
    form: Form, factors: tuple[Tensor, Tensor], module: nn.Module | KpsvdLayer, name: str
) -> tuple[Tensor, ...]:
    """The frozen tensors of a layer from its weight's terms; its norm only where it counts."""
    norm = 1.0
    if form.is_scaled:
        norm = float(torch.linalg.vector_norm(base_weight(module, name).float()))
    return form.freeze(dict(zip(FROZEN, factors, strict=True)), norm)


def _stated_layers(state_dict: Mapping[str, Tensor], form: type[Form]) -> dict[str, dict[str, Any]]:
    """Shape and rank of the layers that a state dict trains, by plain name.

    Empty for those whose shape it does not tell, since a seed gives their frozen factors.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, _, part = plain_name(key).rpartition(".")
        tensors.setdefault(module.removeprefix("base_model.model."), {})[part] = value
    layers: dict[str, dict[str, Any]] = {}
    for name, parts in tensors.items():
        if not parts.keys() >= set(form.trained):
            continue
        left, right = parts.get(LEFT, parts.get(LEFT0)), parts.get(RIGHT, parts.get(RIGHT0))
        layers[name] = {}
        if left is not None and right is not None:
            layers[name] = {"shape": [*left.shape[1:], *right.shape[1:]], "rank": len(left)}
    return layers


def _with_effect(overrides: Mapping[str, Any], names: Iterable[str] | None) -> dict[str, Any]:
    """The rank overrides that match an adapted layer, in PEFT's way of matching."""
    return {
        pattern: value
        for pattern, value in overrides.items()
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names or ())
    }


def base_weight(module: nn.Module | KpsvdLayer, name: str = "a layer") -> Tensor:
    """The weight of an adapted or plain layer as (out, in), dequantised; fetched if offloaded.

    Raises:
        AdapterError: The model was made on the meta device and its weights were not loaded.
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
        # An offloaded weight is freed again, so a copy is returned.
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


def _check_all_found(model: nn.Module, config: KpsvdConfig, adapter_name: str) -> None:
    """Refuse a configuration with layers that the model does not have."""
    found = {name for name, _ in kpsvd_layers(model, adapter_name)}
    lost = sorted(set(config.layers or {}) - found)
    if lost:
        raise AdapterError(
            f"the adapter's configuration names {some_of(lost)}, and the model has no such "
            f"layers to adapt; {len(found)} others fit. Expected the base model that the adapter "
            "was made for, and adapter_config.json as it was saved"
        )


def _without_the_bases(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors that are the base's own, bit for bit in the narrower dtype.

    PEFT saves embeddings beside the adapter where it is told to, and where they were resized.
    """
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())

    def is_the_bases(name: str, value: Tensor) -> bool:
        held = own.get(name, own.get(name.removeprefix("base_model.model.")))
        if held is None or "kpsvd_" in name or held.is_meta or held.shape != value.shape:
            return False
        given = value.to(held.device)
        return torch.equal(given.to(held.dtype), held) or torch.equal(given, held.to(given.dtype))

    return {name: value for name, value in state_dict.items() if not is_the_bases(name, value)}


def _check_names(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are none of the adapter's, which would replace the base's, and gaps."""
    own, optional = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, KpsvdLayer) and adapter_name in module.kpsvd_form:
            own |= {f"{name}.{part}.{adapter_name}" for part in module.stored(adapter_name)}
            if adapter_name in module.kpsvd_base:
                own.add(f"{name}.kpsvd_base.{adapter_name}")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            # PEFT has refused what lacks these.
            wrapper: Any = module
            names: Mapping[str, str] = wrapper.adapter_state_dict_load_map(adapter_name)
            optional |= {f"{name}.{each}" for each in names.values()}
    given = set(state_dict)

    def told(names: set[str]) -> list[str]:
        ends = "base_model.model.", f".{adapter_name}"
        return sorted(name.removeprefix(ends[0]).removesuffix(ends[1]) for name in names)

    if extra := told(given - own - optional):
        raise AdapterError(
            f"the adapter's weights hold {some_of(extra)}, which the configuration does not name "
            "and which would replace what the base model has; expected the tensors of its "
            "layers alone: was the file changed, or is it of another adapter_config.json? PEFT "
            "adds embeddings where it saves with save_embedding_layers=True, or after they were "
            "resized: these are not the base's. Save with save_embedding_layers=False, or name "
            "what is trained of them in modules_to_save or trainable_token_indices"
        )
    if missing := told(own - given):
        raise AdapterError(
            f"the adapter's weights lack {some_of(missing)} of {len(own)} tensors that the "
            "configuration names; expected the file that was saved with it"
        )


def _check_sizes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse factors of other sizes than the configuration gives them."""
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in state_dict.items():
        if "kpsvd_" in key and key in own and own[key].shape != value.shape:
            name = plain_name(key).removeprefix("base_model.model.").rpartition(".")[0]
            raise AdapterError(
                f"the adapter's weights hold {name} of size {tuple(value.shape)}, expected "
                f"{tuple(own[key].shape)} by its configuration: was one of the two files changed?"
            )


def _check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse what torch would copy without a word: other kinds of numbers, and none at all."""
    for key, value in state_dict.items():
        name = plain_name(key).removeprefix("base_model.model.")
        if key.endswith(".kpsvd_base"):
            expected, fits = "torch.int32", value.dtype == torch.int32
        else:
            expected, fits = "floating point", value.is_floating_point()
        if not fits:
            raise AdapterError(
                f"the adapter's weights hold {name} in {value.dtype}, expected {expected}: was the "
                "file changed?"
            )
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            raise AdapterError(
                f"the adapter's weights hold {name} with numbers that are not finite (NaN or "
                "infinity): the adapter is damaged, or its training had failed when it was saved"
            )


def _expect_records(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Expect what the base is known by, or not: files of older versions have it in no layer."""
    if any(key.endswith(".kpsvd_base") for key in state_dict):
        return
    for _, layer in kpsvd_layers(model, adapter_name):
        held: Any = layer.kpsvd_base
        del held[adapter_name]


def _check_loaded(
    model: nn.Module, config: KpsvdConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Compare the base with what was stored of it when the adapter was made."""
    plain = {
        plain_name(key).removeprefix("base_model.model."): value
        for key, value in state_dict.items()
    }
    given = getattr(getattr(model, "config", None), "_name_or_path", "") or "unnamed"
    layers = dict(kpsvd_layers(model, adapter_name))
    record = None
    for name, layer in layers.items():
        unchecked = layer.kpsvd_unchecked.pop(adapter_name, None)
        record = plain.get(f"{name}.kpsvd_base")
        parts = layer.kpsvd_form[adapter_name].frozen
        held = zip(parts, layer.frozen(adapter_name), strict=True)
        factors = tuple(plain.get(f"{name}.{part}", drawn) for part, drawn in held)
        if record is not None and record.any():
            check_record(layer, adapter_name, record, given, factors, unchecked)
            note_seen(layer, adapter_name, record, factors)
        elif unchecked is not None:
            check_base(layer, adapter_name, unchecked, factors, given)
    if record is not None:
        check_rest(model, layers, adapter_name, record, config, given)
    else:
        say_uncompared()
