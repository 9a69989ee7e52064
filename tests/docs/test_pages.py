"""What the documents promise: existing commands and options, the real tree, runnable scripts."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from page_commands import PAGES, ROOT, blocks
from typer.testing import CliRunner

from kpsvd_tune.commands.main import app
from kpsvd_tune.recipe import load_recipe

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Made by scripts and ignored by git.
MADE = {"build", "data", "dist", "runs"}


def documented_commands() -> list[tuple[str, str]]:
    """Every kpsvd-tune command in a bash block of a page or in the head of a recipe."""
    found = []
    for page in PAGES:
        text = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ")
        lines = [line.removeprefix("$ ").removeprefix(".venv/bin/") for line in text.splitlines()]
        found += [(page.name, line) for line in lines if line.startswith("kpsvd-tune ")]
    for recipe in RECIPES:
        comments = re.findall(r"^#.*$", recipe.read_text("utf-8"), re.MULTILINE)
        commands = [re.search(r"kpsvd-tune [^)]*", comment) for comment in comments]
        found += [(recipe.name, command[0]) for command in commands if command]
    return found


def help_of(words: list[str]) -> str:
    """The help of the command that the words begin with."""
    verb = words[:2] if words[0] == "recipes" else words[:1]
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"no such command: kpsvd-tune {' '.join(verb)}"
    return result.output


def test_the_readme_shows_commands():
    assert {"train", "merge"} <= {line.split()[1] for _, line in documented_commands()}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), documented_commands())
def test_documented_commands_exist(page: str, line: str):
    words = shlex.split(line, comments=True)[1:]
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_of(words)))
    # --help and --version belong to the program itself.
    assert options <= known | {"--help", "--version"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path):
    named = re.findall(
        r"(?<![\w/.-])(?:recipes|scripts)/[\w/-]+(?:\.\w+)?", page.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def tree() -> tuple[set[str], set[str]]:
    """What the tree of CONTRIBUTING.md lists: in the package, and beside it."""
    trees = [block for block in blocks(CONTRIBUTING, "", "text") if block.startswith("kpsvd_tune/")]
    assert len(trees) == 1, "CONTRIBUTING.md needs one fenced block that starts with kpsvd_tune/"
    inside: set[str] = set()
    beside: set[str] = set()
    for line in trees[0].splitlines()[1:]:
        entry = re.fullmatch(r"( {0,2})(\S+)( {2,}\S.*)?", line)
        if entry is None:
            continue  # deeper in the tree, or a phrase that goes on
        assert entry[3], f"{entry[2]} has no phrase that says what it is for"
        (inside if entry[1] else beside).add(entry[2])
    return inside, beside


def test_the_tree_is_the_real_tree():
    def entries(folder: Path) -> set[str]:
        return {
            path.name + "/" * path.is_dir()
            for path in folder.iterdir()
            if not path.name.startswith((".", "__")) and (path.is_dir() or path.suffix == ".py")
        }

    inside, beside = tree()
    assert {name for name in inside if not name.startswith("__")} == entries(ROOT / "kpsvd_tune")
    folders = {name for name in beside if name.endswith("/")}
    assert folders == entries(ROOT) - {f"{name}/" for name in MADE} - {"kpsvd_tune/"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_validate(recipe: Path):
    assert load_recipe(recipe).output_dir


def test_scripts_are_programs():
    scripts = [
        file
        for folder in (ROOT / "scripts", ROOT / ".ci")
        for file in folder.iterdir()
        if file.is_file() and not file.suffix
    ]
    assert {"setup", "quickstart", "check", "test", "run"} <= {script.name for script in scripts}
    for script in scripts:
        assert os.access(script, os.X_OK), f"{script} is not executable"
        head = script.read_text(encoding="utf-8").splitlines()
        assert head[0] == "#!/usr/bin/env bash", f"{script} names no bash"
        assert "set -euo pipefail" in head, f"{script} would go on after an error"
