"""The command `merge`: bake an adapter into plain weights and prove the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.commands.options import (
    AllowOtherBase,
    BaseOption,
    Debug,
    DtypeOption,
    Json,
    Offline,
    emit,
    prepare_libraries,
)
from kpsvd_tune.report import console as view


def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run, or an adapter folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    dtype: DtypeOption = None,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest logit difference that passes.")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bake an adapter into plain weights and prove that they are the same model."""
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        report = pipeline.merge(
            source,
            output,
            events,
            dtype=dtype,
            base=base,
            tolerance=tolerance,
            allow_other_base=allow_other_base,
            offline=offline,
        )
        emit(report, as_json, view.show_merge)
        events.note(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)
