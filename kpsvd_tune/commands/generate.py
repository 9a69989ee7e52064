"""The command `generate`: what a model says to a prompt."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kpsvd_tune.commands.options import (
    AllowOtherBase,
    BaseOption,
    Debug,
    Json,
    Offline,
    prepare_libraries,
)
from kpsvd_tune.events import Events
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
    with view.Events() as events:
        text = _answer(
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
        )
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
    else:
        typer.echo(text.strip())


def _answer(
    source: str,
    prompt: str,
    events: Events,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    base_only: bool = False,
    base: str | None = None,
    allow_other_base: bool = False,
) -> str:
    """Let a run, an adapter or a model answer a prompt.

    The prompt gets the template the run was trained with; a model alone gets its chat template
    where it has one.

    Args:
        source: A run, an adapter folder, or a model.
        prompt: The question.
        events: Told of progress.
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.
        raw: Give the prompt as it is.
        base_only: Leave the adapter out.
        base: Another place of the same base model.
        allow_other_base: Take a base that is not the adapter's; a note says so.
    """
    from kpsvd_tune.evaluation.generate import GenerationOptions, generate_text
    from kpsvd_tune.models import load_model, load_tokenizer
    from kpsvd_tune.phase import Phase, loading_cures, watched
    from kpsvd_tune.processes import device
    from kpsvd_tune.runs.find import find, load_adapter, resolve_base

    found = find(source)
    model_source = resolve_base(found, source, base)
    phase = Phase()
    with watched(phase, goes_on=False):
        events.stage(f"loading {model_source.path}")
        tokenizer = load_tokenizer(model_source, found.adapter)
        dtype = found.recipe.model.dtype if found.recipe else "float32"
        phase.enter("loading the base model", loading_cures(dtype))
        model: Any = load_model(model_source, dtype)
        if found.adapter is not None and not base_only:
            model, other = load_adapter(model, found.adapter, allow_other_base)
            if other is not None:
                events.note(f"answering {other}")
        phase.enter("answering", ["a lower --max-new-tokens, or a shorter prompt"])
        model.to(device()).eval()
        dataset = found.dataset
        template = dataset.template if dataset else ("chat" if tokenizer.chat_template else None)
        options = GenerationOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return generate_text(
            model, tokenizer, prompt, template=None if raw else template, options=options
        )
