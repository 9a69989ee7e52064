"""What to say at the end of a run that made the model worse: likely causes and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.run import loss_as_trained, losses, worse_line

_USUAL_NORM = 1.0


def worse_message(results: Mapping[str, Any], recipe: Recipe) -> str | None:
    """What to say at the end of a run that made the model worse; None where it did not.

    `results` is the content of results.json; the recipe tells the likely causes.
    """
    line = worse_line(results)
    if line is None:
        return None
    advice = _restraint(results)
    better = _better_step(results)
    (start, _), trained = losses(results), loss_as_trained(results)
    # Where it was not worse before it was cut back, rate and rows are not to blame.
    if trained is None or start is None or trained > start:
        advice += _rate_and_size(results, recipe)
        better = better or ["the held-out rows may be of another kind than the training rows"]
    advice += better
    return (
        f"{line}. The run is done and all of it is saved in {recipe.output_dir}. What to look at:\n"
        + "\n".join(f"  - {each}" for each in advice)
    )


def _restraint(results: Mapping[str, Any]) -> list[str]:
    """What to do where the update was cut back by `restrain` and lost by it."""
    trained, (_, loss) = loss_as_trained(results), losses(results)
    if trained is None or loss is None or loss <= trained:
        return []
    found = results["restraint"]
    return [
        f"restrain cut the update back with strength {found['strength']:.3g}, which took the "
        f"validation loss from {trained:.4f} to {loss:.4f}: allow a larger restrain.limit (it is "
        f"{found['limit']:g}; as it was trained the update raises the loss on the text by "
        f"{found['change_before']:.4f}). The same command with it and --allow-change "
        "restrain.limit cuts less, without training again"
    ]


def _rate_and_size(results: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The usual causes: a rate too high, gradients not clipped, many parameters."""
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
    return advice


def _better_step(results: Mapping[str, Any]) -> list[str]:
    """What to do where another step than the adapter's was better than the start."""
    best, step = results.get("best_validation_loss"), results.get("best_step")
    start, _ = losses(results)
    is_kept = step == results.get("adapter_step", results.get("steps"))
    if best is None or start is None or best >= start or is_kept:
        return []
    return [
        f"step {step} was better than the start ({best:.4f}), so the run went on for too long: the "
        "same command with train.keep=best --allow-change train.keep takes the adapter of that "
        "step, without training again"
    ]
