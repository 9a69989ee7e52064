"""The self-test of `doctor`: a made-up model is decomposed, trained for two steps and merged.

In a process of its own, by the commands that a user types, in a temporary folder with a cache of
its own; nothing of it is left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kpsvd_tune.report.doctor import Check
from kpsvd_tune.units import duration

_SECONDS = 300
_ROWS = [{"prompt": f"{a} and {b}", "completion": str(a + b)} for a in (1, 2) for b in (3, 4)]


def self_test() -> Check:
    """Run it; a fault says which command failed and what it said."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kpsvd-tune-doctor-") as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _ROWS))
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(_recipe(folder)))
        problem = _run(
            ["train", str(recipe), "--offline", "--json"],
            ["merge", str(folder / "run"), "--output", str(folder / "merged"), "--offline"],
            folder=folder,
        )
        if problem is not None:
            said = f"training and merging a made-up model failed: {problem}"
            said = said.replace(name, "FOLDER")
            return Check("self-test", "fault", said, "report this with --json")
    taken = duration(time.monotonic() - began)
    return Check("self-test", "ok", f"decomposed, trained two steps and merged in {taken}")


# One process for all, the model's making too: importing the libraries takes most of the time.
# 4: the adapter is worse than its base, which two steps may well make it.
_PROGRAM = """
import json, sys
from pathlib import Path
from kpsvd_tune.commands.main import run
from kpsvd_tune.commands.options import prepare_libraries
prepare_libraries(offline=True, debug=False)
from kpsvd_tune.doctor.selftest import write_model
write_model(Path(sys.argv[2]))
for command in json.loads(sys.argv[1]):
    if run(command) not in (0, 4):
        sys.exit(f"kpsvd-tune {command[0]} failed")
"""


def _run(*commands: list[str], folder: Path) -> str | None:
    """What was said when one of the commands failed; None where none did."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(commands), str(folder / "model")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"exit code {done.returncode}: {' / '.join(lines[-3:]) or 'without a word'}"


def _recipe(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "dataset": {"path": str(folder / "rows.jsonl"), "max_length": 64, "validation": 0},
        "adapter": {"rank": {"method": "fixed", "max": 2, "window": 4}},
        "train": {"max_steps": 2, "batch_size": 2, "precision": "no"},
        "output_dir": str(folder / "run"),
    }


def write_model(folder: Path) -> None:
    """A Llama of two small layers and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
