"""What a run found, read back and put into words: how it ended, its figures and its scores.

Most of it is the content of results.json. Shares are written as percentages, losses as they are.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.cost import cost_in_words
from kpsvd_tune.report.results import RankReport, Score
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.paths import inside, kind_of, named, siblings
from kpsvd_tune.units import counted, duration, size

# Scorers whose value is no share of right answers: their n counts tokens.
LOSSES = frozenset({"loss", "perplexity", "loss_change", "base_loss"})
# Scorers whose value is a mean of parts of a point, and no share of answers that are right.
MEANS = frozenset({"chrf", "rouge_l", "macro_f1", "fields"})
# Those of them that are a mean over labels; the others are one over questions.
OVER_LABELS = frozenset({"macro_f1"})
# Key of results.json: tasks of the recipe that a finished run has not been scored on yet.
UNSCORED = "unscored"
# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054
# Rounding alone moves a loss by less; any real change moves it by more.
_ROUNDING = 1e-6
# Runs that a message names of a folder that holds several.
_SHOWN = 8
_NAMES = {
    "validation_loss": "validation loss",
    "validation_loss_before": "the same before training",
    "text_loss_change": "rise of the loss on the text of restrain",
    "best_step": "lowest at step",
    UNSCORED: "not scored yet",
    "train_loss": "training loss",
    "steps": "steps",
    "trainable_parameters": "trainable parameters",
    "wall_seconds": "time",
    "peak_memory_bytes": "peak memory",
}


def read_run(run: Path) -> dict[str, Any]:
    """Return the rank report and the results of a run, each None where it does not exist yet.

    Raises:
        InputError: The folder is not a run, or a file in it is not what a run writes.
    """
    ranks, results = run / "init" / "rank_report.json", run / "results.json"
    if not (os.path.isfile(ranks) or os.path.isfile(results)):
        kind = kind_of(run)
        got = f"; it is {named(kind)}" if kind else "; nothing lies there"
        if within := _runs_in(run):
            listed = f"`kpsvd-tune runs {shlex.quote(str(run))}` lists them"
            got += f" with {', '.join(within)} in it: name one of them ({listed})"
        raise InputError(
            f"{run} holds neither init/rank_report.json nor results.json{got}; expected the "
            "output_dir of a recipe after `kpsvd-tune init-only`, `train` or `compare`"
            f"{'' if kind else siblings(run)}"
        )
    cure = "was it edited or cut? Write it again with `kpsvd-tune init-only`"
    found: dict[str, Any] = {"ranks": None, "results": None}
    if os.path.isfile(ranks):
        found["ranks"] = RankReport.from_dict(read_json(ranks, error=InputError, cure=cure))
    if os.path.isfile(results):
        found["results"] = read_json(results, error=InputError)
    return found


def _runs_in(folder: Path) -> list[str]:
    """Runs and comparisons that lie directly in a folder, the first few of them."""
    found = inside(folder, "run", "comparison")
    names = [str(each) for each in found[:_SHOWN]]
    return names + ["..."] * (len(found) > _SHOWN)


def label_table(
    table: Mapping[str, Mapping[str, int]],
) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The labels that were given, and for each right label how often each of them was."""
    given = sorted({label for row in table.values() for label in row})
    return given, [(right, [row.get(each, 0) for each in given]) for right, row in table.items()]


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
    trained = loss_as_trained(results)
    cut = "" if trained is None else f" cut back by `restrain` ({trained:.4f} as it was trained)"
    return (
        f"the adapter is worse than {began} on the held-out rows: validation loss {loss:.4f} at "
        f"step {step}{cut}, {start:.4f} before the first step"
    )


def loss_as_trained(results: Mapping[str, Any]) -> float | None:
    """Validation loss of the adapter before `restrain` cut it back; None where it did not."""
    if not (results.get("restraint") or {}).get("strength"):
        return None
    is_best = results.get("adapter_step") != results.get("steps")
    loss: float | None = results.get("best_validation_loss" if is_best else "validation_loss")
    return loss


def losses(results: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Validation loss before the first step, and of the adapter that was kept."""
    loss = results.get("adapter_validation_loss", results.get("validation_loss"))
    return results.get("validation_loss_before"), loss


def result_figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of results.json, the most important ones first.

    A loss that repeats one above it is left out, and so is "worse than ..." where it is not.
    """
    order = [key for key in _NAMES if key in results]
    shown: dict[str, Any] = {}
    for key in (*order, *results):
        value = results[key]
        is_repeated = key.endswith("_validation_loss") and value in shown.values()
        is_known = key == "train_loss_steps" or (
            key == "adapter_step" and value == results.get("steps")
        )
        if key == "train_loss":
            value = f"{value:.4f}, {train_loss_kind(results)}"
        if key == "text_loss_change" and not results.get("restraint", {}).get("is_met", True):
            value = f"{value:.4f}, above restrain.limit {results['restraint']['limit']:g}"
        if not (is_repeated or is_known or (key.startswith("worse_than_") and not value)):
            shown[key] = value
    return figures(cost_in_words(shown))


def train_loss_kind(results: Mapping[str, Any]) -> str:
    """What the training loss of results.json is; older versions do not say of how many steps."""
    steps = results.get("train_loss_steps")
    if steps is None:
        return "mean of the last steps"
    return f"mean of the last {counted(steps, 'step')}" if steps != 1 else "of the last step"


def figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values to show, in the order given, without mappings and nulls."""
    return [
        (_NAMES.get(key, key.removesuffix("_bytes").replace("_", " ")), _figure(key, value))
        for key, value in values.items()
        if value is not None and not isinstance(value, Mapping)
    ]


def _figure(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.endswith("_bytes"):
            return size(value)
        if key.endswith("_seconds"):
            return duration(value)
        return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class ScoreLine(NamedTuple):
    """One score with all that one has to know to read it."""

    model: str  # whose score it is: adapter, or base model
    name: str  # the task, with its file where several were scored
    scorer: str  # name of the rule
    score: Mapping[str, Any]  # value, n, stderr and unextractable
    # file, rows and how it was asked; None where an older version did not say
    conditions: str | None


def score_lines(results: Mapping[str, Any]) -> Iterator[ScoreLine]:
    """Every score of results.json, the base model's first."""
    conditions = results.get("score_conditions", {})
    for place, model in (("base_scores", "base model"), ("scores", "adapter")):
        for name, by_scorer in results.get(place, {}).items():
            own = f"{name}, base model" if place == "base_scores" else name
            asked = conditions.get(own, conditions.get(name))
            for scorer, score in by_scorer.items():
                yield ScoreLine(model, name, scorer, score, asked)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of n answers, n >= 1, by Wilson's score method.

    It never leaves 0 to 1, and says how little a share of 0 or 1 in few answers means, where the
    standard error is 0.
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


def score_error(scorer: str, score: Mapping[str, Any]) -> str:
    """The standard error of a score; a dash where answers are all equal, for then it says nothing.

    It is 0 then, however few they are; the 95 % interval says what is known.
    """
    return score_value(scorer, score["stderr"]) if score["stderr"] else "–"


def score_text(scorer: str, score: Mapping[str, Any]) -> str:
    """A score of results.json with its uncertainty, its n and the answers that were not read."""
    value = score_value(scorer, score["value"])
    if scorer in LOSSES:
        return f"{value} over {score['n']:,} tokens ({_uncertainty(scorer, score)})"
    if scorer in OVER_LABELS:
        of = f"{value}, {_labels(score)}, {counted(score['n'], 'question')}"
    elif _is_mean(scorer):
        of = f"mean {value} over {score['n']}"
    else:
        of = f"{value} of {score['n']}"
    return f"{of} ({_uncertainty(scorer, score)}), {score['unextractable']} without an answer"


def _labels(score: Mapping[str, Any]) -> str:
    """What a mean over labels is over; older versions did not keep how many there are."""
    number = score.get("num_labels")
    return "mean over the labels" if number is None else f"mean over {counted(number, 'label')}"


def as_mapping(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Scorer to its value, n, stderr and unextractable; all but a loss with their interval."""
    found: dict[str, dict[str, Any]] = {}
    for score in scores:
        # The points lie beside the answers: `POINTS_FILE`.
        told = score.to_dict()
        left_out = {"scorer", "points"}
        left_out |= {key for key in ("confusion", "num_labels") if told[key] is None}
        own = {k: v for k, v in told.items() if k not in left_out}
        if score.scorer not in LOSSES:
            own["interval"] = list(score_interval(score.scorer, own))
        found[score.scorer] = own
    return found


def score_interval(scorer: str, score: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % confidence interval of a score that is no loss; it never leaves 0 to 1."""
    value, stderr = score["value"], score["stderr"]
    # Parts that are all equal have no spread, which says little where they are few.
    if not _is_mean(scorer) or stderr == 0:
        return wilson_interval(value, score["n"])
    return max(0.0, value - _Z * stderr), min(1.0, value + _Z * stderr)


def _is_mean(scorer: str) -> bool:
    # Those of lm-eval have the name of their task in front.
    return scorer in MEANS or ": " in scorer


def score_table(results: Mapping[str, Any]) -> list[str]:
    """Every score of results.json as lines of a Markdown table; empty without a score."""
    head = (
        *("scored", "task", "scorer", "value", "standard error", "95 % interval", "n"),
        *("without an answer", "asked"),
    )
    rows = [
        (
            *(model, name, f"{scorer}, {_labels(score)}" if scorer in OVER_LABELS else scorer),
            score_value(scorer, score["value"]),
            *(score_error(scorer, score), _interval(scorer, score)),
            *(str(score["n"]), str(score["unextractable"]), conditions or "not known"),
        )
        for model, name, scorer, score, conditions in score_lines(results)
    ]
    if not rows:
        return []
    rule = f"|{'---|' * len(head)}"
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", rule, *lines]


def score_label(results: Mapping[str, Any], task: str, source: str) -> str:
    """The name under which a run keeps the scores of a task on one source of rows.

    Scores of the same source share a name, so that the base model's are next to the adapter's and
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
    return f"95 % interval {_interval(scorer, score)}"


def _interval(scorer: str, score: Mapping[str, Any]) -> str:
    """The 95 % confidence interval of a share of right answers; of a loss nothing is said."""
    if scorer in LOSSES:
        return "-"
    # By value and n, for results of earlier versions have no interval.
    low, high = score_interval(scorer, score)
    return f"{score_value(scorer, low)} to {score_value(scorer, high)}"
