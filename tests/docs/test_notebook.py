"""The notebook runs from top to bottom, and is kept without the outputs of anybody's machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import ROOT

NOTEBOOK = ROOT / "examples" / "afternoon.ipynb"
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path / "run.ipynb")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "run.ipynb").read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    said = "".join(
        "".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", [])
    )
    before, after = said.split(" nats a token")[0].splitlines()[-1].split(" -> ")
    assert float(after) < float(before) - 0.5
    assert "merged and adapted differ by at most" in said
