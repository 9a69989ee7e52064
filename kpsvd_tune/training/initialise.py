"""The stage before training: threshold, ranks and factors, made once and read back by a resume."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from kpsvd_tune.context import Context, RunInput
from kpsvd_tune.decompose import Decomposition, decompose, report_decomposition
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import Probe
from kpsvd_tune.training.probes import EnergyProbes, with_energy


def initialise(context: Context, data: RunInput) -> tuple[Recipe, Decomposition]:
    """Decompose, choose the ranks and give the factors; a run that goes on reads its own back.

    The main process writes init/ of the run; the recipe given has a threshold in place of auto.
    """
    recipe, run, events, start = context.recipe, context.run, context.events, data.start
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
        energy, probes = EnergyProbes(context, data).choose()
        events.note(f"energy threshold chosen: {energy:g}")
        recipe = with_energy(recipe, energy)
    made: list[Decomposition] = []

    def compute() -> None:
        events.stage(f"decomposing {recipe.model.path}")
        began = time.monotonic()
        seed = recipe.train.seed
        found = decompose(
            data.source,
            recipe.adapter,
            seed=seed,
            start_seed=seed,
            device=str(context.accelerator.device),
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
