"""Measure the constants of the cost model on this machine, for a device and a dtype.

    python scripts/measure_costs.py --device cuda --dtype bfloat16 --write

They are printed as an entry of kpsvd_tune/adapter/costs.json, by which the ways to compute an
adapter are chosen; --write puts it there in place of an earlier one of the same hardware. In
bfloat16 on a CPU that is the CPU's unit for it, whoever made the CPU. The unit of cost is a
multiply-add of a large product, so everything is timed against that. Let the machine be quiet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kpsvd_tune.adapter.costs import Costs
from kpsvd_tune.adapter.kernel import dense_weight
from kpsvd_tune.adapter.ways import Batched, Dense
from kpsvd_tune.hardware.bf16 import CPU_UNIT
from kpsvd_tune.hardware.devices import hardware_name, wait_for

FILE = Path(__file__).parents[1] / "kpsvd_tune" / "adapter" / "costs.json"
TOKENS, FEW, MANY = 512, 2, 16


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The fastest of several calls, about that long in all."""
    work()
    wait_for(device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure(
    device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3
) -> dict[str, Any]:
    """An entry of costs.json.

    Args:
        device: Where to measure.
        dtype: In which updates are computed.
        size: The side of the square weight; a multiple of 64.
        seconds: For each of about ten measurements.
    """

    def made(*sizes: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*sizes, device=device).to(kind)

    x, gy, weight = made(TOKENS, size), made(TOKENS, size), made(size, size)
    large = seconds_of(lambda: x @ weight, device, seconds)
    unit = large / (TOKENS * size * size)

    def cost(work: Callable[[], object]) -> float:
        return seconds_of(work, device, seconds) / unit

    side = 32
    other, entries = size // side, size * size

    def build(terms: int) -> float:
        left, right = (
            made(terms, *each, kind=torch.float32) for each in ((side, side), (other, other))
        )
        return cost(lambda: dense_weight(left, right, None).to(dtype)) / entries

    few, many = build(FEW), build(MANY)
    per_term = max(0.0, (many - few) / (MANY - FEW))
    tiny = made(1, 8)
    call = cost(lambda: tiny @ tiny.T)
    passes = cost(lambda: gy.add_(x)) / (TOKENS * size) / 1.5

    terms = FEW * 4
    left, right = made(terms, side, side), made(terms, other, other)
    folded, y = Batched.arrange(left, other), made(TOKENS, size)
    products = TOKENS * terms * (other * size + side * size)
    batched = cost(lambda: Batched.add_update(y, x, folded, right))
    slowness = max(1.0, (batched - passes * TOKENS * 3 * size) / products)

    def chunked(p: int) -> float:
        n = size // p
        a, b = made(FEW, n, n), made(FEW, p, p)
        found = cost(lambda: Batched.gradients(x, gy, None, a, b))
        made_of = 2 * TOKENS * FEW * (p * size + n * size)
        return max(1.0, (found - passes * TOKENS * 4 * size) / made_of)

    wide, thin = chunked(32), chunked(4)
    # thin = wide-limit x (1 + narrow / 4), wide = wide-limit x (1 + narrow / 32).
    narrow = max(0.0, min(16.0, (thin - wide) / max(1e-9, wide / 4 - thin / 32)))
    a, b = made(FEW, side, side, kind=torch.float32), made(FEW, other, other, kind=torch.float32)
    whole = cost(lambda: Dense.gradients(x, gy, None, a, b)) / entries
    costs = Costs(
        build_per_entry=max(0.0, few - FEW * per_term),
        build_per_term=per_term,
        pass_per_entry=passes,
        batched_slowness=slowness,
        chunked_slowness=max(1.0, wide / (1 + narrow / 32)),
        narrow=narrow,
        rearrange_per_entry=max(0.0, whole - TOKENS - 2 * FEW),
        call=call,
    )
    is_by_unit = device.type == "cpu" and dtype == torch.bfloat16
    return {
        "hardware": CPU_UNIT if is_by_unit else hardware_name(device),
        "kind": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "costs": {name: round(value, 3) for name, value in vars(costs).items()},
        "source": f"scripts/measure_costs.py, torch {torch.__version__}, size {size}",
    }


def add(file: Path, entry: dict[str, Any]) -> None:
    """Put an entry in place of the one for the same hardware and dtype."""
    same = ("hardware", "kind", "dtype")
    held = json.loads(file.read_text(encoding="utf-8"))
    kept = [each for each in held if any(each[key] != entry[key] for key in same)]
    file.write_text(json.dumps([*kept, entry], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true", help="add it to costs.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    entry = measure(torch.device(args.device), getattr(torch, args.dtype))
    print(json.dumps(entry, indent=1))
    if args.write:
        add(FILE, entry)


if __name__ == "__main__":
    main()
