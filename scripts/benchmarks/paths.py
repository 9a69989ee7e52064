"""Compare what the cost model chooses for a layer with every other way of computing it.

    python scripts/benchmarks/paths.py --json paths.json

For every weight size, factor shape, rank and number of tokens the forward and backward pass of one
adapted layer is timed (process time of one thread, ways taking turns, fastest of several) along
each path and with each way of differentiating the factors. The table says what was chosen, what was
fastest, and how much slower the choice is; the last lines how often the choice is off and how far.
Ways that are far behind are given up after a few turns. ``--inference`` times the forward pass
alone, ``--dtype bfloat16`` a layer in 16 bits, ``--form left`` one whose left factors alone are
trained. LLaMA2-7B's larger weights are measured up to ``--largest`` multiply-adds of W alone, so
that the grid ends: beyond, every cost grows in proportion to the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kpsvd_tune.adapter import KpsvdLinear
from kpsvd_tune.adapter.costs import costs_of
from kpsvd_tune.adapter.forms import FORMS, Form, Plan, Way
from kpsvd_tune.adapter.function import update_dtype
from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.linalg import KroneckerShape, choose_shape
from kpsvd_tune.linalg.shape import nearest_shape

SIZES = {
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
RULES: dict[str, Any] = {"thin": "thin", "8x8": {"n": 8, "p": 8}, "balanced": "balanced"}
FACTOR_SIZE = 32  # rows and columns of the trained factors of one-sided forms

# The choice itself, which is replaced while other ways are timed.
CHOOSE = Form.plan
UPDATES: dict[Way, str] = {Flat: "flat", Batched: "batched", Dense: "weight"}
GRADIENTS: dict[Way, str] = {Flat: "spread", Batched: "chunked", Dense: "full"}


def shape_of(size: tuple[int, int], rule: str, form: str) -> KroneckerShape:
    """The factor shape of a weight (out, in)."""
    if form == "both":
        return choose_shape(*size, RULES[rule]).shape
    return nearest_shape(*size, form, FACTOR_SIZE).shape


def plans(form: Form, is_training: bool) -> list[Plan]:
    """Every way to compute a layer, but flat products far wider than the layer itself."""
    shape = form.shape
    largest = max(shape.out_features, shape.in_features)
    is_wide = form.num_terms * shape.n * shape.p > 2 * largest
    ways: list[Way] = [Dense, Batched] if is_wide else [Dense, Batched, Flat]
    return [Plan(*each) for each in itertools.product(ways, ways if is_training else [Dense])]


def make_layer(form: Form, dtype: torch.dtype) -> KpsvdLinear:
    """One adapted layer with a non-zero update."""
    shape = form.shape
    base = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype)
    adapted = KpsvdLinear(base.requires_grad_(False), "default")
    frozen = tuple(torch.randn(form.size(part)) for part in form.frozen)
    adapted.update_layer("default", form, 0.0, frozen)
    with torch.no_grad():
        for parameter in adapted.trained("default"):
            parameter.normal_()
    return adapted


def fastest(calls: dict[Plan, Callable[[], object]], seconds: float) -> dict[Plan, float]:
    """The fastest of several turns of each call, about ``seconds`` for a call in all."""
    best = dict.fromkeys(calls, math.inf)
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(200):
        for plan, call in calls.items():
            # What is far behind is not timed for long, but a slow first turn proves nothing.
            is_behind = best[plan] > 1.3 * min(best.values())
            if turn and spent[plan] > (seconds / 5 if is_behind else seconds):
                continue
            begin = time.process_time()
            call()
            took = time.process_time() - begin
            spent[plan] += took
            best[plan] = min(best[plan], took)
    return best


def measure(
    form: Form, tokens: int, is_training: bool, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Time all ways for one layer and number of tokens."""
    adapted, shape = make_layer(form, dtype), form.shape
    x = torch.randn(tokens, shape.in_features, dtype=dtype, requires_grad=is_training)
    gradient = torch.randn(tokens, shape.out_features, dtype=dtype)

    def call(plan: Plan) -> Callable[[], None]:
        def run() -> None:
            Form.plan = lambda *_: plan  # type: ignore[method-assign]
            with torch.set_grad_enabled(is_training):
                y = adapted(x)
            if is_training:
                y.backward(gradient)

        return run

    took = fastest({plan: call(plan) for plan in plans(form, is_training)}, seconds)
    update = update_dtype(dtype, torch.float32, "cpu")
    can_add, costs = torch.finfo(dtype).bits >= 32, costs_of("cpu", update)
    chosen = CHOOSE(form, tokens, "auto", is_training, can_add, costs)
    if not is_training:
        chosen = Plan(chosen.update, Dense)
    best = min(took, key=lambda plan: took[plan])
    return {
        "out": shape.out_features,
        "in": shape.in_features,
        "rank": form.rank,
        "tokens": tokens,
        "chosen": name_of(chosen),
        "best": name_of(best),
        "excess": took[chosen] / took[best] - 1,
        "seconds": {name_of(plan): value for plan, value in took.items()},
    }


def name_of(plan: Plan) -> str:
    """A plan in a word."""
    return f"{UPDATES[plan.update]}+{GRADIENTS[plan.gradient]}"


def summary(rows: list[dict[str, Any]]) -> str:
    """How often the choice is off, and how far."""
    excess = sorted(row["excess"] for row in rows)
    off = [value for value in excess if value > 0.1]
    # The path alone, each with its best gradient: what the choice of a path can be blamed for.
    wrong = 0
    for row in rows:
        chosen = row["chosen"].startswith("weight")
        ways = row["seconds"].items()
        same = min(value for name, value in ways if name.startswith("weight") == chosen)
        wrong += same > 1.1 * min(row["seconds"].values())
    return (
        f"{len(rows) - len(off)} of {len(rows)} choices within 10 % of the best way; "
        f"{len(rows) - wrong} of {len(rows)} paths within 10 % of the better path; "
        f"excess: mean {100 * sum(excess) / len(excess):.1f} %, 95th percentile "
        f"{100 * excess[int(0.95 * (len(excess) - 1))]:.0f} %, largest {100 * excess[-1]:.0f} %"
    )


def main() -> None:
    """Read the options, measure the grid, print what was chosen and what it costs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--rules", nargs="+", choices=sorted(RULES), default=sorted(RULES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--form", choices=["both", "left"], default="both")
    parser.add_argument("--seconds", type=float, default=0.04, help="for each way of each point")
    parser.add_argument("--largest", type=float, default=5e9, help="tokens x out x in")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    sizes = [size for name in args.sizes for size in SIZES[name]]
    rules = args.rules if args.form == "both" else [f"{FACTOR_SIZE}x{FACTOR_SIZE}"]
    for size, rule, rank, tokens in itertools.product(sizes, rules, args.ranks, args.tokens):
        if tokens * math.prod(size) > args.largest:
            continue
        form = FORMS[args.form](shape_of(size, rule, args.form), rank)
        dtype = getattr(torch, args.dtype)
        row = {"rule": rule} | measure(form, tokens, not args.inference, dtype, args.seconds)
        rows.append(row)
        print(
            f"{size[0]:6}x{size[1]:<6}{rule:9} r{rank:<3}{tokens:5} tokens  chosen "
            f"{row['chosen']:20} best {row['best']:20} +{100 * row['excess']:.0f} %",
            flush=True,
        )
    print(summary(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
