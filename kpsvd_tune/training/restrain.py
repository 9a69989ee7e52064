"""`restrain`: after the training the update is cut back until a text is known as well as before.

The user's text is read in windows. Every other one tells where the update must not act, and the
ones between judge, so that the figure is of text that nothing was fitted to. The smallest strength
that keeps to the limit is looked for on a logarithmic scale; where none does, that with the
smallest rise is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor

from kpsvd_tune.adapter.restraint import Restraint
from kpsvd_tune.context import Context, RunInput
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.evaluation.generation import evaluation_mode
from kpsvd_tune.evaluation.kept_text import KeptText
from kpsvd_tune.evaluation.loss import TokenLoss, summarise, token_losses
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import RestrainRecipe
from kpsvd_tune.report.results import RestraintReport

MOST_ROWS = 128  # of the training set, that are looked at
BATCH_SIZE = 4
STRENGTHS = (1 / 256, 256.0)  # tried, from one to the next by this factor
FACTOR = 4.0
HALVINGS = 3  # of the factor, to come nearer to the limit


def restrain(
    context: Context, data: RunInput, model: Any, settings: RestrainRecipe
) -> RestraintReport:
    """Cut the trained update of a model back; all processes get the same.

    The main process looks for the strength, the others are given what it found.
    """
    text = data.kept_text
    assert text is not None  # read with the rows, as the recipe has the section
    found = on_main_process(lambda: _search(context, data, text, model, settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(broadcast(parameter.detach()))
    return found


def _search(
    context: Context, data: RunInput, text: KeptText, model: Any, settings: RestrainRecipe
) -> RestraintReport:
    events = context.events
    with evaluation_mode(model):
        events.stage(f"measuring what was forgotten of {settings.text}")
        base: Tensor
        with model.disable_adapter():
            base = token_losses(model, data.tokenizer, text.judged, BATCH_SIZE)
        restraint: Restraint | None = None
        changes: dict[float, TokenLoss] = {}

        def rise(strength: float) -> float:
            """The rise of the loss with the update cut back, which the model is left with."""
            nonlocal restraint
            if strength and restraint is None:
                rows = data.train[:MOST_ROWS]
                restraint = Restraint(
                    model, _ids(rows, model.device), _ids(text.shown, model.device)
                )
            if restraint is not None:
                restraint.apply(strength)
            if strength not in changes:
                losses = token_losses(model, data.tokenizer, text.judged, BATCH_SIZE)
                changes[strength] = change = summarise(losses - base)
                events.note(
                    f"restrain, strength {strength:.3g}: the loss on the text changes by "
                    f"{change.value:+.4f} (standard error {change.stderr:.4f})"
                )
            return changes[strength].value

        strength, is_met = smallest_strength(rise, settings.limit)
        rise(strength)
    if not is_met:
        events.note(_unmet(settings.limit, strength, changes[strength]))
    return RestraintReport(
        text=settings.text,
        limit=settings.limit,
        is_met=is_met,
        strength=strength,
        num_tokens=len(base),
        base_loss=float(base.mean()),
        change_before=changes[0.0].value,
        change=changes[strength].value,
        stderr=changes[strength].stderr,
    )


def _unmet(limit: float, strength: float, change: TokenLoss) -> str:
    kept = f"strength {strength:g}" if strength else "the update as it was trained (strength 0)"
    return (
        f"restrain: no strength up to {STRENGTHS[1]:g} keeps to the limit {limit:g}; {kept} is "
        f"kept, for its rise is the smallest: {change.value:+.4f} (standard error "
        f"{change.stderr:.4f}). Allow more, or train with a lower rate"
    )


def smallest_strength(rise: Callable[[float], float], limit: float) -> tuple[float, bool]:
    """The smallest strength that keeps to a limit, of those looked at, and whether any did.

    ``rise`` tells the rise of the loss by strength, and is taken to fall with it. 0, which leaves
    the update as it was trained, is looked at first; then powers of FACTOR from 1, then HALVINGS
    between the last that failed and the first that kept to the limit. Where none did, it is the
    one with the smallest rise, of equal ones the smallest: modules that are trained whole can make
    the loss rise with the strength.
    """
    rises: dict[float, float] = {}

    def keeps(strength: float) -> bool:
        rises[strength] = rise(strength)
        return rises[strength] <= limit

    if keeps(0.0):
        return 0.0, True
    low, high = STRENGTHS
    strength = 1.0
    if keeps(strength):
        while strength > low and keeps(strength / FACTOR):
            strength /= FACTOR
    else:
        while strength < high:
            strength *= FACTOR
            if keeps(strength):
                break
        else:
            # A loss that is no number is the worst.
            return min(rises, key=lambda s: (math.isnan(rises[s]), rises[s], s)), False
    failed = strength / FACTOR
    for _ in range(HALVINGS):
        middle = math.sqrt(failed * strength)
        if keeps(middle):
            strength = middle
        else:
            failed = middle
    return strength, True


def _ids(rows: Sequence[TokenizedRow], device: torch.device) -> list[torch.Tensor]:
    return [torch.tensor([list(row.input_ids)], device=device) for row in rows]
