"""What is said of a run that made the model worse."""

from __future__ import annotations

from typing import Any

from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.run import ending
from kpsvd_tune.training.ending import worse_message


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "output_dir": "runs/x", "train": train})


def results(before: float | None, after: float | None, **more: Any) -> dict[str, Any]:
    return {
        "validation_loss": after,
        "validation_loss_before": before,
        "steps": 9,
        "adapter_step": 9,
        "adapter_validation_loss": after,
        "trainable_parameters": 25_700_000,
        **more,
    }


def test_without_held_out_rows_nothing_is_judged() -> None:
    assert worse_message(results(None, None), recipe()) is None


def test_the_message_names_figures_causes_and_cures() -> None:
    found = results(4.2, 16.6, best_step=3, best_validation_loss=4.0)
    found |= ending(found, from_adapter=False)
    message = worse_message(found, recipe(learning_rate=1, max_grad_norm=1000, eval_every=3))
    assert message is not None
    first, *advice = message.split("\n")
    assert first == (
        "the adapter is worse than the base model on the held-out rows: validation loss 16.6000 "
        "at step 9, 4.2000 before the first step. The run is done and all of it is saved in "
        "runs/x. What to look at:"
    )
    assert "train.learning_rate is 1, " in advice[0]
    assert "try 0.33 and 0.1" in advice[0]
    assert advice[1] == "  - train.max_grad_norm is 1000: set it to 1"
    assert "25,700,000 parameters are trained (adapter.rank.max is" in advice[2]
    assert "train.keep=best --allow-change train.keep takes the adapter of that" in advice[3]


def test_no_cure_is_named_that_would_not_help() -> None:
    found = results(4.2, 5.0, best_step=9, best_validation_loss=5.0)
    message = worse_message(found, recipe())
    assert message is not None
    assert "max_grad_norm" not in message
    assert "train.keep" not in message
    assert "of another kind than the training rows" in message
    unclipped = worse_message(found, recipe(max_grad_norm=None))
    assert unclipped is not None
    assert "train.max_grad_norm is null: set it to 1" in unclipped
