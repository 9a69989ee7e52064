"""How a run ended: whether training made the model better on the held-out rows, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.recipe import Recipe

# Rounding alone moves a loss by less; any real change moves it by more.
_ROUNDING = 1e-6
_USUAL_NORM = 1.0


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
    start, loss = _losses(results)
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
    start, loss = _losses(results)
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


def worse_message(results: Mapping[str, Any], recipe: Recipe) -> str | None:
    """What to say at the end of a run that made the model worse; None where it did not.

    Args:
        results: The content of results.json.
        recipe: What the run was asked for, which tells the likely causes.
    """
    line = worse_line(results)
    if line is None:
        return None
    train, rank = recipe.train, recipe.adapter.rank
    norm = train.max_grad_norm
    advice = [
        f"train.learning_rate is {train.learning_rate:g}, and too high a rate is the likeliest "
        f"cause: try {train.learning_rate / 3:.2g} and {train.learning_rate / 10:.2g}"
    ]
    if norm is None or norm > _USUAL_NORM:
        shown = "null" if norm is None else f"{norm:g}"
        advice.append(f"train.max_grad_norm is {shown}: set it to {_USUAL_NORM:g}")
    if number := results.get("trainable_parameters"):
        limit = "none" if rank.budget is None else f"{rank.budget:,}"
        advice.append(
            f"{number:,} parameters are trained (adapter.rank.max is {rank.max}, budget {limit}): "
            "a larger adapter needs a lower rate; try fewer"
        )
    advice += _better_step(results, recipe)
    return (
        f"{line}. The run is done and all of it is saved in {recipe.output_dir}. What to look at:\n"
        + "\n".join(f"  - {each}" for each in advice)
    )


def _better_step(results: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What to do where a step before the last was better than the start."""
    best, step = results.get("best_validation_loss"), results.get("best_step")
    start, _ = _losses(results)
    if best is None or start is None or best >= start or recipe.train.keep == "best":
        return ["the held-out rows may be of another kind than the training rows"]
    return [
        f"step {step} was better than the start ({best:.4f}), so the run went on for too long: the "
        "same command with train.keep=best --allow-change train.keep takes the adapter of that "
        "step, without training again"
    ]


def _losses(results: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Validation loss before the first step, and of the adapter that was kept."""
    loss = results.get("adapter_validation_loss", results.get("validation_loss"))
    return results.get("validation_loss_before"), loss
