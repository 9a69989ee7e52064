"""A run that kills itself, as `kill -9` does, after a step. Usage: killed_run.py RECIPE STEP."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.live import ConsoleEvents


def main(recipe: str, last: int) -> int:
    """Train until that step."""
    step = ConsoleEvents.step

    def stepped(events: ConsoleEvents, metrics: Any, total: int) -> None:
        step(events, metrics, total)
        if metrics.step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    ConsoleEvents.step = stepped  # type: ignore[assignment,method-assign]
    return cli.run(["train", recipe])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
