"""Names and texts that a user may give: brackets, colons, bytes, homes that are not there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.console import show_sweep
from kpsvd_tune.report.layout import make_console, shortened
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.storage.paths import cache_folder

PACKAGE = Path(cli.__file__).parents[1]
ODD = "a[red]b[/]:smile:[x-z]+.yaml"


def test_brackets_and_colons_in_a_name_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(ODD.replace("/", "")).write_text("model: {path: o/m}\noutput_dir: x\n")
    assert cli.run(["validate", ODD.replace("/", "")]) == 0
    assert f"{ODD.replace('/', '')}: valid" in capsys.readouterr().err


def test_events_print_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleEvents() as events:
        events.stage(ODD)
        events.note(ODD)
        events.advance(ODD, 1, 1, ODD)
    assert capsys.readouterr().err.count(ODD) == 4
    show_sweep({ODD: {"error": ODD}})
    assert capsys.readouterr().out.count(ODD) == 3


def test_a_bar_prints_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    out = io.StringIO()
    events = ConsoleEvents()
    events._console = make_console(file=out, force_terminal=True, width=200)
    events.advance(ODD, 1, 2, "[dim]left")
    events.end_progress()
    assert ODD in out.getvalue()
    assert "[dim]left" in out.getvalue()


@pytest.mark.slow
def test_every_console_is_made_by_the_function_that_reads_no_markup() -> None:
    made = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name == "TextColumn":
                    assert "markup=False" in ast.unparse(node), file
                if name in ("Console", "from_markup"):
                    made[file.name] = name
    assert made == {"layout.py": "Console"}


@pytest.mark.slow
def test_bytes_that_are_not_utf8_on_the_command_line_are_refused() -> None:
    for arguments in ([b"validate", b"r\xff.yaml"], [b"generate", b"m", b"caf\xe9"]):
        done = subprocess.run(
            [sys.executable, "-m", "kpsvd_tune", *arguments], capture_output=True, timeout=60
        )
        assert done.returncode == 2
        assert b"holds bytes that are not UTF-8; expected UTF-8: rename" in done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_of_another_encoding_ends_no_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune", "validate", "smollm2_gsm8k", "output_dir=fü→r"],
        capture_output=True,
        timeout=60,
        env={"PYTHONIOENCODING": "latin-1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert b"f\xfc\\u2192r" in done.stdout


def test_a_cache_in_a_home_that_is_not_there_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-here/cache")
    with pytest.raises(InputError, match="Set XDG_CACHE_HOME to a folder that can be written"):
        cache_folder()


def test_a_message_that_lists_what_a_file_holds_is_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "x has the columns " + ", ".join(map(str, range(200_000))) + "; name one of them"
    short = shortened(f"first\n{text}")
    assert len(short) < 2000
    assert short.startswith("first\nx has the columns 0, 1, 2")
    assert " characters ... " in short
    assert short.endswith("199999; name one of them")
    assert shortened("short\ntext") == "short\ntext"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: o/m}\noutput_dir: x\n")
    assert cli.run(["validate", str(recipe), "x" * 100_000 + "=1"]) == 2
    assert len(capsys.readouterr().err) < 3000


@pytest.mark.parametrize(
    "setting",
    [
        "train.batch_size=5000000",
        "train.gradient_accumulation=5000000",
        "train.num_workers=1000000",
        "adapter.rank.window=5000000",
        "evaluation=[{task: gsm8k, batch_size: 5000000}]",
        "evaluation=[{task: gsm8k, samples: 5000000, temperature: 1}]",
        "evaluation=[{task: gsm8k, max_new_tokens: 500000000}]",
    ],
)
def test_millions_are_refused_where_thousands_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: o/m}\noutput_dir: x\n")
    assert cli.run(["validate", str(recipe), setting]) == 2
    assert "000; expected a number of at most" in capsys.readouterr().err
