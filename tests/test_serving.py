"""docs/serving.md: what other programs make of what is written here."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

SERVE = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def ask(port: int, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if content is None else json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.slow
def test_transformers_serve_answers_with_a_merged_model(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A merged folder is a folder of a plain model, as this one is (tests/merge)."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers[serving] is not installed")
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(tiny_model_dir), *options],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        question = {
            "model": str(tiny_model_dir),
            "messages": [{"role": "user", "content": "How many?"}],
            "max_tokens": 4,
        }
        answer = ask(port, "/v1/chat/completions", question)
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant"
        assert isinstance(choice["message"]["content"], str)
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait(30)
