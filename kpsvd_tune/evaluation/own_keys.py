"""Advice about the rows of a task, in the keys of its own section.

The readers of rows advise keys of `dataset`, since training uses them most. A task has its own
path, split and columns; those of own rows can leave columns out, and none can leave rows out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.recipe import OWN_ROWS_TASKS, EvaluationRecipe

_KEY = re.compile(
    r"(?<![\w./-])(?:dataset|evaluation)"
    r"\.(path|name|split|columns|template|learn|labels|json_schema)\b"
)
# "leave it out with dataset.ignore_columns: [tools]"
_LEFT_OUT = re.compile(
    r" with dataset\.(?:ignore_columns: (?P<columns>\[[^\]]*\])(?P<more> \(or functions\))?"
    r"|on_bad_row=drop)"
)


@contextmanager
def advising_own_keys(recipe: EvaluationRecipe) -> Iterator[None]:
    """Have errors name the keys of the section where they name those of `dataset`."""
    try:
        yield
    except KpsvdTuneError as error:
        text = _LEFT_OUT.sub(lambda found: _leaving_out(recipe, found), str(error))
        error.args = (_KEY.sub(lambda found: recipe.written(found[1]), text), *error.args[1:])
        raise


def _leaving_out(recipe: EvaluationRecipe, found: re.Match[str]) -> str:
    if found["columns"] and recipe.task in OWN_ROWS_TASKS:
        return f" with {recipe.written('ignore_columns')}={found['columns']}{found['more'] or ''}"
    return " of the file"
