"""Which layers of a model are targeted, by PEFT's own rules, and which weights stay untouched."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils import resolve_quantization_backend
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.errors import AdapterError, closest, did_you_mean, some_of
from kpsvd_tune.hardware import four_bits
from kpsvd_tune.storage.patterns import SlowPatternError, time_limit

LINEAR = (nn.Linear, Conv1D)
FORWARDS = (nn.Linear.forward, Conv1D.forward)
# Names of the heads that PEFT itself trains whole, with which tasks.
HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# A message lists at most this many modules.
LISTED = 6


def target_names(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str | None = None,
) -> list[str]:
    """List the layers that an adapter goes to, in model order.

    The matching is PEFT's: ``all-linear`` takes every Linear and Conv1D but the output head; a
    list matches whole names or their ends at a dot; any other string is a regular expression for
    the whole name. Names and kinds are enough, so the model may be on the meta device. Names are
    those of the model before torch.compile.

    Args:
        model: The base model; layers that adapters were put on count as what they were.
        target_modules: ``all-linear``, a list, or a regular expression.
        exclude_modules: A list or a regular expression of modules to leave alone.
        modules_to_save: Modules trained whole, never targeted.
        task_type: PEFT's task; with those that get a new head, ``all-linear`` leaves it to be
            trained whole, as PEFT does.

    Returns:
        Full module names; each is an nn.Linear or transformers' Conv1D with a weight of its own.

    Raises:
        AdapterError: Nothing matches, an entry of one of the lists matches nothing, or a match
            cannot be adapted: an embedding, stacked experts, a tied or a packed quantised weight,
            a layer with a forward of its own.
    """
    is_all_linear = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    heads = set(HEADS) if task_type in TASKS_WITH_HEADS else set()
    matched_by = _all_linear(model, heads) if is_all_linear else target_modules
    config = _peft_config(matched_by, exclude_modules, modules_to_save)
    try:
        with time_limit(f"target_modules {target_modules!r} with exclude_modules"):
            found = {name: check_target_module_exists(config, name) for name, _ in _modules(model)}
    except SlowPatternError as error:
        raise AdapterError(str(error)) from error
    except re.error as error:
        raise AdapterError(
            f"target_modules or exclude_modules is not a regular expression: {error}"
        ) from error
    _check_excluded(model, exclude_modules)
    _check_saved(model, [name for name in modules_to_save if name not in heads])
    matched = [name for name, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)]
    reasons = _reasons(model)
    refused = [(name, reasons[name]) for name in matched if name in reasons]
    if is_all_linear:
        # "all" leaves out what cannot be adapted; `untouched` lists it with the reason.
        left_out = {name for name, _ in refused}
        matched = [name for name in matched if name not in left_out]
    elif refused:
        raise AdapterError(_refusal(refused))
    elif not isinstance(target_modules, str):
        _check_every_entry(model, target_modules, list(found))
    if not matched:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        raise AdapterError(
            f"target_modules {target_modules!r} leaves no layer to adapt; " + _hint(model, wanted)
        )
    return matched


def untouched(
    model: nn.Module, names: Iterable[str], trained_whole: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """List every weight matrix that is not trained, neither by an adapter nor whole.

    Args:
        model: The base model; may be on the meta device.
        names: The targeted modules.
        trained_whole: Modules that are trained whole, with all that lies in them.

    Returns:
        (name, reason) in model order; the name is the module's, or the parameter's own where it
        is not called ``weight``. Vectors (biases, norms) are not matrices and are not listed.
    """
    targeted, whole = set(names), tuple(f"{name}." for name in trained_whole)
    reasons = _reasons(model)
    head = _output_head(model)
    left: list[tuple[str, str]] = []
    for module_name, module in _modules(model):
        if module_name in targeted or f"{module_name}.".startswith(whole):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            is_weight = parameter_name == "weight"
            name = module_name if is_weight else f"{module_name}.{parameter_name}".lstrip(".")
            if not is_weight or not isinstance(module, LINEAR):
                reason = _parameter_reason(module, parameter)
            else:
                reason = reasons.get(module_name) or (
                    "output head: named explicitly or not at all"
                    if module is head
                    else "not among the target modules"
                )
            left.append((name, reason))
    return left


def plain_name(name: str) -> str:
    """The name that a module or tensor has without torch.compile around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its plain name; an adapted layer is what adapters were put on."""
    return dict(_modules(model))


def saved_modules(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, list[str]]:
    """The modules that each entry of ``modules_to_save`` means; PEFT matches any end of a name."""
    names = [name for name, _ in _modules(model)]
    return {
        entry: [name for name in names if name.endswith(plain_name(entry))]
        for entry in modules_to_save
    }


def saved_whole(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, int]:
    """The parameters of each module that ``modules_to_save`` has trained whole, by its name.

    A module inside of another one is not counted again.
    """
    names = {name for found in saved_modules(model, modules_to_save).values() for name in found}
    modules = modules_by_name(model)
    return {
        name: sum(parameter.numel() for parameter in modules[name].parameters())
        for name in modules
        if name in names and not any(name.startswith(f"{other}.") for other in names)
    }


def check_saved_plain(model: nn.Module, modules_to_save: Sequence[str]) -> None:
    """Refuse to train packed weights whole, which have no gradient: AdapterError."""
    modules = modules_by_name(model)
    for entry, names in saved_modules(model, modules_to_save).items():
        packed = [
            inner
            for inner, module in modules.items()
            if any(f"{inner}.".startswith(f"{name}.") for name in names)
            and resolve_quantization_backend(module) is not None
        ]
        if packed:
            raise AdapterError(
                f"modules_to_save {entry!r} means quantised weights ({some_of(packed)}), which "
                "cannot be trained; expected modules with plain weights. Adapt these layers "
                "instead (target_modules), or load the base without quantisation "
                "(model.quantization: null)"
            )


def settle_quantised(model: nn.Module) -> None:
    """Have the model compute with 4-bit weights as they are stored; refuse misread ones.

    Raises:
        AdapterError: bitsandbytes dequantises some of them wrongly on this CPU.
    """
    if fault := four_bits.settle(model):
        raise AdapterError(f"{fault}; expected a base with plain or 8-bit weights")


def saved_whole_notes(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Say how many modules an entry means, for each that means several or others by name."""
    notes = []
    for entry, names in saved_modules(model, modules_to_save).items():
        others = [n for n in names if n != entry and not n.endswith(f".{entry}")]
        if len(names) < 2 and not others:
            continue
        listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
        note = f"modules_to_save {entry!r} means {len(names)} modules, trained whole: {listed}"
        if others:
            note += f" (PEFT takes any end of a name; {others[0]} ends with it)"
        notes.append(note)
    return notes


def _all_linear(model: nn.Module, heads: set[str]) -> list[str]:
    head = _output_head(model)
    return [
        name
        for name, module in _modules(model)
        if isinstance(module, LINEAR) and module is not head and name not in heads
    ]


def _peft_config(
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    modules_to_save: Sequence[str],
) -> Any:
    # A bare record: PEFT's own config classes would bring the fields of one method.
    return SimpleNamespace(
        target_modules=target_modules if isinstance(target_modules, str) else set(target_modules),
        exclude_modules=exclude_modules,
        modules_to_save=list(modules_to_save) or None,
        target_parameters=None,
        task_type=None,
    )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        plain = plain_name(name)
        if plain and not hasattr(module, "_orig_mod"):
            yield plain, module


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _reasons(model: nn.Module) -> dict[str, str]:
    """Why a module cannot be adapted; modules that can are absent."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_name(name))
    reasons: dict[str, str] = {}
    modules = modules_by_name(model)
    for name, module in modules.items():
        if not isinstance(module, LINEAR):
            reasons[name] = _module_reason(name, module)
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reasons[name] = (
                "its weight is computed from other tensors (a parametrisation, a norm or pruning)"
            )
            continue
        backend = resolve_quantization_backend(module)
        sharing = [other for other in owners[id(weight)] if not other.startswith(f"{name}.")]
        if sharing:
            reasons[name] = f"tied: shares its weight with {sharing[0]}"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            reasons[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif backend is not None and not backend.supports_merge:
            reasons[name] = f"packed by {backend.backend_name}, which cannot be dequantised"
        elif backend is None and not _is_plain(weight):
            reasons[name] = f"packed quantised weight ({type(module).__name__}, {weight.dtype})"
        elif backend is None and not _is_linear(module):
            kind = type(module).__name__
            reasons[name] = f"a {kind}, which computes more than a linear layer does"
        elif _is_read_by_mamba(model, name, modules):
            reasons[name] = "Mamba's scan and kernels read its weight and never call it"
        elif _is_read_by_encoder(name, modules):
            reasons[name] = "nn.TransformerEncoderLayer reads its weight in evaluation, past a call"
    return reasons


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is a matrix of floating-point numbers of at least 16 bits."""
    return weight.ndim == 2 and weight.is_floating_point() and weight.element_size() >= 2


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a layer multiplies with its weight, adds its bias and does nothing else.

    A forward of its own is tried on a small weight: Falcon's only writes the product in another
    way, routers return several tensors, others scale or regroup.
    """
    forward = type(module).forward
    if forward in FORWARDS:
        return True
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in [(4, 3), (4,), (2, 5, 3)])
    probe: Any = copy.copy(module)
    probe._parameters = dict(module._parameters)
    has_bias = getattr(module, "bias", None) is not None
    try:
        is_transposed = isinstance(module, Conv1D)
        probe.weight = nn.Parameter(weight.T if is_transposed else weight)
        if has_bias:
            probe.bias = nn.Parameter(bias)
        probe.in_features, probe.out_features, probe.nf, probe.nx = 3, 4, 4, 3
        found = forward(probe, x)
        expected = functional.linear(x, weight, bias if has_bias else None)
        return isinstance(found, Tensor) and torch.allclose(found, expected, atol=1e-5)
    except Exception:  # code of others, asked whether it can do this
        return False


def _is_read_by_mamba(model: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT refuses the layer for LoRA, or Mamba's scan multiplies with its weight itself.

    An adapter there does nothing until it is merged, and then changes the model.
    """
    parent, _, child = name.rpartition(".")
    if child == "dt_proj" and "Mamba" in type(modules.get(parent, model)).__name__:
        return True
    as_lora: Any = SimpleNamespace(peft_type="LORA")
    try:
        _check_lora_target_modules_mamba(as_lora, model, child)
    except ValueError:
        return True
    return False


def _is_read_by_encoder(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether torch's fast path takes the weight in evaluation, so that only training calls it.

    An adapter would be trained, and be without effect until it is merged.
    """
    parent = modules.get(name.rpartition(".")[0])
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return False
    attention: Any = parent.self_attn
    # What torch asks of the layer itself; the rest depends on the call.
    return bool(
        type(parent).forward is nn.TransformerEncoderLayer.forward
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and parent.activation_relu_or_gelu
        and parent.norm1.eps == parent.norm2.eps
    )


def _module_reason(name: str, module: nn.Module) -> str:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            reason = _parameter_reason(module, parameter)
            return reason if parameter_name == "weight" else f"{parameter_name}: {reason}"
    inside = [child for child, kind in module.named_modules() if isinstance(kind, LINEAR)]
    # A container's linear layers are what the user most likely means.
    kinds = list(dict.fromkeys(child.rpartition(".")[2] for child in inside))
    what = f"a {type(module).__name__}, not a linear layer"
    return f"{what}; the linear layers in it are {', '.join(kinds)}" if kinds else what


def _parameter_reason(module: nn.Module, parameter: Tensor) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"convolution ({kind})"
    if parameter.ndim == 3:
        return f"{len(parameter)} stacked matrices in one tensor ({kind})"
    if not parameter.is_floating_point():
        return f"packed quantised weight ({kind}, {parameter.dtype})"
    return f"a parameter of a {kind}, not a linear layer"


def _refusal(refused: list[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in refused[:LISTED]]
    if len(refused) > LISTED:
        lines.append(f"  and {len(refused) - LISTED} more")
    return (
        f"target_modules name {len(refused)} modules that KPSVD cannot adapt (it takes nn.Linear "
        "and Conv1D with a floating-point weight of their own):\n"
        + "\n".join(lines)
        + "\nname other modules, or put these into exclude_modules"
    )


def _check_every_entry(model: nn.Module, entries: Sequence[str], names: list[str]) -> None:
    # PEFT is silent about an entry that matches nothing while others do: a misspelt layer would
    # simply not be trained.
    idle = [
        entry
        for entry in entries
        if not any(name == entry or name.endswith(f".{entry}") for name in names)
    ]
    if not idle:
        return
    modules = modules_by_name(model)
    stacked = {
        name: parameter
        for name, parameter in (
            (plain_name(name), parameter) for name, parameter in model.named_parameters()
        )
        for entry in idle
        if parameter.ndim >= 2 and (name == entry or name.endswith(f".{entry}"))
    }
    if stacked:
        raise AdapterError(
            _refusal(
                [
                    (name, _parameter_reason(modules[name.rpartition(".")[0]], value))
                    for name, value in stacked.items()
                ]
            )
        )
    raise AdapterError(
        f"target_modules: {', '.join(map(repr, idle))} matches no module; " + _hint(model, idle)
    )


def _check_excluded(model: nn.Module, exclude_modules: str | Sequence[str] | None) -> None:
    """Refuse an exclusion that leaves nothing out: what it was meant for would be trained."""
    modules = modules_by_name(model)
    if isinstance(exclude_modules, str):
        if exclude_modules and not any(re.fullmatch(exclude_modules, name) for name in modules):
            raise AdapterError(
                f"exclude_modules {exclude_modules!r} matches no module, so nothing is left out; "
                "a regular expression has to match the whole name, such as "
                f"{next(iter(_linear_names(model)), 'layer')!r}"
            )
        return
    for entry in exclude_modules or ():
        hits = {n: m for n, m in modules.items() if n == entry or n.endswith(f".{entry}")}
        if not hits:
            raise AdapterError(_matches_nothing("exclude_modules", entry, modules))
        inside = [n for n in _linear_names(model) if any(n.startswith(f"{hit}.") for hit in hits)]
        if inside and not any(isinstance(module, LINEAR) for module in hits.values()):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in inside)
            raise AdapterError(
                f"exclude_modules {entry!r} leaves out no layer: names in the list are matched "
                f"with the layers themselves, and {next(iter(hits))} only holds some. Expected "
                f"the names of layers ({', '.join(kinds)}), or an expression for all in it: "
                f"'(.*\\.)?{re.escape(entry)}\\..*'"
            )


def _check_saved(model: nn.Module, modules_to_save: Sequence[str]) -> None:
    """Refuse an entry that matches nothing: PEFT would train nothing more, and say nothing."""
    modules = modules_by_name(model)
    for entry, names in saved_modules(model, modules_to_save).items():
        if not names:
            raise AdapterError(_matches_nothing("modules_to_save", entry, modules))


def _matches_nothing(key: str, entry: str, names: Iterable[str]) -> str:
    """What to say of an entry that matches nothing; names are suggested as they end."""
    parts = len(entry.split("."))
    known = {".".join(name.split(".")[-parts:]) for name in names}
    kinds = sorted(kind for kind in known if not kind.rpartition(".")[2].isdigit())
    advice = did_you_mean(entry, kinds) or f"; the model's are called {', '.join(kinds)}"
    return f"{key}: {entry!r} matches no module{advice}"


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in _modules(model) if isinstance(module, LINEAR)]


def _hint(model: nn.Module, wanted: Sequence[str]) -> str:
    kinds = sorted(
        {name.rpartition(".")[2] for name, kind in _modules(model) if isinstance(kind, LINEAR)}
    )
    near = (closest(entry.rpartition(".")[2], kinds) for entry in wanted)
    close = dict.fromkeys(each for each in near if each)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"the linear layers of this model are called {', '.join(kinds) or 'nothing'}{hint}"
