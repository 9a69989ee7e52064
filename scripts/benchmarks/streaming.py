"""Measure `init-only` on a whole checkpoint: time and memory of the command as users type it.

    python scripts/make_checkpoint.py llama2-7b /path/llama2-7b
    python scripts/benchmarks/streaming.py /path/llama2-7b --budget 0.99M --json streaming.json

Runs the command twice on an empty cache: first with everything to compute, then with another
threshold. Seconds include Python's start and all imports. Memory is sampled over the command and
its workers: anonymous memory is what the machine must really have, resident memory counts mapped
file pages on top of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.05


@dataclass
class Memory:
    """Largest values seen, in bytes.

    Attributes:
        process_anonymous: Anonymous memory of the largest process.
        process_resident: Resident memory of the largest process.
        all_anonymous: Anonymous memory of all processes at one moment.
        all_resident: Resident memory of all processes at one moment; shared pages count in each.
    """

    process_anonymous: int = 0
    process_resident: int = 0
    all_anonymous: int = 0
    all_resident: int = 0

    def sample(self, root: int) -> None:
        """Look at a process and everything below it."""
        seen = [memory_of(process) for process in family(root)]
        anonymous, resident = [each[0] for each in seen], [each[1] for each in seen]
        self.process_anonymous = max(self.process_anonymous, *anonymous)
        self.process_resident = max(self.process_resident, *resident)
        self.all_anonymous = max(self.all_anonymous, sum(anonymous))
        self.all_resident = max(self.all_resident, sum(resident))


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


def family(root: int) -> list[int]:
    """A process and all processes that it or they started."""
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # a thread that has just ended
    return found


def measure(command: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], Any]:
    """Run a command that prints JSON: what it cost, and what it printed."""
    peak = Memory()
    started = time.perf_counter()
    # A file, not a pipe, which would fill up while nobody reads.
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(command, env=environment, stdout=output) as process:
            while process.poll() is None:
                peak.sample(process.pid)
                time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            raise SystemExit(f"the command failed with exit code {process.returncode}")
        output.seek(0)
        return {"seconds": seconds, "peak_bytes": asdict(peak)}, json.load(output)


def describe(report: dict[str, Any]) -> dict[str, Any]:
    """What the rank report says about the whole model."""
    layers = report["layers"]
    ranks = [layer["rank"] for layer in layers]
    shapes = [layer["factor_shape"] for layer in layers]
    return {
        "modules": len(layers),
        "adapted": sum(rank > 0 for rank in ranks),
        "ranks": [min(ranks), max(ranks)],
        "matrix_seconds": sum(layer["seconds"] for layer in layers),
        "trainable_parameters": report["totals"]["trainable_parameters"],
        "budget": report["rule"]["budget"],
        "smallest_term_parameters": min(m * n + p * q for m, n, p, q in shapes),
        "energy": report["totals"]["energy"],
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, hub id or .gguf file")
    parser.add_argument("--factor-shape", default="balanced")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--energy", type=float, nargs=2, default=[0.5, 0.3], metavar="TAU")
    parser.add_argument("--budget", default="null", help="trainable parameters, such as 0.99M")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {json.dumps(options.model)}}}\n"
            "adapter:\n"
            f"  factor_shape: {options.factor_shape}\n"
            f"  rank: {{window: {options.window}, max: {options.window}, min: 0, "
            f"budget: {options.budget}}}\n"
            f"output_dir: {temporary}/run\n"
        )
        command = [sys.executable, "-m", "kpsvd_tune", "init-only", str(recipe), "--json"]
        command += ["--processes", str(options.processes)]
        environment = os.environ | {"XDG_CACHE_HOME": f"{temporary}/cache"}
        for energy in options.energy:
            print(f"energy {energy}:", file=sys.stderr)
            cost, report = measure([*command, f"adapter.rank.energy={energy}"], environment)
            runs.append({"energy_threshold": energy} | cost | describe(report))
            peak = cost["peak_bytes"]
            print(
                f"  {cost['seconds']:.1f} s; peak anonymous {peak['all_anonymous'] / 1e9:.2f} GB, "
                f"resident {peak['all_resident'] / 1e9:.2f} GB; "
                f"{runs[-1]['trainable_parameters']:,} parameters in {runs[-1]['adapted']} of "
                f"{runs[-1]['modules']} matrices",
                file=sys.stderr,
            )
    result = {
        "model": options.model,
        "processes": options.processes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpus": os.cpu_count(),
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
