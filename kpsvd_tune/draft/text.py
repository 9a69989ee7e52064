"""A drafted recipe as YAML, with a comment on every value that a user may want to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kpsvd_tune.draft.rows import LookedAt
from kpsvd_tune.draft.settings import Draft
from kpsvd_tune.recipe import value_to_yaml
from kpsvd_tune.units import counted, duration, size

# Where a comment begins, unless the value is longer.
_COLUMN = 36
# Sections whose values are written one below the other; other mappings stand on one line.
_OPEN = {"rank", "evaluation"}


def write_recipe(draft: Draft, rows: LookedAt, command: str, modeline: str) -> str:
    """The text of the recipe.

    Args:
        draft: Its values, and what they rest on.
        rows: What was found in the data.
        command: The command that would draft it again.
        modeline: The line that tells editors where the JSON schema is.
    """
    comments = dict(_comments(draft, rows))
    lines = [modeline, *_head(draft, command)]
    for section, value in draft.content.items():
        lines.append("")
        if isinstance(value, Mapping):
            lines.append(f"{section}:")
            lines += _mapping(value, (section,), comments, "  ")
        elif isinstance(value, list):
            lines.append(f"{section}:")
            for each in value:
                own = list(_mapping(each, (section,), comments, "    "))
                lines += ["  - " + own[0].removeprefix("    "), *own[1:]]
        else:
            lines.append(_line(section, value, comments.get((section,)), ""))
    return "\n".join(lines) + "\n"


def _steps(draft: Draft) -> str:
    steps = draft.plan.data.steps
    assert steps is not None  # the rows were read for the draft
    return counted(steps, "step")


def _head(draft: Draft, command: str) -> list[str]:
    plan, data = draft.plan, draft.plan.data
    low, high = plan.adapter.trainable_parameters
    trained = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    found = [
        f"# Purpose: {draft.content['model']['path']} learns {draft.content['dataset']['path']}.",
        f"# Drafted: {command}",
        f"#          on {draft.device}; {trained} trainable parameters, {_steps(draft)}",
        f"#          of {counted(data.rows_per_step, 'row')}, peak memory about "
        f"{size((plan.on_device or plan.host).peak_bytes)}.",
    ]
    if plan.time.training_seconds is not None:
        least, most = map(duration, plan.time.training_seconds)
        found.append(f"#          Training takes {least} to {most} here, by a first estimate.")
    if draft.limit is not None:
        found.append(f"#          Budget: {draft.limit}.")
    return [*found, "# Keys:    kpsvd-tune recipes docs explains each; any may be changed here."]


def _mapping(
    values: Mapping[str, Any],
    place: tuple[str, ...],
    comments: Mapping[tuple[str, ...], str],
    indent: str,
) -> Iterator[str]:
    for key, value in values.items():
        own = (*place, key)
        if isinstance(value, Mapping) and key in _OPEN:
            yield f"{indent}{key}:"
            yield from _mapping(value, own, comments, indent + "  ")
        else:
            yield _line(key, value, comments.get(own), indent)


def _line(key: str, value: Any, comment: str | None, indent: str) -> str:
    line = f"{indent}{key}: {value_to_yaml(value)}"
    return f"{line:<{_COLUMN}}  # {comment}" if comment else line


def _comments(draft: Draft, rows: LookedAt) -> Iterator[tuple[tuple[str, ...], str]]:
    """What to know about a value, by its place."""
    content, lengths, data = draft.content, draft.lengths, draft.plan.data
    yield ("model", "dtype"), "type the base is loaded in, never changed; auto: as the precision"
    yield ("dataset", "columns"), "which column of the rows is what"
    yield (
        ("dataset", "template"),
        "chat: the form that the model was made for"
        if content["dataset"].get("template") == "chat"
        else "how a row is written",
    )
    yield (
        ("dataset", "max_length"),
        f"tokens; the longest row has {lengths.longest:,}, 99 % have at most {lengths.most:,}",
    )
    yield ("dataset", "too_long"), "a row that is cut would teach the model not to stop"
    yield (
        ("dataset", "validation"),
        f"{len(rows.held_out)} of {rows.num_rows:,} distinct rows, drawn by init; never trained on",
    )
    yield ("adapter", "target_modules"), "fewer targets leave more of the budget to each"
    yield ("adapter", "rank", "energy"), "share of the energy that is asked for; the budget decides"
    if content["adapter"]["rank"]["min"] == 0:
        yield ("adapter", "rank", "min"), "0: the budget does not hold a term of every layer"
    yield ("adapter", "rank", "max"), "most terms of a layer"
    yield ("adapter", "rank", "budget"), "most trainable parameters; the file holds twice as many"
    yield ("train", "epochs"), f"passes over the rows: {_steps(draft)}"
    yield ("train", "max_steps"), draft.limit or "steps"
    yield ("train", "batch_size"), "rows of a forward pass; memory grows with it"
    yield (
        ("train", "gradient_accumulation"),
        f"forward passes of a step: {counted(data.rows_per_step, 'row')} in all",
    )
    yield ("train", "learning_rate"), "the first thing to try others of: 3.0e-4, 3.0e-3"
    yield (
        ("train", "precision"),
        "auto: bf16 where the machine multiplies it at full speed, else no, which is float32",
    )
    yield ("train", "gradient_checkpointing"), "true: far less memory, a third more time"
    yield ("train", "eval_every"), "steps between validations"
    yield ("train", "save_every"), "steps between checkpoints, from which a stopped run goes on"
    yield ("evaluation", "task"), rows.reason
    yield ("evaluation", "before"), "the base model answers the same questions first"
    yield ("evaluation", "labels"), "all that the rows have; those held out lack some"
    yield ("evaluation", "limit"), "questions to ask; more take longer and tell more"
    yield (
        ("evaluation", "max_new_tokens"),
        f"the longest right answer has {counted(lengths.answer, 'token')}",
    )
    yield ("compare", "price_per_hour"), "of this machine; plan and report count with it"
    yield ("output_dir",), "folder of the run"
