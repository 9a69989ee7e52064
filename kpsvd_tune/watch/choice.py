"""Choices that could not be made as the recipe asks, and what was taken in place of them."""

from __future__ import annotations

from collections.abc import Iterator

from kpsvd_tune.report.results import Event, RankReport
from kpsvd_tune.watch.telling import fallback

# What the notes of a layer say where its rank rule could not decide.
_UNDECIDED = ("no elbow", "no noise edge", "no term stands", "the window holds less")
# A budget is met from below by less than a term; one of which not even half is used was not met.
BUDGET_SHARE = 0.5
_RULES = "adapter.rank.max, adapter.rank.window or adapter.rank.energy"


def rank_fallbacks(report: RankReport) -> Iterator[Event]:
    """A threshold that could not decide, and a budget that the other limits leave unused."""
    undecided = [
        layer for layer in report.layers if any(each in (layer.note or "") for each in _UNDECIDED)
    ]
    if undecided:
        first = undecided[0]
        yield fallback(
            "threshold",
            f"The rank rule could not decide for {len(undecided)} of {len(report.layers)} layers, "
            f"and the other limits did ({first.name}: {first.note}; rank {first.rank}).",
            "Look at init/rank_report.html; widen adapter.rank.window, or choose another "
            "adapter.rank.method.",
            layers=len(undecided),
            of=len(report.layers),
            first=first.name,
        )
    budget, trained = report.rule.get("budget"), int(report.totals["trainable_parameters"])
    if isinstance(budget, int) and trained < BUDGET_SHARE * budget:
        yield fallback(
            "budget",
            f"{trained:,} parameters are trained, of a budget of {budget:,}: other limits of the "
            "ranks are lower.",
            f"Raise {_RULES} to use the budget, or lower adapter.rank.budget if that is enough.",
            trained=trained,
            budget=budget,
        )


def bf16_fallback(device: str, asked: str) -> Event:
    """A device without units for bfloat16; `asked` is the key and value that ask for it."""
    return fallback(
        "bf16",
        f"{asked} asks for bfloat16, and {device} has no units for it: it is computed by other "
        "ones, slowly.",
        'Set train.precision: "no" and model.dtype: float32 on this device.',
        device=device,
    )
