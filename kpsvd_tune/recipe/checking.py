"""Check a document against the schema: every fault at once, each with the place it came from."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kpsvd_tune.recipe.faults import message_of, near_key
from kpsvd_tune.recipe.reading import Document, Fault, Line, Path
from kpsvd_tune.recipe.removed import take_removed
from kpsvd_tune.recipe.schema import Recipe, TrainRecipe
from kpsvd_tune.recipe.values import show

# Beyond this a file is no recipe, and comparing every key with every other takes minutes.
MAX_FAULTS = 100


def check(document: Document, *, of_run: bool = False) -> Recipe | None:
    """Validate the document, a mapping; the recipe counts only if the document has no fault then.

    A key with a likely meaning is renamed in the value, so that what it holds is checked as well;
    faults keep the user's spelling. With `of_run` keys that are old or have no effect may stand.
    """
    if not of_run and (fault := _two_lengths(document)):
        document.faults.append(fault)
    take_removed(document, of_run=of_run)
    spelling: dict[Path, str] = {}
    while True:
        try:
            return Recipe.model_validate(document.value)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        if is_flood := len(errors) > MAX_FAULTS:
            document.num_unlisted += len(errors) - MAX_FAULTS
            errors = errors[:MAX_FAULTS]
        located = [(_data_path(each, document.value), each) for each in errors]
        renamed = [
            path
            for path, each in located
            if each["type"] == "extra_forbidden"
            and not is_flood
            and _rename(document, path, spelling)
        ]
        if not renamed:
            break
    broken = {fault.path for fault in document.faults}
    for path, each in located:
        written = _written(path, spelling)
        # What could not be read stands as null in the data: its own fault is enough.
        if written not in broken:
            others = each.get("ctx", {}).get("others", ())
            origin = document.origin_of(written, others)
            if each["type"] == "missing" and isinstance(origin, Line):
                # No part is to blame for what none of them gives, but the recipe made of them.
                whole = document.origins.get(())
                if isinstance(whole, Line) and whole.file != origin.file:
                    origin = whole
            document.faults.append(Fault(origin, written, message_of(each, path)))
    return None


def _two_lengths(document: Document) -> Fault | None:
    """The fault of `epochs` beside `max_steps`, where `epochs` would have no effect.

    A typed `max_steps` may stand beside the file's `epochs`: so a long recipe is tried out. The
    default of `epochs` may stand too, as in every recipe written out with its defaults.
    """
    train = document.value.get("train") if isinstance(document.value, dict) else None
    if not isinstance(train, dict) or train.get("max_steps") is None:
        return None
    epochs, steps = train.get("epochs"), train["max_steps"]
    place: Path = ("train", "epochs")
    origin = document.origins.get(place)
    is_typed = isinstance(origin, str)
    is_outdone = isinstance(document.origins.get(("train", "max_steps")), str) and not is_typed
    default = TrainRecipe.model_fields["epochs"].default
    if epochs is None or is_outdone or (epochs == default and not is_typed):
        return None
    return Fault(
        origin,
        place,
        f"is {show(epochs)} and train.max_steps is {show(steps)}, which alone would count; for "
        "epochs set train.max_steps=null, else leave train.epochs out",
    )


def written_path(path: Path) -> str:
    """Write the path as a user would: `evaluation[0].task`; odd keys are quoted."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            is_plain = step.isprintable() and step and "." not in step
            text += "." * bool(text) + (step if is_plain else repr(step))
    return text


def _data_path(error: ErrorDetails, data: Any) -> Path:
    """Keep of pydantic's location what leads through the data, and drop its names for branches."""
    path: Path = ()
    for step in error["loc"]:
        is_index = isinstance(data, list) and isinstance(step, int)
        if is_index or (isinstance(data, dict) and step in data):
            data = data[step]
            path = (*path, step)
    # A missing key and a default in conflict with another key are not in the data.
    if error["type"] in ("missing", "conflict") and path[-1:] != error["loc"][-1:]:
        path = (*path, error["loc"][-1])
    return path


def _rename(document: Document, path: Path, spelling: dict[Path, str]) -> bool:
    """Give a misspelt key its likely name, unless the section has that already."""
    meant, advice = near_key(path)
    section: Any = document.value
    for step in path[:-1]:
        section = section[step]
    if meant is None or meant in section:
        return False
    written = _written(path, spelling)
    origin = document.origin_of(written)
    document.faults.append(Fault(origin, written, f"unknown key; {advice}"))
    spelling[(*path[:-1], meant)] = str(path[-1])
    section[meant] = section.pop(path[-1])
    return True


def _written(path: Path, spelling: dict[Path, str]) -> Path:
    return tuple(spelling.get(path[: index + 1], step) for index, step in enumerate(path))
