"""The stage before training: threshold, ranks and factors, made once and read back by a resume."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.decompose import Decomposition
from kpsvd_tune.decompose.progress import report_decomposition
from kpsvd_tune.decompose.start import starting_factors
from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.events import Events
from kpsvd_tune.models import ModelSource
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import Probe, RankReport
from kpsvd_tune.runs import RunDirectory, Start
from kpsvd_tune.storage.commit import MANIFEST, check_sealed, manifest
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.training.probes import choose_energy, with_energy

# What the manifest calls the folder.
_KIND = "init"


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
) -> tuple[Recipe, RankReport, Mapping[str, tuple[Tensor, Tensor]]]:
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
        The recipe with a threshold in place of auto, the ranks, and the factors by module.
    """
    factors_file, report_file = run.init / "factors.safetensors", run.init / "rank_report.json"
    is_ours = start.checkpoint is not None or start.is_same
    is_auto = recipe.adapter.rank.energy == "auto"
    if is_ours and factors_file.is_file() and report_file.is_file():
        _check_seal(run.init)
        report = RankReport.from_dict(read_json(report_file))
        if is_auto:
            recipe = with_energy(recipe, _known_energy(report, report_file))
        events.ranks(report)
        return recipe, report, Decomposition.load_factors(factors_file)
    probes: tuple[Probe, ...] = ()
    if is_auto:
        if not is_ours:
            # Probes of other settings say nothing about these.
            on_main_process(lambda: shutil.rmtree(run.path / "probes", ignore_errors=True))
        energy, probes = choose_energy(
            recipe,
            source,
            train_rows,
            validation_rows,
            pad_token_id,
            num_steps,
            accelerator,
            run,
            events,
        )
        events.note(f"energy threshold chosen: {energy:g}")
        recipe = with_energy(recipe, energy)

    def compute() -> None:
        events.stage(f"decomposing {recipe.model.path}")
        began = time.monotonic()
        decomposition = starting_factors(
            recipe,
            source,
            accelerator.device,
            report_decomposition(events),
            seed=recipe.train.seed,
        )
        events.end_progress()
        for note in decomposition.notes:
            events.note(note)
        with explained(f"write {run.init}"):
            # Factors last: with them the stage counts as done. Those of other settings go first,
            # for the seal is not theirs.
            missing_page = write_rank_report(replace(decomposition.report, probes=probes), run.init)
            factors_file.unlink(missing_ok=True)
            contents = {factors_file.name: decomposition.to_bytes()}
            contents[report_file.name] = report_file.read_bytes()
            replace_file(run.init / MANIFEST, manifest(_KIND, contents))
            decomposition.save_factors(factors_file)
        if missing_page is not None:
            events.note(missing_page)
        run.update(init_seconds=time.monotonic() - began)

    on_main_process(compute)
    report = RankReport.from_dict(read_json(report_file))
    events.ranks(report)
    return recipe, report, Decomposition.load_factors(factors_file)


def _check_seal(folder: Path) -> None:
    """Refuse factors that are not those of the decomposition; older versions did not seal them."""
    try:
        check_sealed(folder, _KIND)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. All checkpoints of the run belong to these factors: restore the file from a "
            "copy, or pass --resume never to begin anew; this run is then kept in previous/"
        ) from error


def _known_energy(report: RankReport, file: Path) -> float:
    """The threshold that probes chose."""
    energy = report.rule.get("energy")
    if not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise CheckpointError(
            f"{file}: the energy of its rule is {energy!r}; expected a share above 0, up to 1. "
            "Pass --resume never to choose it again"
        )
    return float(energy)
