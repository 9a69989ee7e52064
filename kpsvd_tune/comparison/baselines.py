"""PEFT's own methods at a budget of trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lokr.layer import factorization

from kpsvd_tune.comparison.methods import Method
from kpsvd_tune.errors import InputError

# A rank is a whole number for every layer, so a budget can be missed by nearly a rank's
# parameters; one that is missed by no more than this share counts as met.
SLACK = 0.02


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's methods, ready to be put on a model.

    Attributes:
        config: PEFT's configuration.
        rank: Its rank, the same for every layer.
        trainable_parameters: What it trains.
        rate_ratios: Parts of parameter names to what their learning rate is multiplied with.
    """

    config: PeftConfig
    rank: int
    trainable_parameters: int
    rate_ratios: Mapping[str, float]


def baseline(
    method: Method, sizes: Mapping[str, tuple[int, int]], budget: int, dropout: float = 0.0
) -> Baseline:
    """Choose the largest rank of a PEFT method within a budget.

    Args:
        method: One of the kinds lora, pissa and lokr.
        sizes: Module name to (out_features, in_features) of each target module.
        budget: Trainable parameters; a rank that costs at most 2 % more still fits.
        dropout: Probability of dropping an input of the update.

    Raises:
        InputError: Rank 1 already costs more than the budget, or the method has no such dropout.
    """
    if dropout and method.kind == "lokr":
        raise InputError(
            f"{method.name}: PEFT's LoKr cannot drop inputs, and adapter.dropout is {dropout:g}; "
            "set it to 0 or leave lokr out"
        )
    settings = method.settings
    count = _lokr_count(int(settings["factor"])) if method.kind == "lokr" else _lora_count
    rank = 0
    # LoKr stops growing once its factors are whole; so does a rank at a layer's smaller side.
    largest = min(min(size) for size in sizes.values())
    while rank < largest and count(sizes, rank + 1) <= budget * (1 + SLACK):
        rank += 1
    if rank == 0:
        raise InputError(
            f"a budget of {budget:,} trainable parameters is below the {count(sizes, 1):,} that "
            f"{method.name} needs at rank 1 on these {len(sizes)} modules; raise --budgets or "
            "target fewer modules"
        )
    alpha = _alpha(settings["alpha"], rank)
    targets: dict[str, Any] = {"target_modules": list(sizes), "task_type": "CAUSAL_LM"}
    config: PeftConfig
    if method.kind == "lokr":
        config = LoKrConfig(
            r=rank, alpha=alpha, decompose_factor=int(settings["factor"]), **targets
        )
    else:
        start: Any = True
        if method.kind == "pissa":
            start = f"pissa_niter_{settings['niter']}" if settings["niter"] != "0" else "pissa"
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=settings.get("rslora") == "true",
            init_lora_weights=start,
            lora_dropout=dropout,
            **targets,
        )
    ratio = float(settings.get("ratio", 1))
    return Baseline(config, rank, count(sizes, rank), {"lora_B": ratio} if ratio != 1 else {})


def _lora_count(sizes: Mapping[str, tuple[int, int]], rank: int) -> int:
    return sum(rank * (out + into) for out, into in sizes.values())


def _lokr_count(factor: int) -> Any:
    """Parameters of LoKr: a whole left factor, and a right one of low rank where that is smaller.

    Source: peft.tuners.lokr.layer.LoKrLayer.update_layer with decompose_both=False.
    """

    def count(sizes: Mapping[str, tuple[int, int]], rank: int) -> int:
        total = 0
        for out, into in sizes.values():
            (out_l, out_k), (in_m, in_n) = factorization(out, factor), factorization(into, factor)
            is_low_rank = rank < max(out_k, in_n) / 2
            total += out_l * in_m + (rank * (out_k + in_n) if is_low_rank else out_k * in_n)
        return total

    return count


def _alpha(text: str, rank: int) -> Any:
    """A number, or a multiple of the rank; whole where it can be, as PEFT's type says."""
    value = float(text[:-1]) * rank if text.endswith("r") else float(text)
    return int(value) if value == int(value) else value
