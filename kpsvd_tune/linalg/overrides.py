"""Exceptions from the rank rule: patterns of module names to a rank or to other limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.storage.patterns import time_limit

OVERRIDE_KEYS = ("method", "energy", "min", "max")
Override = int | Mapping[str, Any]


def overrides_by_layer(names: Sequence[str], overrides: Mapping[str, Override]) -> list[Override]:
    """Each layer's fixed rank, or its own keys (none of them where no pattern matches).

    Args:
        names: The modules, in model order.
        overrides: Pattern to override; the first match wins.

    Raises:
        ValueError: A pattern that matches nothing or is no regular expression, a negative rank or
            an unknown key.
    """
    own: list[Override] = [{}] * len(names)
    # The first pattern wins, so later ones are written first.
    for pattern, override in reversed(list(overrides.items())):
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
        try:
            matcher = re.compile(rf"(.*\.)?({pattern})")
        except re.error as error:
            raise ValueError(
                f"rank override {pattern!r} is not a regular expression: {error}"
            ) from None
        with time_limit(f"rank override {pattern!r}"):
            hits = [i for i, name in enumerate(names) if matcher.fullmatch(name)]
        if not hits:
            raise ValueError(
                f"rank override {pattern!r} matches none of the {len(names)} layers, such as "
                f"{names[0] if names else 'none'}"
            )
        for i in hits:
            own[i] = override
    return own
