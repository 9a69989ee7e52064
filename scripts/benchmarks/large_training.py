"""Train a checkpoint that fills most of the memory: start, stop after two steps, go on; the peak.

    python scripts/make_checkpoint.py llama2-7b /path/llama2-7b
    python scripts/benchmarks/large_training.py /path/llama2-7b --json large.json

A training of forty steps in bfloat16 is started as users do, is sent a Ctrl-C once its second step
is logged, and is started again by the same command, until its fourth. It must have saved each time,
and the second start must go on with the step after the last one of the first. Memory is sampled for
the whole of both. The frozen factors are random, for the decomposition streams and has a benchmark
of its own. Rows are one short sentence each. A checkpoint without a tokenizer gets one of bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge import make_tokenizer
from streaming import Memory

STOPS = (2, 4)  # steps after which it is stopped
NUM_STEPS = 40


def write_recipe(
    base: Path, work: Path, dtype: str = "bfloat16", name: str = "run", **train: Any
) -> Path:
    """A recipe of short rows and random factors, which trains into `name` of the folder."""
    rows = [
        {"prompt": f"{i} and {i + 1}", "completion": f" are {2 * i + 1} in all."} for i in range(64)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "rows.jsonl").write_text(text, encoding="utf-8")
    precision = "bf16" if dtype == "bfloat16" else "no"
    recipe = {
        "model": {"path": str(base), "dtype": dtype},
        "dataset": {"path": str(work / "rows.jsonl"), "max_length": 64, "validation": 0},
        "adapter": {
            "target_modules": "all-linear",
            "form": "left",
            "factor_size": 64,
            "init": "random",
            "rank": {"method": "fixed", "max": 1, "window": 1},
        },
        "train": {"batch_size": 1, "precision": precision, "eval_every": 0, **train},
        "output_dir": str(work / name),
    }
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the steps that were logged so far."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    # The last line may be half written.
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in whole if "step" in line and "loss" in line]


def train_until(step: int, recipe: Path, run: Path, log: Path) -> dict[str, Any]:
    """Train, press Ctrl-C once a step is logged, and tell what it cost."""
    peak, started, first = Memory(), time.perf_counter(), None
    before = len(steps_of(run))
    command = [sys.executable, "-m", "kpsvd_tune", "train", str(recipe), "--offline"]
    with log.open("ab") as output, subprocess.Popen(command, stderr=output) as process:
        is_told = False
        while process.poll() is None:
            peak.sample(process.pid)
            done = len(steps_of(run))
            if done > before and first is None:
                first = time.perf_counter() - started
            if done >= step and not is_told:
                process.send_signal(signal.SIGINT)
                is_told = True
            time.sleep(0.5)
    logged = steps_of(run)
    return {
        "exit_code": process.returncode,
        "seconds": time.perf_counter() - started,
        "seconds_to_the_first_step": first,
        "steps": [line["step"] for line in logged],
        "losses": [line["loss"] for line in logged],
        "checkpoints": sorted(each.name for each in (run / "checkpoints").glob("step-*")),
        "peak_bytes": asdict(peak),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    parser.add_argument("--work", type=Path, default=None, help="default: beside the model")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    base = options.model.resolve()
    work = (options.work or base.parent / f"{base.name}-training-benchmark").resolve()
    work.mkdir(parents=True)
    if not (base / "tokenizer_config.json").is_file():
        make_tokenizer(base)
    recipe = write_recipe(base, work, max_steps=NUM_STEPS, save_every=1)
    run = work / "run"
    sessions = [train_until(step, recipe, run, work / "log.txt") for step in STOPS]
    first, second = sessions
    result = {
        "model": base.name,
        "bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "sessions": sessions,
        "peak_resident_bytes": max(each["peak_bytes"]["all_resident"] for each in sessions),
        "went_on": len(first["steps"]) >= STOPS[0]
        and second["steps"][: len(first["steps"])] == first["steps"]
        and second["steps"] == list(range(1, len(second["steps"]) + 1))
        and second["losses"][: len(first["losses"])] == first["losses"],
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    if not result["went_on"]:
        print(f"the second run did not go on with the first; see {work}", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
