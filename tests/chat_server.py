"""A server of chat completions in a process of its own, and what tests ask it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import warm

TRANSFORMERS = "from transformers.cli.transformers import main; main()"


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


@contextmanager
def served(words: Sequence[str], folder: Path) -> Iterator[int]:
    """The command `transformers WORDS` in a folder, on a free port, which it gives."""
    port = free_port()
    words = [
        str(port) if before == "--port" else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", TRANSFORMERS, *words],
            stdout=out,
            stderr=out,
            cwd=folder,
            env=warm.unmeasured(),
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait(30)
