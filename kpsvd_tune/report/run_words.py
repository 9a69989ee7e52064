"""What the report of a run says in words and tables, in the terminal and on its page alike."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kpsvd_tune.report.results import Event, LearnedLayer
from kpsvd_tune.report.run import UNSCORED, losses, score_lines, score_value, train_loss_kind
from kpsvd_tune.report.run_files import (
    INSTALLED_KEY,
    KEPT_TEXT_KEY,
    SECONDS_KEY,
    SESSIONS_KEY,
    RunFiles,
    Step,
)
from kpsvd_tune.units import counted, duration, energy, money, percent, size

# Rows of the table of a curve.
_ROWS = 10
CURVE_COLUMNS = ("step", "train loss", "validation loss", "learning rate", "gradient norm")
_OWN = "kpsvd-tune"  # this package, by the name that run.json has for it
_BARS = "▁▂▃▄▅▆▇█"


def number(value: Any, form: str = ".4f") -> str:
    """A number as the tables write it; a dash for one that is not known, or not finite."""
    return "–" if not isinstance(value, int | float) else f"{value:{form}}"


def share_text(layer: LearnedLayer) -> str:
    """How far a layer moved: its update over its weight, which may be more than all of it."""
    return "–" if layer.share is None else f"{100 * layer.share:.3g} %"


def state_line(run: RunFiles) -> str:
    """How the run stands, in one sentence."""
    steps = f"step {run.last_step:,}"
    wanted = run.recipe.get("train", {}).get("max_steps")
    if run.state == "finished":
        return f"finished after {counted(run.last_step, 'step')}"
    if wanted:
        steps += f" of {wanted:,}"
    if run.state == "initialised":
        return "decomposed, not trained"
    if run.state == "running":
        return f"running, {steps} logged"
    reason = run.record.get("reason") or "its process ended without a word, or was killed"
    return f"{run.state} at {steps}: {reason}"


def series(metrics: Sequence[Step], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, where it was logged."""
    found = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def validations(run: RunFiles) -> tuple[list[float], list[float]]:
    """Steps and losses of the validations, that before the first step included."""
    steps, values = series(run.metrics, "validation_loss")
    start, _ = losses(run.results)
    return ([0, *steps], [start, *values]) if start is not None else (steps, values)


def curve_rows(run: RunFiles) -> list[tuple[str, ...]]:
    """A few steps of the curve, evenly spaced, and every column's text; the last step is there.

    Where validations were made, only steps with one are shown.
    """
    told = [m for m in run.metrics if isinstance(m.get("validation_loss"), int | float)]
    steps = told if len(told) > 1 else list(run.metrics)
    last = len(steps) - 1
    places = sorted({round(i * last / (_ROWS - 1)) for i in range(_ROWS)}) if steps else []
    rows: list[tuple[str, ...]] = []
    start, _ = losses(run.results)
    if start is not None:
        rows.append(("0", "–", number(start), "–", "–"))
    for step in (steps[place] for place in places):
        rows.append(
            (
                f"{step['step']:,}",
                number(step.get("loss")),
                number(step.get("validation_loss")),
                number(step.get("learning_rate"), ".2e"),
                number(step.get("grad_norm"), ".3g"),
            )
        )
    return rows


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a curve in one line of block characters: means of equal stretches of it."""
    count = min(width, len(values))
    means = []
    for place in range(count):
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def told_events(events: Sequence[Event]) -> list[Event]:
    """Warnings and fall-backs: what a reader must know."""
    return [each for each in events if each.kind in ("warning", "fallback")]


def seconds_trained(run: RunFiles) -> float | None:
    """Seconds of the training loop so far."""
    logged = run.metrics[-1].get("seconds") if run.metrics else None
    seconds = run.results.get("wall_seconds", logged)
    return seconds if isinstance(seconds, int | float) else None


def money_spent(run: RunFiles) -> tuple[str, str] | None:
    """What the run has cost, and what that rests on; None where no price is known."""
    price, currency = run.price_per_hour, run.currency
    if price is None:
        price = run.recipe.get("compare", {}).get("price_per_hour")
    rate = "" if price is None else f", at {money(price)} {currency} an hour of a device"
    if (cost := run.results.get("cost")) is not None:
        told = f"{money(cost)} {run.results.get('currency', currency)}"
        return told, f"for this device time{rate}"
    seconds = seconds_trained(run)
    if price is None or seconds is None:
        return None
    spent = seconds / 3600 * _devices(run) * price
    return f"{money(spent)} {currency}", f"of the training alone{rate}"


def peak_memory(run: RunFiles) -> float | None:
    """The most that a process of the run held, in bytes; older versions forgot it at a stop."""
    told = run.results.get("peak_memory_bytes")
    if not isinstance(told, int | float):
        return None
    return max(told, *series(run.metrics, "memory_bytes")[1], 0)


def cost_lines(run: RunFiles) -> list[tuple[str, str]]:
    """Time, money and energy of a run, and what they rest on."""
    results, seconds, spent = run.results, seconds_trained(run), money_spent(run)
    lines = []
    if seconds is not None:
        told = duration(seconds)
        if run.last_step:
            told += f", {seconds / run.last_step:.3g} s a step with validation and saving"
        lines.append(("time of the training", told))
    if (device_seconds := results.get("device_seconds")) is not None:
        lines.append(("device time", f"{duration(device_seconds)}, {_what_is_counted(run)}"))
    if spent is None:
        unknown = (
            f"not known: give the price of an hour of a device, as in `kpsvd-tune report "
            f"{shlex.quote(str(run.folder))} --price-per-hour 0.2`; compare.price_per_hour of a "
            "recipe holds for all its runs"
        )
        lines.append(("cost", unknown))
    else:
        lines.append(("cost", f"{spent[0]} {spent[1]}"))
    if (joules := results.get("energy_joules")) is not None:
        lines.append(("energy", energy(joules)))
    lines.append(("devices", f"{_devices(run)} × {run.record.get('device', 'not known')}"))
    if (peak := peak_memory(run)) is not None:
        lines.append(("peak memory of a process", size(peak)))
    return lines


def _what_is_counted(run: RunFiles) -> str:
    """What the device time of a finished run is the time of."""
    earlier, found = run.results.get("earlier_device_seconds"), sessions(run)
    if not earlier:
        return "from the start of the command to its end"
    if len(found) < 2 or any(SECONDS_KEY not in each for each in found):
        return (
            f"of which {duration(earlier)} are steps before it was stopped; what else those "
            "commands took, such as loading and scoring, is not counted"
        )
    told = f"of {len(found)} commands, each from its start to its end"
    # The last one is that which ended the run.
    if killed := sum("ended" not in each for each in found[:-1]):
        was, its = ("was", "counts until its") if killed == 1 else ("were", "count until their")
        told += f"; {killed} of them {was} killed, and {its} last checkpoint"
    return told


def sessions(run: RunFiles) -> list[Mapping[str, Any]]:
    """The commands that the run took, the first one first; empty for one of an older version."""
    found = run.record.get(SESSIONS_KEY)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _devices(run: RunFiles) -> int:
    return int(run.record.get("num_processes") or 1)


def command_lines(run: RunFiles) -> list[tuple[str, str]]:
    """The command as it was typed, and one that does the same from the run's own recipe."""
    versions = run.record.get("versions", {})
    packages = _packages(run)
    again = f"{run.folder}-again"
    lines = []
    if command := run.record.get("command"):
        lines.append(("as it was typed", str(command)))
    if packages:
        lines.append(
            (
                f"with Python {versions.get('python', '?')}",
                shlex.join(["pip", "install", *packages]),
            )
        )
    if own := _own_package(run):
        lines.append((f"with {_OWN}", own))
    if run.recipe_text and run.recipe:
        words = ["kpsvd-tune", "train", str(run.folder / "recipe.yaml"), f"output_dir={again}"]
        processes = _devices(run)
        if processes > 1:
            kind = "--processes" if str(run.record.get("device")) == "cpu" else "--gpus"
            words += [kind, str(processes)]
        lines.append(("again, from the recipe as resolved", shlex.join(words)))
    return lines


def _packages(run: RunFiles) -> list[str]:
    """The packages of a run as an index has them: a build such as +cpu is on none."""
    return [
        f"{name}=={str(version).partition('+')[0]}"
        for name, version in run.record.get("versions", {}).items()
        if name != "python" and (name != _OWN or _installed(run).get("kind") == "index")
    ]


def _own_package(run: RunFiles) -> str | None:
    """What this package was installed from; None where an index has it, or nothing is known."""
    version, found = run.record.get("versions", {}).get(_OWN), _installed(run)
    if version is None or found.get("kind") == "index":
        return None
    if "url" not in found:
        return f"version {version}; what it was installed from is not known"
    commit = f", commit {found['commit']}" if "commit" in found else ""
    return f"version {version}, installed from {found['url']}{commit}"


def _installed(run: RunFiles) -> Mapping[str, Any]:
    found = run.record.get(INSTALLED_KEY)
    return found if isinstance(found, Mapping) else {}


def identity_lines(run: RunFiles) -> list[tuple[str, str]]:
    """What the run was made of: hashes of rows and base, seed, device, when."""
    record, identity = run.record, run.record.get("identity", {})
    base = identity.get("base") or {}
    last, found = record.get("started"), sessions(run)
    first = found[0].get("started", last) if found else last
    times = f", {len(found) - 1} times in all" if len(found) > 2 else ""
    lines = [
        ("started", first),
        ("last taken up", f"{last}{times}" if len(found) > 1 else None),
        ("ended", record.get("ended")),
        ("seed", record.get("seed")),
        ("hash of the rows", identity.get("dataset")),
        ("hash of the text of restrain", identity.get(KEPT_TEXT_KEY)),
        *((f"hash of {name} of the base", digest) for name, digest in base.items()),
    ]
    changes = record.get("changes") or []
    lines += [
        (
            f"changed at step {each.get('step')}",
            f"{each.get('key')}: {each.get('old')} → {each.get('new')}"
            + (f" ({each['note']})" if each.get("note") else ""),
        )
        for each in changes
        if isinstance(each, Mapping)
    ]
    return [(name, str(value)) for name, value in lines if value is not None]


class Headline(NamedTuple):
    """The score that stands for a run."""

    name: str  # task, with its scorer where that has another name
    value: float
    text: str  # the value, as people write it
    before: str  # the same of the base model; empty where it was not scored


def headline_score(results: Mapping[str, Any]) -> Headline | None:
    """The adapter's first score of the first task; None where nothing was scored."""
    first = next((line for line in score_lines(results) if line.model == "adapter"), None)
    if first is None:
        return None
    base = results.get("base_scores", {}).get(first.name, {}).get(first.scorer)
    before = "" if base is None else score_value(first.scorer, base["value"])
    value = first.score["value"]
    name = first.name if first.scorer == first.name else f"{first.name}, {first.scorer}"
    return Headline(name, value, score_value(first.scorer, value), before)


def cards(run: RunFiles) -> list[dict[str, str]]:
    """The key figures above everything else: value, title, and what is said beside the value."""
    start, loss = losses(run.results)
    if loss is None:
        loss = next(reversed(validations(run)[1]), None)
    found = [(run.state, "", state_line(run))]
    if loss is not None:
        before = "" if start is None else f"from {start:.4f}"
        found.append((f"{loss:.4f}", before, "validation loss"))
    if (score := headline_score(run.results)) is not None:
        found.append((score.text, f"from {score.before}" if score.before else "", score.name))
    if names := run.results.get(UNSCORED):
        found.append(("not scored yet", "", ", ".join(names)))
    train = run.results.get("train_loss")
    title = f"training loss, {train_loss_kind(run.results)}"
    if train is None:
        train = next(reversed(series(run.metrics, "loss")[1]), None)
        title = "training loss, last step"
    if train is not None:
        found.append((f"{train:.4f}", "", title))
    if (seconds := seconds_trained(run)) is not None:
        found.append((duration(seconds), "", "time of the training"))
    if (spent := money_spent(run)) is not None:
        found.append((spent[0], "", "cost" if run.results else "cost so far"))
    if run.ranks is not None:
        trained = run.ranks.trained_parameters
        share = trained / max(1, run.ranks.totals["base_parameters"])
        title = f"trainable parameters, {percent(share)} of the base"
        found.append((f"{trained:,}", "", title))
    if (peak := peak_memory(run)) is not None and run.results:
        found.append((size(peak), "", "peak memory of a process"))
    return [dict(zip(("value", "spread", "title"), card, strict=True)) for card in found]
