"""Measure `merge` on a whole checkpoint: time against `cp -r` of the folder, and memory.

    python scripts/make_checkpoint.py llama2-7b /path/llama2-7b
    python scripts/benchmarks/merge.py /path/llama2-7b --json merge.json

An adapter of trained size is made beside the checkpoint: one trained factor of 64 x 64 in each
linear layer, with the sketches of the base by which a merge recognises it. Then the folder is
copied, the copy is removed, and the adapter is merged with `--proof tensors`, both timed as users
type them. Last, every tensor that no adapter touches is hashed in both folders. Seconds include
Python's start and all imports. The merge waits until everything is on the disk, which cp does not;
`cp_synced_seconds` is the copy with that wait. Three times the checkpoint's size has to be free.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from streaming import measure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.base import _BITS, _mark
from kpsvd_tune.adapter.base_config import hash_of, values_of
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.sketch import sketch, sketch_rest
from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models import Checkpoint, load_skeleton, resolve_model
from kpsvd_tune.models.stream import tensors_of

FACTOR_SIZE = 64


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes beside the weights, which come without one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index + 3 for index, symbol in enumerate(alphabet)}
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.BPE(vocab=special | vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def make_adapter(base: Path, folder: Path) -> None:
    """Write an adapter whose factors are random, and which knows its base as a trained one does."""
    source = resolve_model(str(base))
    skeleton = load_skeleton(source)
    checkpoint = Checkpoint(source, skeleton)
    names = target_names(skeleton, "all-linear")
    sketches, layers = {}, {}
    for name in names:
        weight = checkpoint.read(checkpoint.parameters[f"{name}.weight"])
        sketches[name] = sketch(weight)
        size = (weight.shape[0], weight.shape[1])
        plan = LayerPlan.of_weight(name, size, "balanced", "left", FACTOR_SIZE)
        shape = list(plan.shape.as_tuple())
        layers[name] = {"shape": shape, "rank": 1, "norm": sketches[name].norm}
    rest = sketch_rest(skeleton, names, (), None, fetch=lambda name: checkpoint.read(name))
    assert rest is not None
    config = KpsvdConfig(
        target_modules=names,
        form="left",
        factor_size=FACTOR_SIZE,
        frozen_seed=0,
        layers=layers,
        base_model_name_or_path=str(base),
    )
    config.base_config = values_of(skeleton)
    of_rest = rest.sketch.packed()
    of_rest[0] |= hash_of(config.base_config) << _BITS
    generator = torch.Generator().manual_seed(0)
    model: Any = get_peft_model(skeleton, config)
    for name, layer in kpsvd_layers(model):
        held: Any = layer
        # As large a change of W, relative to it, as a training makes.
        trained = held.kpsvd_left["default"]
        trained.copy_(0.02 * torch.randn(trained.shape, generator=generator))
        own = sketches[name].packed()
        own[0] |= _mark(layer.frozen("default")) << _BITS
        held.kpsvd_base["default"] = torch.stack([own, of_rest])
    model.save_pretrained(str(folder), save_embedding_layers=False)


def hashes(folder: Path, names: set[str]) -> dict[str, str]:
    """The sha256 of the named tensors of all files, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            for key, place in tensors_of(file).items():
                if key in names:
                    digest = hashlib.sha256(f"{place.dtype} {place.size}".encode())
                    stream.seek(place.begin)
                    left = place.end - place.begin
                    while left:
                        data = stream.read(min(left, 1 << 24))
                        digest.update(data)
                        left -= len(data)
                    found[key] = digest.hexdigest()
    return found


def timed(*command: str) -> float:
    """Seconds that a command takes."""
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    parser.add_argument("--work", type=Path, default=None, help="default: beside the model")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    base = options.model.resolve()
    work = (options.work or base.parent / f"{base.name}-merge-benchmark").resolve()
    work.mkdir(parents=True)
    try:
        if not (base / "tokenizer_config.json").is_file():
            make_tokenizer(base)
        print("making the adapter", file=sys.stderr)
        make_adapter(base, work / "adapter")
        print("copying", file=sys.stderr)
        os.sync()
        copied = timed("cp", "-r", str(base), str(work / "copy"))
        synced = copied + timed("sync", "-f", str(work / "copy"))
        shutil.rmtree(work / "copy")
        os.sync()
        print("merging", file=sys.stderr)
        command = [sys.executable, "-m", "kpsvd_tune", "merge", str(work / "adapter")]
        command += ["--output", str(work / "merged"), "--proof", "tensors", "--json"]
        cost, report = measure(command, dict(os.environ))
        adapted = {f"{name}.weight" for name in report["kept_share"]}
        untouched = {
            key for file in base.glob("*.safetensors") for key in tensors_of(file)
        } - adapted
        before, after = (hashes(each, untouched) for each in (base, work / "merged"))
    finally:
        shutil.rmtree(work)
    result = {
        "model": str(options.model.name),
        "bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cp_seconds": copied,
        "cp_synced_seconds": synced,
        "merge_seconds": cost["seconds"],
        "times_cp": cost["seconds"] / copied,
        "times_cp_synced": cost["seconds"] / synced,
        "peak_bytes": cost["peak_bytes"],
        "layers": len(adapted),
        "max_deviation": report["max_deviation"],
        "min_kept_share": report["min_kept_share"],
        "untouched": len(untouched),
        "untouched_equal": sum(before[key] == after.get(key) for key in before),
        "passed": report["passed"],
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    is_right = result["passed"] and result["untouched"] == result["untouched_equal"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
