"""The command `push`: a run, a merged model or an exported LoRA becomes a repository."""

from __future__ import annotations

from typing import Annotated

import typer

from kpsvd_tune.commands.options import Debug, DryRun, Json, emit, prepare_libraries
from kpsvd_tune.errors import InputError
from kpsvd_tune.phase import watched
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents


def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FOLDER",
            help="A finished run; or a folder with an adapter, merged model, LoRA or GGUF file.",
        ),
    ],
    repo: Annotated[str, typer.Option("--repo", help="Where on the hub: OWNER/NAME.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Refuse anything but a merged model.")
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="Refuse anything but an exported LoRA.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="For everyone to read; else a new one is private.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Replace files of a repository that holds some.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, made where it is missing; default: main.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="What the commit is known by.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Send an adapter, a merged model or a LoRA to the hub; private by default.

    The token comes from HF_TOKEN or from `hf auth login`.
    """
    if merged and lora:
        raise InputError("--merged and --lora exclude each other: a folder is one of the two")
    prepare_libraries(False, debug)
    from kpsvd_tune.publish.bundle import Content, collect
    from kpsvd_tune.publish.hub import Target, check_target, report_of
    from kpsvd_tune.publish.hub import push as send

    with ConsoleEvents() as events:
        target = check_target(Target(repo, public, revision, message, update))
        expected: Content | None = "merged" if merged else "lora" if lora else None
        with watched() as phase:
            phase.enter("looking at the files", kept="nothing was sent")
            bundle = collect(source, target.place, expected)
            report = report_of(bundle, target) if dry_run else send(bundle, target, events, phase)
        emit(report, as_json, view.show_push)
