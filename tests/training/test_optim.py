"""Every optimiser and schedule that a recipe can name: it learns, or is refused with the reason."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.recipe.values import OPTIMIZERS
from kpsvd_tune.training.optim import (
    make_optimizer,
)
from kpsvd_tune.training.schedule import check_optimizer, make_scheduler

SCHEDULERS = get_args(TrainRecipe.model_fields["scheduler"].annotation)
OTHERS = [f"torch.optim.{name}" for name in ("Adam", "RMSprop", "RAdam")]
# What some need to learn in a dozen steps, where that is not a rate of 0.02.
RATES = {"sgd": 1.0, "torch.optim.RAdam": 0.2}


def recipe(**values: object) -> TrainRecipe:
    return TrainRecipe.model_validate(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(name, "cosine") for name in (*OPTIMIZERS, *OTHERS)]
    + [("adamw", name) for name in SCHEDULERS],
)
def test_every_optimiser_and_schedule_learns(start_training, optimizer, scheduler):
    changes: dict[str, Any] = {
        "learning_rate": RATES.get(optimizer, 2e-2),
        "max_steps": 12,
        "warmup_ratio": 0.1,
        "batch_size": 10,
    }
    changes |= {"optimizer": optimizer, "scheduler": scheduler}
    training = start_training(**changes)
    losses = [each.loss for each in training.steps()]
    assert losses[-1] < losses[0] - 0.02


def test_schedule_moves_once_a_step_and_reports_the_rate_used(start_training):
    metrics = list(start_training(scheduler="linear", max_steps=5, warmup_ratio=0.4).steps())
    rates = [each.learning_rate for each in metrics]
    # Two steps of warm-up, then down from the third: no step is without a rate.
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_arguments_reach_the_optimiser_and_join_with_rates_and_decay():
    parameters = [torch.zeros(2, 2, 2, requires_grad=True) for _ in range(3)]
    settings = recipe(
        optimizer="torch.optim.RMSprop",
        optimizer_args={"alpha": 0.9, "eps": "1e-6", "centered": True},
        learning_rate=0.1,
        weight_decay=0.01,
    )
    optimizer = make_optimizer(settings, parameters, [1.0, 4.0, 4.0])
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
    for group in optimizer.param_groups:
        found = {key: group[key] for key in ("alpha", "eps", "centered", "weight_decay")}
        assert found == {"alpha": 0.9, "eps": 1e-6, "centered": True, "weight_decay": 0.01}
    betas = recipe(optimizer="adamw", optimizer_args={"betas": [0.8, 0.9]})
    assert make_optimizer(betas, parameters).param_groups[0]["betas"] == (0.8, 0.9)


def rates_of(num_steps: int = 10, **values: object) -> list[float]:
    settings = recipe(**{"optimizer": "sgd", "learning_rate": 1.0} | values)
    optimizer = make_optimizer(settings, [torch.zeros(2, 2, 2, requires_grad=True)])
    schedule = make_scheduler(settings, optimizer, num_steps)
    return [schedule.lr_lambdas[0](step) for step in range(num_steps + 1)]


def test_schedules_have_defaults_and_take_arguments():
    stable = rates_of(scheduler="warmup_stable_decay", warmup_steps=2)
    assert stable[:10] == pytest.approx([0.5] + [1.0] * 9)
    assert stable[10] == pytest.approx(0.0)
    half = rates_of(
        scheduler="warmup_stable_decay",
        warmup_steps=0,
        scheduler_args={"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.5},
    )
    assert half == pytest.approx([1.0] * 7 + [0.875, 0.75, 0.625, 0.5])
    assert rates_of(scheduler="cosine_with_min_lr")[10] == pytest.approx(0.1)
    args = {"min_lr": 0.25}
    assert rates_of(scheduler="cosine_with_min_lr", scheduler_args=args)[10] == pytest.approx(0.25)


def test_warmup_steps_win_over_the_ratio():
    assert rates_of(scheduler="linear", warmup_steps=5, warmup_ratio=0.1)[5] == 1.0
    assert rates_of(scheduler="linear", warmup_steps=5, warmup_ratio=0.1)[:5] == [
        *(0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert rates_of(scheduler="linear", warmup_steps=0, warmup_ratio=0.5)[0] == 1.0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("ratio", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_a_warm_up_gives_every_step_a_rate_and_the_whole_before_the_end(
    scheduler, ratio, num_steps
):
    rates = rates_of(num_steps, scheduler=scheduler, warmup_ratio=ratio)[:num_steps]
    assert min(rates[:-1], default=1) > 0
    assert rates[0] > 0
    assert max(rates) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": "torch.optim.RMSpropp"},
            r"has no optimiser RMSpropp; expected one of .*did you mean torch\.optim\.RMSprop\?",
        ),
        (
            {"optimizer": "torch.optim.LBFGS"},
            r"torch\.optim\.LBFGS evaluates the loss several times a step",
        ),
        ({"optimizer": "torch.optim.SparseAdam"}, "SparseAdam takes sparse gradients"),
        ({"optimizer": "torch.optim.Muon"}, "Muon takes matrices, and the factors are stacks"),
        ({"optimizer": "torch.optim.Adafactor"}, "offsets start at zero.*adafactor is transf"),
        (
            {"optimizer": "torch.optim.RMSprop", "optimizer_args": {"alhpa": 0.9}},
            r"alhpa: torch\.optim\.RMSprop takes alpha, .*centered.*; did you mean alpha\?",
        ),
        (
            {"optimizer_args": {"lr": 0.1}},
            r"train\.optimizer_args\.lr: not to be given here; set train\.learning_rate",
        ),
        (
            {"optimizer_args": {"betas": [2, 0.9]}},
            r"train\.optimizer_args: adamw: Invalid beta parameter at index 0: 2",
        ),
        ({"optimizer_args": {"betas": 0.9}}, r"train\.optimizer_args: adamw: .*"),
        ({"optimizer_args": {"betas": [0.9]}}, r"train\.optimizer_args: adamw: tuple index out"),
        # torch looks at this one in the first step only.
        (
            {"optimizer": "torch.optim.ASGD", "optimizer_args": {"t0": "long"}},
            r"train\.optimizer_args: TypeE",
        ),
        ({"optimizer": "torch.optim.Rprop"}, "Rprop looks at the rate in its first step only"),
        (
            {"scheduler_args": {"num_cicles": 2}},
            r"train\.scheduler_args\.num_cicles: cosine takes num_cycles; did you mean num_cycles",
        ),
        (
            {"scheduler": "constant", "scheduler_args": {"power": 2}},
            r"train\.scheduler_args\.power: constant takes no arguments",
        ),
        (
            {"scheduler_args": {"num_warmup_steps": 2}},
            r"num_warmup_steps: not to be given here; set train\.warmup_steps",
        ),
        (
            {"scheduler": "polynomial", "learning_rate": 1e-8},
            r"train\.scheduler_args: polynomial: lr_end \(1e-07\) must be smaller",
        ),
        (
            {"scheduler": "polynomial", "scheduler_args": {"power": "two"}},
            r"train\.scheduler_args: TypeError",
        ),
        (
            {"scheduler": "polynomial", "scheduler_args": {"lr_end": -1}},
            r"scheduler_args: ValueError: step \d+ would have -.* times train\.learning_rate",
        ),
        (
            {"scheduler": "cosine_with_min_lr", "scheduler_args": {"min_lr": 5}},
            r"scheduler_args: ValueError: step \d+ would have [\d.]+ times train\.learning_rate",
        ),
        # It fails behind the last step, of one step.
        (
            {"scheduler": "polynomial", "scheduler_args": {"power": -1}, "max_steps": 1},
            r"train\.scheduler_args: ZeroDivisionError",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(values, message):
    with pytest.raises(RecipeError, match=message):
        check_optimizer(recipe(**values))


def test_an_optimiser_of_whole_tensors_is_refused_where_weights_are_shared_out():
    settings = recipe(optimizer="adafactor", parallel="fsdp")
    check_optimizer(settings, num_processes=1)
    with pytest.raises(RecipeError, match=r"adafactor has not been shown.*adamw, sgd, "):
        check_optimizer(settings, num_processes=2)


def test_rates_of_single_parameters_join_with_any_optimiser(tiny_model):
    """A rate for each group, as `rate: relative` and LoRA+ have it, asks nothing of a class."""
    from peft import get_peft_model

    from kpsvd_tune.adapter import KpsvdConfig

    model = get_peft_model(tiny_model, KpsvdConfig(target_modules=["q_proj"], rank=2))
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = {name: 4.0 if "kpsvd_right" in name else 0.25 for name in names}
    settings = recipe(optimizer="torch.optim.NAdam", learning_rate=0.01)
    optimizer = make_optimizer(settings, list(names.values()), [factors[name] for name in names])
    schedule = make_scheduler(settings, optimizer, 10)
    assert sorted(schedule.base_lrs) == pytest.approx([0.01 / 4, 0.01 * 4])
