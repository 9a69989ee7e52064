"""What cutting an update back does to the loss on its task and on other text.

Purpose: the figures of docs/log.md on forgetting: a trained adapter as it is, shrunk, cut back
    within its form (`restrain` of a recipe), and by any matrix, which merged weights can hold.
Needs: the study's data (prepare.py), a trained adapter of a one-sided form or a LoRA, and a text.
Command: .venv/bin/python scripts/benchmarks/study/restrain.py DATA ADAPTER TEXT OUT.jsonl
    DATA as prepare.py wrote it; the first 6,000 tokens of TEXT show directions, the next measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import kpsvd_tune.adapter  # noqa: F401  (registers the adapter with PEFT)
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.restraint import Restraint
from kpsvd_tune.data import IGNORED, TokenizedRow
from kpsvd_tune.evaluation.loss import summarise, token_losses

TEXT_TOKENS, WINDOW = 6000, 256
SCALES, STRENGTHS = (0.8, 0.6, 0.4), (0.1, 0.3, 1.0)
VALIDATION_ROWS, TRAINING_ROWS = 100, 60


def rows(file: Path, tokenizer: Any, most: int) -> list[TokenizedRow]:
    """Rows as the study's recipe writes them, the answers counted."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:most]):
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        whole = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]
        whole.append(tokenizer.eos_token_id)
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        found.append(TokenizedRow(tuple(whole), tuple(labels), number))
    return found


def windows(ids: list[int]) -> list[TokenizedRow]:
    """A text in windows, the first token of each not counted."""
    parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [TokenizedRow(tuple(p), (IGNORED, *p[1:]), n) for n, p in enumerate(parts) if p[1:]]


@torch.no_grad()
def moments(model: Any, layers: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, Tensor]:
    """E x x^T of the inputs of each layer, float64 (in, in)."""
    sums: dict[str, Any] = {}
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, 1).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] += len(x)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for ids in batches:
        model(input_ids=ids)
    for each in hooks:
        each.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@contextmanager
def merged(layers: dict[str, Any], updates: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the base weights carry these updates and the adapter none."""
    with torch.no_grad():
        held = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.base_layer.weight += updates[name].float()
    yield
    with torch.no_grad():
        for name, layer in layers.items():
            layer.base_layer.weight.copy_(held[name])


def main() -> None:
    """Measure every way and append a line each to OUT."""
    data, adapter, text_file, out = map(Path, sys.argv[1:5])
    tokenizer = AutoTokenizer.from_pretrained(data / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(data / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter).eval()
    layers: dict[str, Any] = dict(kpsvd_layers(model)) or {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    ids = tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"]
    shown, judged = windows(ids[:TEXT_TOKENS]), windows(ids[TEXT_TOKENS : 2 * TEXT_TOKENS])
    held_out = rows(data / "validation.jsonl", tokenizer, VALIDATION_ROWS)
    batches = [
        [torch.tensor([row.input_ids]) for row in part]
        for part in (rows(data / "train.jsonl", tokenizer, TRAINING_ROWS), shown)
    ]

    def measure(way: str, strength: float) -> None:
        losses = [
            summarise(token_losses(model, tokenizer, part, 4)).value for part in (held_out, judged)
        ]
        line = {"adapter": adapter.parent.name, "way": way, "strength": strength}
        line |= {"task_loss": losses[0], "text_loss": losses[1]}
        print(line, flush=True)
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    with model.disable_adapter():
        measure("base", 0.0)
    measure("as trained", 0.0)
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    if dict(kpsvd_layers(model)):
        restraint = Restraint(model, *batches)
        for strength in STRENGTHS:
            restraint.apply(strength)
            measure("within the form", strength)
        restraint.apply(0.0)
    own, other = (moments(model, layers, part) for part in batches)
    with model.disable_adapter():
        for scale in SCALES:
            with merged(layers, {name: scale * delta for name, delta in deltas.items()}):
                measure("shrunk", scale)
        for strength in STRENGTHS:
            cut = {}
            for name, delta in deltas.items():
                ridge = 1e-6 * own[name].diagonal().mean() * torch.eye(len(own[name])).double()
                m = own[name] + ridge
                cut[name] = torch.linalg.solve(m + strength * other[name], m @ delta.double().T).T
            with merged(layers, cut):
                measure("any matrix", strength)


if __name__ == "__main__":
    main()
