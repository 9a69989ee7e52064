"""One rank of the runs that test_processes.py starts. Usage: rank.py FOLDER NAME [BACKEND].

RANK, WORLD_SIZE and so on are set as a launcher sets them. BACKEND is another than Accelerate
takes for the device, such as gloo on a GPU that several ranks share, which NCCL refuses.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState  # type: ignore[import-untyped]

from kpsvd_tune.processes import end_processes

RUNS = Path(__file__).parents[1] / "training" / "two_processes.py"


def main(folder: str, name: str, *backend: str) -> None:
    """Train with a global batch of four rows."""
    if backend:
        PartialState(backend=backend[0])
    batch_size = 4 // int(os.environ["WORLD_SIZE"])
    runpy.run_path(str(RUNS))["train"](Path(folder), name, batch_size=batch_size)
    end_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
