"""The methods that can be compared, as a user names them: NAME, or NAME:KEY=VALUE:KEY=VALUE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kpsvd_tune.errors import InputError, did_you_mean

Kind = Literal["kpsvd", "lora", "lora-fa", "pissa", "lokr", "vera", "ia3", "randlora", "hira"]


@dataclass(frozen=True)
class _Known:
    """What a name stands for, before the user's own settings."""

    kind: Kind
    rates: tuple[float, ...]  # tried where the user names none; hold the authors' own rate
    settings: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False  # a baseline that PEFT does not have


# Each grid holds the rate of the authors' code (docs/compare.md cites it) and goes on to where
# short runs of small models have their best: authors' rates are of long runs with large batches.
_KPSVD = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_LORA = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
_VECTORS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_LORA_XS = (1e-3, 4e-3, 1e-2, 2e-2, 4e-2)
# LoRA's alpha of twice the rank and LoRA+'s ratio of 16 are the usual defaults of their users;
# PiSSA's alpha is its rank, since it continues the weight itself.
NAMES: dict[str, _Known] = {
    "kpsvd": _Known("kpsvd", _KPSVD),
    "kpsvd-thin": _Known("kpsvd", _KPSVD, {"factor_shape": "thin"}),
    "lora": _Known("lora", _LORA, {"alpha": "2r"}),
    "lora+": _Known("lora", (5e-5, 2e-4, 6e-4, 2e-3, 6e-3), {"alpha": "2r", "ratio": "16"}),
    "rslora": _Known("lora", _LORA, {"alpha": "2r", "rslora": "true"}),
    "lora-fa": _Known("lora-fa", (7e-5, 1e-3, 1e-2, 3e-2, 1e-1), {"alpha": "2r"}, is_ours=True),
    "lora-xs": _Known("kpsvd", _LORA_XS, {"form": "core", "factor_shape": "pissa"}, is_ours=True),
    "pissa": _Known("pissa", (2e-5, 2e-4, 6e-4, 2e-3, 6e-3), {"alpha": "1r", "niter": "16"}),
    "hira": _Known("hira", _KPSVD),
    "lokr": _Known("lokr", _LORA, {"alpha": "1r", "factor": "8"}),
    "randlora": _Known("randlora", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), {"alpha": "20r"}),
    "vera": _Known("vera", _VECTORS, {"d_initial": "0.1"}),
    "ia3": _Known("ia3", _VECTORS),
}
# Those that are compared where the user names none.
DEFAULT = "kpsvd,kpsvd-thin,lora,rslora,pissa,lokr"
# Methods that read or overwrite the base's weights as they are stored, by `model.quantization`.
_NOT_ON: Mapping[str | None, tuple[Kind, ...]] = {"nf4": ("pissa", "lokr"), "int8": ("pissa",)}
_ALPHA = (r"\d+(\.\d+)?r?", "a number above 0, or a multiple of the rank such as 2r")
_NUMBER = (r"\d+(\.\d+)?", "a number above 0 such as 16")
# Settings of PEFT's methods, each with its form and that in words; those of KPSVD are the
# recipe's keys.
_KEYS: dict[Kind, dict[str, tuple[str, str]]] = {
    "lora": {"alpha": _ALPHA, "ratio": _NUMBER, "rslora": ("true|false", "true or false")},
    "lora-fa": {"alpha": _ALPHA},
    "pissa": {"alpha": _ALPHA, "niter": (r"\d+", "a whole number; 0 for an exact SVD")},
    "lokr": {"alpha": _ALPHA, "factor": (r"[1-9]\d*", "a whole number above 0")},
    "randlora": {"alpha": _ALPHA},
    "vera": {"d_initial": (r"\d+(\.\d+)?", "a number above 0 such as 0.1")},
    "hira": {},
    "ia3": {},
}
_MODULES = (r"[^+\s]+(\+[^+\s]+)*", "names of modules with + between them, such as q_proj+v_proj")


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Settings of kpsvd are recipe keys to values as YAML. Those of the others are alpha (a number,
    or a multiple of the rank such as 2r), ratio (LoRA+: rate of B over that of A), rslora, niter
    (0: exact SVD), factor (LoKr's decompose_factor) and d_initial (VeRA's start of d).
    """

    name: str  # as typed, without the rates; it names the method in every table
    kind: Kind
    settings: Mapping[str, str]
    own_rates: tuple[float, ...]  # tried where the user names none for all methods
    rates: tuple[float, ...] = ()  # those that the user typed for this method
    modules: str | tuple[str, ...] | None = None  # what it goes on; None: the recipe's targets

    @property
    def overrides(self) -> list[str]:
        """The settings of a kpsvd method as overrides of a recipe; none of another method."""
        if self.kind != "kpsvd":
            return []
        found = []
        for key, value in self.settings.items():
            sides = re.fullmatch(r"(\d+)x(\d+)", value)
            if key == "factor_shape" and sides:
                value = f"{{n: {sides[1]}, p: {sides[2]}}}"
            found.append(f"adapter.{key}={value}")
        if self.modules is not None:
            names = self.modules if isinstance(self.modules, str) else f"[{','.join(self.modules)}]"
            found.append(f"adapter.target_modules={names}")
        return found


def read_methods(text: str) -> list[Method]:
    """Read a list of methods as typed.

    Args:
        text: Names with commas between them; a name may carry settings, as in
            ``kpsvd:init=random:factor_shape=8x8`` or ``lora:alpha=1r:on=q_proj+v_proj``. Commas
            inside brackets belong to a value.

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


def default_methods(quantization: str | None) -> tuple[list[Method], str | None]:
    """The default methods that such a base can be trained by, and what to say of those left out."""
    methods = read_methods(DEFAULT)
    unfit = unfit_names(methods, quantization)
    chosen = [each for each in methods if each.name not in unfit]
    if not unfit:
        return chosen, None
    note = (
        f"compared are {', '.join(each.name for each in chosen)}: of the default methods "
        f"{', '.join(unfit)} cannot be trained on {quantization} weights"
    )
    return chosen, note


def unfit_names(methods: Sequence[Method], quantization: str | None) -> list[str]:
    """The methods that cannot be trained on weights that are kept so, by their names."""
    return [each.name for each in methods if each.kind in _NOT_ON.get(quantization, ())]


def read_rate(option: str, text: str) -> float:
    """A learning rate as typed after ``option``; an InputError says what was expected."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) or not 0 < float(text) <= 1:
        raise InputError(f"{option}: got {text!r}; expected a number above 0, up to 1")
    return float(text)


def is_ours(name: str) -> bool:
    """Whether the method of that name is a baseline of this project's own, for PEFT has none."""
    known = NAMES.get(name.partition(":")[0])
    return known is not None and known.is_ours


def _read(text: str) -> Method:
    name, *pairs = text.split(":")
    if name not in NAMES:
        raise InputError(
            f"--methods: unknown {name!r}; expected {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
        )
    known = NAMES[name]
    settings, kept = dict(known.settings), [name]
    rates: tuple[float, ...] = ()
    modules: str | tuple[str, ...] | None = None
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise InputError(f"--methods {text}: got {pair!r}; expected KEY=VALUE after each colon")
        if key == "rates":
            # Not part of the name: more rates of a method are no other method.
            each = {read_rate(f"--methods {text}", rate) for rate in value.split("+")}
            rates = tuple(sorted(each))
            continue
        kept.append(pair)
        if key == "on":
            _check_form(text, key, value, *_MODULES)
            modules = "all-linear" if value == "all-linear" else tuple(value.split("+"))
        elif known.kind == "kpsvd":
            _check_recipe_key(text, key)
            settings[key] = value
        else:
            _check(text, known.kind, key, value)
            settings[key] = value
    return Method(":".join(kept), known.kind, settings, known.rates, rates, modules)


def _check_recipe_key(text: str, key: str) -> None:
    # Rows, steps and rates are the comparison's, equal for all methods; budgets are its own too.
    if key == "target_modules":
        raise InputError(
            f"--methods {text}: the modules of one method are named by on, as in "
            "kpsvd:on=q_proj+v_proj; for all of them set it as in "
            "`compare RECIPE 'adapter.target_modules=[q_proj,v_proj]'`"
        )
    if key.split(".")[0] in ("train", "dataset", "model", "modules_to_save"):
        raise InputError(
            f"--methods {text}: {key} is the same for every method; set it for all of them, as in "
            "`compare RECIPE train.max_steps=100`"
        )
    if key == "rank.budget":
        raise InputError(f"--methods {text}: the budget comes from --budgets")


def _check(text: str, kind: Kind, key: str, value: str) -> None:
    known = _KEYS[kind]
    if key not in known:
        others = ", ".join([*known, "on", "rates"])
        raise InputError(f"--methods {text}: {kind} has no setting {key!r}; expected {others}")
    _check_form(text, key, value, *known[key])
    # An alpha or a ratio of zero would train nothing.
    if key in ("alpha", "ratio", "d_initial") and float(value.rstrip("r")) == 0:
        raise InputError(f"--methods {text}: {key} got {value!r}; expected {known[key][1]}")


def _check_form(text: str, key: str, value: str, form: str, in_words: str) -> None:
    if not re.fullmatch(form, value):
        raise InputError(f"--methods {text}: {key} got {value!r}; expected {in_words}")
