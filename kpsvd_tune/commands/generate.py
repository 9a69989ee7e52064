"""The command `generate`: what a model says to a prompt."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kpsvd_tune.commands.options import (
    AllowOtherBase,
    BaseOption,
    Debug,
    Json,
    Offline,
    prepare_libraries,
)
from kpsvd_tune.report import console as view


def generate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter or a model.")
    ],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt without a template.")] = False,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Answer without the adapter, to compare.")
    ] = False,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model says to a prompt."""
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        text = pipeline.generate(
            source,
            prompt,
            events,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            raw=raw,
            base_only=base_only,
            base=base,
            allow_other_base=allow_other_base,
            offline=offline,
        )
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
    else:
        typer.echo(text.strip())
