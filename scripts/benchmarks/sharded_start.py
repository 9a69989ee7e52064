"""What each process of a sharded training holds, and whether its losses are one process's.

    python scripts/make_checkpoint.py llama-1b /path/llama-1b
    python scripts/benchmarks/sharded_start.py /path/llama-1b --dtype bfloat16 --json sharded.json

Trains three steps of two short rows on a CPU: by one process, by two under `train.parallel: fsdp`,
and by two under DeepSpeed's ZeRO 3 (the extra deepspeed). Measured is the largest anonymous memory
of each process, from its start to its end: its libraries, its share of the weights, what a layer
needs while it is computed, and activations. On a checkpoint of the size `tiny` it is the libraries
alone. The frozen factors are random, so that nothing is decomposed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from large_training import steps_of, write_recipe
from merge import make_tokenizer
from streaming import family, memory_of

STEPS = 3
KINDS = ("one process", "fsdp", "zero3")


@dataclass
class Peaks:
    """The most anonymous memory of each process, in bytes, by its number."""

    by_process: dict[int, int] = field(default_factory=dict)

    def sample(self, root: int) -> None:
        """Look at a process and everything below it."""
        for process in family(root):
            anonymous, _ = memory_of(process)
            self.by_process[process] = max(self.by_process.get(process, 0), anonymous)

    def largest(self, count: int) -> list[int]:
        """The largest peaks, as many as there are ranks: launchers hold little."""
        return sorted(self.by_process.values(), reverse=True)[:count]


def write_zero(work: Path) -> Path:
    """Accelerate's configuration of ZeRO 3."""
    found = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3},
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
    }
    path = work / "zero3.accelerate.yaml"
    path.write_text(yaml.safe_dump(found), encoding="utf-8")
    return path


def train(base: Path, work: Path, kind: str, dtype: str) -> dict[str, Any]:
    """Train, and tell losses, seconds and peaks."""
    count = 1 if kind == "one process" else 2
    keys = {"max_steps": STEPS, "save_every": 0, "batch_size": 2 // count}
    parallel, name = "fsdp" if kind == "fsdp" else "ddp", kind.replace(" ", "-")
    recipe = write_recipe(base, work, dtype, name, parallel=parallel, **keys)
    command = [sys.executable, "-m", "kpsvd_tune", "train", str(recipe), "--offline"]
    if count > 1:
        command += ["--processes", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if kind == "zero3":
        command += ["--accelerate-config", str(write_zero(work))]
        environment |= {"DS_ACCELERATOR": "cpu"}
    else:
        environment |= {"ACCELERATE_USE_CPU": "true"}
    peaks, started = Peaks(), time.perf_counter()
    with (
        (work / "log.txt").open("ab") as log,
        subprocess.Popen(command, stderr=log, stdout=log, env=environment) as process,
    ):
        while process.poll() is None:
            peaks.sample(process.pid)
            time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"{kind}: exit code {process.returncode}; see {work / 'log.txt'}")
    return {
        "kind": kind,
        "seconds": time.perf_counter() - started,
        "losses": [line["loss"] for line in steps_of(work / name)],
        "anonymous_bytes": peaks.largest(count),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, default=None, help="default: beside the model")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    base = options.model.resolve()
    work = (options.work or base.parent / f"{base.name}-sharded-benchmark").resolve()
    work.mkdir(parents=True)
    if not (base / "tokenizer_config.json").is_file():
        make_tokenizer(base)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    size = stored * (2 if options.dtype == "float32" else 1)  # the file has 16 bits a number
    rows = [train(base, work, kind, options.dtype) for kind in options.only]
    for row in rows:
        row["largest_to_model"] = max(row["anonymous_bytes"]) / size
        pairs = zip(row["losses"], rows[0]["losses"], strict=True)
        row["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    text = json.dumps({"model_bytes": size, "dtype": options.dtype, "kinds": rows}, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
