"""The command `compare`: every method at equal budgets on the same rows, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every method at equal budgets on the same rows, and draw a verdict."""
    sizes = sorted({_budget(each) for each in _items("--budgets", budgets)})
    from kpsvd_tune.comparison.plan import Entry, Grid

    rates: list[float] = []
    if learning_rates is not None:
        items = _items("--learning-rates", learning_rates)
        rates = sorted({read_rate("--learning-rates", each) for each in items})
    shared = load_recipe(recipe, overrides or (), look_up=("model", "dataset", "compare"))
    left_out = None
    if methods is None:
        chosen, left_out = default_methods(shared.model.quantization)
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
        _check_money(money, shared)
    if dry_run:
        prepare_libraries(offline, debug)
        from kpsvd_tune.comparison.compare import check_comparable, money_summary
        from kpsvd_tune.estimate.verbs import comparison_work

        check_comparable(shared, chosen)
        if left_out:
            typer.echo(f"note: {left_out}", err=True)
        summary = grid.summary()
        if money is not None:
            summary |= money_summary(shared, grid, money, jobs)
        work = comparison_work(shared, max(sizes), summary["trials"], jobs)
        emit({**summary, "work": work.to_dict()}, as_json, lambda _: _show(summary, work))
        return
    prepare_libraries(offline, debug)
    from kpsvd_tune.comparison.compare import compare as run_comparison

    with ConsoleEvents() as events, TrialTable() as table:
        if left_out:
            events.note(left_out)
        verdict = run_comparison(
            shared, recipes, chosen, grid, events, table, jobs=jobs, money=money, score=score
        )
    emit(verdict, as_json, show_comparison)


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
