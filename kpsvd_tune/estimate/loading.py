"""How long loading a base model takes, by what its files are and how fast Python runs here."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from kpsvd_tune.estimate.time import STEP_RANGE
from kpsvd_tune.models import ModelSource
from kpsvd_tune.models.loading import DTYPES

# Processor time of the parts of loading, taken with SmolLM2-135M from its GGUF file (10 s) and from
# safetensors (0.3 s) on one thread of an AMD EPYC, whose pace of Python is _PACE.
_STRING = 30e-6  # a token or merge of the vocabulary in a GGUF file
_NAME = 0.35e-3  # a module's name among those of one layer, of which gguf lists all for each module
_DEQUANTISED = 20e-9  # a weight of a GGUF file
_COPIED = 1e-9  # a byte of the weights as they are kept
# Seconds of `_lap` there.
_PACE = 3.3e-3
_PROBE_SECONDS = 0.1


def loading_seconds(
    source: ModelSource, skeleton: nn.Module, dtype: str, *, decomposes: bool
) -> tuple[float, float]:
    """Least and most seconds of all loading of a command, of files that lie in the system's memory.

    The base once, and once more in float32 where it `decomposes` and the files cannot be read
    matrix by matrix. At the least the machine is left alone, at the most it stays as busy as now.
    """
    times = 2 if decomposes and is_loaded_whole(source) else 1
    reading = times * _reading(source, skeleton)
    copying = _COPIED * sum(each.numel() for each in skeleton.parameters()) * DTYPES[dtype].itemsize
    if times == 2:
        copying += copying * DTYPES["float32"].itemsize / DTYPES[dtype].itemsize
    alone, now = python_slowness()
    # Weights that are kept as they are stored may be copied when they are used, if ever.
    return STEP_RANGE[0] * reading * alone, STEP_RANGE[1] * (reading + copying) * now


def _reading(source: ModelSource, skeleton: nn.Module) -> float:
    """Seconds of reading the files once, beside the copying, where the constants are from."""
    seconds = 0.0
    if source.kind == "gguf":
        numel = sum(each.numel() for each in skeleton.parameters())
        model: Any = skeleton
        config = model.config.get_text_config()
        modules = sum(1 for _ in skeleton.modules())
        layers = getattr(config, "num_hidden_layers", None) or 1
        # About one merge for each token.
        seconds += 2 * config.vocab_size * _STRING + modules * layers * _NAME
        seconds += numel * _DEQUANTISED
    return seconds


def is_loaded_whole(source: ModelSource) -> bool:
    """Whether a decomposition loads the model, as it cannot read its files matrix by matrix."""
    return bool(source.weight_files) and not source.is_safetensors


def python_slowness() -> tuple[float, float]:
    """Seconds of Python here in times of those where the constants are from.

    By processor time, which is what a machine left alone takes, and by the clock as it goes now.
    """
    _lap()
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < _PROBE_SECONDS:
        _lap()
        count += 1
    used, taken = time.process_time() - used, time.perf_counter() - began
    return used / count / _PACE, taken / count / _PACE


def _lap() -> int:
    size = 0
    for number in range(20_000):
        size += len(f"{number}.{size}")
    return size
