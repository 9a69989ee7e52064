"""Watches one training and tells what it finds, on the main process, which writes the run.

Losses, norms and offsets are those of all processes. Each has memory of its own, which the others
send; the disk is that of the process that writes.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from kpsvd_tune.adapter.idle import idle_cure, idle_message, trained_by_layer
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.json_files import check_types, parse_json, read_bytes
from kpsvd_tune.storage.memory import tightest_memory
from kpsvd_tune.training.offsets import Offsets
from kpsvd_tune.watch.machine import disk_low, memory_low
from kpsvd_tune.watch.offsets import dead_layers, exploding_offsets
from kpsvd_tune.watch.telling import warning
from kpsvd_tune.watch.watch import MEMORY, Watch

_log = logging.getLogger(__name__)
Tell = Callable[[Event], None]
# Bytes free, bytes in all, and whose memory it is.
Memory = tuple[int, int, str]
# What a checkpoint holds of each trained number: itself and AdamW's two, in float32.
_CHECKPOINT_BYTES = 3 * 4


def log_event(event: Event) -> None:
    """Tell an event where nobody watches, as in a trial: fallbacks as warnings of the log."""
    if event.kind == "fallback":
        _log.warning("%s", event.text)


def log_idle(names: Sequence[str], model: nn.Module) -> None:
    """Warn of layers without a gradient where nobody watches."""
    adapted = list(trained_by_layer(model))
    _log.warning("%s. %s", idle_message(names, adapted), idle_cure(names, adapted))


def memory_of_process(device: torch.device) -> list[Memory]:
    """What is free for this process: on the host, and on its GPU after the highest use so far."""
    found = [each for each in (tightest_memory(),) if each is not None]
    if device.type == "cuda":
        # What torch has cached is free for the next step; its own peak is not.
        total = torch.cuda.get_device_properties(device).total_memory
        found.append((total - torch.cuda.max_memory_allocated(device), total, "the GPU's"))
    return found


class Watching:
    """The detectors over one training, each fed with what the loop has anyway.

    Args:
        model: The model in training.
        recipe: The training's section.
        run: The run's folder; its metrics.jsonl tells the detectors what came before.
        tell: Told of every finding; who tells it on sorts out what was told before.
        holds_weights: Whether this process holds what is trained whole. Otherwise offsets are not
            looked at, because their norms would have to be gathered.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TrainRecipe,
        run: RunDirectory,
        tell: Tell,
        *,
        holds_weights: bool,
    ) -> None:
        self._recipe, self._run, self._tell = recipe, run, tell
        self._adapted = tuple(trained_by_layer(model))
        self._offsets = Offsets(model) if holds_weights else None
        self._num_numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.start_again()

    def start_again(self) -> None:
        """Take the state that metrics.jsonl tells, as after a return to a checkpoint."""
        self._watch = Watch(self._recipe.max_grad_norm, _last_lines(self._run.metrics_file))
        self._start = self._offsets.norms() if self._offsets else {}
        self._num_taken = 0

    def idle(self, names: tuple[str, ...]) -> None:
        """Take in the layers that got no gradient in the first step."""
        if names:
            self._tell(
                warning(
                    "dead_layers",
                    idle_message(names, self._adapted),
                    idle_cure(names, self._adapted),
                    1,
                    dead=len(names),
                    adapted=len(self._adapted),
                )
            )

    def step(self, metrics: StepMetrics, memory: Sequence[Sequence[Memory]] | None) -> None:
        """Take in a step that is done; with `memory`, of each process, look at the rest as well."""
        for event in self._watch.step(metrics):
            self._tell(event)
        is_moving = metrics.skipped is None and metrics.learning_rate > 0
        self._num_taken += is_moving
        if memory is not None:
            step = metrics.step
            for found in (*self._layers(step), self._disk(step), *_memory(memory, step)):
                if found is not None:
                    self._tell(found)

    def _layers(self, step: int) -> tuple[Event | None, ...]:
        if self._offsets is None:
            return ()
        now = self._offsets.norms()
        return (
            dead_layers(self._start, now, self._num_taken, step, self._offsets.advice),
            exploding_offsets(self._offsets.shares(), step),
        )

    def _disk(self, step: int) -> Event | None:
        try:
            free = shutil.disk_usage(self._run.path).free
        except OSError:  # the next write will say what is wrong
            return None
        return disk_low(free, _CHECKPOINT_BYTES * self._num_numbers, str(self._run.path), step)


def _memory(memory: Sequence[Sequence[Memory]], step: int) -> Iterator[Event | None]:
    for process, places in enumerate(memory):
        for place in places:
            yield memory_low(*place, step, process if len(memory) > 1 else None)


def _last_lines(file: Path) -> list[StepMetrics]:
    if not file.exists():
        return []
    found = []
    for line in read_bytes(file).splitlines()[-MEMORY:]:
        try:
            # JSON has no infinity and no NaN, which stand there as null.
            content = {
                key: math.nan if value is None else value for key, value in parse_json(line).items()
            }
            found.append(check_types(content, StepMetrics))
        except ValueError:
            # Of another version, or edited: the detectors begin without it.
            continue
    return found
