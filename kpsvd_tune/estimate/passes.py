"""How long a forward pass takes: by products of the model's own sizes, made now.

A large product in a loop is many times as fast as those of a model with few rows at a time, whose
weights come from memory and whose operations each cost a call.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.hardware.devices import wait_for

# Seconds that a probe of one size takes, beside a first call.
_PROBE_SECONDS = 0.04
# Multiply-adds of a product that is probed; of one with more rows some are taken.
_MOST_WORK = 1 << 30
_FEWEST_ROWS = 16
# Bytes of different weights of a size: they come from memory, as those of a model do.
_WEIGHTS = 1 << 25
# Bytes of a weight that is probed whole: more than a processor's cache. Of a larger one, such as
# the head of a large vocabulary, some outputs are taken.
_MOST_BYTES = 1 << 27
# Names that configurations have for how many experts see each token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
# Small operations that a module without an adapter and an adapted layer take beside their products.
_MODULE_CALLS, _ADAPTER_CALLS = 3, 15


class PassTimes:
    """Seconds of forward passes of a model, each size of product probed once.

    Args:
        skeleton: The model without weights.
        dtype: What its weights are in.
        device: Where it computes.
        adapted: Its layers that have adapters.
    """

    def __init__(
        self, skeleton: Any, dtype: torch.dtype, device: torch.device, adapted: int = 0
    ) -> None:
        self._dtype, self._device = dtype, device
        head = skeleton.get_output_embeddings()
        sizes = {module: _size(module) for module in skeleton.modules()}
        self._sizes = Counter(s for m, s in sizes.items() if s is not None and m is not head)
        self._head = None if head is None else sizes.get(head)
        known = sum(out * inside * count for (out, inside), count in self._sizes.items())
        # Weights of other kinds, such as those of experts, take the pace of the linear ones. Their
        # numbers are kept by the share of the tokens that each weight sees.
        shares: Counter[float] = Counter()
        for module, size in sizes.items():
            if size is None and not isinstance(module, nn.Embedding):
                for each in module.parameters(recurse=False):
                    if each.dim() > 1:
                        shares[_share_of_tokens(skeleton, module, each)] += each.numel()
        self._others = {share: number / known for share, number in shares.items()} if known else {}
        self._calls = _MODULE_CALLS * len(sizes) + _ADAPTER_CALLS * adapted
        self._known: dict[tuple[int, int, int], float] = {}

    def seconds(self, rows: int, tokens: int) -> float:
        """Seconds of one pass of so many rows of so many tokens, the last of which have logits."""
        products = self._products(rows * tokens)
        for share, times in self._others.items():
            # An expert that is reached reads its weights for at least one token.
            seen = share * rows * tokens
            each = max(1, round(seen))
            products += times * seen / each * self._products(each)
        head = 0.0 if self._head is None else self._product(*self._head, rows)
        return products + head + self._calls * self._call_seconds()

    def _products(self, rows: int) -> float:
        """Seconds of all linear layers but the head."""
        return sum(count * self._product(*size, rows) for size, count in self._sizes.items())

    def _product(self, out: int, inside: int, rows: int) -> float:
        taken = rows
        width = self._dtype.itemsize
        some = max(1, min(out, _MOST_BYTES // (inside * width)))
        if rows > _FEWEST_ROWS:
            # A power of two, so that batches of like lengths are one probe.
            taken = max(_FEWEST_ROWS, min(rows, _MOST_WORK // (some * inside)))
            taken = 1 << (taken.bit_length() - 1)
        key = (out, inside, taken)
        if key not in self._known:
            options: Any = {"dtype": self._dtype, "device": self._device}
            count = max(1, min(16, _WEIGHTS // (some * inside * width)))
            weights = [torch.ones(some, inside, **options) for _ in range(count)]
            x = torch.ones(taken, inside, **options)
            self._known[key] = self._timed(lambda turn: linear(x, weights[turn % count]))
        return self._known[key] * rows / taken * out / some

    def _call_seconds(self) -> float:
        """Seconds of a product that is nothing but a call."""
        if (0, 0, 0) not in self._known:
            layer = nn.Linear(8, 8, bias=False, dtype=self._dtype, device=self._device)
            x = torch.ones(1, 8, dtype=self._dtype, device=self._device)
            self._known[0, 0, 0] = self._timed(lambda _: layer(x))
        return self._known[0, 0, 0]

    @torch.no_grad()
    def _timed(self, call: Callable[[int], object]) -> float:
        call(0)
        wait_for(self._device)
        began, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - began < _PROBE_SECONDS:
            call(count)
            count += 1
            if count % 8 == 0:
                wait_for(self._device)
        wait_for(self._device)
        return (time.perf_counter() - began) / count


def _share_of_tokens(skeleton: Any, module: nn.Module, weight: nn.Parameter) -> float:
    """The share of the tokens that a weight sees on average: less than 1 for experts only."""
    config = skeleton.config.get_text_config()
    number = getattr(module, "num_experts", None)
    if weight.dim() != 3 or number != weight.shape[0]:
        return 1.0
    found = [getattr(config, name, None) for name in _EXPERTS_PER_TOKEN]
    # Some models have a number for each layer: all of the experts are counted there.
    seen = next((each for each in found if isinstance(each, int)), number)
    return min(1.0, float(seen / number))


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer that is one product; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        inside, out = module.weight.shape
        return out, inside
    return None
