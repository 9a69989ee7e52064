"""The methods that can be compared, as a user names them: NAME, or NAME:KEY=VALUE:KEY=VALUE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kpsvd_tune.errors import InputError, did_you_mean

Kind = Literal["kpsvd", "lora", "pissa", "lokr"]

# Name -> kind and settings. LoRA's alpha of twice the rank and LoRA+'s ratio of 16 are the usual
# defaults of their users; PiSSA's alpha is its rank, since it continues the weight itself.
NAMES: dict[str, tuple[Kind, dict[str, str]]] = {
    "kpsvd": ("kpsvd", {}),
    "kpsvd-thin": ("kpsvd", {"factor_shape": "thin"}),
    "lora": ("lora", {"alpha": "2r"}),
    "lora+": ("lora", {"alpha": "2r", "ratio": "16"}),
    "rslora": ("lora", {"alpha": "2r", "rslora": "true"}),
    "pissa": ("pissa", {"alpha": "1r", "niter": "16"}),
    "lokr": ("lokr", {"alpha": "1r", "factor": "8"}),
}
# Settings of PEFT's methods; those of KPSVD are the recipe's keys.
_KEYS: dict[Kind, dict[str, str]] = {
    "lora": {"alpha": r"\d+(\.\d+)?r?", "ratio": r"\d+(\.\d+)?", "rslora": "true|false"},
    "pissa": {"alpha": r"\d+(\.\d+)?r?", "niter": r"\d+"},
    "lokr": {"alpha": r"\d+(\.\d+)?r?", "factor": r"[1-9]\d*"},
}


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Settings of kpsvd are recipe keys to values as YAML. Those of the others are alpha (a number,
    or a multiple of the rank such as 2r), ratio (LoRA+: rate of B over that of A), rslora, niter
    (0: exact SVD) and factor (LoKr's decompose_factor).
    """

    name: str  # as typed; it names the method in every table
    kind: Kind
    settings: Mapping[str, str]

    @property
    def overrides(self) -> list[str]:
        """The settings of a kpsvd method as overrides of a recipe."""
        found = []
        for key, value in self.settings.items():
            sides = re.fullmatch(r"(\d+)x(\d+)", value)
            if key == "factor_shape" and sides:
                value = f"{{n: {sides[1]}, p: {sides[2]}}}"
            found.append(f"adapter.{key}={value}")
        return found


def read_methods(text: str) -> list[Method]:
    """Read a list of methods as typed.

    Args:
        text: Names with commas between them; a name may carry settings, as in
            ``kpsvd:init=random:factor_shape=8x8`` or ``lora:alpha=1r``. Commas inside brackets
            belong to a value.

    Returns:
        The methods, in the order given.

    Raises:
        InputError: An unknown name or setting, the same method twice, or none.
    """
    parts = re.split(r",(?![^\[\]{}]*[\]}])", text)
    methods = [_read(each.strip()) for each in parts if each.strip()]
    if not methods:
        raise InputError(f"--methods is empty; expected some of {', '.join(NAMES)}")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--methods: {name} is given twice")
    return methods


def _read(text: str) -> Method:
    name, *pairs = text.split(":")
    if name not in NAMES:
        raise InputError(
            f"--methods: unknown {name!r}; expected {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
        )
    kind, defaults = NAMES[name]
    settings = dict(defaults)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise InputError(f"--methods {text}: got {pair!r}; expected KEY=VALUE after each colon")
        if kind == "kpsvd":
            _check_recipe_key(text, key)
        else:
            _check(text, kind, key, value)
        settings[key] = value
    return Method(text, kind, settings)


def _check_recipe_key(text: str, key: str) -> None:
    # Rows, steps and rates are the comparison's, equal for all methods; budgets are its own too.
    if key.split(".")[0] in ("train", "dataset", "model", "modules_to_save", "target_modules"):
        raise InputError(
            f"--methods {text}: {key} is the same for every method; set it for all of them, as in "
            "`compare RECIPE train.max_steps=100`"
        )
    if key == "rank.budget":
        raise InputError(f"--methods {text}: the budget comes from --budgets")


def _check(text: str, kind: Kind, key: str, value: str) -> None:
    known = _KEYS[kind]
    if key not in known:
        raise InputError(
            f"--methods {text}: {kind} has no setting {key!r}; expected {', '.join(known)}"
        )
    is_read = re.fullmatch(known[key], value)
    # An alpha or a ratio of zero would train nothing.
    if not is_read or (key in ("alpha", "ratio") and float(value.rstrip("r")) == 0):
        raise InputError(f"--methods {text}: {key} got {value!r}; expected {_FORMS[key]}")


_FORMS = {
    "alpha": "a number above 0, or a multiple of the rank such as 2r",
    "ratio": "a number above 0 such as 16",
    "rslora": "true or false",
    "niter": "a whole number; 0 for an exact SVD",
    "factor": "a whole number above 0",
}
