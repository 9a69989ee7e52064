"""PEFT's methods at a budget: which sizes each can have, and the configuration that trains one."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import (
    HiraConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
)
from peft.tuners.lokr.layer import factorization
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from kpsvd_tune.comparison.methods import Method
from kpsvd_tune.errors import InputError

# A size goes in steps, so a budget is missed; one that is missed by no more than this share
# counts as met.
SLACK = 0.02
# The largest rank of VeRA in its authors' runs.
VERA_RANK = 1024
_WITHOUT_DROPOUT = {"lokr": "LoKr", "ia3": "IA3"}
# Module name to (out_features, in_features).
Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """One size that a method can have."""

    modules: tuple[str, ...]
    rank: int | None  # the same for every layer; None for a method without one
    trainable_parameters: int


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's methods, ready to be put on a model."""

    config: PeftConfig
    size: Size
    # Parts of names of parameters: to what their learning rate is multiplied with, and those that
    # PEFT would train and the method does not.
    rate_ratios: Mapping[str, float]
    frozen: tuple[str, ...]


def best_size(method: Method, sizes: Sizes, budget: int, model_type: str) -> Size:
    """The size of a method that is nearest below a budget of trainable parameters.

    One that costs at most 2 % more still fits. An InputError says that the smallest costs more.
    """
    found = list(_sizes(method, sizes, model_type))
    fits = [size for size in found if size.trainable_parameters <= budget * (1 + SLACK)]
    if not fits:
        least = min(size.trainable_parameters for size in found)
        raise InputError(
            f"a budget of {budget:,} trainable parameters is below the {least:,} that "
            f"{method.name} needs at its smallest on these {len(sizes)} modules; raise --budgets, "
            f"or name fewer modules, as in {method.name}:on=q_proj+v_proj"
        )
    return max(fits, key=lambda size: (size.trainable_parameters, size.rank or 0))


def check_training(method: Method, dropout: float, weight_decay: float) -> None:
    """Refuse what a method of PEFT cannot do, or would do wrong."""
    if dropout and method.kind in _WITHOUT_DROPOUT:
        raise InputError(
            f"{method.name}: PEFT's {_WITHOUT_DROPOUT[method.kind]} cannot drop inputs, and "
            f"adapter.dropout is {dropout:g}; set it to 0 or leave {method.name} out"
        )
    if weight_decay and method.kind == "ia3":
        raise InputError(
            f"{method.name}: its vectors are 1 where nothing is changed, and train.weight_decay, "
            f"{weight_decay:g}, would pull them to 0; set it to 0 or leave {method.name} out"
        )


def baseline(
    method: Method, size: Size, model_type: str, *, dropout: float = 0.0, seed: int = 0
) -> Baseline:
    """Configure a method at a size; ``seed`` fixes the directions that it draws and freezes."""
    rank, settings = size.rank or 0, method.settings
    targets: dict[str, Any] = {"target_modules": list(size.modules), "task_type": "CAUSAL_LM"}
    alpha = _alpha(settings.get("alpha", "1r"), rank)
    # Frozen directions are stored as their seed, which both methods are known for.
    drawn: dict[str, Any] = {"projection_prng_key": seed, "save_projection": False}
    config: PeftConfig
    with warnings.catch_warnings():
        # PEFT advises to store the directions, since another machine may draw others.
        warnings.simplefilter("ignore")
        if method.kind == "lokr":
            factor = int(settings["factor"])
            config = LoKrConfig(r=rank, alpha=alpha, decompose_factor=factor, **targets)
        elif method.kind == "vera":
            start = float(settings["d_initial"])
            config = VeraConfig(r=rank, d_initial=start, vera_dropout=dropout, **drawn, **targets)
        elif method.kind == "randlora":
            config = RandLoraConfig(
                r=rank, randlora_alpha=alpha, randlora_dropout=dropout, **drawn, **targets
            )
        elif method.kind == "hira":
            config = HiraConfig(r=rank, hira_dropout=dropout, **targets)
        elif method.kind == "ia3":
            scaled = [name for name in size.modules if _scales_inputs(name, model_type)]
            config = IA3Config(feedforward_modules=scaled, **targets)
        else:
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                use_rslora=settings.get("rslora") == "true",
                init_lora_weights=_lora_start(settings.get("niter")),
                lora_dropout=dropout,
                **targets,
            )
    ratios = {"lora_B": float(settings["ratio"])} if "ratio" in settings else {}
    frozen = ("lora_A",) if method.kind == "lora-fa" else ()
    return Baseline(config, size, ratios, frozen)


def _sizes(method: Method, sizes: Sizes, model_type: str) -> Iterator[Size]:
    """Every size that a method can have on these modules, whatever it costs."""
    placements = [tuple(sizes)]
    if method.kind == "ia3" and method.modules is None:
        # Where its authors put it; on every module it is the larger of two sizes.
        names = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type, ())
        chosen = tuple(name for name in sizes if _is_called(name, names))
        placements += [chosen] if chosen else []
    smallest = [min(size) for size in sizes.values()]
    ranks: Sequence[int | None] = {
        "ia3": [None],
        "vera": range(1, VERA_RANK + 1),
        # A lower rank takes more matrices to span the weight, and so more parameters.
        "randlora": range(1, max(smallest) + 1),
    }.get(method.kind, range(1, min(smallest) + 1))
    for modules in placements:
        layers = Counter((_scales_inputs(name, model_type), *sizes[name]) for name in modules)
        for rank in ranks:
            count = sum(
                number * _count(method, rank or 0, *layer) for layer, number in layers.items()
            )
            yield Size(modules, rank, count)


def _count(method: Method, rank: int, scales_inputs: bool, out: int, into: int) -> int:
    """Trainable parameters of one layer; PEFT's own code is the source of each formula."""
    match method.kind:
        case "ia3":
            return into if scales_inputs else out
        case "vera":
            return out + rank
        case "lora-fa":
            return rank * out
        case "randlora":
            # Coefficients of each matrix's columns and rows, for as many as span the weight.
            return math.ceil(min(out, into) / rank) * (rank + min(out, into))
        case "lokr":
            # A whole left factor, and a right one of low rank where that is smaller.
            factor = int(method.settings["factor"])
            (out_l, out_k), (in_m, in_n) = factorization(out, factor), factorization(into, factor)
            is_low_rank = rank < max(out_k, in_n) / 2
            return out_l * in_m + (rank * (out_k + in_n) if is_low_rank else out_k * in_n)
        case _:
            return rank * (out + into)


def _scales_inputs(module: str, model_type: str) -> bool:
    """Whether IA3 scales what goes into a module rather than what comes out."""
    names = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, ())
    return _is_called(module, names)


def _is_called(module: str, names: Sequence[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _lora_start(niter: str | None) -> Any:
    if niter is None:
        return True
    return "pissa" if niter == "0" else f"pissa_niter_{niter}"


def _alpha(text: str, rank: int) -> Any:
    """A number, or a multiple of the rank; whole where it can be, as PEFT's type says."""
    value = float(text[:-1]) * rank if text.endswith("r") else float(text)
    return int(value) if value == int(value) else value
