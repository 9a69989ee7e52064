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
from kpsvd_tune.recipe.paths import check_reachable, check_source
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.work import show_work
from kpsvd_tune.storage.disk import explained

_MAX_RANK = 64


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run, or an adapter folder.")
    ],
    to: Annotated[
        Literal["lora", "gguf"],
        typer.Option("--to", help="What to write: a plain LoRA, or a merged model as GGUF."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for it.")],
    max_rank: Annotated[
        int | None,
        typer.Option(
            help=f"Widest LoRA: 1, 8, 16, 32, 64, 128, 256, 320 or 512; default: {_MAX_RANK}."
        ),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write a LoRA that holds less than 99 % too.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        typer.Option(
            "--dtype",
            help="Of matrices. LoRA: float32 (default), bfloat16, float16. GGUF: float16 "
            "(default), q8_0, bfloat16, float32.",
        ),
    ] = None,
    metadata_from: Annotated[
        Path | None,
        typer.Option(
            help="For gguf, where the base is no GGUF file: one of the same base, whose tokenizer "
            "and settings are taken."
        ),
    ] = None,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as a plain LoRA or as GGUF, and prove it with PEFT or transformers."""
    if to == "gguf":
        _refuse("gguf", "lora", **{"--max-rank": max_rank is not None, "--lossy": lossy})
        if output.suffix.lower() == ".gguf":
            raise InputError(
                f"--output {output}: expected the name of a new folder, in which model.gguf, a "
                f"report and a model card are written: --output {output.with_suffix('')}"
            )
    else:
        _refuse("lora", "gguf", **{"--metadata-from": metadata_from is not None})
        if dtype == "q8_0":
            raise InputError(
                "--dtype q8_0: a LoRA has float32, bfloat16 or float16; q8_0 is for --to gguf"
            )
    prepare_libraries(offline, debug)
    # Before torch is imported, which takes seconds.
    check_source(source, base)
    check_reachable(source, base)
    from kpsvd_tune.export import gguf, lora
    from kpsvd_tune.merge.merging import check_output
    from kpsvd_tune.runs.find import adapter_of, find, resolve_base

    with ConsoleEvents() as events:
        width = _MAX_RANK if max_rank is None else max_rank
        lora.check_rank(width)
        found = find(source)
        adapter = adapter_of(source, found)
        base_model = resolve_base(found, source, base, with_weights=not dry_run)
        own = [base_model.folder] if base_model.kind == "folder" else []
        place = check_output(output, [adapter, Path(source), *own])
        if dry_run:
            from kpsvd_tune.estimate.verbs import export_work, gguf_work

            emit(
                gguf_work(found, base_model, place, metadata_from, dtype or "float16")
                if to == "gguf"
                else export_work(found, base_model, place, width, dtype or "float32"),
                as_json,
                show_work,
            )
            return
        with watched(goes_on=False) as phase, explained(f"write {place}", "an --output"):
            phase.enter("exporting the adapter", exporting_cures(), "nothing was written")
            if to == "gguf":
                of_gguf = gguf.GgufSettings(dtype or "float16", metadata_from, allow_other_base)
                written = gguf.export_gguf(found, base_model, place, of_gguf, events)
                emit(written, as_json, view.show_gguf)
            else:
                of_lora = lora.LoraSettings(width, dtype or "float32", lossy, allow_other_base)
                report = lora.export_lora(found, base_model, place, of_lora, events)
                emit(report, as_json, view.show_lora)
        events.note(f"written: {output / gguf.NAME if to == 'gguf' else output}")


def _refuse(to: str, other: str, **given: bool) -> None:
    """Refuse options of the other form."""
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"{name} is an option of --to {other}, and --to {to} was asked for")
