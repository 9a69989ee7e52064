"""The rank rule: its values with their ranges, and what it is for a single layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kpsvd_tune.storage.patterns import time_limit

METHODS = ("energy", "elbow", "energy+elbow", "noise_edge", "fixed")
ENERGY_OF = ("pooled", "window", "total")
OVERRIDE_KEYS = ("method", "energy", "min", "max")
Override = int | Mapping[str, Any]


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen: the one form of it, which recipes and configurations write down.

    Raises:
        ValueError: A value is out of range.
    """

    method: str = "energy+elbow"  # energy+elbow takes the smaller of the two
    energy: float = 0.5  # the threshold tau in (0, 1]
    # What tau is a share of: the pooled window of all layers, each layer's own window, or each
    # layer's total ||W||_F^2.
    energy_of: str = "pooled"
    window: int = 32  # leading terms that are computed and looked at
    min: int = 1  # fewest terms of a layer; 0 lets a layer stay untouched
    max: int = 16  # most terms of a layer; what fixed uses everywhere
    budget: int | None = None  # most trainable parameters of all layers together
    tolerance: float = 5e-3  # share of the window's energy that may be missed, in [0, 1)
    # Patterns (regular expressions, matched against a module's whole name or its end after a dot)
    # to a fixed rank or to a mapping with some of method, energy, min, max. The first match wins.
    # A layer with its own energy applies it to its own window when the rule pools, and leaves the
    # pool.
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"rank method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.energy_of not in ENERGY_OF:
            raise ValueError(
                f"energy_of {self.energy_of!r}: expected one of {', '.join(ENERGY_OF)}"
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"the energy threshold must be in (0, 1], got {self.energy}")
        if self.window < 1:
            raise ValueError(f"the window must be at least 1, got {self.window}")
        if not 0 <= self.min <= self.max:
            raise ValueError(f"expected 0 <= min <= max, got min {self.min} and max {self.max}")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"the budget must not be negative, got {self.budget}")

    def for_layers(self, names: Sequence[str]) -> list[LayerRule]:
        """The rule of each layer, with the first override that matches its name.

        Raises:
            ValueError: An override that matches nothing, is no regular expression, or asks for
                something unknown or out of range.
        """
        own: list[Override] = [{}] * len(names)
        # The first pattern wins, so later ones are written first.
        for pattern, override in reversed(list(self.overrides.items())):
            _check_override(pattern, override)
            for index in _matches(pattern, names):
                own[index] = override
        return [self._for_layer(*each) for each in zip(names, own, strict=True)]

    def _for_layer(self, name: str, override: Override) -> LayerRule:
        is_pooled = self.energy_of == "pooled"
        if isinstance(override, int):
            return LayerRule(self, is_pooled, override)
        try:
            own = replace(self, overrides={}, **override)
        except ValueError as error:
            raise ValueError(f"rank override for {name}: {error}") from None
        return LayerRule(own, is_pooled and "energy" not in override, None)


@dataclass(frozen=True)
class LayerRule:
    """The rule of one layer."""

    rule: RankRule  # with the layer's own values
    is_pooled: bool  # it takes part in the pooled energy threshold
    rank: int | None  # the rank that an override fixes; None: the rule chooses

    @property
    def least(self) -> int:
        """Fewest terms that the layer must get."""
        return self.rule.min if self.rank is None else self.rank


def _check_override(pattern: str, override: Override) -> None:
    if isinstance(override, int):
        if override < 0:
            raise ValueError(
                f"rank override {pattern!r}: the rank must not be negative, got {override}"
            )
    elif unknown := sorted(set(override) - set(OVERRIDE_KEYS)):
        raise ValueError(
            f"rank override {pattern!r}: unknown {', '.join(unknown)}; expected a rank or "
            f"some of {', '.join(OVERRIDE_KEYS)}"
        )


def _matches(pattern: str, names: Sequence[str]) -> list[int]:
    try:
        matcher = re.compile(rf"(.*\.)?({pattern})")
    except re.error as error:
        raise ValueError(
            f"rank override {pattern!r} is not a regular expression: {error}"
        ) from None
    with time_limit(f"rank override {pattern!r}"):
        hits = [index for index, name in enumerate(names) if matcher.fullmatch(name)]
    if not hits:
        raise ValueError(
            f"rank override {pattern!r} matches none of the {len(names)} layers, such as "
            f"{names[0] if names else 'none'}"
        )
    return hits
