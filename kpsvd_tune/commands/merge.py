"""The command `merge`: bake an adapter into plain weights and prove the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpsvd_tune.errors import InputError
from kpsvd_tune.events import Events
from kpsvd_tune.report.card import Base
from kpsvd_tune.report.results import MergeReport
from kpsvd_tune.storage.paths import kind_of

if TYPE_CHECKING:
    from kpsvd_tune.models import ModelSource

import os
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
    with view.Events() as events:
        report = _merge(
            source,
            output,
            events,
            dtype=dtype,
            base=base,
            tolerance=tolerance,
            allow_other_base=allow_other_base,
        )
        emit(report, as_json, view.show_merge)
        events.note(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)


def _merge(
    source: str,
    output: Path,
    events: Events,
    *,
    dtype: str | None = None,
    base: str | None = None,
    tolerance: float | None = None,
    allow_other_base: bool = False,
) -> MergeReport:
    """Merge the adapter of a run into plain weights and prove the result.

    Args:
        source: A run or an adapter folder.
        output: A new folder.
        events: Told of progress.
        dtype: Of the stored weights; by default the recipe's, else float32.
        base: Another place of the same base model.
        tolerance: Largest logit difference that passes; by default the dtype's.
        allow_other_base: Merge onto a base that is not the adapter's; the report says so.

    Raises:
        InputError: The source is no adapter, or the output would overwrite something.
        AdapterError: The base is not the one the adapter was trained on.
    """
    from kpsvd_tune.merge.merging import DTYPES, check_output
    from kpsvd_tune.merge.merging import merge as merge_adapter
    from kpsvd_tune.models import load_model, load_tokenizer
    from kpsvd_tune.phase import Phase, merging_cures, watched
    from kpsvd_tune.runs.find import compare_files, find, load_adapter, resolve_base
    from kpsvd_tune.runs.ownership import refuse_inside_run
    from kpsvd_tune.storage.disk import explained
    from kpsvd_tune.storage.paths import check_writable

    found = find(source)
    if found.adapter is None:
        if kind_of(source) in ("merged", "model"):
            raise InputError(
                f"{source} is a model, with plain weights: there is nothing to merge; expected a "
                "run or an adapter"
            )
        raise InputError(
            f"{source} is neither a run nor an adapter: expected a folder with recipe.yaml and "
            "adapter/, or one with adapter_config.json"
        )
    stored = dtype or (found.recipe.model.dtype if found.recipe else "float32")
    if stored not in DTYPES:
        raise InputError(f"--dtype {stored}: expected one of {', '.join(DTYPES)}")
    model_source = resolve_base(found, source, base)
    inputs = [found.adapter, Path(source)]
    if model_source.kind == "folder":
        inputs.append(model_source.folder)
    check_output(output, inputs)
    output = Path(os.path.realpath(output))  # what a link names is made, and the link stays
    refuse_inside_run(output, "--output")
    check_writable(output)
    phase = Phase()
    with watched(phase, goes_on=False):
        phase.enter("merging the adapter into its base", merging_cures(), "nothing was written")
        events.stage(f"loading {model_source.path}")
        base_model = load_model(model_source, "float32")
        model, other = load_adapter(base_model, found.adapter, allow_other_base)
        if other is None:
            compare_files(model, model_source, events)
        tokenizer = load_tokenizer(model_source, found.adapter)
        with explained(f"write {output}", "an --output"):
            return merge_adapter(
                model,
                tokenizer,
                output,
                adapter=str(found.adapter),
                dtype=stored,
                base=_named(found.base, base, model_source),
                tolerance=tolerance,
                base_folder=None if model_source.kind == "gguf" else model_source.folder,
                warnings=() if other is None else (f"merged {other}",),
                stage=events.stage,
            )


def _named(known: str, given: str | None, source: ModelSource) -> Base:
    """The base for a card: by the name that the adapter knows, where that is one of the hub."""
    from kpsvd_tune.models import describe_base

    found = describe_base(known or source.path, source.folder)
    return describe_base(given, source.folder) if given and not found.is_on_hub else found
