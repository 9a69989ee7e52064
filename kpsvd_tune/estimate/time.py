"""How long the decomposition and the training take: by short probes of this machine, or by steps.

Before the first step there is a range only: what a device makes of its speed depends on sizes,
on memory and on what else it does. The steps of a run that has begun tell it within 30 %.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kpsvd_tune.decompose.spectra import MATRIX_WORK, work
from kpsvd_tune.estimate.trace import Trace
from kpsvd_tune.hardware.devices import wait_for
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, decompose_layer

# A probe of the decomposition takes a matrix of at most this many entries, and so many shapes are
# probed, those with the most work.
_PROBE_ENTRIES = 1 << 20
_PROBED_SHAPES = 4
# Seconds of each matrix beside its decomposition, for hashing it and writing its terms to the cache
# (SmolLM2-135M on an AMD EPYC).
_MATRIX_SECONDS = 0.013
_PROBE_SECONDS = 0.3
# What a step takes, in times of products and memory traffic at the speed of the probes.
STEP_RANGE = (0.7, 2.5)
# Steps that tell the pace of a run; the first of them also warms up.
FEWEST_STEPS = 5
# A forward pass is at most this share of a step, whose backward pass takes as long or longer.
_FORWARD_SHARE = 0.5
# Bytes a second of checkpoints, until one was seen: what a plain disk does.
_DISK_SPEED = 200e6


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


@dataclass(frozen=True)
class Ahead:
    """What a run consists of, by which its first steps tell the time of the rest."""

    num_steps: int
    size_until: Callable[[int], float]  # tokens with padding of a process, up to a step
    validation_size: float = 0.0  # the same of one validation; 0 without held-out rows
    eval_every: int = 0
    save_every: int = 0
    checkpoint_bytes: int = 0

    def is_validated(self, step: int) -> bool:
        """Whether the held-out rows are looked at after a step."""
        is_due = step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)
        return self.validation_size > 0 and is_due

    def is_saved(self, step: int) -> bool:
        """Whether a step is saved for its number alone."""
        return step == self.num_steps or (self.save_every > 0 and step % self.save_every == 0)


def seconds_by_steps(lines: Sequence[Mapping[str, Any]], ahead: Ahead) -> float | None:
    """Seconds of a whole run by the lines of its metrics.jsonl; None where there are too few.

    What was taken so far is known. A step to come takes the median pace of those done, which the
    first ones, that warm caches up or compile, do not change; and what lies between two steps, a
    validation and a checkpoint take what they were seen to take.
    """
    steps = [each for each in lines if each.get("tokens_per_second") and not each.get("skipped")]
    if not steps or steps[-1]["step"] < FEWEST_STEPS:
        return None
    last, num_done = steps[-1], steps[-1]["step"]
    # A run that logs each tenth step only has one line by then.
    warm = [each for each in steps if each["step"] > 1]
    pace = statistics.median(_own(each) / _size_of(each, ahead) for each in warm)
    between, validation, saving = _gaps(steps, ahead, pace)
    coming = range(num_done + 1, ahead.num_steps + 1)
    # What follows the last step that was logged is still to come.
    after = range(num_done, ahead.num_steps + 1)
    validated = [step for step in after if ahead.is_validated(step)]
    saved = [step for step in after if ahead.is_saved(step) and not ahead.is_validated(step)]
    size = ahead.size_until(ahead.num_steps) - ahead.size_until(num_done)
    rest = pace * size + between * len(coming)
    known: float = last["seconds"]
    return known + rest + validation * len(validated) + saving * len(saved)


def _gaps(
    steps: Sequence[Mapping[str, Any]], ahead: Ahead, pace: float
) -> tuple[float, float, float]:
    """Seconds between two steps; with a validation between them; and with a checkpoint."""
    gaps: dict[str, list[float]] = {"plain": [], "validated": [], "saved": []}
    for one, other in itertools.pairwise(steps):
        if other["step"] == one["step"] + 1:
            step = one["step"]
            kind = "saved" if ahead.is_saved(step) else "plain"
            kind = "validated" if one.get("validation_loss") is not None else kind
            gaps[kind].append(max(0.0, other["seconds"] - _own(other) - one["seconds"]))
    plain = statistics.median(gaps["plain"]) if gaps["plain"] else 0.0
    if gaps["validated"]:
        validation = statistics.median(gaps["validated"])
    else:
        validation = _FORWARD_SHARE * pace * ahead.validation_size
        if (first := steps[0])["step"] == 1:
            # The one before the first step warmed up as well, so it says what it takes at most.
            validation = min(validation, max(0.0, first["seconds"] - _own(first)))
    unseen = ahead.checkpoint_bytes / _DISK_SPEED
    return plain, validation, statistics.median(gaps["saved"]) if gaps["saved"] else unseen


def _own(line: Mapping[str, Any]) -> float:
    """Seconds of the step itself."""
    seconds: float = line["tokens"] / line["tokens_per_second"]
    return seconds


def _size_of(line: Mapping[str, Any], ahead: Ahead) -> float:
    return ahead.size_until(line["step"]) - ahead.size_until(line["step"] - 1)


def decomposition_seconds(
    plans: Sequence[LayerPlan], num_terms: int, tolerance: float, device: torch.device
) -> float:
    """Seconds to decompose these layers one after another, by matrices decomposed now.

    One of each shape, those with the most work first; of large matrices smaller ones of like
    proportions, and of what is not probed the pace of the last one.
    """
    shapes: dict[KroneckerShape, list[LayerPlan]] = {}
    for plan in plans:
        shapes.setdefault(plan.shape, []).append(plan)
    pace: dict[KroneckerShape, float] = {}  # seconds of a unit of work, by the probe's shape
    total, last = _MATRIX_SECONDS * len(plans), 0.0
    for same in sorted(shapes.values(), key=lambda each: -sum(map(_own_work, each))):
        probe = _smaller(same[0])
        if probe.shape not in pace and len(pace) < _PROBED_SHAPES:
            # The first one also loads what the library needs, and one may have been interrupted.
            tries = [_decompose(probe, num_terms, tolerance, device) for _ in range(2)]
            pace[probe.shape] = min(tries) / _own_work(probe)
        last = pace.get(probe.shape, last)
        total += last * sum(map(_own_work, same))
    return total


def _own_work(plan: LayerPlan) -> float:
    """Work of the decomposition itself, which a probe measures."""
    return work(plan) - MATRIX_WORK


def _decompose(probe: LayerPlan, num_terms: int, tolerance: float, device: torch.device) -> float:
    """Seconds to decompose a random matrix of a shape, of a processor that does nothing else."""
    generator = torch.Generator().manual_seed(0)
    shape = probe.shape
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator).to(device)
    used = time.process_time()
    done, _ = decompose_layer(probe, weight, num_terms, tolerance=tolerance, seed=0)
    used = time.process_time() - used
    # Threads that wait for each other on a busy machine use more processor time than the clock has.
    return min(done.seconds, used) if device.type == "cpu" else done.seconds


def _smaller(plan: LayerPlan) -> LayerPlan:
    """A layer of like proportions that is small enough for a probe."""
    m, n, p, q = plan.shape.as_tuple()
    while m * n * p * q > _PROBE_ENTRIES:
        longest = max(m, n, p, q)
        m, n, p, q = (side // 2 if side == longest else side for side in (m, n, p, q))
    return replace(plan, shape=KroneckerShape(m, n, p, q))


def _per_second(work: Any, device: torch.device) -> float:
    work()
    wait_for(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _PROBE_SECONDS:
        work()
        wait_for(device)
        count += 1
    return count / (time.perf_counter() - began)
