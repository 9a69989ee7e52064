"""Whether a run made the model worse."""

from __future__ import annotations

from typing import Any

import pytest

from kpsvd_tune.report.run import ending, worse_line


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


@pytest.mark.parametrize(
    ("before", "after", "is_worse"), [(4.2, 16.6, True), (4.2, 4.1, False), (4.2, 4.2, False)]
)
def test_the_end_is_judged_by_the_losses(before: float, after: float, is_worse: bool) -> None:
    found = ending(results(before, after), from_adapter=False)
    assert found == {
        "base_validation_loss": before,
        "worse_than_base": is_worse,
        "worse_than_start": is_worse,
    }
    assert ending(results(before, after), from_adapter=True) == {"worse_than_start": is_worse}
    assert (worse_line(results(before, after) | found) is not None) is is_worse
    # Those of earlier versions say nothing of it.
    old = {"validation_loss": after, "validation_loss_before": before, "steps": 9}
    assert (worse_line(old) is not None) is is_worse


def test_without_held_out_rows_nothing_is_judged() -> None:
    assert ending(results(None, None), from_adapter=False) == {}
    assert worse_line(results(None, None)) is None


def test_a_run_from_an_adapter_is_compared_with_that_adapter() -> None:
    found = results(4.2, 5.0)
    found |= ending(found, from_adapter=True)
    assert "worse than the adapter it began with (adapter.from)" in str(worse_line(found))
