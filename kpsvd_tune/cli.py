"""The command line: parse, one call into the pipeline, render, exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.exceptions import TyperException

from kpsvd_tune import __version__
from kpsvd_tune.errors import InputError, KpsvdTuneError
from kpsvd_tune.recipe import EvaluationRecipe, Recipe, load_recipe, recipe_to_yaml, shipped_recipes
from kpsvd_tune.report import console as view

app = typer.Typer(
    name="kpsvd-tune",
    help="Fine-tune language models with KPSVD: Kronecker-product SVD adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML recipe, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change: train.max_steps=40"),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", help="Make no network call.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Train on that many GPUs.")]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Train in that many CPU processes.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kpsvd-tune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    resume: Annotated[
        str, typer.Option(help="auto continues the run, never starts it anew, or a checkpoint.")
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Continue although this recipe key has changed."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code when scoring MBPP.")
    ] = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose, train, score and save the adapter of a recipe."""
    resolved = load_recipe(recipe, overrides or ())
    _launch_processes(gpus, processes)
    _prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if dry_run:
            _emit(pipeline.plan(resolved, events, offline=offline), as_json, view.show_plan)
            return
        result = pipeline.train(
            resolved,
            events,
            offline=offline,
            resume=resume,
            allow_change=tuple(allow_change or ()),
            allow_code_execution=allow_code_execution,
        )
        _emit(result, as_json, view.show_results)


@app.command("init-only")
def init_only(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Processes = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="Show the totals for several values of a key."),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose and choose the ranks, without data and without training."""
    resolved = load_recipe(recipe, overrides or ())
    _prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if sweep:
            variants = _sweep(recipe, overrides or (), sweep)
            _emit(
                pipeline.sweep_ranks(variants, events, offline=offline, processes=processes or 1),
                as_json,
                view.show_sweep,
            )
            return
        report = pipeline.init_only(resolved, events, offline=offline, processes=processes or 1)
        _emit(report, as_json, view.show_ranks)
        events.note(f"written: {Path(resolved.output_dir) / 'init'}/rank_report.json and .csv")


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
    _prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        report = pipeline.merge(
            source, output, events, dtype=dtype, base=base, tolerance=tolerance, offline=offline
        )
        _emit(report, as_json, view.show_merge)
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
        _emit({"task": task, "scores": scores}, as_json, view.show_scores)
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
    _prepare_libraries(offline, debug)
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
        _emit(result, as_json, view.show_scores)


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
    _prepare_libraries(offline, debug)
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
        typer.echo(text)


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and print it as resolved, with every default."""
    resolved = load_recipe(recipe, overrides or ())
    if as_json:
        typer.echo(resolved.model_dump_json())
    else:
        typer.echo(recipe_to_yaml(resolved), nl=False)
        Console(stderr=True).print(f"{recipe}: valid", style="green")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the ranks and results of a run again."""
    from kpsvd_tune.report.reading import read_run

    _emit(read_run(run), as_json, view.show_run)


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes with their purpose."""
    purposes = {name: view.purpose(path) for name, path in shipped_recipes().items()}
    if as_json:
        typer.echo(json.dumps(purposes))
        return
    for name, purpose in purposes.items():
        typer.echo(f"{name:24} {purpose}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")],
    target: Annotated[
        Path | None, typer.Argument(help="File or folder; default: here, same name.")
    ] = None,
) -> None:
    """Copy a shipped recipe to edit it; never overwrites."""
    source = _shipped(name)
    path = target or Path(source.name)
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise InputError(f"{path} exists: name another file")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist")
    path.write_bytes(source.read_bytes())
    typer.echo(str(path))


def _shipped(name: str) -> Path:
    recipes = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key not in recipes:
        raise InputError(f"no shipped recipe {name!r}; there are: {', '.join(recipes)}")
    return recipes[key]


def _sweep(recipe: str, overrides: Any, sweep: list[str]) -> dict[str, Recipe]:
    """One recipe per value of each KEY=A,B,C."""
    variants = {}
    for item in sweep:
        key, separator, values = item.partition("=")
        if not separator or not values:
            raise InputError(f"--sweep {item}: expected KEY=A,B,C, as adapter.rank.energy=0.3,0.5")
        for value in values.split(","):
            setting = f"{key}={value}"
            variants[setting] = load_recipe(recipe, [*overrides, setting])
    return variants


def _launch_processes(gpus: int | None, processes: int | None) -> None:
    """Start the same command on several ranks, unless this is one of them already."""
    if gpus and processes:
        raise InputError("--gpus and --processes exclude each other: GPUs, or CPU processes")
    count = gpus or processes
    if count is None or "WORLD_SIZE" in os.environ:
        return
    if processes == 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if count == 1:
        return
    from kpsvd_tune.launch import launch

    raise typer.Exit(launch(sys.argv[1:], count, use_cpu=processes is not None))


def _prepare_libraries(offline: bool, debug: bool) -> None:
    """Set what the libraries read when they are imported, so this comes before any of them."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not debug:
        # Their warnings are about their insides; ours say what a user can act on. Their bars show
        # a person that a download goes on, and fill a log file with noise.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.simplefilter("ignore")
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def _emit(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        typer.echo(json.dumps(result, default=lambda value: value.to_dict()))
    else:
        show(result)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors become one message on stderr."""
    debug = "--debug" in arguments
    try:
        code = app(arguments, standalone_mode=False, prog_name="kpsvd-tune")
        if code == 130:
            # typer turns a Ctrl-C into this code, without a word.
            _say("stopped")
        return code if isinstance(code, int) else 0
    except TyperException as error:
        _say(f"error: {error.format_message()}")
        return 2
    except BrokenPipeError:
        # The reader of our output is gone, as in `| head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KpsvdTuneError as error:
        return _fail(str(error), error.exit_code, debug)
    except (OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, 1, debug)
    except Exception as error:
        traceback.print_exc()
        _say(f"error: {type(error).__name__}: {error}")
        _say("This is a bug in kpsvd-tune: please report it.")
        return 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say(f"error: {message}")
    return code


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
