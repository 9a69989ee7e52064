"""Layers whose offsets never move, and offsets that grow beyond the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kpsvd_tune.report.results import Event
from kpsvd_tune.watch.telling import warning

# Steps after which a layer that has not moved at all will hardly ever move: every optimiser moves
# what has a gradient in its first or second step.
DEAD_STEPS = 10
# Norm of a layer's update over that of its weight. Useful updates of trained models are 0.001 to
# 0.1; the small random weights of made-up ones are outgrown a few times by runs that learn well.
EXPLODING_SHARE = 10.0
_LISTED = 4


def dead_layers(
    start: Mapping[str, float],
    now: Mapping[str, float],
    num_steps: int,
    step: int,
    advice: Callable[[Sequence[str]], str],
) -> Event | None:
    """The warning of layers whose norm is to the last bit what it was.

    Args:
        start: Norm of what is trained, by layer, when this session began.
        now: The same now.
        num_steps: Steps taken since then.
        step: Optimiser steps of the run.
        advice: Says of dead layers what to set so that they are left out.
    """
    dead = [name for name, norm in now.items() if start.get(name) == norm]
    if num_steps < DEAD_STEPS or not dead:
        return None
    return warning(
        "dead_layers",
        f"{len(dead)} of {len(now)} adapted layers have not moved in {num_steps} steps: "
        f"{_named(dead)}.",
        f"The model may not use them on these rows; {advice(dead)}.",
        step,
        dead=len(dead),
        adapted=len(now),
        layers=_named(dead),
    )


def exploding_offsets(shares: Mapping[str, float], step: int) -> Event | None:
    """The warning of updates that are as large as their weights; `shares` by layer."""
    large = sorted(
        (name for name, share in shares.items() if not share <= EXPLODING_SHARE),
        key=lambda name: -shares[name],
    )
    if not large:
        return None
    return warning(
        "exploding_offsets",
        f"The update of {len(large)} of {len(shares)} layers has outgrown the weight; the "
        f"largest is {shares[large[0]]:.3g} times its weight: {_named(large)}.",
        "Lower train.learning_rate, or set train.weight_decay, which draws the offsets towards the "
        "base.",
        step,
        layers=_named(large),
        largest=shares[large[0]],
        limit=EXPLODING_SHARE,
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
