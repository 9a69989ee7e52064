"""Commands that only read files and import no torch: validate, report and recipes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.cli.shared import Debug, Json, Overrides, RecipeArgument, app, emit
from kpsvd_tune.errors import InputError
from kpsvd_tune.folders import exists, expand, kind_of
from kpsvd_tune.recipe import load_recipe, recipe_to_yaml, shipped_recipes
from kpsvd_tune.recipe.paths import SECTIONS
from kpsvd_tune.report import console as view
from kpsvd_tune.report.comparison import read_comparison
from kpsvd_tune.report.layout import make_console, output, print_pair
from kpsvd_tune.report.run import read_run
from kpsvd_tune.report.trials import show_comparison

recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and print it as resolved, with every default."""
    resolved = load_recipe(recipe, overrides or (), look_up=SECTIONS)
    if as_json:
        typer.echo(resolved.model_dump_json())
    else:
        typer.echo(recipe_to_yaml(resolved), nl=False)
        make_console(stderr=True, soft_wrap=True).print(f"{recipe}: valid", style="green")


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run or of a comparison.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="The rank of every layer too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the results of a run again, and its ranks; or the verdict of a comparison."""
    folder = expand(run)
    if kind_of(folder) == "comparison":
        emit(read_comparison(folder), as_json, show_comparison)
    else:
        emit(read_run(folder), as_json, lambda found: view.show_run(found, layers=layers))


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes with their purpose."""
    purposes = {name: view.purpose(path) for name, path in shipped_recipes().items()}
    if as_json:
        typer.echo(json.dumps(purposes))
        return
    for name, purpose in purposes.items():
        print_pair(output(), name, purpose)


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
    if os.path.isdir(path):
        path = path / source.name
    if exists(path):
        raise InputError(f"{path} exists: name another file")
    if not os.path.isdir(path.parent):
        raise InputError(f"the folder {path.parent} does not exist")
    try:
        with path.open("xb") as file:
            file.write(source.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; name a file in another folder"
        ) from error
    typer.echo(str(path))


def _shipped(name: str) -> Path:
    recipes = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key not in recipes:
        raise InputError(f"no shipped recipe {name!r}; there are: {', '.join(recipes)}")
    return recipes[key]
