"""The command `merge`: bake adapters into plain weights and prove the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kpsvd_tune.commands.options import (
    AllowOtherBase,
    BaseOption,
    Debug,
    DryRun,
    Json,
    Offline,
    emit,
    prepare_libraries,
)
from kpsvd_tune.phase import merging_cures, watched
from kpsvd_tune.recipe.paths import check_reachable, check_source
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.work import show_work
from kpsvd_tune.storage.disk import explained


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...", help="A finished run, or an adapter folder; or several."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    weights: Annotated[
        str | None,
        typer.Option(help="What each adapter's update is multiplied by, such as 0.7,0.3."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; default: the base's."),
    ] = None,
    proof: Annotated[
        Literal["tensors", "logits", "both"] | None,
        typer.Option(help="tensors, logits or both; default: both where the model fits in memory."),
    ] = None,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest logit difference that passes.")
    ] = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bake adapters into plain weights and prove that they are the same model."""
    prepare_libraries(offline, debug)
    for source in sources:
        # Before torch is imported, which takes seconds.
        check_source(source, base)
        check_reachable(source, base)
    from kpsvd_tune.merge import merging
    from kpsvd_tune.merge.changes import Part
    from kpsvd_tune.runs.find import adapter_of, find, resolve_base

    with ConsoleEvents() as events:
        found = [find(source) for source in sources]
        adapters = [adapter_of(*each) for each in zip(sources, found, strict=True)]
        shares = merging.weights_for(len(adapters), weights)
        base_model = resolve_base(found[0], sources[0], base, with_weights=not dry_run)
        own = [base_model.folder] if base_model.kind == "folder" else []
        inputs = [*adapters, *map(Path, sources), *own]
        place = merging.check_output(output, inputs)
        if dry_run:
            from kpsvd_tune.estimate.verbs import merge_work

            emit(merge_work(found, base_model, place, dtype, proof), as_json, show_work)
            return
        with watched(goes_on=False) as phase:
            phase.enter("merging the adapter into its base", merging_cures(), "nothing was written")
            settings = merging.settings_for(found, base_model, base, dtype)
            settings = replace(
                settings,
                tolerance=tolerance,
                proof=proof,
                weights=shares,
                allow_other_base=allow_other_base,
            )
            parts = [Part(*each) for each in zip(adapters, shares, strict=True)]
            with explained(f"write {place}", "an --output"):
                report = merging.merge(parts, base_model, place, settings, events)
        emit(report, as_json, view.show_merge)
        events.note(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)
