"""The command `export`: an adapter in a form that other programs serve."""

from __future__ import annotations

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
from kpsvd_tune.errors import InputError
from kpsvd_tune.phase import exporting_cures, watched
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.work import show_work
from kpsvd_tune.storage.disk import explained

# Which rules split a text before BPE is named in a GGUF file, by a table of hashes that only
# llama.cpp's converter has; a file with another name there would be read without an error, and its
# texts split into other tokens.
_GGUF = (
    "--to gguf: llama.cpp's own converter writes that, for it alone knows all tokenizers. Merge "
    "first, then convert: kpsvd-tune merge RUN --output merged; python "
    "llama.cpp/convert_hf_to_gguf.py merged --outtype q8_0 --outfile model.gguf (or f16). "
    "docs/serving.md has the whole way"
)


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run, or an adapter folder.")
    ],
    to: Annotated[
        Literal["lora", "gguf"],
        typer.Option("--to", help="What to write: lora; gguf says which program writes that."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for it.")],
    max_rank: Annotated[
        int, typer.Option(help="Widest LoRA: 1, 8, 16, 32, 64, 128, 256, 320 or 512.")
    ] = 64,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write a LoRA that holds less than 99 % too.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Of the LoRA's matrices: float32, bfloat16 or float16."),
    ] = "float32",
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as a plain LoRA, and prove it with plain PEFT."""
    if to == "gguf":
        raise InputError(_GGUF)
    prepare_libraries(offline, debug)
    from kpsvd_tune.export import lora
    from kpsvd_tune.merge.merging import check_output
    from kpsvd_tune.runs.find import find, resolve_base

    with ConsoleEvents() as events:
        lora.check_rank(max_rank)
        found = find(source)
        if found.adapter is None:
            raise InputError(
                f"{source} is neither a run nor an adapter: expected a folder with recipe.yaml and "
                "adapter/, or one with adapter_config.json"
            )
        base_model = resolve_base(found, source, base, with_weights=not dry_run)
        own = [base_model.folder] if base_model.kind == "folder" else []
        place = check_output(output, [found.adapter, Path(source), *own])
        if dry_run:
            from kpsvd_tune.estimate.verbs import export_work

            emit(export_work(found, base_model, place, max_rank, dtype), as_json, show_work)
            return
        settings = lora.LoraSettings(max_rank, dtype, lossy, allow_other_base)
        with watched(goes_on=False) as phase, explained(f"write {place}", "an --output"):
            phase.enter("exporting the adapter", exporting_cures(), "nothing was written")
            report = lora.export_lora(found, base_model, place, settings, events)
        emit(report, as_json, view.show_lora)
        events.note(f"written: {output}")
