"""How a run ended: whether training made the model better on the held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Rounding alone moves a loss by less; any real change moves it by more.
_ROUNDING = 1e-6


def ending(results: Mapping[str, Any], *, from_adapter: bool) -> dict[str, Any]:
    """What results.json says of the end beside the figures of the training.

    Args:
        results: Figures of the training, as `TrainResult` gives them.
        from_adapter: Whether it began with `adapter.from`, so that its first validation is that
            adapter's and the base model's own loss was not measured.

    Returns:
        `base_validation_loss` and `worse_than_base` where it began with the base model, and
        `worse_than_start`; nothing without held-out rows.
    """
    start, loss = losses(results)
    if start is None or loss is None:
        return {}
    is_worse = loss > start + _ROUNDING * abs(start)
    if from_adapter:
        return {"worse_than_start": is_worse}
    return {
        "base_validation_loss": start,
        "worse_than_base": is_worse,
        "worse_than_start": is_worse,
    }


def worse_line(results: Mapping[str, Any]) -> str | None:
    """One sentence where the adapter is worse than what it began with; None where it is not.

    Results of earlier versions, which do not say it, are judged by their losses.
    """
    start, loss = losses(results)
    if start is None or loss is None:
        return None
    is_from_base = "worse_than_start" not in results or "base_validation_loss" in results
    if not results.get("worse_than_start", loss > start + _ROUNDING * abs(start)):
        return None
    began = "the base model" if is_from_base else "the adapter it began with (adapter.from)"
    step = results.get("adapter_step", results.get("steps"))
    return (
        f"the adapter is worse than {began} on the held-out rows: validation loss {loss:.4f} at "
        f"step {step}, {start:.4f} before the first step"
    )


def losses(results: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Validation loss before the first step, and of the adapter that was kept."""
    loss = results.get("adapter_validation_loss", results.get("validation_loss"))
    return results.get("validation_loss_before"), loss
