"""Names of optimisers and schedules, and their arguments, as the `train` section holds them.

Names are checked here without torch. What a class of torch takes is known to torch alone, so
arguments are checked when the run starts, before any long work.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from kpsvd_tune.errors import did_you_mean
from kpsvd_tune.recipe.values import Text, read_number, show

# adafactor is transformers'; any other one is named by its class of torch.optim.
OPTIMIZERS = ("adamw", "adafactor", "sgd")
_TORCH_CLASS = re.compile(r"torch\.optim\.[A-Za-z_]\w*", re.ASCII)


def _check_optimizer(name: str) -> str:
    if name in OPTIMIZERS or _TORCH_CLASS.fullmatch(name):
        return name
    raise ValueError(
        f"got {show(name)}; expected {', '.join(OPTIMIZERS)} or a class of torch such as "
        f"torch.optim.RMSprop{did_you_mean(name.rpartition('.')[2], OPTIMIZERS)}"
    )


def _check_scheduler(name: object) -> object:
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"got {show(name)}, which sets the rate by the losses it sees and has no plan for the "
            "whole run; expected a schedule such as cosine, with train.early_stopping to end a run "
            "that no longer learns"
        )
    return name


def _read_argument(value: object) -> object:
    """Numbers as the rest of the recipe reads them, `1e-8` among them; lists become tuples."""
    if isinstance(value, list | tuple):
        return tuple(_read_argument(each) for each in value)
    value = read_number(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"got {show(value)}; expected a number, true or false, text, or a list")
    return value


Argument = Annotated[Any, BeforeValidator(_read_argument)]
Arguments = dict[Text, Argument]

Optimizer = Annotated[Text, AfterValidator(_check_optimizer)]

Scheduler = Annotated[
    Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ],
    BeforeValidator(_check_scheduler),
]
