"""The stage before training: threshold, ranks and factors, made once and read back by a resume."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.decompose import Decomposition, decompose, report_decomposition
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import Probe
from kpsvd_tune.runs import RunDirectory, Start
from kpsvd_tune.training.probes import EnergyProbes, with_energy


def initialise(
    recipe: Recipe,
    source: ModelSource,
    train_rows: Sequence[TokenizedRow],
    validation_rows: Sequence[TokenizedRow],
    num_steps: int,
    pad_token_id: int,
    run: RunDirectory,
    start: Start,
    accelerator: Accelerator,
    events: Events,
) -> tuple[Recipe, Decomposition]:
    """Decompose, choose the ranks and give the factors; a run that goes on reads its own back.

    Args:
        recipe: The recipe.
        source: The base model.
        train_rows: Rows to learn from.
        validation_rows: Held-out rows.
        num_steps: Optimiser steps of the run.
        pad_token_id: Fills short rows.
        run: The run's folder; init/ is written.
        start: Where the run begins or goes on.
        accelerator: The processes; the main one decomposes.
        events: Told of progress.

    Returns:
        The recipe with a threshold in place of auto, and ranks and factors.
    """
    is_ours = start.checkpoint is not None or start.is_same
    is_auto = recipe.adapter.rank.energy == "auto"
    is_of_weight = recipe.adapter.init == "weight"
    if is_ours and Decomposition.is_in(run.init):
        known = Decomposition.load(run.init, is_of_weight=is_of_weight)
        if is_auto:
            recipe = with_energy(recipe, known.energy(run.init))
        events.ranks(known.report)
        return recipe, known
    probes: tuple[Probe, ...] = ()
    if is_auto:
        if not is_ours:
            # Probes of other settings say nothing about these.
            on_main_process(lambda: shutil.rmtree(run.path / "probes", ignore_errors=True))
        energy, probes = EnergyProbes(
            recipe,
            source,
            train_rows,
            validation_rows,
            pad_token_id,
            num_steps,
            accelerator,
            run,
        ).choose(events)
        events.note(f"energy threshold chosen: {energy:g}")
        recipe = with_energy(recipe, energy)
    made: list[Decomposition] = []

    def compute() -> None:
        events.stage(f"decomposing {recipe.model.path}")
        began = time.monotonic()
        seed = recipe.train.seed
        found = decompose(
            source,
            recipe.adapter,
            seed=seed,
            start_seed=seed,
            device=str(accelerator.device),
            progress=report_decomposition(events),
        )
        events.end_progress()
        for note in found.notes:
            events.note(note)
        found = replace(found, report=replace(found.report, probes=probes))
        if (missing_page := found.save(run.init)) is not None:
            events.note(missing_page)
        run.update(init_seconds=time.monotonic() - began)
        made.append(found)

    on_main_process(compute)
    # The other processes read the bits that the main one wrote, as a resume does.
    found = made[0] if made else Decomposition.load(run.init, is_of_weight=is_of_weight)
    events.ranks(found.report)
    return recipe, found
