"""Measure the decomposition of a whole checkpoint from its files: time and memory.

    python scripts/make_checkpoint.py llama2-7b /path/llama2-7b
    python scripts/benchmarks/streaming.py /path/llama2-7b --window 16 --budget 990000

Runs the stage twice on an empty cache folder: once with everything to compute, once with another
threshold. Memory is sampled over this process and its workers. Anonymous memory is what the
machine must really have; resident memory counts mapped file pages on top of it. The result is
JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kpsvd_tune.decompose import Progress, decompose
from kpsvd_tune.models import ModelSource, resolve_model
from kpsvd_tune.recipe.adapter import AdapterRecipe

SAMPLE_SECONDS = 0.05


@dataclass
class Memory:
    """Largest values seen, in bytes.

    Attributes:
        process_anonymous: Anonymous memory of the largest process.
        process_resident: Resident memory of the largest process.
        all_anonymous: Anonymous memory of all processes at one moment.
    """

    process_anonymous: int = 0
    process_resident: int = 0
    all_anonymous: int = 0


class MemorySampler:
    """Watches this process and its children from a thread."""

    def __init__(self) -> None:
        self.peak = Memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            samples = [memory_of(process) for process in [os.getpid(), *children()]]
            anonymous = [sample[0] for sample in samples]
            peak = self.peak
            peak.process_anonymous = max(peak.process_anonymous, *anonymous)
            peak.process_resident = max(peak.process_resident, *(x[1] for x in samples))
            peak.all_anonymous = max(peak.all_anonymous, sum(anonymous))
            if self._stop.wait(SAMPLE_SECONDS):
                return


def memory_of(process: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process now; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {
        key: int(rest.split()[0]) * 1024
        for key, _, rest in (line.partition(":") for line in lines)
        if key in ("Anonymous", "Rss")
    }
    return values.get("Anonymous", 0), values.get("Rss", 0)


def children() -> list[int]:
    """Processes that this one started."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # a thread that has just ended
    return found


def show(progress: Progress) -> None:
    """Print one line now and then."""
    if progress.done % 16 == 0 or progress.done == progress.total:
        left = "?" if progress.seconds_left is None else f"{progress.seconds_left:.0f}"
        print(
            f"  {progress.done}/{progress.total}, {left} s left, "
            f"windows hold {100 * progress.energy:.1f} %",
            file=sys.stderr,
        )


def measure(
    source: ModelSource, recipe: AdapterRecipe, cache_dir: Path, processes: int
) -> dict[str, Any]:
    """Run the stage once and describe it."""
    before = memory_of(os.getpid())[0]
    started = time.perf_counter()
    with MemorySampler() as sampler:
        found = decompose(source, recipe, cache_dir=cache_dir, processes=processes, progress=show)
    ranks = [layer.rank for layer in found.report.layers]
    return {
        "rank": recipe.rank.model_dump(),
        "seconds": time.perf_counter() - started,
        "matrix_seconds": sum(layer.seconds for layer in found.report.layers),
        "anonymous_bytes_before": before,
        "peak_bytes": asdict(sampler.peak),
        "modules": len(ranks),
        "adapted": sum(rank > 0 for rank in ranks),
        "ranks": [min(ranks), max(ranks)],
        "trainable_parameters": found.report.totals["trainable_parameters"],
        "largest_term_parameters": max(
            layer.factor_shape[0] * layer.factor_shape[1]
            + layer.factor_shape[2] * layer.factor_shape[3]
            for layer in found.report.layers
        ),
        "energy": found.report.totals["energy"],
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, hub id or .gguf file")
    parser.add_argument("--factor-shape", default="balanced")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--energy", type=float, nargs=2, default=[0.5, 0.7], metavar="TAU")
    parser.add_argument("--budget", default=None, help="trainable parameters, such as 0.99M")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=None, help="cache folder; default: empty")
    options = parser.parse_args()
    source = resolve_model(options.model)
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        cache_dir = options.cache or Path(temporary)
        for energy in options.energy:
            rank = {
                "energy": energy,
                "window": options.window,
                "max": options.window,
                "min": 0,
                "budget": options.budget,
            }
            recipe = AdapterRecipe.model_validate(
                {"rank": rank, "factor_shape": options.factor_shape}
            )
            print(f"energy {energy}:", file=sys.stderr)
            runs.append(measure(source, recipe, cache_dir, options.processes))
    result = {
        "model": source.path,
        "weight_bytes": sum(file.stat().st_size for file in source.weight_files),
        "processes": options.processes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "runs": runs,
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
