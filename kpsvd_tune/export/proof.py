"""The proof of an exported LoRA: its logits in a process that knows nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from kpsvd_tune.errors import ExportError, ResourceError
from kpsvd_tune.export import plain_peft
from kpsvd_tune.merge.proof import check_logits
from kpsvd_tune.models import ModelSource


def plain_logits(
    adapter: Path, source: ModelSource, prompts: Sequence[Sequence[int]], whose: str
) -> list[Tensor]:
    """As :func:`logits`, of a LoRA that transformers and PEFT load in a process of their own.

    Raises:
        ExportError: It cannot be loaded so, or its logits prove nothing.
        ResourceError: The process was ended by a signal.
    """
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
    check_logits(ordered, whose, ExportError)
    return ordered
