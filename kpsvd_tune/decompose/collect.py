"""Spectra of all target modules of a model: computed, or found in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kpsvd_tune.adapter.targets import saved_whole_notes, target_names, untouched
from kpsvd_tune.decompose.cache import SpectraCache, default_cache_dir
from kpsvd_tune.decompose.progress import Progress, ProgressMeter
from kpsvd_tune.decompose.ranks import check_rank, rank_report
from kpsvd_tune.decompose.spectra import SpectraWorker
from kpsvd_tune.decompose.tasks import Finished, Settings, Task
from kpsvd_tune.decompose.workers import run_processes
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import choose_shape
from kpsvd_tune.models import ModelSource, WeightReader, load_skeleton
from kpsvd_tune.recipe.adapter import AdapterRecipe, RankRecipe
from kpsvd_tune.report.results import RankReport


class Spectra:
    """The spectra of all target modules, ready for any rank rule.

    Args:
        source: The base model.
        window: Leading terms computed of each matrix, as far as it has them.
        finished: The spectra of the target modules, in model order.
        cache: Where the factors lie.
        base_parameters: Parameters of the base model.
        left_alone: (name, reason) of the weight matrices that are not targeted.
        notes: What happened on the way.

    Attributes:
        window: As given.
        notes: As given.
    """

    def __init__(
        self,
        source: ModelSource,
        window: int,
        finished: list[Finished],
        cache: SpectraCache,
        *,
        base_parameters: int,
        left_alone: list[tuple[str, str]],
        notes: tuple[str, ...],
    ) -> None:
        self.notes = notes
        self.window = window
        self._source = source
        self._finished = finished
        self._cache = cache
        self._base_parameters = base_parameters
        self._left_alone = left_alone

    def report(self, rank: RankRecipe) -> RankReport:
        """Apply a rank rule.

        Args:
            rank: The rule; its window may be smaller than the one that was computed.

        Returns:
            Ranks, energies and totals of all target modules.

        Raises:
            AdapterError: A budget below the minima, an override that matches nothing, or a window
                larger than the one computed.
        """
        if rank.window > self.window:
            raise AdapterError(
                f"adapter.rank.window {rank.window}: only {self.window} terms were computed"
            )
        return rank_report(
            self._source.path,
            self._finished,
            rank,
            base_parameters=self._base_parameters,
            left_alone=self._left_alone,
        )

    def factors(self, report: RankReport) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the initial factors of the chosen ranks from the cache.

        Args:
            report: From :meth:`report`.

        Returns:
            Module name to A0 (rank, m, n) and B0 (rank, p, q), without modules of rank 0.

        Raises:
            AdapterError: Every rank is 0, or a cache entry was removed meanwhile.
        """
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for done, layer in zip(self._finished, report.layers, strict=True):
            if layer.rank == 0:
                continue
            entry = self._cache.read(done.key, done.shape, layer.rank)
            if entry is None:
                raise AdapterError(
                    f"{done.name}: its entry in the spectra cache {self._cache.folder} was removed "
                    "or damaged while it was in use; run again"
                )
            chosen[done.name] = entry.terms.factors(layer.rank)
        if not chosen:
            if all(done.squared_norm == 0 for done in self._finished):
                raise AdapterError(
                    f"all {len(self._finished)} target weights of {self._source.path} are zero, so "
                    "there is nothing to decompose; expected trained weights: fetch the model "
                    "again, or choose other adapter.target_modules"
                )
            raise AdapterError(
                "adapter.rank: every layer got rank 0; raise min, energy, max or budget"
            )
        return chosen


@torch.no_grad()
def collect_spectra(
    source: ModelSource,
    adapter: AdapterRecipe,
    *,
    seed: int = 0,
    check_rule: bool = False,
    cache_dir: Path | None = None,
    processes: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Spectra:
    """Compute, or find in the cache, the spectra of all target matrices.

    Interrupted at any point, even killed, the next call goes on after the last finished matrix
    and ends with the same result.

    Args:
        source: The base model.
        adapter: Targets, factor shape, and window and tolerance of the rank rule.
        seed: Seeds the truncated decomposition.
        check_rule: Whether to refuse a rank rule that cannot be met before the work; a caller that
            tries several leaves that to :meth:`Spectra.report`.
        cache_dir: The cache folder; by default ``$XDG_CACHE_HOME/kpsvd-tune``.
        processes: Worker processes to start for this call.
        device: Where to decompose: cpu, cuda, cuda:1.
        progress: Called after each matrix.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape or, with ``check_rule``, a rank rule that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    skeleton = load_skeleton(source)
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    reader = WeightReader(source, names, skeleton)
    tasks = _tasks(reader, adapter)
    if check_rule:
        check_rank(tasks, adapter.rank)
    settings = Settings(
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir),
        tolerance=adapter.rank.tolerance,
        seed=seed,
        device=device,
    )
    meter = ProgressMeter(tasks, progress)
    found: dict[str, Finished] = {}

    def note(finished: Finished) -> None:
        if finished.name not in found:
            found[finished.name] = finished
            meter(finished)

    worker = SpectraWorker(reader, settings)
    if processes > 1:
        # Starting workers takes seconds: only for what the cache does not have.
        left = worker.look_up(tasks, note)
        run_processes(source, left, settings, processes, note)
    else:
        worker.run(tasks, note)
    reader.close()
    damaged = sum(finished.is_repaired for finished in found.values())
    notes = [f"adapter.{note}" for note in saved_whole_notes(skeleton, adapter.modules_to_save)]
    if damaged:
        notes.append(f"{damaged} damaged entries of the spectra cache were computed again")
    return Spectra(
        source,
        adapter.rank.window,
        [found[task.name] for task in tasks],
        worker.cache,
        base_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        left_alone=untouched(skeleton, names),
        notes=tuple(notes),
    )


def _tasks(reader: WeightReader, adapter: AdapterRecipe) -> list[Task]:
    given = adapter.factor_shape
    rule = given if isinstance(given, str) else {"n": given["n"], "p": given["p"]}
    tasks: list[Task] = []
    for name in reader.names:
        try:
            choice = choose_shape(*reader.size(name), rule)
        except ValueError as error:
            raise AdapterError(f"adapter.factor_shape for {name}: {error}") from error
        tasks.append(Task(name, choice.shape, adapter.rank.window, choice.note))
    return tasks
