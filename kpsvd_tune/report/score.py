"""Scores as mappings and in words: shares as percentages, losses as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.report.results import Score

# Scorers whose value is no share of right answers: their n counts tokens.
LOSSES = frozenset({"loss", "perplexity", "loss_change", "base_loss"})


def score_value(scorer: str, value: float) -> str:
    """The value or standard error of a scorer, as people write it."""
    return f"{value:.4f}" if scorer in LOSSES else f"{100 * value:.1f} %"


def score_text(scorer: str, score: Mapping[str, Any]) -> str:
    """A score with its standard error, its n and the answers that were not read.

    Args:
        scorer: Name of the rule.
        score: Its value, n, stderr and unextractable.
    """
    value, error = (score_value(scorer, score[key]) for key in ("value", "stderr"))
    if scorer in LOSSES:
        return f"{value} over {score['n']:,} tokens (standard error {error})"
    return (
        f"{value} of {score['n']} (standard error {error}), {score['unextractable']} without an "
        "answer"
    )


def as_mapping(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Scorer to its value, n, stderr and unextractable."""
    return {
        score.scorer: {k: v for k, v in score.to_dict().items() if k != "scorer"}
        for score in scores
    }


def score_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Scores by task and scorer as lines of a Markdown table."""
    lines = [
        "| task | scorer | value | standard error | n | without an answer |",
        "|---|---|---|---|---|---|",
    ]
    for task, by_scorer in scores.items():
        for scorer, score in by_scorer.items():
            value, error = (score_value(scorer, score[key]) for key in ("value", "stderr"))
            lines.append(
                f"| {task} | {scorer} | {value} | {error} | {score['n']} | "
                f"{score['unextractable']} |"
            )
    return lines
