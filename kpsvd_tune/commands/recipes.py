"""The commands `recipes`: those that come with the package, and what a recipe may hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.commands.options import Json, emit
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import shipped_recipes
from kpsvd_tune.recipe.reference import place_schema, reference_page, schema_text
from kpsvd_tune.report.layout import print_pairs
from kpsvd_tune.storage.paths import exists

recipes_app = typer.Typer(
    help="Recipes: those that come along, and every key.", no_args_is_help=True
)


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes with their purpose."""
    purposes = {name: _purpose(path) for name, path in shipped_recipes().items()}
    emit(purposes, as_json, lambda found: print_pairs(found.items()))


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
    place_schema(path.parent)
    typer.echo(str(path))


@recipes_app.command("schema")
def recipe_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file; default: standard output.")
    ] = None,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check their keys."""
    _give(schema_text(), output)


@recipes_app.command("docs")
def recipe_docs(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file; default: standard output.")
    ] = None,
) -> None:
    """Print a page of all keys of a recipe: values, default and meaning."""
    _give(reference_page(), output)


def _give(text: str, output: Path | None) -> None:
    """Print what is made anew at any time, or write it, over an earlier one too."""
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{output} cannot be written: {error.strerror or error}; name another file"
        ) from error
    typer.echo(str(output))


def _shipped(name: str) -> Path:
    recipes = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key not in recipes:
        raise InputError(f"no shipped recipe {name!r}; there are: {', '.join(recipes)}")
    return recipes[key]


def _purpose(path: Path) -> str:
    """What the opening comment says between "Purpose:" and "Needs:", on one line."""
    opening = path.read_text(encoding="utf-8").partition("# Needs:")[0]
    opening = opening.partition("# Purpose:")[2]
    return " ".join(line.lstrip("# ") for line in opening.splitlines())
