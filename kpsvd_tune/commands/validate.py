"""The command `validate`: check a recipe and print it with every default."""

from __future__ import annotations

import typer

from kpsvd_tune.commands.options import Debug, Json, Overrides, RecipeArgument
from kpsvd_tune.recipe import load_recipe, recipe_to_yaml
from kpsvd_tune.recipe.paths import SECTIONS
from kpsvd_tune.report.layout import make_console


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
        console = make_console(stderr=True, soft_wrap=True)
        if resolved.extends:
            console.print(f"made of {', '.join(resolved.extends)} and {recipe}")
        console.print(f"{recipe}: valid", style="green")
