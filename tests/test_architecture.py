"""The house rules that can be read off the files: order of imports, sizes, names, safe calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kpsvd_tune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each takes a second or more to import; what answers at once must do without them.
HEAVY = {"accelerate", "datasets", "peft", "torch", "transformers"}

# Both run what they read: pickle on loading a file, the others on a text.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {
    *("torch.load", "torch.save", "np.load", "numpy.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen"),
}
# These are there to run code in the sandbox: the generated program, its tests, and our own side of
# both, which is sent there compiled and never read back.
RUNS_CODE = {
    PACKAGE / "evaluation" / "sandbox" / name for name in ("run.py", "judge.py", "program.py")
}


def name_of(module: Path) -> str:
    return module.relative_to(ROOT).as_posix()


def dotted(node: ast.expr) -> str:
    """The name that an expression such as `torch.load` spells, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def is_weights_only(call: ast.Call) -> bool:
    """Whether a call of torch.load says in so many words that it runs nothing."""
    return dotted(call.func) == "torch.load" and any(
        each.arg == "weights_only"
        and isinstance(each.value, ast.Constant)
        and each.value.value is True
        for each in call.keywords
    )


def unsafe_uses(source: str) -> list[str]:
    """What a module imports or calls that could run code hidden in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in UNSAFE_MODULES or names & UNSAFE_CALLS:
                found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS and not is_weights_only(node):
                found.append(dotted(node.func))
            found += ["shell=" for keyword in node.keywords if keyword.arg == "shell"]
            found += ["allow_pickle=" for k in node.keywords if k.arg == "allow_pickle"]
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("import os, dill.source", ["dill.source"]),
        ("from pickle import loads", ["from pickle"]),
        ("from torch import load", ["from torch"]),
        ("def f():\n    return torch.load('x')", ["torch.load"]),
        ("torch.load('x', weights_only=is_safe)", ["torch.load"]),
        ("torch.load('x', weights_only=False)", ["torch.load"]),
        ("torch.load('x', mmap=True, weights_only=True)", []),
        ("yaml.load(text, Loader=yaml.SafeLoader)", ["yaml.load"]),
        ("subprocess.run('ls', shell=True)", ["shell="]),
        ("eval('1')", ["eval"]),
        ("model.eval(); safetensors.torch.load_file('x'); yaml.safe_load('a')", []),
    ],
)
def test_the_scan_tells_unsafe_from_safe(source: str, found: list[str]):
    assert unsafe_uses(source) == found


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({*MODULES} - RUNS_CODE), ids=name_of)
def test_nothing_runs_code_hidden_in_data(module: Path):
    assert unsafe_uses(module.read_text(encoding="utf-8")) == []


def test_names_say_what_is_inside():
    said_nothing = {"common", "helper", "helpers", "misc", "util", "utils"}
    folders = [PACKAGE, ROOT / "scripts", ROOT / "tests"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert len(files) > len(MODULES) > 0
    for file in files:
        assert not said_nothing & {part.strip("_") for part in file.with_suffix("").parts[-3:]}


@pytest.mark.slow
def test_imports_keep_their_contracts():
    program = "from importlinter.cli import lint_imports_command as main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def heavy_after(program: str, cwd: Path) -> set[str]:
    """Which of the heavy libraries are loaded when a program has ended."""
    probe = (
        "import sys\n"
        f"try:\n    {program}\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('loaded:', *sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return HEAVY & set(run.stdout.split("loaded:")[-1].split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "kpsvd_tune",
        "kpsvd_tune.errors",
        "kpsvd_tune.recipe",
        "kpsvd_tune.report",
        "kpsvd_tune.commands.main",
    ],
)
def test_importing_stays_light(module: str, tmp_path: Path):
    assert heavy_after(f"import {module}", tmp_path) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["--help", "train --help", "recipes list", "validate smollm2_gsm8k"]
)
def test_commands_that_only_read_stay_light(command: str, tmp_path: Path):
    program = (
        f"sys.argv[1:] = {command.split()!r}; from kpsvd_tune.commands.main import main; main()"
    )
    assert heavy_after(program, tmp_path) == set()


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path: Path):
    def output(*command: str) -> str:
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout

    from_module = output(sys.executable, "-m", "kpsvd_tune", "--version")
    assert from_module == output(str(Path(sys.executable).with_name("kpsvd-tune")), "--version")
    assert from_module.startswith("kpsvd-tune ")
