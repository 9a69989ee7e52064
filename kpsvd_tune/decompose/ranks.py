"""The decomposition stage: spectra of all layers, the rank rules over them, the first factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpsvd_tune.decompose.cache import SpectraCache, default_cache_dir
from kpsvd_tune.decompose.spectra import (
    Finished,
    Progress,
    ProgressMeter,
    Settings,
    SpectraWorker,
    Task,
    shares,
)
from kpsvd_tune.decompose.workers import run_processes
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import (
    KroneckerShape,
    LayerSpectrum,
    RankChoice,
    RankRule,
    choose_ranks,
    choose_shape,
)
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    load_skeleton,
    target_names,
    untouched,
)
from kpsvd_tune.recipe.adapter import AdapterRecipe, RankRecipe
from kpsvd_tune.report.results import LayerReport, RankReport

TOLERANCE = 5e-3


@dataclass(frozen=True)
class Decomposition:
    """What the stage gives to the adapter.

    Attributes:
        report: The ranks of all target modules, rank 0 included.
        layers: ``KpsvdConfig.layers``: per module of rank 1 and more its ``shape`` [m, n, p, q],
            ``rank`` and ``fingerprint`` <W, A0_1 kron B0_1>, which is sigma_1^2.
        factors: Per module of ``layers`` A0 (rank, m, n) and B0 (rank, p, q), float32.
        notes: What the user should know, such as damaged cache entries.
    """

    report: RankReport
    layers: dict[str, dict[str, Any]]
    factors: dict[str, tuple[Tensor, Tensor]]
    notes: tuple[str, ...] = ()

    def save_factors(self, file: Path) -> None:
        """Write the factors as ``NAME.left`` and ``NAME.right`` into one safetensors file."""
        tensors = {
            f"{name}.{side}": factor.contiguous()
            for name, pair in self.factors.items()
            for side, factor in zip(("left", "right"), pair, strict=True)
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.replace(file)

    @staticmethod
    def load_factors(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Read what :meth:`save_factors` wrote."""
        tensors = load_file(file)
        names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
        return {name: (tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}


class Spectra:
    """The spectra of all target modules, ready for any rank rule.

    Args:
        source: The base model.
        tasks: The target modules with their shapes, in model order.
        finished: Their spectra, in the same order.
        cache: Where the factors lie.
        base_parameters: Parameters of the base model.
        left_alone: (name, reason) of the weight matrices that are not targeted.
        shape_notes: Module to what its factor shape had to fall back on.
        notes: What happened on the way.

    Attributes:
        window: Leading terms computed of each matrix, as far as it has them.
        notes: As given.
    """

    def __init__(
        self,
        source: ModelSource,
        tasks: list[Task],
        finished: list[Finished],
        cache: SpectraCache,
        *,
        base_parameters: int,
        left_alone: list[tuple[str, str]],
        shape_notes: Mapping[str, str],
        notes: tuple[str, ...],
    ) -> None:
        self.notes = notes
        self.window = tasks[0].num_terms
        self._source = source
        self._tasks = tasks
        self._finished = finished
        self._cache = cache
        self._base_parameters = base_parameters
        self._left_alone = left_alone
        self._shape_notes = shape_notes

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
        spectra = [
            LayerSpectrum(task.name, done.values[: rank.window], done.squared_norm, task.shape)
            for task, done in zip(self._tasks, self._finished, strict=True)
        ]
        try:
            choices = choose_ranks(spectra, _rule(rank), _overrides(rank))
        except ValueError as error:
            raise AdapterError(f"adapter.rank: {error}") from error
        layers = tuple(
            _layer_report(spectrum, choice, done.seconds, self._shape_notes.get(done.name))
            for spectrum, choice, done in zip(spectra, choices, self._finished, strict=True)
        )
        # Every layer weighs the same, as in the pooled rule.
        kept = math.fsum(layer.energy_total for layer in layers)
        whole = math.fsum(_share(spectrum, rank.window) for spectrum in spectra)
        return RankReport(
            model=self._source.path,
            totals={
                "modules": len(layers),
                "trainable_parameters": sum(layer.parameters for layer in layers),
                "base_parameters": self._base_parameters,
                "energy": kept / whole if whole > 0 else 0.0,
            },
            layers=layers,
            untouched=tuple(self._left_alone),
            rule=rank.model_dump(),
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
        for task, done, layer in zip(self._tasks, self._finished, report.layers, strict=True):
            if layer.rank == 0:
                continue
            entry = self._cache.read(done.key, task.shape, layer.rank)
            if entry is None:
                raise AdapterError(
                    f"{task.name}: its entry in the spectra cache {self._cache.folder} was removed "
                    "or damaged while it was in use; run again"
                )
            chosen[task.name] = entry.terms.factors(layer.rank)
        if not chosen:
            raise AdapterError(
                "adapter.rank: every layer got rank 0; raise min, energy, max or budget"
            )
        return chosen


def decompose(
    source: ModelSource,
    adapter: AdapterRecipe,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    cache_dir: Path | None = None,
    processes: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Decomposition:
    """Decompose the target matrices, choose their ranks, and give the initial factors.

    The arguments are those of :func:`collect_spectra`.

    Returns:
        Report, layers for ``KpsvdConfig`` and factors.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape or rank rule that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    spectra = collect_spectra(
        source,
        adapter,
        seed=seed,
        tolerance=tolerance,
        cache_dir=cache_dir,
        processes=processes,
        process_index=process_index,
        num_processes=num_processes,
        device=device,
        progress=progress,
    )
    report = spectra.report(adapter.rank)
    layers = {
        layer.name: {
            "shape": list(layer.factor_shape),
            "rank": layer.rank,
            "fingerprint": layer.singular_values[0] ** 2,
        }
        for layer in report.layers
        if layer.rank > 0
    }
    return Decomposition(report, layers, spectra.factors(report), spectra.notes)


@torch.no_grad()
def collect_spectra(
    source: ModelSource,
    adapter: AdapterRecipe,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    cache_dir: Path | None = None,
    processes: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Spectra:
    """Compute, or find in the cache, the spectra of all target matrices.

    Interrupted at any point, even killed, the next call goes on after the last finished matrix
    and ends with the same result.

    Args:
        source: The base model.
        adapter: Targets, factor shape and the window of the rank rule.
        seed: Seeds the truncated decomposition.
        tolerance: Accepted missing share of the leading energy; 0 decomposes exactly.
        cache_dir: The cache folder; by default ``$XDG_CACHE_HOME/kpsvd-tune``.
        processes: Worker processes to start for this call.
        process_index: This process's number where every rank of a launched run calls this
            function; each then begins with its own share, helps with the rest, and returns the
            same.
        num_processes: How many such ranks there are.
        device: Where to decompose: cpu, cuda, cuda:1.
        progress: Called after each matrix.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    skeleton = load_skeleton(source)
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    reader = WeightReader(source, names, skeleton)
    tasks, shape_notes = _tasks(reader, adapter)
    settings = Settings(
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir),
        tolerance=tolerance,
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
    elif num_processes > 1:
        own = shares(tasks, num_processes)[process_index]
        # Our share first; then the others' from their ends, where they have not been yet.
        mine = {task.name for task in own}
        worker.run(own + [task for task in reversed(tasks) if task.name not in mine], note)
    else:
        worker.run(tasks, note)
    reader.close()
    damaged = sum(finished.is_repaired for finished in found.values())
    return Spectra(
        source,
        tasks,
        [found[task.name] for task in tasks],
        worker.cache,
        base_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        left_alone=untouched(skeleton, names),
        shape_notes=shape_notes,
        notes=(f"{damaged} damaged entries of the spectra cache were computed again",)
        if damaged
        else (),
    )


def _tasks(reader: WeightReader, adapter: AdapterRecipe) -> tuple[list[Task], dict[str, str]]:
    tasks: list[Task] = []
    notes: dict[str, str] = {}
    given = adapter.factor_shape
    rule = given if isinstance(given, str) else {"n": given["n"], "p": given["p"]}
    for name in reader.names:
        try:
            choice = choose_shape(*reader.size(name), rule)
        except ValueError as error:
            raise AdapterError(f"adapter.factor_shape for {name}: {error}") from error
        tasks.append(Task(name, choice.shape, adapter.rank.window))
        if choice.note is not None:
            notes[name] = choice.note
    return tasks, notes


def _rule(rank: RankRecipe) -> RankRule:
    return RankRule(
        **{key: value for key, value in rank.model_dump().items() if key != "overrides"}
    )


def _overrides(rank: RankRecipe) -> dict[str, int | dict[str, Any]]:
    # The recipe lets {rank: 4} stand for 4.
    return {
        pattern: value if isinstance(value, int) else value.get("rank", dict(value))
        for pattern, value in rank.overrides.items()
    }


def _share(spectrum: LayerSpectrum, num_terms: int) -> float:
    """Share of ||W||_F^2 in the leading terms; the sums' rounding must not take it above 1."""
    if spectrum.squared_norm == 0:
        return 0.0
    held = math.fsum(value * value for value in spectrum.values[:num_terms])
    return min(1.0, held / spectrum.squared_norm)


def _layer_report(
    spectrum: LayerSpectrum, choice: RankChoice, seconds: float, shape_note: str | None
) -> LayerReport:
    shape: KroneckerShape = spectrum.shape
    window, kept = _share(spectrum, len(spectrum.values)), _share(spectrum, choice.rank)
    norm = spectrum.squared_norm
    leading = spectrum.values[0] ** 2 if spectrum.values else 0.0
    return LayerReport(
        name=spectrum.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        factor_shape=shape.as_tuple(),
        rank=choice.rank,
        rank_energy=choice.rank_energy,
        rank_elbow=choice.rank_elbow,
        bound_by=choice.bound_by,
        energy_window=kept / window if window > 0 else 0.0,
        energy_total=kept,
        parameters=choice.rank * shape.num_parameters,
        relative_error=math.sqrt(1.0 - kept) if norm > 0 else 0.0,
        singular_values=spectrum.values,
        # Of R(W), not of W: how many leading terms of equal size would hold all the energy.
        stable_rank=norm / leading if leading > 0 else 0.0,
        seconds=seconds,
        note="; ".join(text for text in (shape_note, choice.note) if text) or None,
    )
