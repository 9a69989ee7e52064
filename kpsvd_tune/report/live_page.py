"""The page of a run while it trains: written again now and then, and never a reason to stop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from kpsvd_tune.errors import InputError

_log = logging.getLogger(__name__)
PAGE = "report.html"
# The page is written again at the earliest after so many seconds, and after so many times what
# the last writing took: two hundredths of the training go into it at most.
LEAST_SECONDS = 30.0
_COST_FACTOR = 50.0


class LivePage:
    """Keeps RUN/report.html up to date; only the writer, the main process, does anything."""

    def __init__(self, run: Path, *, is_writer: bool = True) -> None:
        self._run, self._is_writer = run, is_writer
        self._next = 0.0

    def refresh(self, *, is_last: bool = False) -> None:
        """Write the page if it is time, or because nothing comes after it.

        Whatever goes wrong is logged once; the page is then left alone.
        """
        began = time.monotonic()
        if not self._is_writer or (began < self._next and not is_last):
            return
        try:
            _write(self._run)
        except Exception as error:
            self._is_writer = False
            is_known = isinstance(error, InputError)
            said = str(error) if is_known else f"{type(error).__name__}: {error}"
            _log.warning("%s is not written, the run goes on: %s", self._run / PAGE, said)
            return
        now = time.monotonic()
        self._next = now + max(LEAST_SECONDS, _COST_FACTOR * (now - began))


def _write(run: Path) -> None:
    # What draws the page is loaded with the first one.
    from kpsvd_tune.report.run_files import read_run_files
    from kpsvd_tune.report.run_page import write_run_page

    write_run_page(read_run_files(run), run / PAGE)
