"""The runs and comparisons under a folder, each with its key figures, and how they are shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from kpsvd_tune.errors import InputError, KpsvdTuneError
from kpsvd_tune.report.comparison import read_comparison
from kpsvd_tune.report.layout import Column, output, print_line, print_table
from kpsvd_tune.report.results import Result
from kpsvd_tune.report.run import UNSCORED, losses
from kpsvd_tune.report.run_files import is_finished, json_lines, run_state
from kpsvd_tune.report.run_words import headline_score
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.paths import kind_of, named, siblings
from kpsvd_tune.units import duration

Key = Literal["date", "name", "state", "model", "loss", "score", "time", "parameters", "steps"]
# Folders below the given one that are looked into.
_DEPTH = 6
# By these the best or the newest comes first, and that is the largest.
_LARGEST_FIRST = ("date", "score")
_SHOWN_SKIPPED = 20


@dataclass(frozen=True)
class RunLine(Result):
    """One run or comparison; what is not known is None."""

    folder: str
    name: str  # its path below the folder that was listed
    kind: str  # run or comparison
    state: str  # finished, running, stopped, failed, initialised; of a comparison finished or begun
    date: float  # seconds since 1970 of its latest record
    model: str | None = None
    form: str | None = None  # of the adapter
    rank: str | None = None  # smallest and largest rank
    parameters: int | None = None  # trainable ones; of a comparison's trials the largest budget
    steps: int | None = None  # optimiser steps done
    loss_before: float | None = None  # validation loss before the first step
    loss: float | None = None  # validation loss, of the adapter that was kept
    score: float | None = None  # the first scorer's of the first task
    score_name: str | None = None
    score_text: str | None = None
    time: float | None = None  # seconds of the training


@dataclass(frozen=True)
class RunList(Result):
    """What lies under a folder."""

    folder: str
    runs: tuple[RunLine, ...]
    skipped: tuple[tuple[str, str], ...]  # folders that could not be read, each with the reason

    def to_dict(self) -> dict[str, Any]:
        """Give the list as JSON has it."""
        skipped = [{"folder": folder, "reason": reason} for folder, reason in self.skipped]
        return super().to_dict() | {"skipped": skipped}


def list_runs(folder: Path, sort: Key = "date", *, reverse: bool = False) -> RunList:
    """Find the runs and comparisons in a folder and those below it, sorted.

    Trials inside a comparison and earlier runs that were set aside are not listed. Runs without
    the figure that is sorted by come last.

    Raises:
        InputError: There is no such folder.
    """
    if not folder.is_dir():
        kind = kind_of(folder)
        got = f"it is {named(kind)}" if kind else f"nothing lies there{siblings(folder)}"
        raise InputError(f"{folder} is no folder to look for runs in: {got}")
    lines, skipped = [], []
    for place, reason in _places(folder, _DEPTH):
        if reason is None:
            try:
                lines.append(_line(place, folder))
                continue
            except (KpsvdTuneError, OSError, ValueError, TypeError, AttributeError, KeyError) as e:
                reason = str(e) if isinstance(e, KpsvdTuneError) else f"{type(e).__name__}: {e}"
        skipped.append((str(place), reason))
    known = [each for each in lines if getattr(each, sort) is not None]
    known.sort(key=lambda each: each.name)
    known.sort(key=lambda each: getattr(each, sort), reverse=(sort in _LARGEST_FIRST) != reverse)
    rest = [each for each in lines if getattr(each, sort) is None]
    return RunList(str(folder), (*known, *rest), tuple(skipped))


def _places(folder: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
    """Folders of runs and comparisons, and those that could not be looked into, with the reason."""
    if kind_of(folder) in ("run", "comparison") and _is_ours(folder):
        yield folder, None
        return
    if depth == 0:
        return
    try:
        inner = sorted(each.path for each in os.scandir(folder) if _is_folder(each))
    except OSError as error:
        yield folder, f"it cannot be looked into: {error.strerror or error}"
        return
    for each in inner:
        yield from _places(Path(each), depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link may lead round in a circle.
    return not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds more of a run than a folder called checkpoints, as others have too."""
    ours = ("run.json", "init/rank_report.json", "compare.json", "comparison.json")
    return any((folder / name).exists() for name in ours)


def _line(place: Path, root: Path) -> RunLine:
    name = os.path.relpath(place, root)
    if name == ".":
        name = Path(os.path.realpath(place)).name
    return _comparison(place, name) if kind_of(place) == "comparison" else _run(place, name)


def _comparison(place: Path, name: str) -> RunLine:
    if not (place / "comparison.json").is_file():
        date = (place / "compare.json").stat().st_mtime
        return RunLine(str(place), name, "comparison", "begun", date)
    found = read_comparison(place)
    # As the verdict has it: of those with the most seeds, for few may look lucky.
    most = max(each.validation_loss.n for each in found.summaries)
    same = [each for each in found.summaries if each.validation_loss.n == most]
    best = min(same, key=lambda each: each.validation_loss.mean)
    return RunLine(
        folder=str(place),
        name=name,
        kind="comparison",
        state="finished",
        date=(place / "comparison.json").stat().st_mtime,
        model=found.model,
        form=best.method,
        rank=best.rank,
        parameters=best.trainable_parameters,
        steps=found.steps,
        loss_before=found.base.get("validation_loss"),
        loss=best.validation_loss.mean,
    )


def _run(place: Path, name: str) -> RunLine:
    record = _object(place / "run.json")
    results = _object(place / "results.json") if is_finished(record) or not record else {}
    ranks = _object(place / "init" / "rank_report.json")
    recipe = record.get("identity", {}).get("recipe", {})
    chosen = [layer["rank"] for layer in ranks.get("layers", []) if layer["rank"] > 0]
    start, loss = losses(results)
    steps, seconds = results.get("steps"), results.get("wall_seconds")
    if not results and record:
        last = _last_lines(place / "metrics.jsonl")
        steps, seconds, loss = last["step"], last["seconds"], last["validation_loss"]
    score = headline_score(results)
    total = ranks.get("totals", {}).get("trainable_parameters")
    if total is not None:
        total += sum(ranks.get("trained_whole", {}).values())
    return RunLine(
        folder=str(place),
        name=name,
        kind="run",
        state=run_state(place, record),
        date=_date(place, record),
        model=recipe.get("model", {}).get("path") or ranks.get("model"),
        form=recipe.get("adapter", {}).get("form") or ranks.get("form", "both" if ranks else None),
        rank=_spread(chosen),
        parameters=results.get("trainable_parameters", total),
        steps=steps,
        loss_before=start,
        loss=loss,
        score=None if score is None else score.value,
        score_name=None if score is None else score.name,
        score_text=score.text if score else "not yet" if UNSCORED in results else None,
        time=seconds,
    )


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there. InputError: it is damaged."""
    return read_json(file, error=InputError) if file.exists() else {}


def _last_lines(metrics: Path) -> dict[str, Any]:
    """The newest step, seconds and validation loss of a run that goes on, or None for each."""
    found: dict[str, Any] = dict.fromkeys(("step", "seconds", "validation_loss"))
    for line in json_lines(metrics) if metrics.exists() else ():
        found |= {key: line[key] for key in found if line and line.get(key) is not None}
    return found


def _date(place: Path, record: dict[str, Any]) -> float:
    """When the run ended or began; of older runs when its newest file was written."""
    for key in ("ended", "started"):
        try:
            return datetime.strptime(str(record.get(key)), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            continue
    files = ("results.json", "run.json", "init/rank_report.json")
    return max((place / name).stat().st_mtime for name in files if (place / name).exists())


def _spread(ranks: Sequence[int]) -> str | None:
    if not ranks:
        return None
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


_COLUMNS = (
    Column("run", is_text=True),
    Column("state", is_text=True),
    Column("model", is_text=True, goes=4),
    Column("form", is_text=True, goes=8),
    Column("rank", goes=9),
    Column("params", goes=3),
    Column("steps", goes=6),
    Column("before", goes=7),
    Column("val. loss"),
    Column("score", goes=2),
    Column("time", goes=5),
    Column("when", is_text=True, goes=1),
)
_LONGEST_NAME, _LONGEST_MODEL = 40, 24


def show_runs(found: RunList) -> None:
    """One row a run, then those that could not be read."""
    out = output()
    if found.runs:
        rows = [_row(each, min(_LONGEST_NAME, out.width // 2 - 8)) for each in found.runs]
        print_table(out, _COLUMNS, rows, where="--json")
        if any(len(each.name) > min(_LONGEST_NAME, out.width // 2 - 8) for each in found.runs):
            print_line(
                out, Text("long names are cut in the middle; --json has them whole", style="dim")
            )
    else:
        print_line(out, f"no run and no comparison lies in {found.folder} or below it")
    for folder, reason in found.skipped[:_SHOWN_SKIPPED]:
        print_line(out, Text(f"skipped {folder}: {reason}", style="yellow"), 4)
    if (more := len(found.skipped) - _SHOWN_SKIPPED) > 0:
        print_line(out, Text(f"and {more} more were skipped; --json names them", style="yellow"))


def _row(each: RunLine, longest: int) -> list[str]:
    def text(value: Any, form: str = "") -> str:
        return "–" if value is None else f"{value:{form}}"

    is_run = each.kind == "run"
    return [
        _middle_cut(each.name, longest),
        each.state if is_run else f"comparison, {each.state}",
        _middle_cut(Path(each.model).name, _LONGEST_MODEL) if each.model else "–",
        text(each.form),
        text(each.rank),
        text(each.parameters, ","),
        text(each.steps, ","),
        text(each.loss_before, ".4f"),
        text(each.loss, ".4f"),
        text(each.score_text),
        "–" if each.time is None else duration(each.time),
        f"{datetime.fromtimestamp(each.date):%Y-%m-%d %H:%M}",
    ]


def _middle_cut(name: str, most: int) -> str:
    """A name with its middle left out: its start and its end tell runs apart."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[-end:]}"
