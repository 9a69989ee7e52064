"""Time one token of generation at batch 1 with no adapter and with an unmerged one.

    python scripts/benchmarks/generation.py --json generation.json

needs the same model as scripts/benchmarks/step.py. Tokens are fed one at a time to models that take
turns at the same text, with a cache of keys and values; process time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from step import adapt, make_base

METHODS = ["none", "lora-r4", "thin-r4", "balanced-r4", "balanced-r16", "merged"]


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = make_base("smollm2", getattr(torch, args.dtype))
    models: dict[str, Any] = {}
    for method in args.methods:
        if method == "merged":
            models[method] = adapt(make_base("smollm2", base.dtype), "thin-r4").merge_and_unload()
        else:
            models[method] = adapt(base, method)
        models[method].eval()
    prompt = torch.randint(1000, (1, 32))
    took: dict[str, list[float]] = {method: [] for method in models}
    with torch.no_grad():
        caches = {name: model(prompt).past_key_values for name, model in models.items()}
        for turn in range(args.tokens + 3):
            token = torch.tensor([[turn]])
            for name, model in models.items():
                begin = time.process_time()
                caches[name] = model(token, past_key_values=caches[name]).past_key_values
                if turn >= 3:
                    took[name].append(time.process_time() - begin)
    rows = []
    for name, seconds in took.items():
        median = statistics.median(seconds)
        ratio = median / statistics.median(took["none"]) if "none" in took else float("nan")
        rows.append({"method": name, "seconds": median, "to_base": ratio})
        print(
            f"{name:14} {1e3 * median:7.2f} ms a token  {1 / median:6.1f} tokens/s  x {ratio:.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
