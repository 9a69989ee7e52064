"""The command `chat` in a terminal of its own: questions, Ctrl-C, and leaving."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm

from kpsvd_tune.commands import main as cli


class Terminal:
    """A program in a terminal."""

    def __init__(self, *command: str) -> None:
        self._end, inside = pty.openpty()
        # A session of its own, so that Ctrl-C reaches this program and nobody else.
        self.process = warm.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
        )
        os.close(inside)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Read until a pattern comes, and forget what came up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            ready, _, _ = select.select([self._end], [], [], 1)
            if ready:
                self.seen += os.read(self._end, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C until a pattern comes.

        readline shows its prompt a moment before it waits for keys, and a signal in that moment
        is seen with the next key only.
        """
        for _ in range(60):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.wait_for(pattern, seconds=2)
                return
        raise AssertionError(self.seen)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextlib.contextmanager
def _terminal(*command: str) -> Iterator[Terminal]:
    terminal = Terminal(*command)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.slow
def test_a_conversation_in_a_terminal(tiny_model_dir: Path) -> None:
    # So many tokens that the first answer lasts until it is stopped.
    command = ["chat", str(tiny_model_dir), "--max-new-tokens", "480"]
    with _terminal(sys.executable, "-m", "kpsvd_tune", *command) as terminal:
        terminal.wait_for("> ")
        terminal.type("How many?\n")
        terminal.wait_for(r"How many\?\r\n.")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\((stopped|cut at)")
        terminal.wait_for("> ")
        terminal.interrupt_until("Ctrl-D leaves")  # at the prompt it says how to leave
        terminal.wait_for("> ")
        terminal.type("/nothing\n")
        terminal.wait_for("/nothing: expected a question; /reset forgets")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0


@pytest.mark.slow
def test_questions_from_a_pipe(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["One?", "", "word " * 300, "/help", "/reset", "One?", "/quit"])

    def read(prompt: str) -> str:
        assert prompt == ""  # nobody is there to read one
        return next(lines)

    monkeypatch.setattr("builtins.input", read)
    assert cli.run(["chat", str(tiny_model_dir), "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.strip("\n").split("\n")[-2:]
    assert first == second
    assert "(cut at --max-new-tokens 4 or the full context)" in captured.err
    assert "error: the conversation is" in captured.err
    assert "/help: expected a question" in captured.err


def test_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chat", "no/such/run"]) == 2
    assert "no/such/run" in capsys.readouterr().err
