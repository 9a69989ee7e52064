"""The application: all commands, their exit codes, and every error as one message."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from kpsvd_tune import __version__
from kpsvd_tune.commands.chat import chat
from kpsvd_tune.commands.compare import compare
from kpsvd_tune.commands.doctor import doctor
from kpsvd_tune.commands.eval import evaluate
from kpsvd_tune.commands.export import export
from kpsvd_tune.commands.generate import generate
from kpsvd_tune.commands.init import init
from kpsvd_tune.commands.init_only import init_only
from kpsvd_tune.commands.merge import merge
from kpsvd_tune.commands.options import RanksEnded, is_later_rank
from kpsvd_tune.commands.plan import plan
from kpsvd_tune.commands.push import push
from kpsvd_tune.commands.recipes import recipes_app
from kpsvd_tune.commands.report import report
from kpsvd_tune.commands.runs import runs
from kpsvd_tune.commands.train import train
from kpsvd_tune.commands.validate import validate
from kpsvd_tune.errors import InputError, KpsvdTuneError, StoppedBySignal, closest
from kpsvd_tune.launch import is_of_other_launcher
from kpsvd_tune.recipe.faults import key_like
from kpsvd_tune.report.layout import make_console, print_line, shortened
from kpsvd_tune.storage.disk import cure
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory

app = typer.Typer(
    name="kpsvd-tune",
    help="Fine-tune language models with KPSVD: Kronecker-product SVD adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (
    init,
    plan,
    train,
    init_only,
    merge,
    export,
    push,
    evaluate,
    generate,
    chat,
    compare,
    report,
    runs,
    validate,
    doctor,
):
    # A function of Python has the name `eval`.
    app.command("eval" if _command is evaluate else None)(_command)
app.add_typer(recipes_app, name="recipes")

# What typer adds of options that are spelt somewhat alike.
_OFFERED = re.compile(r" \((?:Possible options|Did you mean)\b[^)]*\)")
# The commands with KEY=VALUE for a recipe.
_TAKE_KEYS = ("plan", "train", "compare", "init-only", "validate")


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
        if code == 130 and not is_later_rank():
            # typer turns a Ctrl-C into this code, without a word.
            _say("stopped")
        return code if isinstance(code, int) else 0
    except RanksEnded as ended:
        return ended.exit_code
    except TyperException as error:
        _say(f"error: {_usage_message(error, arguments)}")
        return 2
    except BrokenPipeError:
        # The reader of our output is gone, as in `| head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KpsvdTuneError as error:
        if error.is_everywhere and is_later_rank():
            return error.exit_code
        if not isinstance(error, StoppedBySignal):
            return _fail(str(error), error.exit_code, debug)
        _say_stopped(error, arguments)
        return error.exit_code
    except Exception as error:
        if is_out_of_memory(error):
            command = arguments[0] if arguments else "kpsvd-tune"
            return _fail(str(out_of_memory(error, f"running {command}", ())), 1, debug)
        if isinstance(error, OSError):
            # No stage has put it into words: the system's words, the file, and what to do.
            where = f" ({error.filename})" if error.filename else ""
            said = f"{error.strerror or str(error) or type(error).__name__}{where}"
            return _fail(f"{said}; {cure(error, 'a place')}" if error.errno else said, 1, debug)
        traceback.print_exc()
        _say(f"error: {type(error).__name__}: {error}")
        _say("This is a bug in kpsvd-tune: please report it.")
        return 1


def _usage_message(error: TyperException, arguments: Sequence[str]) -> str:
    """What typer says of a mistake on the command line, with what was got and what to write."""
    said = error.format_message().replace(": Value error, ", ": ")
    if said.startswith("No such command"):
        group = getattr(getattr(error, "ctx", None), "command", None)
        return f"{said} Expected one of {', '.join(getattr(group, 'commands', ()))}."
    found = re.match(r"(?:No such option: |Invalid value for ')(--[^\s']+)", said)
    names = [each.partition("=")[0] for each in arguments]
    if not found or found[1] not in names:
        return said
    option, place = found[1], names.index(found[1])
    _, equals, value = arguments[place].partition("=")
    got = value if equals else "".join(arguments[place + 1 : place + 2])
    if said.startswith("Invalid value"):
        if option == "--gpus" and "," in got:
            choose = f"CUDA_VISIBLE_DEVICES={got} ... --gpus {got.count(',') + 1}"
            return f"{said}; got {got!r}; to choose GPUs: {choose}"
        # typer does not always name the value.
        return said if repr(got) in said else f"{said}; got {got!r}"
    if arguments[0] not in _TAKE_KEYS:
        return said
    # What typer offers is right for a slip of a letter, and misleads where another word was typed.
    offered = _OFFERED.search(said)
    if offered is not None:
        if closest(option, re.findall(r"--[\w-]+", offered[0]), 0.8):
            return said
        said = said.replace(offered[0], "")
    # Such an option may be meant for a key of the recipe.
    key = key_like(option.lstrip("-"))
    if key is None:
        return f"{said}; keys of the recipe are changed without dashes: train.max_steps=40"
    # An option without a value is a switch in the tools that have such options.
    is_switch = not equals and (not got or got.startswith("-") or "=" in got)
    change = shlex.quote(f"{key}={'true' if is_switch else got}")
    return f"{said}; to change that key of the recipe write {change}"


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are not UTF-8, which cannot be written into any of our files."""
    for each in arguments:
        if any("\ud800" <= character <= "\udfff" for character in each):
            raise InputError(
                f"the argument {each!r} holds bytes that are not UTF-8; expected UTF-8: rename the "
                "file or folder, or save the text with that encoding"
            )


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say(f"error: {message}")
    return code


def _say_stopped(error: StoppedBySignal, arguments: Sequence[str]) -> None:
    """Say where a signal came, and the command that goes on from there."""
    if not error.goes_on:
        _say(str(error))
        return
    # With that option the same command would go back to where it began this time.
    again = _without_option("--resume", arguments)
    what = "the same command" if again == list(arguments) else "the same command without --resume"
    if is_of_other_launcher():
        # What was typed began with the launcher, and is not known here.
        _say(f"{error}; {what} goes on from there")
        return
    _say(f"{error}; {what} goes on from there:")
    # As it is, for a line that is broken between words could not be copied.
    typer.echo(f"  {shlex.join(['kpsvd-tune', *again])}", err=True)


def _without_option(option: str, arguments: Sequence[str]) -> list[str]:
    """The arguments without an option and its value, which may be behind = or the next word."""
    kept, is_value = [], False
    for each in arguments:
        if is_value or each.partition("=")[0] == option:
            is_value = not is_value and each == option
        else:
            kept.append(each)
    return kept


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
