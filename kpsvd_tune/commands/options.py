"""The options that commands share, and what each of them does before and after its work."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from kpsvd_tune.errors import InputError
from kpsvd_tune.offline import go_offline

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML recipe, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change: train.max_steps=40"),
]
SOURCE = typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter or a model.")
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", help="Make no network call.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Share the work over that many GPUs.")
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Share the work over that many CPU processes."),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; default: the recipe's."),
]
SandboxOption = Annotated[
    Literal["bwrap", "none"],
    typer.Option("--sandbox", help="bwrap; none runs code without protection."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the programs it writes, for mbpp.")
]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="Leave the adapter out, to compare.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The base model, when it lies elsewhere by now.")
]
AllowOtherBase = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="Put the adapter on a base that is not its own; what is written says so.",
    ),
]


def prepare_libraries(offline: bool, debug: bool) -> None:
    """Set what the libraries read when they are imported, so this comes before any of them."""
    if offline:
        go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Where it is installed, transformers imports it for itself; it logs to standard output, which
    # is for results.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not debug:
        # Their warnings are about their insides; ours say what a user can act on. Their bars show
        # a person that a download goes on, and fill a log file with noise.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # On a CPU with units for bfloat16 it asks for a package with a kernel that is not used.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.simplefilter("ignore")
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def is_later_rank() -> bool:
    """Whether this is not the first of several ranks, which speaks for all of them."""
    return bool(int(os.environ.get("RANK", "0")))


def emit(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a command's result, as one JSON object or by ``show``; on the first rank alone."""
    if is_later_rank():
        return
    if as_json:
        typer.echo(json.dumps(result, default=lambda value: value.to_dict()))
    else:
        show(result)


def check_devices(gpus: int | None, processes: int | None) -> None:
    """Refuse both options at once, and more GPUs than there are (InputError)."""
    if gpus and processes:
        raise InputError("--gpus and --processes exclude each other: GPUs, or CPU processes")
    # A rank sees what its launcher has checked.
    if gpus and "WORLD_SIZE" not in os.environ:
        from kpsvd_tune.launch import check_gpus

        check_gpus(gpus)


class RanksEnded(Exception):
    """The command was done by ranks, which have said all; ``exit_code`` is theirs."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def launch_processes(
    gpus: int | None, processes: int | None, accelerate_config: str | None = None
) -> None:
    """Start the same command on several ranks, unless this is one of them already.

    RanksEnded is raised when they were started and have ended.
    """
    check_devices(gpus, processes)
    count = gpus or processes
    if accelerate_config and count is None:
        raise InputError("--accelerate-config needs --gpus N or --processes N")
    if count is None or "WORLD_SIZE" in os.environ:
        return
    if processes == 1 and not accelerate_config:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if count == 1 and not accelerate_config:
        return
    from kpsvd_tune.launch import launch

    deepspeed = None
    if accelerate_config:
        from kpsvd_tune.training.engines.deepspeed_config import launch_environment

        deepspeed = launch_environment(accelerate_config, count)
    raise RanksEnded(launch(sys.argv[1:], count, processes is not None, deepspeed))
