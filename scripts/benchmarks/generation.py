"""Time one token of generation at batch 1 with no adapter and with an unmerged one.

    python scripts/benchmarks/generation.py --json generation.json

has the models of scripts/benchmarks/step.py. Tokens are fed one at a time to models that take
turns at the same text, with a cache of keys and values; process time of one thread, or on a GPU
the time between CUDA events.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step import MADE, adapt, make_base, timed
from torch import Tensor

METHODS = ["none", "lora-r4", "thin-r4", "balanced-r4", "balanced-r16", "merged"]


def make_model(base: Any, method: str, args: argparse.Namespace) -> Any:
    """The base with an adapter or none; merged, it has weights of its own."""
    if method == "merged":
        own = make_base(args.model, args.dtype).to(args.device)
        return adapt(own, "thin-r4").merge_and_unload().eval()
    # As `generate`, `eval` and the scorings of a training have it: nothing needs a gradient.
    return adapt(base, method).eval().requires_grad_(False)


def feed(caches: dict[str, Any], name: str, model: Any, token: Tensor) -> None:
    """One token more of a model's text."""
    caches[name] = model(token, past_key_values=caches[name]).past_key_values


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["smollm2", *MADE], default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    base = make_base(args.model, args.dtype).to(device)
    models = {method: make_model(base, method, args) for method in args.methods}
    # Every token id below exists in every model.
    prompt = torch.randint(256, (1, 32)).to(device)
    took: dict[str, list[float]] = {method: [] for method in models}
    with torch.no_grad():
        caches = {name: model(prompt).past_key_values for name, model in models.items()}
        for turn in range(args.tokens + 3):
            token = torch.tensor([[turn % 256]], device=device)
            for name, model in models.items():
                seconds = timed(partial(feed, caches, name, model, token), device)
                if turn >= 3:
                    took[name].append(seconds)
    rows = []
    for name, turns in took.items():
        median = statistics.median(turns)
        ratio = median / statistics.median(took["none"]) if "none" in took else float("nan")
        rows.append({"method": name, "seconds": median, "to_base": ratio})
        print(
            f"{name:14} {1e3 * median:7.2f} ms a token  {1 / median:6.1f} tokens/s  x {ratio:.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
