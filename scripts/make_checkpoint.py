"""Write a synthetic Llama checkpoint of a named size, to measure streaming and decomposition on.

    python scripts/make_checkpoint.py llama2-7b /path/with/14-GB-free/llama2-7b

The folder has config.json and bfloat16 safetensors shards with an index, as a download would; it
has no tokenizer. Every linear weight is a Gaussian bulk with a planted spectrum: Kronecker terms
of the balanced shape and singular triplets, each group holding a tenth of the energy with falling
shares, which puts the leading shares where those of real weights lie.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kpsvd_tune.linalg import choose_shape, unrearrange

PLANTED_TERMS = 64
# Share of the energy in the planted Kronecker terms, and the same again in singular triplets.
PLANTED_SHARE = 0.1
# Shares fall as k ** -DECAY.
DECAY = 0.8


@dataclass(frozen=True)
class Size:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(64, 160, 2, 4, 2, 256),
    "small": Size(512, 1408, 4, 8, 8, 4096),
    # 2.2 GB in layers of 88 MB, of TinyLlama's sizes.
    "llama-1b": Size(2048, 5632, 22, 32, 4, 32000),
    "llama2-7b": Size(4096, 11008, 32, 32, 32, 32000),
    # As large in every tensor, with fewer layers.
    "llama2-7b-4-layers": Size(4096, 11008, 4, 32, 32, 32000),
}


class Planter:
    """Makes weights; bulks are drawn once a size and shifted for each use.

    A shifted Gaussian matrix is as Gaussian as a fresh one, and drawing seven billion numbers
    would take minutes.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._bulks: dict[tuple[int, int], Tensor] = {}
        self._uses = 0

    def weight(self, out_features: int, in_features: int) -> Tensor:
        """Return one weight (out, in), bfloat16, with entries of deviation 1/sqrt(in)."""
        size = (out_features, in_features)
        if size not in self._bulks:
            self._bulks[size] = self._normal(*size)
        self._uses += 1
        bulk = torch.roll(self._bulks[size].view(-1), 7919 * self._uses).view(size)
        shape = choose_shape(out_features, in_features, "balanced").shape
        kronecker = self._product(shape.m * shape.n, shape.p * shape.q)
        planted = unrearrange(kronecker, shape) + self._product(out_features, in_features)
        scale = math.sqrt(PLANTED_SHARE * bulk.numel())
        rest = math.sqrt(1 - 2 * PLANTED_SHARE)
        return bulk.mul_(rest).add_(planted, alpha=scale).div_(math.sqrt(in_features)).bfloat16()

    def plain(self, *size: int) -> Tensor:
        """Return an embedding: nothing planted."""
        return (self._normal(*size) * 0.02).bfloat16()

    def _product(self, rows: int, columns: int) -> Tensor:
        """A matrix of norm about 1 with falling singular values."""
        terms = min(PLANTED_TERMS, rows, columns)
        shares = torch.arange(1, terms + 1).float().pow(-DECAY)
        values = (shares / shares.sum()).sqrt()
        left = self._normal(rows, terms) / math.sqrt(rows)
        right = self._normal(terms, columns) / math.sqrt(columns)
        return (left * values) @ right

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator)


def tensors(size: Size, planter: Planter) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model, in order, one at a time."""
    key_value = size.hidden // size.heads * size.key_value_heads
    linears = {
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (key_value, size.hidden),
        "self_attn.v_proj": (key_value, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
    }
    norm = torch.ones(size.hidden, dtype=torch.bfloat16)
    yield "model.embed_tokens.weight", planter.plain(size.vocabulary, size.hidden)
    for layer in range(size.layers):
        stem = f"model.layers.{layer}"
        for name, (out_features, in_features) in linears.items():
            yield f"{stem}.{name}.weight", planter.weight(out_features, in_features)
        yield f"{stem}.input_layernorm.weight", norm.clone()
        yield f"{stem}.post_attention_layernorm.weight", norm.clone()
    yield "model.norm.weight", norm.clone()
    yield "lm_head.weight", planter.plain(size.vocabulary, size.hidden)


def write(size: Size, folder: Path, shard_bytes: int, seed: int) -> int:
    """Write the checkpoint.

    Args:
        size: The model's sizes.
        folder: Where to; must not hold a checkpoint yet.
        shard_bytes: Most bytes of a shard.
        seed: Seeds every number.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"part-{len(shards)}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        print(f"  {file.name}: {sum(shards[-1].values()) / 1e9:.2f} GB", file=sys.stderr)
        held.clear()

    for name, tensor in tensors(size, Planter(seed)):
        if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
    flush()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        final = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(shard, final)
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # Last, so that an interrupted folder is not taken for a model.
    (folder / "config.json").write_text(json.dumps(configuration(size), indent=1))
    return total


def configuration(size: Size) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="most GB of a shard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.folder / "config.json").exists():
        print(f"{options.folder} holds a checkpoint already; nothing is written", file=sys.stderr)
        return 2
    started = time.perf_counter()
    total = write(SIZES[options.size], options.folder, int(options.shard_gb * 1e9), options.seed)
    seconds = time.perf_counter() - started
    print(f"{options.folder}: {total / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
