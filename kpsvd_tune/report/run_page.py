"""The report of a run as an HTML page, `templates/run.html.j2` filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kpsvd_tune.report.console import preflight_lines, rank_summary
from kpsvd_tune.report.events import EVENTS_FILE
from kpsvd_tune.report.figures import PALETTES, Style, Trace, figure, smooth, thinned
from kpsvd_tune.report.heat_map import heat_map, plot_text
from kpsvd_tune.report.pages import render
from kpsvd_tune.report.results import LearnedReport, RankReport
from kpsvd_tune.report.run import label_table, score_error, score_lines, score_text, score_value
from kpsvd_tune.report.run_files import Answers, RunFiles, gold_text, read_answers
from kpsvd_tune.report.run_words import (
    CURVE_COLUMNS,
    cards,
    command_lines,
    cost_lines,
    curve_rows,
    identity_lines,
    number,
    series,
    share_text,
    state_line,
    told_events,
    validations,
)
from kpsvd_tune.storage.durable import replace_file

# What of a run is shown on its page: of more than that, how much more there is.
MOST_ANSWERS = 6  # questions of a task
LONGEST_TEXT = 1500  # characters of a question or an answer
LONGEST_RECIPE = 20_000
MOST_EVENTS = 200
MOST_LABELS = 30  # in a table of right and given ones; results.json has larger ones
MOST_LEARNED = 12  # layers in the table; all are in the heat map

_TRAIN, _VALIDATION, _WARNING = Style("training", 0), Style("validation", 1), Style("warning", 4)


def write_run_page(run: RunFiles, file: Path) -> None:
    """Write the page of a run.

    Raises:
        InputError: plotly is not installed.
        ResourceError: The disk refused.
    """
    replace_file(file, run_page(run).encode("utf-8", errors="backslashreplace"))


def run_page(run: RunFiles) -> str:
    """Render a run as a page: figures, maps, answers, scores, data, cost, events and recipe.

    Raises:
        InputError: plotly is not installed.
    """
    figures = _figures(run)
    maps = {}
    if run.ranks is not None and run.ranks.layers:
        maps["ranks"] = _rank_map(run.ranks)
    if run.learned is not None and run.learned.layers:
        maps["learned"] = _learned_map(run.learned)
    told = told_events(run.events)
    return render(
        "run",
        "the report of a run",
        {"figures": figures, "maps": maps, "palettes": PALETTES},
        model=str(run.recipe.get("model", {}).get("path") or (run.ranks and run.ranks.model) or ""),
        name=run.name,
        state=run.state,
        subtitle=state_line(run),
        faults=run.faults,
        cards=cards(run),
        figures={name: each["about"] for name, each in figures.items()},
        last_step=f"{run.last_step:,}",
        curve=(CURVE_COLUMNS, curve_rows(run)),
        rank_lines=rank_summary(run.ranks) if run.ranks else [],
        maps={name: each["about"] for name, each in maps.items()},
        learned=_learned_rows(run.learned),
        answers=[_answers(each) for each in read_answers(run.folder, MOST_ANSWERS)],
        scores=_score_rows(run.results),
        confusions=_confusions(run.results),
        preflight=preflight_lines(run.preflight) if run.preflight else [],
        sample=run.preflight.sample if run.preflight else (),
        cost=cost_lines(run),
        warnings=told[:MOST_EVENTS],
        num_warnings=len(told),
        has_events=(run.folder / EVENTS_FILE).exists(),
        events=[each for each in run.events if each not in told][-MOST_EVENTS:],
        recipe=_cut(run.recipe_text, LONGEST_RECIPE),
        versions=list(run.record.get("versions", {}).items()),
        identity=identity_lines(run),
        commands=command_lines(run),
    )


def _figures(run: RunFiles) -> dict[str, Any]:
    """The figures that the log of the run has numbers for; each with a sentence that says it."""
    found: dict[str, Any] = {}
    steps, values = series(run.metrics, "loss")
    checks, checked = validations(run)
    traces: list[Trace] = []
    notes: list[str] = []
    if steps:
        traces += _line_and_mean(_TRAIN, "training loss", steps, values, notes)
    if checks:
        xs, ys = thinned(checks, checked)
        look = {"mode": "lines+markers", "marker": {"size": 6}, "name": "validation loss"}
        traces.append(_VALIDATION.line(xs, ys, **look))
    if traces:
        traces += _warning_marks(run, steps, values)
        about = [
            _course("training loss", steps, values),
            _course("validation loss", checks, checked),
        ]
        found["losses"] = _told("Losses", traces, "loss", about, notes)
    clip = run.recipe.get("train", {}).get("max_grad_norm")
    for name, key, title, axis in (
        ("rate", "learning_rate", "Learning rate", "learning rate"),
        ("norms", "grad_norm", "Gradient norm before clipping", "gradient norm"),
        ("speed", "tokens_per_second", "Speed", "tokens/s"),
        ("memory", "memory_bytes", "Peak memory so far, of the main process", "bytes"),
    ):
        steps, values = series(run.metrics, key)
        if not steps:
            continue
        if key == "memory_bytes":
            # Older versions began anew with it where a run was taken up.
            values = list(accumulate(values, max))
        notes = []
        if key in ("grad_norm", "tokens_per_second"):
            traces = _line_and_mean(_TRAIN, axis, steps, values, notes)
        else:
            traces = [_TRAIN.line(*thinned(steps, values), name=axis, showlegend=False)]
        if key == "grad_norm" and isinstance(clip, int | float) and clip < 2 * max(values):
            style = Style("clipped", 1, "dash")
            ends = [steps[0], steps[-1]]
            traces.append(style.line(ends, [clip, clip], name=f"clipped above {clip:g}"))
        found[name] = _told(title, traces, axis, [_course(axis, steps, values)], notes)
        found[name]["y"]["rangemode"] = "tozero"
        if key == "memory_bytes":
            found[name]["y"]["tickformat"] = ".3s"
        if key == "learning_rate":
            found[name]["y"]["tickformat"] = "~g"
    return found


def _told(
    title: str, traces: list[Trace], axis: str, about: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    made = figure(traces, "step", axis)
    return {
        **made,
        "about": {"title": title, "text": " ".join(filter(None, about)), "notes": notes},
    }


def _line_and_mean(
    style: Style, name: str, steps: list[float], values: list[float], notes: list[str]
) -> list[Trace]:
    """Every point as a faint line, and the moving mean over it; what was thinned is noted."""
    xs, ys = thinned(steps, values)
    if len(xs) < len(steps):
        notes.append(
            f"{len(xs):,} of {len(steps):,} points of the faint line are drawn: the lowest and "
            "the highest of each stretch."
        )
    means, window = smooth(values)
    if window == 1:
        return [style.line(xs, ys, name=name)]
    faint = {"mode": "lines", "line": {"width": 1}, "opacity": 0.35}
    places, smoothed = thinned(steps, means)
    return [
        style.behind(xs, ys, **faint),
        style.line(places, smoothed, name=f"{name}, mean of {window} points"),
    ]


def _warning_marks(run: RunFiles, steps: list[float], values: list[float]) -> list[Trace]:
    """Where on the curve a warning or a fall-back came; each says its sentence."""
    at = [each for each in told_events(run.events) if each.step is not None]
    if not at or not steps:
        return []
    places = [min(range(len(steps)), key=lambda i: abs(steps[i] - (e.step or 0))) for e in at]
    return [
        _WARNING.line(
            [each.step or 0 for each in at],
            [values[place] for place in places],
            name="warnings",
            mode="markers",
            marker={"size": 11, "symbol": "triangle-down"},
            text=[plot_text(each.text) for each in at],
            hoverinfo="text",
        )
    ]


def _course(name: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """One sentence that says what a line shows, for who cannot see it."""
    if not steps:
        return ""
    low = min(range(len(values)), key=values.__getitem__)
    return (
        f"{name}: {values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step {steps[-1]:,}, "
        f"lowest {values[low]:.4g} at step {steps[low]:,}."
    )


def _rank_map(report: RankReport) -> dict[str, Any]:
    layers = report.layers
    return {
        **heat_map([layer.name for layer in layers]),
        "title": "rank",
        "format": "d",
        "values": [layer.rank for layer in layers],
        "texts": [str(layer.rank) for layer in layers],
        "hover": [
            f"<b>{plot_text(layer.name)}</b><br>rank {layer.rank}, bound by "
            f"{plot_text(layer.bound_by)}<br>{layer.parameters:,} parameters"
            for layer in layers
        ],
        "about": f"Ranks of {len(layers)} matrices by layer and kind of module",
    }


def _learned_map(report: LearnedReport) -> dict[str, Any]:
    layers = report.layers
    return {
        **heat_map([layer.name for layer in layers]),
        "title": "update",
        "format": ".2~%",
        "values": [layer.share for layer in layers],
        "texts": ["–" if layer.share is None else f"{100 * layer.share:.2g}%" for layer in layers],
        "hover": [
            f"<b>{plot_text(layer.name)}</b><br>update {layer.update_norm:.4g}, weight "
            f"{layer.weight_norm:.4g}"
            for layer in layers
        ],
        "about": f"How far {len(layers)} matrices moved, by layer and kind of module",
    }


def _learned_rows(report: LearnedReport | None) -> list[tuple[str, ...]]:
    """The layers that moved furthest, and the one that moved least."""
    if report is None:
        return []
    most = report.most()
    chosen = most[:MOST_LEARNED] + most[max(MOST_LEARNED, len(most) - 1) :]
    return [
        (
            layer.name,
            share_text(layer),
            number(layer.update_norm, ".4g"),
            number(layer.weight_norm, ".4g"),
        )
        for layer in chosen
    ]


def _score_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            line.model,
            line.name if line.scorer == line.name else f"{line.name}, {line.scorer}",
            score_value(line.scorer, line.score["value"]),
            score_error(line.scorer, line.score),
            score_text(line.scorer, line.score),
            line.conditions or "not known",
        )
        for line in score_lines(results)
    ]


def _confusions(results: Mapping[str, Any]) -> list[tuple[str, Sequence[str], Sequence[Any]]]:
    """What is scored, the given labels, and of each right label how often each was given."""
    found: list[tuple[str, Sequence[str], Sequence[Any]]] = []
    for line in score_lines(results):
        table = line.score.get("confusion")
        if table and len(table) <= MOST_LABELS:
            found.append((f"{line.model}, {line.name}", *label_table(table)))
    return found


def _answers(found: Answers) -> dict[str, Any]:
    """The groups of answers to a task, each with a sentence that says how they were chosen."""
    num, groups = f"{found.num_questions:,}", []
    if found.wrong:
        number = len(found.wrong)
        first = "question" if number == 1 else f"{number} questions"
        is_all = number == found.num_wrong
        told = "all of them" if is_all else f"the first {first} of them"
        groups.append(
            (
                f"Wrong after training by {found.scorer}: {found.num_wrong:,} of {num}; here "
                f"{told}, by row.",
                [_shown(one) for one in found.wrong],
            )
        )
    elif found.num_wrong == 0:
        groups.append((f"Wrong after training by {found.scorer}: none of {num}.", []))
    groups.append(
        (
            f"The first {len(found.shown)} of {num} questions by row; none was chosen for its "
            "answer.",
            [_shown(one) for one in found.shown],
        )
    )
    return {"task": found.task, "groups": groups}


def _shown(answer: Mapping[str, Any]) -> dict[str, Any]:
    gold = answer["gold"]
    told = gold_text(gold)
    return {
        "row": answer["row"],
        "prompt": _cut(answer["prompt"]),
        "gold": None if gold is None else _cut(told),
        "before": answer["before"] if answer["before"] is None else _cut(answer["before"]),
        "after": answer["after"] if answer["after"] is None else _cut(answer["after"]),
        "is_same": answer["before"] is not None and answer["before"] == answer["after"],
    }


def _cut(text: str, most: int = LONGEST_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"
