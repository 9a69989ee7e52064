"""The command `generate`: what a model says to a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from kpsvd_tune.commands.options import (
    SOURCE,
    AllowOtherBase,
    BaseOnly,
    BaseOption,
    Debug,
    Json,
    Offline,
    emit,
    prepare_libraries,
)
from kpsvd_tune.phase import loading_cures, watched
from kpsvd_tune.recipe.paths import check_reachable, check_source
from kpsvd_tune.report.live import ConsoleEvents


def generate(
    source: Annotated[str, SOURCE],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt without a template.")] = False,
    base_only: BaseOnly = False,
    base: BaseOption = None,
    allow_other_base: AllowOtherBase = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model says to a prompt."""
    prepare_libraries(offline, debug)
    # Before torch is imported, which takes seconds.
    check_source(source, base)
    check_reachable(source, base)
    from kpsvd_tune.evaluation.generation import GenerationOptions, answer_one
    from kpsvd_tune.processes import device
    from kpsvd_tune.runs.find import (
        find,
        full_precision_note,
        load,
        place_loaded,
        resolve_base,
    )

    with ConsoleEvents() as events:
        found = find(source)
        place = resolve_base(found, source, base)
        with watched(goes_on=False) as phase:
            events.stage(f"loading {place.path}")
            phase.enter("loading the base model", loading_cures(found.dtype))
            loaded = load(
                found, place, found.dtype, base_only=base_only, allow_other_base=allow_other_base
            )
            if loaded.other_base is not None:
                events.note(f"answering {loaded.other_base}")
            if note := full_precision_note(loaded.distances, "answers in"):
                events.note(note)
            events.stage("answering")
            phase.enter("answering", ["a lower --max-new-tokens, or a shorter prompt"])
            place_loaded(found, loaded, device(), events.note)
            loaded.model.eval()
            # A run's answers are asked for as it was trained; a model alone by its chat template.
            template = "chat" if loaded.tokenizer.chat_template else None
            if found.asked_by is not None and not raw:
                events.note(found.asked_by)
            if found.dataset is not None:
                template = found.template
            answer = answer_one(
                loaded.model,
                loaded.tokenizer,
                prompt,
                template=None if raw else template,
                options=GenerationOptions(max_new_tokens, temperature=temperature, seed=seed),
            )
            if answer.is_cut:
                events.note(
                    f"the answer had not ended after {max_new_tokens:,} tokens or at the end of "
                    "the model's context (--max-new-tokens)"
                )
    result = {"prompt": prompt, "text": answer.completion, "is_cut": answer.is_cut}
    emit(result, as_json, lambda said: typer.echo(said["text"].strip()))
