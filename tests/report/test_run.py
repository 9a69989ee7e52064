"""What a run found in words: scores with their intervals, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import (
    as_mapping,
    ending,
    result_figures,
    score_label,
    score_lines,
    score_table,
    score_text,
    wilson_interval,
    worse_line,
)


def share(value: float, n: int) -> dict[str, Any]:
    return {"value": value, "n": n, "stderr": (value * (1 - value) / n) ** 0.5, "unextractable": 1}


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    [
        # By the closed forms z^2 / (n + z^2) and n / (n + z^2) at the ends, with z^2 = 3.8415.
        (0.0, 3, 0.0, 3.8415 / 6.8415),
        (1.0, 3, 3 / 6.8415, 1.0),
        # A textbook example: 15 of 50.
        (0.3, 50, 0.1910, 0.4375),
        (0.5, 1, 0.0546, 0.9454),
    ],
)
def test_wilson_intervals(value: float, n: int, low: float, high: float):
    assert wilson_interval(value, n) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_few_answers_shows_how_little_it_says():
    assert score_text("exact_match", share(0.0, 3)) == (
        "0.0 % of 3 (95 % interval 0.0 % to 56.1 %), 1 without an answer"
    )
    loss = {"value": 1.25, "n": 1200, "stderr": 0.01, "unextractable": 0}
    assert score_text("loss", loss) == "1.2500 over 1,200 tokens (standard error 0.0100)"


def test_shares_are_kept_with_their_interval_and_losses_without():
    found = as_mapping([Score("exact_match", 0.0, 3, 0.0), Score("loss", 1.2, 90, 0.1)])
    assert list(found["exact_match"]) == ["value", "n", "stderr", "unextractable", "interval"]
    assert found["exact_match"]["interval"] == pytest.approx([0.0, 0.5615], abs=1e-4)
    assert list(found["loss"]) == ["value", "n", "stderr", "unextractable"]


RESULTS: dict[str, Any] = {
    "scores": {"exact_match": {"exact_match": share(0.5, 4)}, "loss": {"loss": share(1.0, 9)}},
    "base_scores": {"exact_match": {"exact_match": share(0.25, 8)}},
    "score_conditions": {
        "exact_match": "a.jsonl, the first 4, template '<|user|>'",
        "exact_match, base model": "a.jsonl, the first 8, greedy",
    },
}


def test_every_line_says_whose_score_it_is_of_which_rows_and_how_asked():
    lines = list(score_lines(RESULTS))
    assert [(line.model, line.name, line.conditions) for line in lines] == [
        ("base model", "exact_match", "a.jsonl, the first 8, greedy"),
        ("adapter", "exact_match", "a.jsonl, the first 4, template '<|user|>'"),
        ("adapter", "loss", None),
    ]
    table = score_table(RESULTS)
    assert len(table) == 5
    assert table[2] == (
        "| base model | exact_match | exact_match | 25.0 % | 15.3 % | 7.1 % to 59.1 % | 8 | 1 "
        "| a.jsonl, the first 8, greedy |"
    )
    # A bar in a template would begin another cell.
    assert all(row.count("|") == 10 for row in table)
    assert table[-1].endswith("| not known |")
    assert score_table({}) == []


def test_scores_of_another_file_get_a_name_of_their_own(tmp_path: Path):
    assert score_label({}, "gsm8k", "openai/gsm8k (test)") == "gsm8k"
    assert score_label(RESULTS, "exact_match", "a.jsonl") == "exact_match"
    assert score_label(RESULTS, "exact_match", "b/c.jsonl") == "exact_match, c.jsonl"
    # Nobody knows whose the loss is, so it is not replaced.
    assert score_label(RESULTS, "loss", "a.jsonl") == "loss, a.jsonl"
    known = {
        **RESULTS,
        "scores": {**RESULTS["scores"], "exact_match, c.jsonl": {}, "exact_match-2": {}},
        "score_files": {"exact_match, c.jsonl": "b/c.jsonl", "exact_match-2": "second.jsonl"},
    }
    assert score_label(known, "exact_match", "b/c.jsonl") == "exact_match, c.jsonl"
    assert score_label(known, "exact_match", "d/c.jsonl") == "exact_match, d/c.jsonl"
    assert score_label(known, "exact_match", "second.jsonl") == "exact_match-2"
    again = {**known, "scores": {**known["scores"], "exact_match, d/c.jsonl": {}}}
    assert score_label(again, "exact_match", "d/c.jsonl") == "exact_match, d/c.jsonl"
    # One file by two paths is one file.
    file = tmp_path / "rows.jsonl"
    file.touch()
    one = {"scores": {"loss": {}}, "score_files": {"loss": str(file)}}
    other = tmp_path / "." / ".." / tmp_path.name / "rows.jsonl"
    assert score_label(one, "loss", str(other)) == "loss"


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


@pytest.mark.parametrize(
    ("is_met", "shown"), [(True, "0.5116"), (False, "0.5116, above restrain.limit 0.2")]
)
def test_a_limit_that_was_not_kept_is_shown(is_met: bool, shown: str) -> None:
    found = {"text_loss_change": 0.51158, "restraint": {"limit": 0.2, "is_met": is_met}}
    assert result_figures(found) == [("rise of the loss on the text of restrain", shown)]
