"""Hold the seconds that `plan` tells of loading, decomposition and scoring against measured ones.

    python scripts/benchmarks/plan_parts.py [--only smollm2 gpt2] [--dtypes float32 bfloat16]

Each model and dtype has a process of its own: it estimates, as `plan` does, then loads the model,
decomposes all its matrices into an empty cache and answers 20 questions of 45 to 51 tokens with 16
tokens at most. Printed are the range, the clock and the processor time. SmolLM2 is the model that
`scripts/setup` installs, the other the GPT-2 of plan.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from plan import SMOLLM2, write_gpt2

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.decompose import collect_spectra, layer_plans
from kpsvd_tune.estimate.answers import answering_seconds
from kpsvd_tune.estimate.loading import loading_seconds
from kpsvd_tune.estimate.passes import PassTimes
from kpsvd_tune.estimate.time import STEP_RANGE, decomposition_seconds
from kpsvd_tune.evaluation.generation import GenerationOptions, Prompt, generate_completions
from kpsvd_tune.models import (
    WeightReader,
    load_model,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.recipe.adapter import AdapterRecipe

CPU = torch.device("cpu")
LENGTHS = [45 + number % 7 for number in range(20)]
NEW = 16
T = TypeVar("T")


def measured(work: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds by the clock, seconds of the processor, and what the work gave."""
    clock, used = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - clock, time.process_time() - used, found


def one(path: str, dtype: str) -> None:
    """Estimate and measure one model in one dtype, and print rows of a table."""
    source = resolve_model(path)
    skeleton, tokenizer = load_skeleton(source), load_tokenizer(source)
    adapter = AdapterRecipe()
    names = target_names(skeleton, adapter.target_modules, adapter.exclude_modules, [])
    plans = layer_plans(WeightReader(source, names, skeleton), adapter)
    task = EvaluationRecipe(
        task="exact_match", path="unread.jsonl", batch_size=16, max_new_tokens=NEW
    )
    window, tolerance = adapter.rank.window, adapter.rank.tolerance
    decomposing = decomposition_seconds(plans, window, tolerance, CPU)
    # The decomposition of a GGUF file loads the model first.
    is_gguf = source.kind == "gguf"
    loads = loading_seconds(source, skeleton, "float32", decomposes=False)
    more = loads if is_gguf else (0.0, 0.0)
    told = {
        "loading": loading_seconds(source, skeleton, dtype, decomposes=False),
        "scoring": answering_seconds(PassTimes(skeleton, DTYPES[dtype], CPU), task, LENGTHS),
        "decomposition": (
            STEP_RANGE[0] * decomposing + more[0],
            STEP_RANGE[1] * decomposing + more[1],
        ),
    }
    took: dict[str, tuple[float, float]] = {}
    clock, used, model = measured(lambda: load_model(source, dtype))
    took["loading"] = (clock, used)
    prompts = [
        Prompt(number, "", tuple(range(100, 100 + length)), "")
        for number, length in enumerate(LENGTHS)
    ]
    options = GenerationOptions(max_new_tokens=NEW, batch_size=16)
    clock, used, _ = measured(
        lambda: list(generate_completions(model, tokenizer, prompts, options))
    )
    took["scoring"] = (clock, used)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        clock, used, _ = measured(lambda: collect_spectra(source, adapter))
        took["decomposition"] = (clock, used)
    for name, (low, high) in told.items():
        clock, used = took[name]
        holds = "yes" if low <= used <= high else "no"
        print(
            f"| {Path(path).stem} | {dtype} | {name} | {low:.1f} to {high:.1f} | {clock:.1f} | "
            f"{used:.1f} | {holds} |",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["smollm2", "gpt2"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.dtypes[0])
        return
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        gpt2 = Path(folder) / "gpt2"
        if "gpt2" in options.only:
            write_gpt2(gpt2)
        for name in options.only:
            path = SMOLLM2 if name == "smollm2" else str(gpt2)
            for dtype in options.dtypes:
                words = [sys.executable, __file__, "--one", path, "--dtypes", dtype]
                subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
