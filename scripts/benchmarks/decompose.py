"""Time and accuracy of the truncated KPSVD at 7B sizes, against torch.svd_lowrank.

    python scripts/benchmarks/decompose.py [--repeats 3] [--threads N] [--json FILE] [--exact]
        [--device cuda]

Both methods start from the same bf16 weight, rearranged and cast within the timed part, and are
run in turn in one process. svd_lowrank(q=16, niter=16) is what PEFT's ``pissa_niter_16`` calls.
"Equal" is our method at the loosest of a few tolerances at which it still captures what
svd_lowrank captures. The optimum is our Lanczos run until it stands still (tolerance 1e-9);
``--exact`` checks it by a full SVD of the first matrix, about half a minute. A smaller matrix
shows what a full SVD costs beside both, and its optimum is exact. The weights are a
spectrum sigma_k = strength * edge * k^-decay planted over a Gaussian bulk whose own largest
singular value is ``edge``: flat near rank 16, as real weights are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpsvd_tune.linalg import KroneckerShape, choose_shape, kpsvd, rearrange, unrearrange

SIZES = [(4096, 4096), (11008, 4096)]
# Where a full SVD joins in: it costs seconds here, a minute or more at the sizes above.
SMALL = (2048, 2048)
RANK = 16
NUM_PLANTED = 256
STRENGTH, DECAY = 1.2, 0.05
TOLERANCES = [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3]


def planted_weight(shape: KroneckerShape, seed: int = 0) -> Tensor:
    """A bf16 weight whose rearrangement has a decaying spectrum over a random bulk."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape.m * shape.n, shape.p * shape.q
    edge = rows**0.5 + columns**0.5
    strengths = STRENGTH * edge * torch.arange(1, NUM_PLANTED + 1) ** -DECAY
    left, right = (
        torch.linalg.qr(torch.randn(size, NUM_PLANTED, generator=generator)).Q
        for size in (rows, columns)
    )
    matrix = torch.randn(rows, columns, generator=generator).addmm_(left * strengths, right.T)
    return (0.02 * unrearrange(matrix, shape)).bfloat16()


def peak_memory_mb() -> float:
    """Largest resident memory since the last reset, from the kernel (Linux), in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak() -> None:
    """Make the kernel forget the peak, so that each method shows its own."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, float, float]:
    """Run once: result, wall seconds, processor seconds, peak MB of the device above the start."""
    is_on_gpu = device.type == "cuda"
    if is_on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated() / 2**20
    else:
        reset_peak()
        start = peak_memory_mb()
    wall, processor = time.perf_counter(), time.process_time()
    values = call()
    if is_on_gpu:
        torch.cuda.synchronize()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = torch.cuda.max_memory_allocated() / 2**20 if is_on_gpu else peak_memory_mb()
    return values, wall, processor, peak - start


def measure(
    out_features: int,
    in_features: int,
    repeats: int,
    device: torch.device,
    *,
    exact: bool = False,
    full: bool = False,
) -> dict[str, Any]:
    """Compare the methods on one matrix; ``full`` adds torch.linalg.svd to them."""
    shape = choose_shape(out_features, in_features, "balanced").shape
    weight = planted_weight(shape).to(device)

    def ours(tolerance: float) -> Tensor:
        return kpsvd(weight, shape, RANK, tolerance=tolerance).values

    def theirs() -> Tensor:
        return torch.svd_lowrank(rearrange(weight.float(), shape), q=RANK, niter=16)[1]

    def whole() -> Tensor:
        return torch.linalg.svd(rearrange(weight.float(), shape), full_matrices=False)[1]

    def energy(values: Tensor) -> float:
        return float(values[:RANK].double().square().sum())

    optimum = energy(ours(1e-9))
    result: dict[str, Any] = {
        "size": [out_features, in_features],
        "factor_shape": shape.as_tuple(),
        "optimum_share_of_weight": optimum / float(weight.double().square().sum()),
    }
    if exact or full:
        best = energy(torch.linalg.svdvals(rearrange(weight.float(), shape)))
        result["optimum_over_full_svd"] = optimum / best
        optimum = best
    goal = energy(theirs())
    equal = next((t for t in TOLERANCES if energy(ours(t)) >= goal), TOLERANCES[-1])
    methods: dict[str, Callable[[], Tensor]] = {
        "svd_lowrank(q=16, niter=16)": theirs,
        "kpsvd, default": lambda: ours(5e-3),
        f"kpsvd, equal (tolerance {equal:g})": lambda: ours(equal),
    }
    if full:
        methods["torch.linalg.svd, all terms"] = whole
    runs: dict[str, list[tuple[Tensor, float, float, float]]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            runs[name].append(timed(call, device))
    base = statistics.median(run[1] for run in runs["svd_lowrank(q=16, niter=16)"])
    result["methods"] = {
        name: {
            "seconds": statistics.median(run[1] for run in taken),
            "processor_seconds": statistics.median(run[2] for run in taken),
            "ratio": statistics.median(run[1] for run in taken) / base,
            "captured_energy": energy(taken[0][0]) / optimum,
            "peak_memory_mb": max(run[3] for run in taken),
        }
        for name, taken in runs.items()
    }
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, help="only a square matrix of this size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--exact", action="store_true", help="full SVD of the first matrix")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    # svd_lowrank draws from the global generator.
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    small = (options.size, options.size) if options.size else SMALL
    results = []
    for size in [small] if options.size else [*SIZES, SMALL]:
        exact = options.exact and size == SIZES[0]
        result = measure(*size, options.repeats, device, exact=exact, full=size == small)
        results.append(result)
        print(
            f"{size[0]} x {size[1]}, factors {result['factor_shape']}, best {RANK} terms hold "
            f"{result['optimum_share_of_weight']:.2%} of the weight"
        )
        if "optimum_over_full_svd" in result:
            print(f"  optimum over full SVD: {result['optimum_over_full_svd']:.6f}")
        for name, figures in result["methods"].items():
            print(
                f"  {name:32s} {figures['seconds']:7.2f} s {figures['ratio']:6.2f} x"
                f" {figures['processor_seconds']:7.2f} cpu-s {figures['captured_energy']:9.3%}"
                f" {figures['peak_memory_mb']:7.0f} MB"
            )
    if options.json:
        payload: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if device.type == "cuda":
            payload["device"] = torch.cuda.get_device_name(device)
        payload["runs"] = results
        options.json.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
