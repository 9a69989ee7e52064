"""Commands that use what was trained: merge, eval and generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from kpsvd_tune.cli.shared import Debug, Json, Offline, app, emit, prepare_libraries
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report import console as view


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the recipe's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, when the adapter names none that exists.")
    ] = None,
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
            source, output, events, dtype=dtype, base=base, tolerance=tolerance, offline=offline
        )
        emit(report, as_json, view.show_merge)
        events.note(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    source: Annotated[
        str | None, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter or a model.")
    ] = None,
    task: Annotated[str, typer.Option(help="gsm8k, math, mbpp or exact_match.")] = "gsm8k",
    path: Annotated[
        str | None, typer.Option(help="The questions: file or hub id; default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the completions.")
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Score without the adapter, to compare.")
    ] = False,
    rescore: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score stored completions again.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code (mbpp).")
    ] = False,
    sandbox: Annotated[str, typer.Option(help="bwrap; none runs code without protection.")] = (
        "bwrap"
    ),
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a run or a model on a task, or score stored completions again."""
    if sandbox not in ("bwrap", "none"):
        raise InputError(f"--sandbox {sandbox}: expected bwrap or none")
    may = {"allow_code_execution": allow_code_execution, "sandbox": sandbox}
    if rescore is not None:
        from kpsvd_tune.evaluation.scoring import rescore as score_again

        scores = {score.scorer: score.to_dict() for score in score_again(rescore, task, **may)}  # type: ignore[arg-type]
        for score in scores.values():
            del score["scorer"]
        emit({"task": task, "scores": scores}, as_json, view.show_scores)
        return
    if source is None:
        raise InputError("eval needs a RUN_OR_MODEL, or --rescore FILE")
    section: dict[str, Any] = {"task": task, "limit": limit, "path": path}
    section |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    try:
        wanted = EvaluationRecipe(**section)
    except ValidationError as error:
        faults = (f"--{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise InputError("; ".join(faults)) from error
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        result = pipeline.evaluate(
            source,
            wanted,
            events,
            output=output,
            base_only=base_only,
            offline=offline,
            **may,  # type: ignore[arg-type]
        )
        emit(result, as_json, view.show_scores)


@app.command()
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
            offline=offline,
        )
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
    else:
        typer.echo(text.strip())
