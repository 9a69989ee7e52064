"""The proof of an exported LoRA: its logits in a process that knows nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kpsvd_tune.errors import ExportError, ResourceError
from kpsvd_tune.export import plain_peft
from kpsvd_tune.models import ModelSource

Logits = Sequence[Tensor]  # of each prompt, (tokens, vocabulary), float32


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Sequence[int]], whose: str) -> Logits:
    """The logits of each prompt of token ids.

    Raises:
        ExportError: They are not finite, or all equal, so that comparing them proves nothing.
    """
    model.eval()
    found = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in prompts]
    check(found, whose)
    return found


def plain_logits(
    adapter: Path, source: ModelSource, prompts: Sequence[Sequence[int]], whose: str
) -> Logits:
    """As :func:`logits`, of a LoRA that transformers and PEFT load in a process of their own."""
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with tempfile.TemporaryDirectory() as name:
        job, output = Path(name) / "job.json", Path(name) / "logits.safetensors"
        content = {
            "base": str(source.folder),
            "options": options,
            "adapter": str(adapter),
            "prompts": [list(ids) for ids in prompts],
            "output": str(output),
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        # -P: the folder of the program holds files of ours, which are no modules for it.
        command = [sys.executable, "-P", plain_peft.__file__, str(job)]
        done = subprocess.run(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode < 0:
            raise ResourceError(
                f"the process that loads the LoRA with plain PEFT was ended by signal "
                f"{-done.returncode}: signal 9 often means that the machine had no memory left for "
                "a second base model in float32; nothing was written"
            )
        if done.returncode or not output.is_file():
            fault = job.with_suffix(".fault")
            said = fault.read_text(encoding="utf-8") if fault.is_file() else done.stderr[-500:]
            raise ExportError(
                f"plain PEFT does not load the LoRA: {said[:500]}; nothing was written. Serve the "
                "merged model instead: kpsvd-tune merge"
            )
        found = load_file(output)
    ordered = [found[str(number)] for number in range(len(prompts))]
    check(ordered, whose)
    return ordered


def check(found: Logits, whose: str) -> None:
    """Refuse logits that would equal any others, or none (ExportError)."""
    for number, each in enumerate(found, 1):
        fault = ""
        if not torch.isfinite(each).all():
            fault = "are not finite"
        elif each.max() == each.min():
            fault = f"are all {float(each.max()):g}"
        if fault:
            raise ExportError(
                f"the logits of {whose} {fault} for prompt {number}, so that comparing them proves "
                "nothing: the weights of the base or of the adapter are damaged; nothing was "
                "written"
            )


def difference(one: Logits, other: Logits) -> tuple[float, float]:
    """Largest absolute logit difference, and the share of positions with the same top token."""
    pairs = list(zip(one, other, strict=True))
    # torch's max keeps a NaN, which Python's max() of floats may lose.
    largest = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return largest, same / sum(len(a) for a in one)
