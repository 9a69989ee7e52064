"""How long the decomposition and the training take: by short probes of this machine, or by steps.

Before the first step there is a range only: what a device makes of its speed depends on sizes,
on memory and on what else it does. The steps of a run that has begun tell it within 30 %.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kpsvd_tune.decompose.spectra import work
from kpsvd_tune.estimate.trace import Trace
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, decompose_layer

# A probe of the decomposition takes a matrix of at most this many entries.
_PROBE_ENTRIES = 1 << 20
_PROBE_SECONDS = 0.3
# What a step takes, in times of products and memory traffic at the speed of the probes.
STEP_RANGE = (0.7, 2.5)
# Steps that tell the pace of a run; the first of them also warms up.
FEWEST_STEPS = 5


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    multiply_adds: float  # of a large product, in the type that the model computes in
    traffic: float  # bytes that an operation on large tensors reads and writes


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Probe a device for about half a second."""
    a = torch.ones(512, 1024, device=device, dtype=dtype)
    b = torch.ones(1024, 1024, device=device, dtype=dtype)
    big = torch.ones(1 << 24, device=device)
    products = _per_second(lambda: a @ b, device)
    passes = _per_second(lambda: big.mul_(1.0), device)
    return Speed(products * 512 * 1024 * 1024, passes * 2 * big.nbytes)


def step_seconds(trace: Trace, micro_steps: int, speed: Speed) -> tuple[float, float]:
    """Least and most seconds of an optimiser step of that many micro steps on a process."""
    bare = trace.multiply_adds / speed.multiply_adds + trace.traffic / speed.traffic
    low, high = (factor * bare * micro_steps for factor in STEP_RANGE)
    return low, high


def run_seconds(step: float, num_steps: int, num_validations: int, validation: float) -> float:
    """Seconds of a training of equal steps; ``validation`` is one, in times of a step."""
    return step * (num_steps + num_validations * validation)


def seconds_by_steps(
    lines: Sequence[Mapping[str, Any]], tokens: float, num_validations: int = 0
) -> float | None:
    """Seconds of a whole run by the lines of its metrics.jsonl; None where there are too few.

    Args:
        lines: Metrics of steps, in order.
        tokens: Of the whole run, without padding.
        num_validations: Validations of the whole run; one takes what the first one took.
    """
    steps = [each for each in lines if each.get("tokens_per_second") and not each.get("skipped")]
    if len(steps) < FEWEST_STEPS:
        return None
    warm = steps[1:]
    spent = sum(each["tokens"] / each["tokens_per_second"] for each in warm)
    pace: float = spent / sum(each["tokens"] for each in warm)
    first = steps[0]
    before: float = first["seconds"] - first["tokens"] / first["tokens_per_second"]
    return pace * tokens + max(0.0, before) * num_validations


def decomposition_seconds(
    plans: Sequence[LayerPlan], num_terms: int, tolerance: float, device: torch.device
) -> float:
    """Seconds to decompose these layers one after another, by a small matrix decomposed now."""
    if not plans:
        return 0.0
    largest = max(plans, key=work)
    probe = _smaller(largest)
    generator = torch.Generator().manual_seed(0)
    shape = probe.shape
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator).to(device)
    done, _ = decompose_layer(probe, weight, num_terms, tolerance=tolerance, seed=0)
    return done.seconds * sum(map(work, plans)) / work(probe)


def _smaller(plan: LayerPlan) -> LayerPlan:
    """A layer of like proportions that is small enough for a probe."""
    m, n, p, q = plan.shape.as_tuple()
    while m * n * p * q > _PROBE_ENTRIES:
        longest = max(m, n, p, q)
        m, n, p, q = (side // 2 if side == longest else side for side in (m, n, p, q))
    return replace(plan, shape=KroneckerShape(m, n, p, q))


def _per_second(work: Any, device: torch.device) -> float:
    work()
    _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _PROBE_SECONDS:
        work()
        _wait(device)
        count += 1
    return count / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
