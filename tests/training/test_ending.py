"""What is said of a run that made the model worse."""

from __future__ import annotations

from typing import Any

import pytest

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


def restrained(trained: float, **more: Any) -> dict[str, Any]:
    """A run that began with 5.7 and ended with 7.7, cut back from `trained` at its last step."""
    restraint = {"strength": 4.76, "limit": 0.05, "change_before": 2.248, "is_met": True}
    found = results(5.7, trained, **more) | {"adapter_validation_loss": 7.7, "restraint": restraint}
    return found | ending(found, from_adapter=False)


COST = (
    "  - restrain cut the update back with strength 4.76, which took the validation loss from "
    "4.3000 to 7.7000: allow a larger restrain.limit (it is 0.05; as it was trained the update "
    "raises the loss on the text by 2.2480). The same command with it and --allow-change "
    "restrain.limit cuts less, without training again"
)


@pytest.mark.parametrize("best", [{"best_step": 9, "best_validation_loss": 4.3}, {}], ids=str)
def test_what_the_restraint_cost_is_not_laid_on_the_training(best: dict[str, Any]) -> None:
    message = worse_message(restrained(4.3, **best), recipe())
    assert message is not None
    first, *advice = message.split("\n")
    assert (
        "validation loss 7.7000 at step 9 cut back by `restrain` (4.3000 as it was trained), "
        "5.7000 before the first step."
    ) in first
    assert advice == [COST]


def test_the_best_step_is_advised_where_the_adapter_is_of_another() -> None:
    found = restrained(4.3, best_step=6, best_validation_loss=4.1)
    message = worse_message(found, recipe())
    assert message is not None
    _, *advice = message.split("\n")
    assert advice[0] == COST
    assert advice[1].startswith("  - step 6 was better than the start (4.1000)")
    assert len(advice) == 2
    # Of train.keep: best, the loss before the cut is the best step's.
    kept = found | {"adapter_step": 6}
    assert worse_message(kept, recipe()) == message.replace("step 9", "step 6").replace(
        "4.3000", "4.1000"
    ).removesuffix("\n" + advice[1])


def test_a_training_that_was_worse_before_it_was_cut_back_is_to_blame_too() -> None:
    message = worse_message(restrained(6.0, best_step=9, best_validation_loss=6.0), recipe())
    assert message is not None
    assert "took the validation loss from 6.0000 to 7.7000: allow a larger" in message
    assert "too high a rate is the likeliest" in message
    assert "of another kind than the training rows" in message
    better = worse_message(restrained(8.0, best_step=9, best_validation_loss=8.0), recipe())
    assert better is not None
    assert "restrain.limit" not in better
    assert "too high a rate is the likeliest" in better
