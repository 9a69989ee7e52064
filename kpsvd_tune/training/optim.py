"""The optimiser and the learning-rate schedule that a recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor

from kpsvd_tune.errors import RecipeError, closest, did_you_mean
from kpsvd_tune.recipe import TrainRecipe

# Optimisers that update each entry by its own history alone, so that they can work on shards of
# tensors; each is tested with sharded weights.
SHARDABLE = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "torch.optim.Adam": torch.optim.Adam,
    "torch.optim.RMSprop": torch.optim.RMSprop,
}
_CANNOT = {
    "LBFGS": "evaluates the loss several times a step, which the training loop does once",
    "SparseAdam": "takes sparse gradients, and those of the factors are dense",
    "Muon": "takes matrices, and the factors are stacks of matrices, one for each term",
    "Adafactor": "scales its steps by the size of a weight, and offsets start at zero: they would "
    "hardly move; adafactor is transformers' one, set to absolute steps",
    "Rprop": "looks at the rate in its first step only, so that no schedule would change it",
    "Optimizer": "is the base of all optimisers, and none itself",
}
_OWN_KEYS = {
    "params": "what is trained is decided by adapter",
    "lr": "set train.learning_rate",
    "weight_decay": "set train.weight_decay",
    "maximize": "a loss is to fall",
    "differentiable": "no gradient is taken of a step",
    "scale_parameter": "offsets start at zero",
    "relative_step": "train.learning_rate and train.scheduler set the rate",
    "warmup_init": "train.learning_rate and train.scheduler set the rate",
    "optimizer": "the schedule is that of train.optimizer",
    "last_epoch": "a resumed run knows where it was",
    "num_warmup_steps": "set train.warmup_steps or train.warmup_ratio",
    "num_training_steps": "set train.max_steps or train.epochs",
}


def make_optimizer(
    recipe: TrainRecipe, parameters: Sequence[Tensor], rate_factors: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """Make the optimiser of `train.optimizer`, with a group for each `rate_factor` (else 1)."""
    members: dict[float, list[Tensor]] = {}
    factors = rate_factors or [1.0] * len(parameters)
    for parameter, factor in zip(parameters, factors, strict=True):
        members.setdefault(factor, []).append(parameter)
    groups = [
        {"params": group, "lr": recipe.learning_rate * factor, "rate_factor": factor}
        for factor, group in members.items()
    ]
    kind = optimizer_class(recipe)
    arguments: dict[str, Any] = dict(recipe.optimizer_args)
    accepted = check_arguments("train.optimizer_args", kind, recipe.optimizer, arguments)
    arguments["lr"] = recipe.learning_rate
    if "weight_decay" in accepted:
        # Given at 0 too: some have another default.
        arguments["weight_decay"] = recipe.weight_decay
    elif recipe.weight_decay:
        raise RecipeError(
            f"train.weight_decay: {recipe.optimizer} has none; set it to 0, or choose another "
            "train.optimizer"
        )
    if kind is Adafactor:
        # Relative steps scale by a weight's size; offsets start at zero and would never leave it.
        arguments |= {"scale_parameter": False, "relative_step": False}
    elif kind is torch.optim.AdamW and not {"fused", "foreach"} & arguments.keys():
        # Hundreds of small tensors: one fused pass instead of ten operations for each.
        arguments["fused"] = all(
            p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters
        )
    try:
        return kind(groups, **arguments)
    except Exception as error:
        # Of any type, as a class comes upon an argument that does not fit: betas of one number.
        raise RecipeError(f"train.optimizer_args: {recipe.optimizer}: {error}") from error


def optimizer_class(recipe: TrainRecipe) -> type[torch.optim.Optimizer]:
    """The class that `train.optimizer` names; refuse one that torch lacks or that cannot train."""
    name = recipe.optimizer
    if name in ("adamw", "sgd"):
        return SHARDABLE[name]
    if name == "adafactor":
        return Adafactor
    name = name.removeprefix("torch.optim.")
    usable = sorted(
        each
        for each, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and each not in _CANNOT
    )
    if name in usable:
        found: type[torch.optim.Optimizer] = getattr(torch.optim, name)
        return found
    if hasattr(torch.optim, name) and name in _CANNOT:
        reason = f"torch.optim.{name} {_CANNOT[name]}"
    else:
        reason = f"torch.optim of torch {torch.__version__} has no optimiser {name}"
    near = closest(name, usable)
    advice = f"; did you mean torch.optim.{near}?" if near else ""
    raise RecipeError(f"train.optimizer: {reason}; expected one of {', '.join(usable)}{advice}")


def knows_state(
    recipe: TrainRecipe, state: Mapping[str, Mapping[str, Any]], num_dims: Mapping[str, int]
) -> bool:
    """Whether a saved state, by parameter and key, is of the kind that `train.optimizer` keeps.

    Not so where another optimiser was allowed, or arguments that make it keep something else.
    `state` leaves out what has none yet; `num_dims` are those of every trained parameter.
    """
    known: dict[int, list[set[Any]]] = {}
    for each in set(num_dims.values()):
        parameter = stand_in(each)
        optimizer = make_optimizer(recipe, [parameter])
        before = set(optimizer.state[parameter])
        optimizer.step()
        known[each] = [before, set(optimizer.state[parameter])]
    return all(set(state.get(name, ())) in known[each] for name, each in num_dims.items())


def stand_in(num_dims: int) -> nn.Parameter:
    """A small parameter with a gradient, to try an optimiser out on."""
    parameter = nn.Parameter(torch.zeros((2,) * num_dims))
    parameter.grad = torch.ones_like(parameter)
    return parameter


def check_arguments(key: str, function: Any, name: str, given: dict[str, Any]) -> set[str]:
    """Give all that `function` takes; refuse other arguments, and those not to be given here."""
    accepted = set(inspect.signature(function).parameters)
    own = [argument for argument in given if argument in _OWN_KEYS]
    if own:
        raise RecipeError(f"{key}.{own[0]}: not to be given here; {_OWN_KEYS[own[0]]}")
    unknown = [argument for argument in given if argument not in accepted]
    if unknown:
        free = sorted(accepted - _OWN_KEYS.keys())
        raise RecipeError(
            f"{key}.{unknown[0]}: {name} takes {', '.join(free) or 'no arguments'}"
            f"{did_you_mean(unknown[0], free)}"
        )
    return accepted
