"""What to say at the end of a run that made the model worse: likely causes and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.run import losses, worse_line

_USUAL_NORM = 1.0


def worse_message(results: Mapping[str, Any], recipe: Recipe) -> str | None:
    """What to say at the end of a run that made the model worse; None where it did not.

    `results` is the content of results.json; the recipe tells the likely causes.
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
    start, _ = losses(results)
    if best is None or start is None or best >= start or recipe.train.keep == "best":
        return ["the held-out rows may be of another kind than the training rows"]
    return [
        f"step {step} was better than the start ({best:.4f}), so the run went on for too long: the "
        "same command with train.keep=best --allow-change train.keep takes the adapter of that "
        "step, without training again"
    ]
