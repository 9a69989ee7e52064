"""Scores as mappings and in words: shares as percentages, losses as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kpsvd_tune.report.results import Score

# Scorers whose value is no share of right answers: their n counts tokens.
LOSSES = frozenset({"loss", "perplexity", "loss_change", "base_loss"})
# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


class ScoreLine(NamedTuple):
    """One score with all that one has to know to read it.

    Attributes:
        model: Whose score it is: adapter, or base model.
        name: The task, with its file where several were scored.
        scorer: Name of the rule.
        score: Its value, n, stderr and unextractable.
        conditions: File, rows and how it was asked; None where an older version did not say.
    """

    model: str
    name: str
    scorer: str
    score: Mapping[str, Any]
    conditions: str | None


def score_lines(results: Mapping[str, Any]) -> Iterator[ScoreLine]:
    """Every score of a run, the base model's first.

    Args:
        results: The content of results.json.
    """
    conditions = results.get("score_conditions", {})
    for place, model in (("base_scores", "base model"), ("scores", "adapter")):
        for name, by_scorer in results.get(place, {}).items():
            own = f"{name}, base model" if place == "base_scores" else name
            asked = conditions.get(own, conditions.get(name))
            for scorer, score in by_scorer.items():
                yield ScoreLine(model, name, scorer, score, asked)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, by Wilson's score method.

    It never leaves 0 to 1, and says how little a share of 0 or 1 in few answers means, where the
    standard error is 0.

    Args:
        share: Of right answers, 0 to 1.
        n: Answers, at least 1.
    """
    weight = _Z**2 / n
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    low = 0.0 if share <= 0 else max(0.0, middle - half)
    high = 1.0 if share >= 1 else min(1.0, middle + half)
    return low, high


def score_value(scorer: str, value: float) -> str:
    """The value or standard error of a scorer, as people write it."""
    return f"{value:.4f}" if scorer in LOSSES else f"{100 * value:.1f} %"


def score_text(scorer: str, score: Mapping[str, Any]) -> str:
    """A score with its uncertainty, its n and the answers that were not read.

    Args:
        scorer: Name of the rule.
        score: Its value, n, stderr and unextractable.
    """
    value = score_value(scorer, score["value"])
    if scorer in LOSSES:
        return f"{value} over {score['n']:,} tokens ({_uncertainty(scorer, score)})"
    return (
        f"{value} of {score['n']} ({_uncertainty(scorer, score)}), {score['unextractable']} "
        "without an answer"
    )


def as_mapping(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Scorer to its value, n, stderr and unextractable; a share with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for score in scores:
        found[score.scorer] = {k: v for k, v in score.to_dict().items() if k != "scorer"}
        if score.scorer not in LOSSES:
            found[score.scorer]["interval"] = list(wilson_interval(score.value, score.n))
    return found


def score_table(results: Mapping[str, Any]) -> list[str]:
    """Every score of a run as lines of a Markdown table; empty without a score.

    Args:
        results: The content of results.json.
    """
    rows = []
    for model, name, scorer, score, conditions in score_lines(results):
        cells = [
            model,
            name,
            scorer,
            score_value(scorer, score["value"]),
            _uncertainty(scorer, score),
            str(score["n"]),
            str(score["unextractable"]),
            conditions or "not known",
        ]
        shown = (str(cell).replace("|", "&#124;") for cell in cells)
        rows.append(f"| {' | '.join(shown)} |")
    if not rows:
        return []
    return [
        "| scored | task | scorer | value | uncertainty | n | without an answer | asked |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def score_label(results: Mapping[str, Any], task: str, source: str) -> str:
    """The name under which a run keeps the scores of a task on one source of rows.

    Scores of the same source share a name, so that the base model's stand beside the adapter's and
    a later one replaces an earlier one; those of another source never do.

    Args:
        results: The content of results.json.
        task: The task.
        source: Where its rows are from, as `score_files` keeps it.
    """
    taken: list[str] = list(
        dict.fromkeys([*results.get("scores", {}), *results.get("base_scores", {})])
    )
    own = [name for name in taken if name == task or name.startswith((f"{task}-", f"{task}, "))]
    for name in own:
        if _is_of(results, name, source):
            return name
    short = f"{task}, {Path(source).name or source}"
    return next((name for name in (task, short) if name not in taken), f"{task}, {source}")


def _is_of(results: Mapping[str, Any], name: str, source: str) -> bool:
    known = results.get("score_files", {}).get(name)
    if known is not None:
        if known == source:
            return True
        one, other = Path(known), Path(source)
        return one.exists() and other.exists() and one.samefile(other)
    # Earlier versions wrote the source down at the beginning of the conditions only.
    conditions = results.get("score_conditions", {})
    said = str(conditions.get(name, conditions.get(f"{name}, base model", "")))
    return said.startswith(f"{source}, ")


def _uncertainty(scorer: str, score: Mapping[str, Any]) -> str:
    if scorer in LOSSES:
        return f"standard error {score_value(scorer, score['stderr'])}"
    # By value and n, for results of earlier versions have no interval.
    low, high = wilson_interval(score["value"], score["n"])
    return f"95 % interval {score_value(scorer, low)} to {score_value(scorer, high)}"
