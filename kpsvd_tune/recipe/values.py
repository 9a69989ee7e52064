"""The kinds of value a recipe holds: how each is read, and what it refuses.

The readers run before pydantic's strict types. They exist because YAML 1.1 has traps: `1e-3`
(no dot) is text, `no` is False, and a budget is most readable as `0.99M`.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from kpsvd_tune.errors import closest, did_you_mean

_One = TypeVar("_One")
_Each = TypeVar("_Each")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BUDGET = re.compile(r"(\d+\.?\d*|\.\d+)([eE]\+?\d{1,2})?\s*([kKmMgG]?)", re.ASCII)
_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
# adafactor is transformers'; any other one is named by its class of torch.optim.
OPTIMIZERS = ("adamw", "adafactor", "sgd")
_TORCH_CLASS = re.compile(r"torch\.optim\.[A-Za-z_]\w*", re.ASCII)

_BUDGET_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_MAX_BUDGET = 10**15


def _is_number(value: object) -> bool:
    # bool is a subclass of int in Python, and never a number in a recipe.
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_number(value: object) -> object:
    """Turn `'1e-3'` into 0.001; what is no number goes on to the strict type unchanged."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"got {show(value)}; expected a finite number")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError(f"got {show(value)}; expected text that is not blank")
    return value


def _check_path(value: str) -> str:
    """Refuse what no file can be called."""
    if "\0" in value:
        raise ValueError(f"got {show(value)}; a path that holds a NUL character names no file")
    return value


def _expand_home(value: str) -> str:
    try:
        return os.path.join(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:
        user = value.partition("/")[0]
        raise ValueError(f"got {show(value)} of {show(user)}; there is no such user here") from None


def _compile(pattern: str) -> str:
    """Refuse what `re` cannot compile; its warnings about odd but valid patterns stay quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"got {show(pattern)}; expected a regular expression: {error}") from None
    return pattern


def _check_target(value: str) -> str:
    # "all_linear" is a valid regular expression that matches nothing: surely a slip.
    if value != "all-linear" and closest(value, ["all-linear"], 0.75):
        raise ValueError(f"got {show(value)}; did you mean all-linear?")
    return value


def _read_precision(value: object) -> object:
    """`precision: no` is False to YAML 1.1, and means "no" here."""
    return "no" if value is False else value


def _read_budget(value: object) -> object:
    try:
        return None if value is None else read_number_of_parameters(value)
    except ValueError as error:
        raise ValueError(f"{error}, or null for no budget") from None


def read_number_of_parameters(value: object) -> int:
    """Read a number of trainable parameters: 990000, `0.99M`, `300k` or `1e6`.

    Raises:
        ValueError: It is no whole number of at least 1.
    """
    number: Decimal | None = None
    if isinstance(value, str) and (match := _BUDGET.fullmatch(value.strip())):
        number = Decimal(match[1] + (match[2] or "")) * _BUDGET_UNITS[match[3].lower()]
    elif isinstance(value, int | float) and _is_number(value):
        number = Decimal(value)
    if number is None or not 1 <= number <= _MAX_BUDGET or number != int(number):
        raise ValueError(
            f"got {show(value)}; expected a whole number of trainable parameters of at least 1, "
            "such as 990000, 0.99M or 300k"
        )
    return int(number)


def _freeze(value: object) -> object:
    """Take what YAML holds as it is, with lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(_freeze(each) for each in value)
    if isinstance(value, Mapping):
        return {str(key): _freeze(each) for key, each in value.items()}
    return value


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"got {show(value)}; expected a name of letters, digits and underscores")
    return value


def _read_validation(value: object) -> object:
    """Tell a share (a float below 1), a number of rows (an int) and a file (other text) apart."""
    number = value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = int(value) if value.isdecimal() and len(value) < 16 else float(value)
    is_share = isinstance(number, float) and 0 <= number < 1
    is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 0
    is_file = isinstance(number, str) and number.strip() != "" and "\0" not in number
    if not (is_share or is_count or is_file):
        raise ValueError(
            f"got {show(value)}; expected a share of the rows such as 0.02, a number of rows "
            "such as 200, or the path of a file"
        )
    return number


def _read_energy(value: object) -> object:
    """Read a share above 0 and up to 1, or auto."""
    number = read_number(value)
    is_share = _is_number(number) and 0 < number <= 1  # type: ignore[operator]
    if value != "auto" and not is_share:
        raise ValueError(f"got {show(value)}; expected a share above 0, up to 1, or auto")
    return "auto" if value == "auto" else float(number)  # type: ignore[arg-type]


def read_factor_shape(value: object) -> object:
    """Refuse what is neither a name nor a mapping, naming both forms."""
    if not isinstance(value, str | Mapping):
        raise ValueError(
            f"got {show(value)}; expected balanced, thin, pissa or a mapping such as {{n: 8, p: 2}}"
        )
    return value


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


def show(value: object) -> str:
    """The value as a user would recognise it in YAML, on one line and at most 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


CLOSED = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


class Section(BaseModel):
    """A closed, frozen mapping of the recipe; strict, so that no value changes its type unseen."""

    model_config = CLOSED


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key that may be left out: its default, what it means, and limits as pydantic names them."""
    return Field(default=default, description=description, **limits)


def conflict(message: str, *others: str) -> PydanticCustomError:
    """A fault between a key and the `others` of its section."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "others": others})


# Both decide a union by the kind of the value alone, so that only one branch reports faults.
def _list_or_scalar(value: object) -> str:
    return "list" if isinstance(value, list) else "scalar"


def mapping_or_scalar(value: object) -> str:
    """Discriminate a union of a mapping and one other type, tagged `mapping` and `scalar`."""
    return "mapping" if isinstance(value, Mapping) else "scalar"


Number = Annotated[float, BeforeValidator(read_number)]
Text = Annotated[str, AfterValidator(_not_blank)]
# A local path or a hub id; `~` is read where it is used, for a run knows its recipe as written.
PathText = Annotated[Text, AfterValidator(_check_path)]
OutputFolder = Annotated[PathText, AfterValidator(_expand_home)]
_OneOrMany = Annotated[
    Annotated[_One, Tag("scalar")] | Annotated[list[_Each], Field(min_length=1), Tag("list")],
    Discriminator(_list_or_scalar),
]
PathOrList = _OneOrMany[PathText, PathText]
TextOrList = _OneOrMany[Text, Text]
# One name stands for a list of it.
Parts = Annotated[
    list[PathText],
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=PathOrList,
    ),
]
Pattern = Annotated[Text, AfterValidator(_compile)]
# The names of a list are looked for as they are.
PatternOrList = _OneOrMany[Pattern, Text]
Targets = _OneOrMany[Annotated[Pattern, AfterValidator(_check_target)], Text]
Precision = Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(_read_precision)]
Energy = Annotated[float | Literal["auto"], BeforeValidator(_read_energy)]
# Editors take what a user may write, and not what is made of it.
Budget = Annotated[
    int | None, BeforeValidator(_read_budget, json_schema_input_type=int | float | str | None)
]
Validation = Annotated[int | float | str, BeforeValidator(_read_validation)]
PlainValues = dict[
    Annotated[str, AfterValidator(_check_name)], Annotated[Any, BeforeValidator(_freeze)]
]
Arguments = dict[Text, Annotated[Any, BeforeValidator(_read_argument)]]
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
