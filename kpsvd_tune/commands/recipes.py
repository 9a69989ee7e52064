"""The commands `recipes`: those that come with the package, and what a recipe may hold."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kpsvd_tune import units
from kpsvd_tune.commands.options import Json, emit
from kpsvd_tune.errors import InputError, did_you_mean
from kpsvd_tune.recipe import shipped_recipes
from kpsvd_tune.recipe.convert import convert
from kpsvd_tune.recipe.extending import EXAMPLE, JOIN
from kpsvd_tune.recipe.files import is_part, shipped_files, shipped_parts
from kpsvd_tune.recipe.heads import combinations, head_of
from kpsvd_tune.recipe.reference import place_schema, reference_page, schema_text
from kpsvd_tune.recipe.writing import joined_text, resolved_text
from kpsvd_tune.report import layout
from kpsvd_tune.report.layout import Column, print_pairs, print_table
from kpsvd_tune.storage.paths import exists

_NAME_HELP = "A shipped recipe or part, or parts joined by +."
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMGBkmgb])[Bb]?", re.ASCII)
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}

recipes_app = typer.Typer(
    help="Recipes: those that come along, and every key.", no_args_is_help=True
)


_FILTER = typer.Option(metavar="NAME", help="Only combinations with this one.")


@recipes_app.command("list")
def list_recipes(
    model: Annotated[str | None, _FILTER] = None,
    task: Annotated[str | None, _FILTER] = None,
    machine: Annotated[str | None, _FILTER] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N", help="At most so many parameters: 2B, 500M.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="GB", help="At most so much memory a device: 24GB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what comes along: recipes and parts; with a filter, combinations that fit."""
    if (model, task, machine, size, memory) == (None,) * 5:
        purposes = {name: _purpose(path) for name, path in shipped_files().items()}
        emit(purposes, as_json, _show_files)
        return
    wanted = {"models": model, "tasks": task, "machines": machine}
    for folder, name in wanted.items():
        known = [each.partition("/")[2] for each in shipped_parts() if each.startswith(folder)]
        if name is not None and name.removeprefix(f"{folder}/") not in known:
            raise InputError(
                f"--{folder.removesuffix('s')}: got {name!r}; expected one of "
                f"{', '.join(known)}{did_you_mean(name, known)}"
            )
    most = _amount("--size", size, "2B or 500M"), _amount("--memory", memory, "24GB")
    found = [
        each.to_dict() | {"command": f"kpsvd-tune train {each.name} {each.options}".strip()}
        for each in combinations()
        if all(
            name in (None, part, f"{folder}/{part}")
            for (folder, name), part in zip(wanted.items(), each.parts, strict=True)
        )
        and each.parameters <= (most[0] or each.parameters)
        and each.memory_bytes <= (most[1] or each.memory_bytes)
    ]
    emit({"combinations": found}, as_json, lambda every: _show_combinations(every["combinations"]))


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_NAME_HELP)],
) -> None:
    """Print a shipped recipe, a part, or what parts joined by + give together."""
    if JOIN in name:
        typer.echo(resolved_text(name, _file_name(name)), nl=False)
    else:
        typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_NAME_HELP)],
    target: Annotated[
        Path | None, typer.Argument(help="File or folder; default: here, same name.")
    ] = None,
    resolved: Annotated[
        bool,
        typer.Option("--resolved", help="One whole file with a comment a key, without `extends`."),
    ] = False,
) -> None:
    """Copy a shipped recipe to edit it, or write one of parts joined by +; never overwrites."""
    source = _file_name(name) if JOIN in name else _shipped(name)
    path = target or Path(source.name)
    if os.path.isdir(path):
        path = path / source.name
    if resolved:
        _write_new(path, resolved_text(name, path))
    elif JOIN in name:
        _write_new(path, joined_text(name, path))
    else:
        _write_new(path, source.read_text(encoding="utf-8"))
    place_schema(path.parent)
    typer.echo(str(path))


@recipes_app.command("convert")
def convert_recipe(
    file: Annotated[
        str,
        typer.Argument(help="YAML of axolotl, LLaMA-Factory or trl, or adapter_config.json."),
    ],
    target: Annotated[
        Path | None, typer.Argument(help="The recipe to write; default: here, like the file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe of another tool's LoRA configuration, and list what has no counterpart."""
    stem = Path(file).stem
    path = target or Path(f"{stem}-kpsvd.yaml")
    if os.path.isdir(path):
        path = path / f"{stem}-kpsvd.yaml"
    found = convert(file, path.stem)
    _write_new(path, found.text)
    place_schema(path.parent)
    emit({"recipe": str(path), **found.to_dict()}, as_json, lambda told: _show_converted(told))


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


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    if exists(path):
        raise InputError(f"{path} exists: name another file")
    if not os.path.isdir(path.parent):
        raise InputError(f"the folder {path.parent} does not exist")
    try:
        with path.open("xb") as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; name a file in another folder"
        ) from error


def _file_name(name: str) -> Path:
    """The file of parts joined by +: models/a+tasks/b+machines/c is a-b.yaml."""
    names = [re.sub(r"\.ya?ml$", "", each.strip()) for each in name.split(JOIN)]
    last = [each.rpartition("/")[2] for each in names if not each.startswith("machines/")]
    return Path(f"{'-'.join(last)}.yaml")


def _shipped(name: str) -> Path:
    files = shipped_files()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key not in files:
        whole = ", ".join(shipped_recipes())
        raise InputError(
            f"no shipped recipe {name!r}; there are: {whole}; and parts that `kpsvd-tune recipes "
            f"list` shows{did_you_mean(key, files)}"
        )
    return files[key]


def _purpose(path: Path) -> str:
    return head_of(path).get("Purpose", "")


def _amount(option: str, text: str | None, example: str) -> float | None:
    """A number of parameters or bytes, with its unit."""
    if text is None:
        return None
    found = _AMOUNT.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(
            f"{option}: got {text!r}; expected a number above 0 with its unit: {example}"
        )
    return float(found[1]) * _UNITS[found[2].upper()]


def _show_files(purposes: Mapping[str, str]) -> None:
    whole = {name: each for name, each in purposes.items() if not is_part(name)}
    print_pairs(whole.items())
    typer.echo(f"\nParts, of which a recipe is made: {EXAMPLE}")
    print_pairs((name, each) for name, each in purposes.items() if is_part(name))
    typer.echo("\nWhat fits where: kpsvd-tune recipes list --machine gpu-24gb --task chat")


def _show_converted(told: Mapping[str, Any]) -> None:
    typer.echo(f"read as a configuration of {told['tool']}; carried over:")
    print_pairs((key, f"from {source}") for key, source in told["taken"].items())
    if told["left"]:
        typer.echo("\nleft out, and what that means for the run:")
        print_pairs(
            (key, f"{each['value']}: {each['meaning']}") for key, each in told["left"].items()
        )
    typer.echo(f"\n{told['recipe']}\nnext: kpsvd-tune validate {shlex.quote(told['recipe'])}")


def _show_combinations(found: Sequence[Mapping[str, Any]]) -> None:
    columns = [
        Column("model", is_text=True),
        Column("task", is_text=True),
        Column("machine", is_text=True),
        Column("parameters", goes=2),
        Column("trained", goes=3),
        Column("memory", goes=1),
        Column("options", is_text=True, goes=4),
    ]
    rows = [
        [
            each["model"],
            each["task"],
            each["machine"],
            f"{each['parameters'] / 1e9:.2f}B",
            f"{each['trained'] / 1e6:.2f}M",
            units.size(each["memory_bytes"]),
            each["options"],
        ]
        for each in found
    ]
    if not rows:
        typer.echo("no combination of shipped parts is like that; leave a filter out")
        return
    print_table(layout.output(), columns, rows, where="--json")
    typer.echo(
        "memory: of each device, by `plan`, every row being as long as may be\n"
        "to train one: kpsvd-tune train models/MODEL+tasks/TASK+machines/MACHINE OPTIONS "
        "dataset.path=rows.jsonl\n"
        "to edit one:  kpsvd-tune recipes copy models/MODEL+tasks/TASK+machines/MACHINE my.yaml"
    )
