"""The application: all commands, their exit codes, and every error as one message."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from kpsvd_tune import __version__
from kpsvd_tune.commands.compare import compare
from kpsvd_tune.commands.eval import evaluate
from kpsvd_tune.commands.generate import generate
from kpsvd_tune.commands.init_only import init_only
from kpsvd_tune.commands.merge import merge
from kpsvd_tune.commands.options import RanksEnded
from kpsvd_tune.commands.recipes import recipes_app
from kpsvd_tune.commands.report import report
from kpsvd_tune.commands.train import train
from kpsvd_tune.commands.validate import validate
from kpsvd_tune.errors import InputError, KpsvdTuneError, StoppedBySignal
from kpsvd_tune.recipe.faults import key_like
from kpsvd_tune.report.layout import make_console, print_line, shortened
from kpsvd_tune.storage.disk import cure
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="kpsvd-tune",
    help="Fine-tune language models with KPSVD: Kronecker-product SVD adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in (
    ("train", train),
    ("init-only", init_only),
    ("merge", merge),
    ("eval", evaluate),
    ("generate", generate),
    ("compare", compare),
    ("report", report),
    ("validate", validate),
):
    app.command(_name)(_command)
app.add_typer(recipes_app, name="recipes")

# The commands with KEY=VALUE for a recipe.
_TAKE_KEYS = ("train", "compare", "init-only", "validate")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kpsvd-tune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the program itself."""


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors become one message on stderr."""
    debug = "--debug" in arguments
    try:
        _check_text(arguments)
        code = app(arguments, standalone_mode=False, prog_name="kpsvd-tune")
        if code == 130 and not _is_later_rank():
            # typer turns a Ctrl-C into this code, without a word.
            _say("stopped")
        return code if isinstance(code, int) else 0
    except RanksEnded as ended:
        return ended.exit_code
    except TyperException as error:
        message = error.format_message().replace(": Value error, ", ": ")
        advice = _as_override(getattr(error, "option_name", ""), arguments)
        if message.startswith("No such command"):
            group = getattr(getattr(error, "ctx", None), "command", None)
            advice = f" Expected one of {', '.join(getattr(group, 'commands', ()))}."
        _say(f"error: {message}{_got(message, arguments)}{advice}")
        return 2
    except BrokenPipeError:
        # The reader of our output is gone, as in `| head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except StoppedBySignal as error:
        if _is_later_rank():
            return error.exit_code
        # With that option the same command would go back to where it began this time.
        is_chosen = any(each.partition("=")[0] == "--resume" for each in arguments)
        command = "the same command without --resume" if is_chosen else "the same command"
        _say(f"{error}; {command} goes on from there" if error.goes_on else str(error))
        return error.exit_code
    except KpsvdTuneError as error:
        if error.is_everywhere and _is_later_rank():
            return error.exit_code
        return _fail(str(error), error.exit_code, debug)
    except Exception as error:
        if is_out_of_memory(error):
            command = arguments[0] if arguments else "kpsvd-tune"
            return _fail(str(out_of_memory(error, f"running {command}", ())), 1, debug)
        if isinstance(error, OSError):
            return _fail(_of_the_system(error), 1, debug)
        traceback.print_exc()
        _say(f"error: {type(error).__name__}: {error}")
        _say("This is a bug in kpsvd-tune: please report it.")
        return 1


def _as_override(option: str, arguments: Sequence[str]) -> str:
    """Where an unknown option is meant for a key of the recipe, how that is written."""
    if not option.startswith("--") or arguments[0] not in _TAKE_KEYS:
        return ""
    names = [each.partition("=")[0] for each in arguments]
    if option not in names:
        return ""
    place = names.index(option)
    _, equals, value = arguments[place].partition("=")
    if not equals:
        after = arguments[place + 1] if place + 1 < len(arguments) else "-"
        # An option without a value is a switch in the tools that have such options.
        value = "true" if after.startswith("-") or "=" in after else after
    key = key_like(option.lstrip("-"))
    if key is None:
        return "; keys of the recipe are changed without dashes: train.max_steps=40"
    return f"; to change that key of the recipe write {key}={value}"


def _got(message: str, arguments: Sequence[str]) -> str:
    """The value of an option that typer calls invalid without naming it."""
    found = re.match(r"Invalid value for '(--[a-z-]+)'", message)
    for place, each in enumerate(arguments if found else ()):
        name, equals, value = each.partition("=")
        if found and name == found[1]:
            got = value if equals else "".join(arguments[place + 1 : place + 2])
            if name == "--gpus" and "," in got:
                number = len(got.split(","))
                return (
                    f"; got {got!r}; to choose GPUs: CUDA_VISIBLE_DEVICES={got} ... --gpus {number}"
                )
            return "" if repr(got) in message else f"; got {got!r}"
    return ""


def _of_the_system(error: OSError) -> str:
    """What no stage has put into words: the system's words, the file, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    said = error.strerror or str(error) or type(error).__name__
    return f"{said}{where}; {cure(error, 'a place')}" if error.errno else f"{said}{where}"


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are not UTF-8, which cannot be written into any of our files."""
    for each in arguments:
        if any("\ud800" <= character <= "\udfff" for character in each):
            raise InputError(
                f"the argument {each!r} holds bytes that are not UTF-8; expected UTF-8: rename the "
                "file or folder, or save the text with that encoding"
            )


def _is_later_rank() -> bool:
    """Whether the first of several ranks says what all of them would."""
    return bool(int(os.environ.get("RANK", "0")))


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say(f"error: {message}")
    return code


def _say(message: str) -> None:
    out = make_console(stderr=True, soft_wrap=True)
    for line in shortened(message).split("\n"):
        print_line(out, line)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding shows what it lacks as \u2026 rather than ending us.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
