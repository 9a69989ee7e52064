"""The check before every optimiser step: nothing infinite or NaN may reach a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kpsvd_tune.errors import NonFiniteError

_MOST_ROWS = 16


def check_finite(
    step: int,
    losses: Sequence[float],
    grad_norm: float | None,
    rows_of: Callable[[int], Sequence[int]],
) -> None:
    """Refuse a step whose loss or gradient is not finite.

    Args:
        step: The step, counted from 1.
        losses: Summed loss of each process.
        grad_norm: Norm of the whole gradient; None where the loss scaler judges it.
        rows_of: Row numbers of the step on one process, for the message.

    Raises:
        NonFiniteError: Names the step, the process and its rows.
    """
    for process, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {step}: the loss is {loss} on process {process}, in one of the rows "
                f"{_listed(rows_of(process))}. {_CURE}"
            )
    if grad_norm is not None and not math.isfinite(grad_norm):
        rows = [row for process in range(len(losses)) for row in rows_of(process)]
        where = "process 0" if len(losses) == 1 else f"processes 0 to {len(losses) - 1}"
        raise NonFiniteError(
            f"step {step}: the gradient norm is {grad_norm} while every loss is finite; "
            f"the step's rows on {where}: {_listed(rows)}. {_CURE}"
        )


_CURE = (
    "The step was not taken and the last checkpoint is untouched. Try a lower "
    "train.learning_rate, a smaller train.max_grad_norm, or train.precision: no"
)


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_MOST_ROWS]))
    more = len(rows) - _MOST_ROWS
    return f"{shown} and {more} more" if more > 0 else shown
