"""Decompose on all processes of a launch, on one machine or several; results go to the main one.

The main process decides and keeps the results in its cache; the others, which wait for it in
:func:`kpsvd_tune.processes.on_main_process`, get one matrix at a time. So nothing depends on a disk
that all of them see, and each error and each finished matrix is known after every round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kpsvd_tune.decompose.cache import default_cache_dir
from kpsvd_tune.decompose.spectra import Found, Settings, SpectraWorker, work
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import KPSVD, LayerPlan
from kpsvd_tune.models import ModelSource, WeightReader
from kpsvd_tune.processes import num_processes, share_out


@dataclass(frozen=True)
class Part:
    """What one process does in one round."""

    source: ModelSource  # the base model, which every process finds at the same place
    names: tuple[str, ...]  # all target modules
    settings: Settings  # the main process's
    plans: Sequence[LayerPlan]  # at most one; none where there are fewer matrices than processes


class Spectrum(NamedTuple):
    """One layer as a process sends it."""

    found: Found
    terms: KPSVD  # on the CPU
    seconds: float  # that they took


class Helper:
    """What a process of a launch that is not the main one does: its parts, on its own device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._worker: SpectraWorker | None = None

    @torch.no_grad()
    def __call__(self, part: Part) -> list[Spectrum]:
        """Decompose the matrices of one round; errors are those of :meth:`SpectraWorker.run`."""
        if self._worker is None and part.plans:
            # Its own cache, which may be the main process's or lie on another machine.
            own = replace(part.settings, cache_dir=default_cache_dir(), device=self._device)
            self._worker = SpectraWorker(WeightReader(part.source, part.names), own)
        return _spectra(self._worker, part.settings, part.plans) if self._worker else []


def run_launched(
    worker: SpectraWorker,
    reader: WeightReader,
    settings: Settings,
    plans: Sequence[LayerPlan],
    report: Callable[[Found], None],
) -> None:
    """Decompose every layer on the processes of this launch, and report each.

    For the main process, while the others wait with a :class:`Helper`. Errors are as of
    :meth:`SpectraWorker.run`, from whatever process.
    """
    # What costs about the same is computed at the same time: nobody waits long for the others.
    left = sorted(worker.look_up(plans, report), key=lambda plan: -work(plan))
    size = num_processes()
    for begin in range(0, len(left), size):
        among = [left[begin + place : begin + size][:1] for place in range(size)]
        parts = [Part(reader.source, reader.names, settings, each) for each in among]
        for found in share_out(parts, lambda part: _spectra(worker, settings, part.plans)):
            for each in found:
                _keep(worker, each)
                report(each.found)


def _spectra(
    worker: SpectraWorker, settings: Settings, plans: Sequence[LayerPlan]
) -> list[Spectrum]:
    found: list[Found] = []
    worker.run(plans, found.append)
    spectra = []
    for each in found:
        entry = worker.cache.read(each.key, each.plan.shape, settings.num_terms)
        if entry is None:
            raise AdapterError(
                f"{each.plan.name}: its entry in the spectra cache {worker.cache.folder} was "
                "removed or damaged while it was in use; run again"
            )
        spectra.append(Spectrum(each, *entry))
    return spectra


def _keep(worker: SpectraWorker, spectrum: Spectrum) -> None:
    """Put a layer into the cache of this process, unless the same disk holds it already."""
    (plan, key, _), terms, seconds = spectrum
    if worker.cache.read(key, plan.shape, len(terms.values)) is None:
        with worker.cache.lock(key, wait=True):
            worker.cache.write(key, terms, seconds)
