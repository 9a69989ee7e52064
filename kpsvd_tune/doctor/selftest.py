"""The self-test of `doctor`: a made-up model is decomposed, trained for two steps and merged.

In a process of its own, by the commands that a user types, in a temporary folder with a cache of
its own; nothing of it is left. The process is forked where it can be: importing the libraries again
would take more than the test itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.report.doctor import Check
from kpsvd_tune.units import duration

Run = Callable[[list[str]], int]
_SECONDS = 300
_LOG = "said.txt"
_ROWS = [{"prompt": f"{a} and {b}", "completion": str(a + b)} for a in (1, 2) for b in (3, 4)]


def self_test(run: Run) -> Check:
    """Run it; a fault says which command failed and what it said.

    `run` runs a command line and gives its exit code; a function of a module, which another process
    can import.
    """
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
            run=run,
        )
        if problem is not None:
            said = f"training and merging a made-up model failed: {problem}"
            said = said.replace(name, "FOLDER")
            return Check("self-test", "fault", said, "report this with --json")
    taken = duration(time.monotonic() - began)
    return Check("self-test", "ok", f"decomposed, trained two steps and merged in {taken}")


def _run(*commands: list[str], folder: Path, run: Run) -> str | None:
    """What was said when one of the commands failed; None where none did."""
    process = _context().Process(target=_work, args=(commands, folder, run), daemon=True)
    process.start()
    try:
        process.join(_SECONDS)
        is_over = process.exitcode is not None
    finally:
        process.kill()
        process.join()
    if not is_over:
        return f"it took longer than {_SECONDS} s"
    if process.exitcode == 0:
        return None
    log = folder / _LOG
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in said.splitlines() if line.strip()]
    code = process.exitcode
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ended}: {' / '.join(lines[-3:]) or 'without a word'}"


def _context() -> Any:
    """How the process is made: forked, unless the libraries of this one cannot be forked."""
    torch: Any = sys.modules.get("torch")
    has_cuda = torch is not None and torch.cuda.is_initialized()
    can_fork = sys.platform == "linux" and not has_cuda
    return multiprocessing.get_context("fork" if can_fork else "spawn")


def _work(commands: Sequence[list[str]], folder: Path, run: Run) -> None:
    """Make the model and run the commands; what they say goes into a file of the folder."""
    with (folder / _LOG).open("w", encoding="utf-8") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")

        import torch

        # OpenMP's threads do not come along with a fork, and would be waited for.
        torch.set_num_threads(1)
        write_model(folder / "model")
        for command in commands:
            # 4: the adapter is worse than its base, which two steps may well make it.
            if run(command) not in (0, 4):
                log.write(f"kpsvd-tune {command[0]} failed")
                log.flush()
                # Without the exit handlers of what was forked.
                os._exit(1)
        log.flush()
        os._exit(0)


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
