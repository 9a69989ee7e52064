"""Factors of random directions that a seed alone gives again, on any machine."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def drawn_factor(seed: int, name: str, size: tuple[int, ...]) -> Tensor:
    """Draw a factor of independent standard normal numbers.

    Args:
        seed: Of the whole adapter.
        name: Of this factor, so that each is drawn on its own.
        size: Its size.

    Returns:
        float32, the same bits wherever it is drawn: NumPy freezes the stream of RandomState
        (NEP 19), which no release of torch promises.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = np.random.RandomState(np.frombuffer(digest, dtype=">u4").astype(np.uint32))
    return torch.from_numpy(stream.standard_normal(size).astype(np.float32))
