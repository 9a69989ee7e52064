"""The optimiser and the learning-rate schedule that a recipe names."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from kpsvd_tune.errors import RecipeError, closest, did_you_mean
from kpsvd_tune.recipe import TrainRecipe

# Whose update of an entry needs nothing but that entry's own history, so that they can work on
# parts of tensors. Rprop would be one, but its masks are not implemented for DTensors.
SHARDABLE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
_CANNOT = {
    "LBFGS": "evaluates the loss several times a step, which the training loop does once",
    "SparseAdam": "takes sparse gradients, and those of the factors are dense",
    "Muon": "takes matrices, and the factors are stacks of matrices, one for each term",
    "Adafactor": "scales its steps by the size of a weight, and offsets start at zero: they would "
    "hardly move; adafactor is transformers' one, set to absolute steps",
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
    """Make the optimiser of `train.optimizer` over all `parameters`.

    Args:
        recipe: Names the optimiser and its settings.
        parameters: What to train.
        rate_factors: What the learning rate of each parameter is multiplied with; empty: 1.
            Parameters of equal factor make a group, which knows it as ``rate_factor``.

    Raises:
        RecipeError: There is no such optimiser, it cannot train factors, or it refuses an argument.
    """
    groups = _groups(recipe, parameters, rate_factors)
    kind = optimizer_class(recipe)
    arguments: dict[str, Any] = dict(recipe.optimizer_args)
    accepted = _check_arguments("train.optimizer_args", kind, recipe.optimizer, arguments)
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
        # Whatever a class makes of an argument it did not expect: betas of one number, say.
        raise RecipeError(f"train.optimizer_args: {recipe.optimizer}: {error}") from error


def optimizer_class(recipe: TrainRecipe) -> type[torch.optim.Optimizer]:
    """The class that `train.optimizer` names.

    Raises:
        RecipeError: torch has no such class, or it cannot train factors.
    """
    if recipe.optimizer == "adafactor":
        return Adafactor
    known = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    # Short names are those of classes in lower case.
    name = recipe.optimizer.removeprefix("torch.optim.")
    name = next((each for each in known if each.lower() == name), name)
    usable = [each for each in known if each not in _CANNOT]
    if name in _CANNOT and name in known:
        raise RecipeError(
            f"train.optimizer: torch.optim.{name} {_CANNOT[name]}; expected one of "
            f"{', '.join(usable)}"
        )
    if name not in known:
        near = closest(name, usable)
        advice = f"; did you mean torch.optim.{near}?" if near else ""
        raise RecipeError(
            f"train.optimizer: torch.optim of torch {torch.__version__} has no optimiser {name}; "
            f"expected one of {', '.join(usable)}{advice}"
        )
    return known[name]


def check_optimizer(recipe: TrainRecipe, num_processes: int = 1) -> None:
    """Refuse an optimiser, a schedule or arguments of theirs that cannot work, before any work.

    Args:
        recipe: The `train` section.
        num_processes: Processes that share the work.

    Raises:
        RecipeError: Names the key.
    """
    is_shared_out = recipe.parallel == "fsdp" and num_processes > 1
    if is_shared_out and optimizer_class(recipe) not in SHARDABLE:
        raise RecipeError(
            f"train.optimizer: {recipe.optimizer} needs whole tensors, which train.parallel: fsdp "
            "shares out; expected one of "
            f"{', '.join(kind.__name__.lower() for kind in SHARDABLE)}, or train.parallel: ddp"
        )
    # Of the form of stacked factors. Some classes look at an argument in their first step only.
    optimizer = make_optimizer(recipe, [_stand_in(3)])
    num_steps = recipe.max_steps or 100
    scheduler = make_scheduler(recipe, optimizer, num_steps)
    if isinstance(optimizer, torch.optim.Rprop) and scheduler.lr_lambdas[0](0) < 1:
        raise RecipeError(
            f"train.optimizer: {recipe.optimizer} looks at the rate in its first step only, where "
            "a warm-up has it low; set train.warmup_steps: 0, or choose another optimiser"
        )
    factors = map(scheduler.lr_lambdas[0], range(num_steps + 1))
    trials: dict[str, Callable[[], object]] = {
        "optimizer_args": lambda: optimizer.step(),
        "scheduler_args": lambda: _check_rates(factors),
    }
    for key, try_out in trials.items():
        try:
            try_out()
        except Exception as error:
            raise RecipeError(f"train.{key}: {type(error).__name__}: {error}") from error


def knows_state(
    recipe: TrainRecipe, state: Mapping[str, Mapping[str, Any]], num_dims: Mapping[str, int]
) -> bool:
    """Whether a saved state is of the kind that the optimiser of `train.optimizer` keeps.

    It is not where another optimiser was allowed, or arguments that make it keep something else.

    Args:
        recipe: The `train` section.
        state: What was kept of each parameter, by name and then by key; without what has none yet.
        num_dims: Dimensions of every trained parameter.
    """
    known: dict[int, list[set[Any]]] = {}
    for each in set(num_dims.values()):
        stand_in = _stand_in(each)
        optimizer = make_optimizer(recipe, [stand_in])
        before = set(optimizer.state[stand_in])
        optimizer.step()
        known[each] = [before, set(optimizer.state[stand_in])]
    return all(set(state.get(name, ())) in known[each] for name, each in num_dims.items())


def _stand_in(num_dims: int) -> nn.Parameter:
    """A small parameter with a gradient, to try an optimiser out on."""
    parameter = nn.Parameter(torch.zeros((2,) * num_dims))
    parameter.grad = torch.ones_like(parameter)
    return parameter


def _check_rates(factors: Iterable[float]) -> None:
    for step, factor in enumerate(factors):
        if not 0 <= factor <= 1 + 1e-6:
            raise ValueError(
                f"step {step + 1} would have {factor:g} times train.learning_rate, which is the "
                "highest rate; expected 0 to 1"
            )


def _groups(
    recipe: TrainRecipe, parameters: Sequence[Tensor], rate_factors: Sequence[float]
) -> list[dict[str, Any]]:
    factors = rate_factors or [1.0] * len(parameters)
    members: dict[float, list[Tensor]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        members.setdefault(factor, []).append(parameter)
    return [
        {"params": group, "lr": recipe.learning_rate * factor, "rate_factor": factor}
        for factor, group in members.items()
    ]


def _check_arguments(key: str, function: Any, name: str, given: dict[str, Any]) -> set[str]:
    """Refuse arguments that `function` does not take or that are not the recipe's to give here.

    Returns:
        All that it takes.
    """
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


def make_scheduler(
    recipe: TrainRecipe,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    *,
    starts_at_zero: bool = False,
) -> LambdaLR:
    """Make the schedule of `train.scheduler`, to be stepped once an optimiser step.

    A warm-up of w steps gives step k (from 1) the k-th of w equal parts of the way: its first step
    has a rate, and its last one the whole. Transformers' own warm-up starts at rate 0, so that the
    first step changes nothing, and a run of one step nothing at all.

    Args:
        recipe: The `train` section.
        optimizer: Whose rates the schedule sets.
        num_steps: Length of the run.
        starts_at_zero: Transformers' warm-up, for runs that began with it.

    Raises:
        RecipeError: The schedule refuses an argument.
    """
    name, arguments = recipe.scheduler, dict(recipe.scheduler_args)
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    _check_arguments("train.scheduler_args", function, name, arguments)
    if name == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & arguments.keys():
        arguments["min_lr_rate"] = 0.1
    if name == "warmup_stable_decay":
        arguments.setdefault("num_decay_steps", math.ceil(0.1 * num_steps))
    num_warmup = num_warmup_steps(recipe, num_steps, starts_at_zero=starts_at_zero)
    try:
        with warnings.catch_warnings():
            # That num_stable_steps wins over the length of the run, which it is given for.
            warnings.simplefilter("ignore", UserWarning)
            scheduler = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=num_warmup,
                num_training_steps=num_steps,
                scheduler_specific_kwargs=arguments,
            )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.scheduler_args: {name}: {error}") from error
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"{name} is a {type(scheduler).__name__}; expected a LambdaLR")
    if num_warmup and not starts_at_zero:
        scheduler.lr_lambdas = [
            _one_step_ahead(factor, num_warmup) for factor in scheduler.lr_lambdas
        ]
        rates = [
            base * factor(0)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
    return scheduler


def _one_step_ahead(factor: Callable[[int], float], num_warmup: int) -> Callable[[int], float]:
    """The schedule whose warm-up gives each step what `factor` gives the next one."""

    def ahead(step: int) -> float:
        if step < num_warmup - 1:
            return factor(step + 1)
        return 1.0 if step < num_warmup else factor(step)

    return ahead


def schedule_factors(recipe: TrainRecipe, num_steps: int) -> list[float]:
    """What the schedule of a run multiplies `train.learning_rate` with, step by step.

    Raises:
        RecipeError: The schedule refuses an argument.
    """
    scheduler = make_scheduler(recipe, make_optimizer(recipe, [_stand_in(3)]), num_steps)
    return [float(scheduler.lr_lambdas[0](step)) for step in range(num_steps)]


def num_warmup_steps(recipe: TrainRecipe, num_steps: int, *, starts_at_zero: bool = False) -> int:
    """Steps that the rate rises in, of a run of `num_steps`; by the ratio never all of them."""
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    num_warmup = math.ceil(recipe.warmup_ratio * num_steps)
    return num_warmup if starts_at_zero else min(num_warmup, num_steps - 1)
