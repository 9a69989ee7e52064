"""The command `merge`: bake an adapter into plain weights and prove the result."""

from __future__ import annotations

from dataclasses import replace
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
from kpsvd_tune.phase import merging_cures, watched
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.storage.disk import explained


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
    from kpsvd_tune.merge import merging
    from kpsvd_tune.runs.find import compare_files, find, load, resolve_base

    with ConsoleEvents() as events:
        found = find(source)
        adapter = merging.check_source(source, found)
        base_model = resolve_base(found, source, base)
        own = [base_model.folder] if base_model.kind == "folder" else []
        place = merging.check_output(output, [adapter, Path(source), *own])
        with watched(goes_on=False) as phase:
            phase.enter("merging the adapter into its base", merging_cures(), "nothing was written")
            events.stage(f"loading {base_model.path}")
            loaded = load(found, base_model, "float32", allow_other_base=allow_other_base)
            warnings = [f"merged {loaded.other_base}"] if loaded.other_base else []
            if not warnings:
                compare_files(loaded.model, base_model, events)
            settings = merging.settings_for(found, base_model, base, dtype or found.dtype)
            settings = replace(settings, tolerance=tolerance, warnings=tuple(warnings))
            with explained(f"write {place}", "an --output"):
                report = merging.merge(
                    loaded.model, loaded.tokenizer, place, settings, events.stage
                )
        emit(report, as_json, view.show_merge)
        events.note(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)
