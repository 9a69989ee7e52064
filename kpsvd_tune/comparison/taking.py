"""Which trials other workers of a comparison have, and taking one that nobody has.

Workers are calls of the command on any machines that share the folder. Who has a trial holds the
lock of a file for it, which the system lifts however the worker ends: then it is free again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kpsvd_tune.events import Events
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import make_folder
from kpsvd_tune.storage.locks import hold, join_folder

# Between looks for a trial that another worker has given back.
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Taken:
    """What came of looking for something to do."""

    number: int | None  # its place among the names; None: others have all, or it was not accepted
    others: Mapping[int, float] = field(default_factory=dict)  # since when, by the clock, who has


class Taking:
    """One worker among others in a comparison's folder, which it takes at most `at_most` trials in.

    ResourceError, at the start: the file system of the folder has no locks.
    """

    def __init__(self, folder: Path, at_most: int | None = None) -> None:
        self._folder, self._claims = folder, folder / "claims"
        self._left = at_most
        self.is_bounded = at_most is not None

    @property
    def has_more(self) -> bool:
        """Whether this worker may take another trial."""
        return self._left is None or self._left > 0

    def count(self) -> None:
        """Count a trial that this worker has run."""
        if self._left is not None:
            self._left -= 1

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Be a worker: calls that want the folder for themselves are refused meanwhile."""
        make_folder(self._folder)
        with join_folder(self._folder, "workers that share a comparison"):
            make_folder(self._claims)
            yield

    @contextlib.contextmanager
    def alone(self, events: Events) -> Iterator[None]:
        """Be the only worker that prepares the folder or writes the verdict; others wait."""
        file = self._folder / ".prepare.lock"
        with contextlib.ExitStack() as stack:
            with explained(f"lock {file}"):
                held = stack.enter_context(hold(file, wait=False))
            if held is False:
                events.note("waiting for another worker, which prepares the comparison")
                with explained(f"lock {file}"):
                    stack.enter_context(hold(file, wait=True))
            yield

    @contextlib.contextmanager
    def take(
        self,
        names: Sequence[str],
        accept: Callable[[int, Mapping[int, float]], bool] = lambda *_: True,
    ) -> Iterator[Taken]:
        """Hold the first of some tasks that no worker has, inside the context.

        `accept` is asked with its number, and with those that others have and since when; no other
        worker takes anything meanwhile.
        """
        with contextlib.ExitStack() as stack:
            with explained(f"lock files in {self._claims}"):
                number, others = self._first(stack, names, accept)
            yield Taken(number, others)

    def _first(
        self,
        stack: contextlib.ExitStack,
        names: Sequence[str],
        accept: Callable[[int, Mapping[int, float]], bool],
    ) -> tuple[int | None, Mapping[int, float]]:
        with hold(self._claims / ".lock", wait=True):
            others = {
                number: self._since(name)
                for number, name in enumerate(names)
                if not self._is_free(name)
            }
            number = next((each for each in range(len(names)) if each not in others), None)
            if number is None or not accept(number, others):
                return None, others
            stack.enter_context(hold(self._file(names[number]), wait=False))
            worker = f"process {os.getpid()} on {socket.gethostname()}"
            about = json.dumps({"since": time.time(), "worker": worker})
            self._file(names[number]).write_text(about, encoding="utf-8")
            return number, others

    def _file(self, name: str) -> Path:
        return self._claims / f"{name}.lock"

    def _is_free(self, name: str) -> bool:
        with hold(self._file(name), wait=False) as held:
            return held is not False

    def _since(self, name: str) -> float:
        # It is being written, or is of a worker that was killed in between.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(self._file(name).read_text(encoding="utf-8"))["since"])
        return time.time()
