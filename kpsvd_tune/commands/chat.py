"""The command `chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from kpsvd_tune.commands.options import (
    SOURCE,
    AllowOtherBase,
    BaseOnly,
    BaseOption,
    Debug,
    Offline,
    prepare_libraries,
)
from kpsvd_tune.errors import InputError
from kpsvd_tune.phase import loading_cures, watched
from kpsvd_tune.recipe.paths import check_reachable, check_source
from kpsvd_tune.report.live import ConsoleEvents

if TYPE_CHECKING:
    from kpsvd_tune.evaluation.conversation import Conversation

_HELP = "/reset forgets what was said, /quit or Ctrl-D leaves; Ctrl-C stops an answer"


def chat(
    source: Annotated[str, SOURCE],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    base_only: BaseOnly = False,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Talk with a model in the terminal."""
    prepare_libraries(offline, debug)
    # Before torch is imported, which takes seconds.
    check_source(source, base)
    check_reachable(source, base)
    from kpsvd_tune.evaluation.conversation import Conversation
    from kpsvd_tune.evaluation.generation import GenerationOptions
    from kpsvd_tune.processes import device
    from kpsvd_tune.runs.find import (
        find,
        full_precision_note,
        load,
        place_loaded,
        resolve_base,
    )

    with ConsoleEvents() as events:
        found = find(source)
        place = resolve_base(found, source, base)
        with watched(goes_on=False) as phase:
            events.stage(f"loading {place.path}")
            phase.enter("loading the base model", loading_cures(found.dtype))
            loaded = load(
                found, place, found.dtype, base_only=base_only, allow_other_base=allow_other_base
            )
            if loaded.other_base is not None:
                events.note(f"answering {loaded.other_base}")
            if note := full_precision_note(loaded.distances, "answers in"):
                events.note(note)
            place_loaded(found, loaded, device(), events.note)
            loaded.model.eval()
            # A run is asked as it was trained; a model alone by its chat template.
            template = "chat" if loaded.tokenizer.chat_template else "{prompt}{completion}"
            if found.asked_by is not None:
                events.note(found.asked_by)
            if found.dataset is not None:
                template = found.template or template
            options = GenerationOptions(max_new_tokens, temperature=temperature, seed=seed)
            conversation = Conversation(loaded.model, loaded.tokenizer, template, options)
        if template != "chat":
            events.note(f"asked by the template {template!r}, which shows one question at a time")
        events.note(_HELP)
    is_on = True
    while is_on:
        try:
            is_on = _one_exchange(conversation, max_new_tokens)
        except KeyboardInterrupt:
            typer.echo(f"\n{_HELP}", err=True)


def _one_exchange(conversation: Conversation, max_new_tokens: int) -> bool:
    """Read a question and answer it; whether there may be another."""
    question = _read()
    if question is None:
        return False
    if question == "/reset":
        conversation.reset()
    elif question.startswith("/"):
        typer.echo(f"{question}: expected a question; {_HELP}", err=True)
    elif question:
        _answer(conversation, question, max_new_tokens)
    return True


def _read() -> str | None:
    """The next question; None at the end."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its line editing and history
    try:
        line = input("> " if is_terminal else "").strip()
    except EOFError:
        if is_terminal:
            typer.echo()
        return None
    return None if line in ("/quit", "/exit") else line


def _answer(conversation: Conversation, question: str, max_new_tokens: int) -> None:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        with _ctrl_c() as is_stopped:
            ending = conversation.ask(question, write, is_stopped)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        return
    write("\n")
    if ending == "length":
        typer.echo(f"(cut at --max-new-tokens {max_new_tokens} or the full context)", err=True)
    elif ending == "stopped":
        typer.echo("(stopped)", err=True)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one does not wait for the token that is computed."""
    pressed: list[int] = []

    def press(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, earlier)
