"""Spectra of all target modules of a model, computed or found in the cache, and their ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kpsvd_tune.adapter.targets import saved_whole, saved_whole_notes, target_names, untouched
from kpsvd_tune.decompose.cache import SpectraCache, default_cache_dir
from kpsvd_tune.decompose.launched import run_launched
from kpsvd_tune.decompose.ranks import rank_report, rank_rule
from kpsvd_tune.decompose.spectra import Found, Settings, SpectraWorker, work
from kpsvd_tune.decompose.workers import run_processes
from kpsvd_tune.errors import AdapterError, ModelError
from kpsvd_tune.events import Events
from kpsvd_tune.linalg import LayerPlan, check_rule
from kpsvd_tune.models import ModelSource, WeightReader, load_skeleton
from kpsvd_tune.processes import num_processes
from kpsvd_tune.recipe.adapter import AdapterRecipe, RankRecipe
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.units import time_left


@dataclass(frozen=True)
class Progress:
    """How far a decomposition is."""

    name: str  # of the matrix just finished
    done: int  # matrices finished
    total: int  # in all
    seconds_left: float | None  # by the work done so far; None before anything was computed
    energy: float  # mean share of ||W||_F^2 that the windows of the finished matrices hold


Show = Callable[[Progress], None]


def report_decomposition(events: Events) -> Show:
    """A progress callback for the decomposition."""

    def advance(progress: Progress) -> None:
        detail = f"energy so far {100 * progress.energy:.1f} %"
        if left := time_left(progress.seconds_left):
            detail += f", {left}"
        events.advance("decomposing", progress.done, progress.total, detail)

    return advance


@dataclass(frozen=True)
class Spectra:
    """The spectra of all target modules, ready for any rank rule."""

    source: ModelSource
    window: int  # leading terms computed of each matrix, as far as it has them
    found: tuple[Found, ...]  # the target modules, in model order
    cache: SpectraCache  # where their factors lie
    base_parameters: int  # of the base model
    left_alone: tuple[tuple[str, str], ...]  # (name, reason) of what is not targeted
    notes: tuple[str, ...]  # what happened on the way
    is_drawn: bool = False  # a seed gives the frozen factors
    # Parameters of the modules that are trained whole.
    trained_whole: Mapping[str, int] = field(default_factory=dict)

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
            self.source.path,
            [found.plan for found in self.found],
            rank,
            base_parameters=self.base_parameters,
            left_alone=self.left_alone,
            is_drawn=self.is_drawn,
            trained_whole=self.trained_whole,
        )

    def factors(self, report: RankReport) -> dict[str, tuple[Tensor, Tensor]]:
        """Read A0 (rank, m, n) and B0 (rank, p, q) of each module of rank 1 or more from the cache.

        None where a seed gives the frozen factors.

        Raises:
            AdapterError: Every rank is 0, or a cache entry was removed meanwhile.
        """
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for (plan, key, _), layer in zip(self.found, report.layers, strict=True):
            if layer.rank == 0:
                continue
            if self.is_drawn:
                # The adapter draws them itself.
                return {}
            entry = self.cache.read(key, plan.shape, layer.rank)
            if entry is None:
                raise AdapterError(
                    f"{plan.name}: its entry in the spectra cache {self.cache.folder} was removed "
                    "or damaged while it was in use; run again"
                )
            terms, _ = entry
            chosen[plan.name] = terms.factors(layer.rank)
        if not chosen:
            if all(found.plan.squared_norm == 0 for found in self.found):
                raise AdapterError(
                    f"all {len(self.found)} target weights of {self.source.path} are zero, so "
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
    is_rule_final: bool = False,
    processes: int = 1,
    device: str = "cpu",
    in_launch: bool = False,
    progress: Show | None = None,
) -> Spectra:
    """Compute, or find in the cache, the spectra of all target matrices.

    Interrupted at any point, even killed, the next call goes on after the last finished matrix
    and ends with the same result.

    Args:
        source: The base model.
        adapter: Targets, factor shape, and window and tolerance of the rank rule.
        seed: Seeds the truncated decomposition.
        is_rule_final: Whether to refuse a rank rule that cannot be met before the work; a caller
            that tries several leaves that to :meth:`Spectra.report`.
        processes: Worker processes to start for this call.
        device: Where to decompose: cpu, cuda, cuda:1.
        in_launch: Whether the other processes of this launch wait with a
            :class:`kpsvd_tune.decompose.launched.Helper`; they then share the work.
        progress: Called after each matrix.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape or, with ``is_rule_final``, a rank rule that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    skeleton = load_skeleton(source)
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    reader = WeightReader(source, names, skeleton)
    plans = layer_plans(reader, adapter)
    if is_rule_final:
        try:
            check_rule(plans, rank_rule(adapter.rank))
        except ValueError as error:
            raise AdapterError(f"adapter.rank: {error}") from error
    rank = adapter.rank
    settings = Settings(default_cache_dir(), rank.window, rank.tolerance, seed, device)
    found = _Collected(plans, progress)
    worker = SpectraWorker(reader, settings)
    if adapter.is_drawn:
        for plan in plans:
            began = time.perf_counter()
            square = float(reader.load(plan.name).float().square().sum())
            try:
                plan = plan.with_random_terms(square, rank.window)
            except ValueError as error:
                raise ModelError(f"{plan.name} cannot be adapted: {error}") from error
            plan = replace(plan, seconds=time.perf_counter() - began)
            found.add(Found(plan, "", "computed"))
    elif in_launch and num_processes() > 1:
        run_launched(worker, reader, settings, plans, found.add)
    elif processes > 1:
        # Starting workers takes seconds: only for what the cache does not have.
        run_processes(source, worker.look_up(plans, found.add), settings, processes, found.add)
    else:
        worker.run(plans, found.add)
    reader.close()
    whole = saved_whole(skeleton, adapter.modules_to_save)
    notes = [f"adapter.{note}" for note in saved_whole_notes(skeleton, adapter.modules_to_save)]
    return Spectra(
        source,
        rank.window,
        tuple(found.layers[name] for name in names),
        worker.cache,
        base_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        left_alone=tuple(untouched(skeleton, names, whole)),
        notes=(*notes, *found.notes()),
        is_drawn=adapter.is_drawn,
        trained_whole=whole,
    )


def cached_spectra(
    reader: WeightReader, plans: Sequence[LayerPlan], adapter: AdapterRecipe, seed: int
) -> dict[str, LayerPlan]:
    """Spectra that the cache holds of weights whose hashes are known, by the layers' names.

    No weight is read, so a matrix whose files were never hashed counts as absent.
    """
    if not reader.source.weight_files or adapter.is_drawn:
        return {}
    rank = adapter.rank
    worker = SpectraWorker(reader, Settings(default_cache_dir(), rank.window, rank.tolerance, seed))
    found: dict[str, LayerPlan] = {}
    worker.look_up(plans, lambda each: found.update({each.plan.name: each.plan}))
    return found


def layer_plans(reader: WeightReader, adapter: AdapterRecipe) -> list[LayerPlan]:
    """The target layers with their factor shapes; AdapterError for a shape that cannot be met."""
    given = adapter.factor_shape
    rule = given if isinstance(given, str) else {"n": given["n"], "p": given["p"]}
    plans: list[LayerPlan] = []
    for name in reader.names:
        try:
            plans.append(
                LayerPlan.of_weight(
                    name, reader.size(name), rule, adapter.form, adapter.factor_size
                )
            )
        except ValueError as error:
            raise AdapterError(f"adapter.factor_shape for {name}: {error}") from error
    return plans


class _Collected:
    """The layers found so far, and how far that is."""

    def __init__(self, plans: Sequence[LayerPlan], show: Show | None) -> None:
        self.layers: dict[str, Found] = {}
        self._work = {plan.name: work(plan) for plan in plans}
        self._show = show
        self._left = sum(self._work.values())
        self._computed = 0.0
        self._started: float | None = None

    def add(self, found: Found) -> None:
        """Take one more layer and show how far the work is."""
        plan, is_new = found.plan, found.origin != "cached"
        self.layers[plan.name] = found
        if self._started is None:
            # Loading a model that cannot be streamed says nothing about the matrices.
            self._started = time.perf_counter() - (plan.seconds if is_new else 0.0)
        self._left -= self._work[plan.name]
        # What came from the cache took no time and says nothing about the rest.
        self._computed += self._work[plan.name] if is_new else 0.0
        if self._show is None:
            return
        elapsed = time.perf_counter() - self._started
        rate = self._computed / elapsed if elapsed > 0 else 0.0
        energies = [each.plan.energy(len(each.plan.values)) for each in self.layers.values()]
        self._show(
            Progress(
                name=plan.name,
                done=len(self.layers),
                total=len(self._work),
                seconds_left=max(0.0, self._left) / rate if rate > 0 else None,
                energy=sum(energies) / len(energies),
            )
        )

    def notes(self) -> list[str]:
        """What the user should know of the cache."""
        damaged = sum(found.origin == "repaired" for found in self.layers.values())
        if not damaged:
            return []
        return [f"{damaged} damaged entries of the spectra cache were computed again"]
