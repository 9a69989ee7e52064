"""The command `compare`: every method at equal budgets on the same rows, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from kpsvd_tune.commands.options import (
    Debug,
    DryRun,
    Json,
    Offline,
    Overrides,
    RecipeArgument,
    emit,
    prepare_libraries,
)
from kpsvd_tune.comparison.methods import DEFAULT, default_methods, read_methods, read_rate
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import Recipe, load_recipe, read_number_of_parameters
from kpsvd_tune.report.console import show_comparison, show_grid
from kpsvd_tune.report.live import ConsoleEvents, TrialTable
from kpsvd_tune.report.work import WorkPlan, show_work
from kpsvd_tune.signals import drawing


def compare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="kpsvd, kpsvd-thin, lora, lora+, rslora, lora-fa, lora-xs, pissa, hira, lokr, "
            "randlora, vera, ia3; with settings as kpsvd:init=random, lora:on=q_proj+v_proj or "
            f"vera:rates=1e-3+1e-2; default: {DEFAULT}, without those that a quantised base has "
            "no way for.",
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(metavar="A,B,C", help="Trainable parameters: 0.3M,0.6M,1.2M.")
    ] = "0.3M,0.6M,1.2M",
    learning_rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Rates that every method is tried at, but for those with rates=; default: each "
            "method's own, around its authors' rate.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: orders of the rows.")] = 3,
    plan: Annotated[
        Literal["full", "staged", "done"] | None,
        typer.Option(
            help="full: every combination; staged: rates, then seeds, then budgets; done: run "
            "nothing, judge every trial that is there. Default: full, and staged with --money."
        ),
    ] = None,
    money: Annotated[
        float | None,
        typer.Option(
            metavar="AMOUNT",
            help="Spend no more than this on all trials together, at compare.price_per_hour.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Judge by this task's score too: gsm8k, math, exact_match, label, json or text, "
            "on rows of the recipe's evaluation, of compare.test or of a validation file.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; with --ray tasks, default: all.")
    ] = None,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared",
            help="Work beside other calls on the same output_dir, from any machines: take trials "
            "that none of them has.",
        ),
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="With --shared: at most N trials in this call; 0: the verdict."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run each trial as a task of a Ray cluster: its address, auto, or local.",
        ),
    ] = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every method at equal budgets on the same rows, and draw a verdict."""
    if ray is not None and shared:
        raise InputError("--ray and --shared exclude each other: tasks of Ray share by themselves")
    if trials is not None and not shared:
        raise InputError(f"--trials {trials} needs --shared: other calls take the other trials")
    if shared and jobs is not None:
        raise InputError(
            f"--jobs {jobs}: a call with --shared runs one trial at a time; start more such calls"
        )
    sizes = sorted({_budget(each) for each in _items("--budgets", budgets)})
    from kpsvd_tune.comparison.plan import Entry, Grid

    rates: list[float] = []
    if learning_rates is not None:
        items = _items("--learning-rates", learning_rates)
        rates = sorted({read_rate("--learning-rates", each) for each in items})
    common = load_recipe(recipe, overrides or (), look_up=("model", "dataset", "compare"))
    left_out = None
    if methods is None:
        chosen, left_out = default_methods(common.model.quantization)
    else:
        chosen = read_methods(methods)
    recipes = {
        method.name: load_recipe(recipe, [*(overrides or ()), *method.overrides])
        for method in chosen
    }
    entries = [
        Entry(method.name, sizes, method.rates or rates or method.own_rates) for method in chosen
    ]
    grid = Grid(entries, seeds, plan or ("full" if money is None else "staged"))
    if money is not None:
        _check_money(money, common)
    if dry_run:
        prepare_libraries(offline, debug)
        from kpsvd_tune.comparison.compare import check_comparable, money_summary
        from kpsvd_tune.estimate.verbs import comparison_work

        check_comparable(common, chosen)
        if left_out:
            typer.echo(f"note: {left_out}", err=True)
        summary = grid.summary()
        if money is not None:
            summary |= money_summary(common, grid, money, jobs or 1)
        work = comparison_work(common, max(sizes), summary["trials"], jobs or 1)
        emit({**summary, "work": work.to_dict()}, as_json, lambda _: _show(summary, work))
        return
    prepare_libraries(offline, debug)
    from kpsvd_tune.comparison.compare import check_comparable
    from kpsvd_tune.comparison.compare import compare as run_comparison

    if ray is not None:
        check_comparable(common, chosen)
        words = _words(recipe, overrides or (), score, money, offline)
        words += [] if methods is None else ["--methods", methods]
        words += ["--budgets", budgets, "--seeds", str(seeds)]
        words += ["--plan", grid.plan]
        words += [] if learning_rates is None else ["--learning-rates", learning_rates]
        from kpsvd_tune.comparison.ray_tasks import run_tasks

        with ConsoleEvents() as events:
            run_tasks(words, grid.summary()["trials"], ray, jobs, events)
        shared, trials = True, 0
    with ConsoleEvents() as events, TrialTable() as table, drawing(table.leave_table):
        if left_out:
            events.note(left_out)
        verdict = run_comparison(
            common,
            recipes,
            chosen,
            grid,
            events,
            table,
            jobs=1 if ray else jobs or 1,
            money=money,
            score=score,
            is_shared=shared,
            num_trials=trials,
        )
    emit(verdict, as_json, show_comparison)


def _words(
    recipe: str, overrides: Sequence[str], score: str | None, money: float | None, offline: bool
) -> list[str]:
    """The command of a worker, as far as it is the same for all plans."""
    words = ["compare", recipe, *overrides]
    words += [] if score is None else ["--score", score]
    words += [] if money is None else ["--money", repr(money)]
    return [*words, *(["--offline"] if offline else [])]


def _check_money(money: float, recipe: Recipe) -> None:
    if not 0 < money < math.inf:
        raise InputError(f"--money: got {money:g}; expected an amount above 0")
    if recipe.compare.price_per_hour is None:
        raise InputError(
            "--money needs a price: set what an hour of one device costs, as in "
            "compare.price_per_hour=2.5 compare.currency=EUR"
        )


def _show(summary: Mapping[str, Any], work: WorkPlan) -> None:
    show_grid(summary)
    show_work(work)


def _items(option: str, text: str) -> list[str]:
    items = [each.strip() for each in text.split(",") if each.strip()]
    if not items:
        raise InputError(f"{option} is empty; expected numbers with commas between them")
    return items


def _budget(text: str) -> int:
    try:
        return read_number_of_parameters(text)
    except ValueError as error:
        raise InputError(f"--budgets: {error}") from error
