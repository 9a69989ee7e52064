"""One rank of the runs under DeepSpeed that test_zero.py starts.

Usage: zero_processes.py FOLDER, with RANK and so on set as a launcher sets them and DeepSpeed asked
for as `accelerate launch` asks for it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from kpsvd_tune.processes import end_processes

CLIPPED: dict[str, Any] = {"max_grad_norm": 0.1, "weight_decay": 0.1, "two_rates": True}
RUNS = runpy.run_path(str(Path(__file__).with_name("two_processes.py")))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train = RUNS["train"]
    two: dict[str, Any] = {"batch_size": 2}
    train(folder, "plain", **two)
    train(folder, "accumulated", batch_size=1, gradient_accumulation=2)
    train(folder, "clipped", **two, **CLIPPED)
    train(folder, "checkpointing", **two, gradient_checkpointing=True)
    train(folder, "sgd", **two, optimizer="sgd")
    train(folder, "bf16", **two, precision="bf16")
    groups = two | {"dropout": 0.3, "two_rates": True}
    train(folder, "whole", **groups)
    train(folder, "parts", **groups, stop_after=3)
    train(folder, "parts+resumed", **groups)
    train(folder, "nan", **two, plant=RUNS["plant_nan_once"])
    train(folder, "signal", **two, plant=RUNS["kill_once"])
    train(folder, "signal+resumed", **two)
    train(folder, "skip", **two, plant=RUNS["plant_nan_once"], on_nonfinite="skip")
    train(folder, "retry", **two, plant=RUNS["plant_nan_once"], on_nonfinite="retry")
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
