"""Whether the task that somebody asked for suits the answers of the rows."""

from __future__ import annotations

import shlex

from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.draft.rows import LookedAt, answer_of, suited_task
from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation.doubt import doubt
from kpsvd_tune.evaluation.json_answer import parse_answer
from kpsvd_tune.units import counted


def check_json(found: LookedAt) -> None:
    """Refuse answers that are no JSON for the task json, as a training with it would.

    Raises:
        InputError: An answer of the rows that were looked at is no JSON.
    """
    answers = [answer_of(each) for each in found.examples]
    wrong = [answer for answer in answers if not parse_answer(answer)[0]]
    if wrong:
        raise InputError(
            f"task: got json, and {len(wrong):,} of {counted(len(answers), 'answer')} of "
            f"{found.path} are no JSON, such as {wrong[0][:40]!r}; correct them, or take "
            f"--task {found.task or 'none'}"
        )


def doubt_about(found: LookedAt, task: str | None) -> str | None:
    """What speaks against a task that was asked for, and what to do, in words; None: nothing."""
    if task is None or task == found.task:
        return None
    said = doubt(task, [answer_of(each) for each in found.examples], is_sample=False)
    if said is None:
        return None
    return f"--task {task} was asked for, and {said.reason}: {_cure(found)}"


def _cure(found: LookedAt) -> str:
    return f"{_other_way(found) or 'are the columns right? If so, '}take --task {found.task}"


def _other_way(found: LookedAt) -> str:
    """The advice to exchange the columns, where the questions look like labels; else nothing."""
    prompts = [each.prompt for each in found.examples if isinstance(each, Pair)]
    asked, answered = (found.form.columns.get(role) for role in ("prompt", "completion"))
    if asked is None or answered is None or suited_task(prompts, found.form)[0] != "label":
        return ""
    option = shlex.join(["--columns", f"prompt={answered},completion={asked}"])
    return (
        f"are the columns swapped? The texts of {asked!r}, which is the prompt now, are "
        f"{len(set(prompts))} labels: {option} takes them the other way; or "
    )
