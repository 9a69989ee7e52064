"""A program: loads a LoRA as its users will, with transformers and PEFT alone, and runs prompts.

It is started by its path in a process of its own, so that nothing of kpsvd_tune is imported there:
what it finds is what any program without this package finds. Its one argument is a JSON file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    """Write the logits of each prompt, (tokens, vocabulary) float32, and what was imported."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    base: Any = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.float32, local_files_only=True, **job["options"]
    )
    is_gguf = "gguf_file" in job["options"]  # whose weights are plain, though marked otherwise
    if not is_gguf and getattr(base, "hf_quantizer", None) is not None:
        # Packed weights are multiplied with roundings of their own, larger than the tolerance.
        base = base.dequantize().float()
    model: Any = PeftModel.from_pretrained(base, job["adapter"]).eval()
    logits = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in job["prompts"]]
    if any(name.partition(".")[0] == "kpsvd_tune" for name in sys.modules):
        raise SystemExit("kpsvd_tune was imported: this proves nothing of a plain PEFT")
    save_file({str(i): each.contiguous() for i, each in enumerate(logits)}, job["output"])


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Apart from what libraries write to the streams.
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        Path(sys.argv[1]).with_suffix(".fault").write_text(fault, encoding="utf-8")
        raise
