"""The pictures of the documentation are what their scripts draw."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from page_commands import DOCS, PAGES, ROOT

from kpsvd_tune import __version__

DRAWN = ("rearrangement", "spectra", "forms", "place")


@pytest.mark.slow
def test_the_script_draws_the_pictures_that_are_there(tmp_path: Path):
    script = ROOT / "scripts" / "pictures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    assert {file.stem for file in tmp_path.iterdir()} == set(DRAWN)
    for name in DRAWN:
        made = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        if name != "spectra":  # its curves depend on the last bits of the machine
            assert made == kept, f"stale: python {script.relative_to(ROOT)} docs/pictures"
        assert made.count("<") == kept.count("<")


@pytest.mark.parametrize(
    "picture", sorted((DOCS / "pictures").iterdir()), ids=lambda each: each.name
)
def test_a_picture_stands_on_a_page_and_fetches_nothing(picture: Path):
    assert any(f"pictures/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES)
    if picture.suffix == ".svg":
        text = picture.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "http" not in text.replace("http://www.w3.org/", "")


@pytest.mark.slow
def test_the_terminal_shows_what_a_command_prints(tmp_path: Path):
    script, file = ROOT / "scripts" / "terminal_picture.py", tmp_path / "terminal.svg"
    command = [sys.executable, str(script), str(file), "kpsvd-tune --version"]
    subprocess.run(command, check=True, capture_output=True)
    text = file.read_text(encoding="utf-8").replace("&#160;", " ")
    assert "kpsvd-tune --version" in text
    assert __version__ in text
    assert "http" not in text.replace("http://www.w3.org/", "")
    command[-1] = "kpsvd-tune report nowhere"
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "kpsvd-tune report nowhere ended with 2:\nerror: " in failed.stderr
