"""The stage before training: threshold, ranks and factors, made once and read back by a resume.

`adapter.rank.energy: auto` is chosen by short trainings, in successive halving (Jamieson and
Talwalkar 2016): every candidate is trained for a few steps, the better half for twice as many,
until one is left.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.context import Context, RunInput
from kpsvd_tune.decompose import (
    Decomposition,
    Spectra,
    collect_spectra,
    decompose,
    report_decomposition,
    start_from,
)
from kpsvd_tune.decompose.launched import Helper
from kpsvd_tune.decompose.start import adapt, fetching
from kpsvd_tune.errors import DataError, NonFiniteError
from kpsvd_tune.hardware.devices import decomposing_device
from kpsvd_tune.models.offload import place
from kpsvd_tune.processes import on_main_process
from kpsvd_tune.recipe import Recipe, recipe_to_yaml
from kpsvd_tune.report.results import Probe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.training.accelerator import shares_weights
from kpsvd_tune.training.loop import Training
from kpsvd_tune.units import counted

CANDIDATES = (0.2, 0.4, 0.6, 0.8)
# A candidate with fewer parameters wins where it keeps this share of the best fall of the loss:
# falls differ by a few per cent where parameters differ by several times.
KEPT_FALL = 0.98
# All probes together take at most this share of the run's steps, but no round fewer than this many.
STEP_SHARE = 0.25
FEWEST_STEPS = 5


def initialise(context: Context, data: RunInput) -> tuple[Recipe, Decomposition]:
    """Decompose, choose the ranks and give the factors; a run that goes on reads its own back.

    The main process writes init/ of the run; the recipe given has a threshold in place of auto.
    """
    recipe, run, events, start = context.recipe, context.run, context.events, data.start
    is_ours = start.checkpoint is not None or start.is_same
    is_auto = recipe.adapter.rank.energy == "auto"
    probes: tuple[Probe, ...] = ()
    if is_ours and Decomposition.is_in(run.init):
        found = Decomposition.load(run.init, is_of_weight=recipe.adapter.init == "weight")
        if is_auto:
            recipe = with_energy(recipe, found.energy(run.init))
    else:
        if is_auto:
            if not is_ours:
                # Probes of other settings say nothing about these.
                on_main_process(lambda: shutil.rmtree(run.path / "probes", ignore_errors=True))
            energy, probes = EnergyProbes(context, data).choose()
            events.note(f"energy threshold chosen: {energy:g}")
            recipe = with_energy(recipe, energy)
        found = on_main_process(
            lambda: _decompose(context, data, recipe, probes), Helper(_place(context))
        )
    events.ranks(found.report)
    return recipe, found


def _decompose(
    context: Context, data: RunInput, recipe: Recipe, probes: tuple[Probe, ...]
) -> Decomposition:
    run, events, seed = context.run, context.events, recipe.train.seed
    events.stage(f"decomposing {recipe.model.path}")
    began = time.monotonic()
    found = decompose(
        data.source,
        recipe.adapter,
        seed=seed,
        start_seed=seed,
        device=_place(context),
        in_launch=True,
        progress=report_decomposition(events),
    )
    events.end_progress()
    for note in found.notes:
        events.note(note)
    found = replace(found, report=replace(found.report, probes=probes))
    if (missing_page := found.save(run.init)) is not None:
        events.note(missing_page)
    run.update(init_seconds=time.monotonic() - began)
    return found


def _place(context: Context) -> str:
    """Where this process decomposes."""
    return str(decomposing_device(context.accelerator.device))


@dataclass(frozen=True)
class EnergyProbes:
    """Short trainings of one run's recipe, which differ in their energy threshold alone.

    Every probe sees the rows in the same order; the held-out ones judge.
    """

    context: Context  # its recipe has energy auto; done probes stay in probes/
    data: RunInput  # its number of steps caps that of the probes

    def choose(self) -> tuple[float, tuple[Probe, ...]]:
        """Train candidates of the energy threshold for a few steps; give the best and all probes.

        Probes that are done are kept, so that a stopped choice goes on. DataError: no held-out
        rows; NonFiniteError: every candidate diverged.
        """
        events = self.context.events
        if not self.data.validation:
            raise DataError(
                "adapter.rank.energy: auto compares thresholds on held-out rows and "
                "dataset.validation is 0; set it above 0, or give a threshold such as 0.5"
            )
        left = on_main_process(self._candidates, Helper(_place(self.context)))
        lengths = round_lengths(len(left), self.data.num_steps)
        cost = sum(length * max(1, len(left) >> place) for place, length in enumerate(lengths))
        events.stage(
            f"choosing the energy threshold among {', '.join(map(str, left))}: "
            f"{counted(cost, 'step')} "
            f"in {counted(len(lengths), 'round')}, beside the run's {self.data.num_steps}"
        )
        probes: list[Probe] = []
        for length in lengths:
            if len(left) == 1:
                break
            done = []
            for energy in left:
                if probe := self.probe(energy, length):
                    done.append(probe)
                # Accelerate keeps every model that it was given, each with a base of its own.
                self.context.accelerator.free_memory()
            if not done:
                raise NonFiniteError(
                    "adapter.rank.energy: auto: every threshold diverged; lower "
                    "train.learning_rate, or give a threshold such as 0.5"
                )
            for each in done:
                events.note(
                    f"energy {each.energy:g}: {each.parameters:,} parameters, validation loss "
                    f"{each.loss_before:.4f} to {each.loss:.4f} in {counted(each.steps, 'step')}"
                )
            probes += done
            left = [probe.energy for probe in best_first(done)][: max(1, len(done) // 2)]
        return left[0], tuple(probes)

    def probe(self, energy: float, length: int) -> Probe | None:
        """Run one short training, or read it back; None where its loss became infinite or NaN."""
        folder = self.context.run.path / "probes" / f"energy-{energy:g}-steps-{length}"
        file = folder.with_name(f"{folder.name}.json")
        cure = "remove it, and the probe is run again"
        known: Probe | None = on_main_process(
            lambda: read_json(file, Probe, cure=cure) if file.exists() else None
        )
        if known is not None:
            return known
        began = time.monotonic()
        training = self._training(energy, length, folder)
        try:
            for _ in training.steps():
                pass
        except NonFiniteError:
            return None
        outcome = training.result()
        assert outcome.validation_loss is not None
        assert outcome.validation_loss_before is not None
        probe = Probe(
            energy=energy,
            steps=length,
            parameters=outcome.trainable_parameters,
            loss_before=outcome.validation_loss_before,
            loss=outcome.validation_loss,
            seconds=time.monotonic() - began,
        )

        def keep() -> None:
            replace_file(file, to_json(probe.to_dict()))
            shutil.rmtree(folder, ignore_errors=True)

        on_main_process(keep)
        return probe

    @cached_property
    def _spectra(self) -> Spectra:
        """Those of all target matrices; for the main process alone."""
        recipe, place = self.context.recipe, _place(self.context)
        return collect_spectra(
            self.data.source,
            recipe.adapter,
            seed=recipe.train.seed,
            device=place,
            in_launch=True,
        )

    def _candidates(self) -> list[float]:
        """The candidates without those that give the ranks of a smaller one."""
        found: dict[tuple[int, ...], float] = {}
        for energy in CANDIDATES:
            report = self._spectra.report(with_energy(self.context.recipe, energy).adapter.rank)
            found.setdefault(tuple(layer.rank for layer in report.layers), energy)
        return list(found.values())

    def _training(self, energy: float, length: int, folder: Path) -> Training:
        tried = with_energy(self.context.recipe, energy)
        warmup = tried.train.warmup_steps
        update = {
            "max_steps": length,
            "eval_every": 0,
            "save_every": 0,
            "early_stopping": None,
            "keep": "last",
            # Made for the whole run, which a probe is much shorter than.
            "warmup_steps": None if warmup is not None and warmup >= length else warmup,
        }
        start = on_main_process(lambda: start_from(self._spectra, tried.adapter, tried.train.seed))
        is_shared = shares_weights(self.context.accelerator, tried.train)
        model = adapt(tried, self.data.source, start, None, is_shared=is_shared)
        rates = rate_factors(
            model, is_relative=tried.adapter.rate == "relative", fetch=fetching(model)
        )
        # The run itself tells of it.
        place(model, tried.model.device_map, self.context.accelerator.device, lambda _: None)
        own = RunDirectory(folder)
        begun = on_main_process(
            lambda: own.begin(
                recipe_to_yaml(tried),
                {"recipe": tried.model_dump(mode="json"), "steps": length},
                {"probe": energy},
            ),
        )
        return Training(
            model,
            self.data.train,
            self.data.validation,
            tried.train.model_copy(update=update),
            self.context.accelerator,
            own,
            pad_token_id=self.data.pad_token_id,
            checkpoint=begun.checkpoint,
            rate_factors=rates,
        )


def round_lengths(num_candidates: int, num_steps: int) -> list[int]:
    """Steps of a probe in each round: doubling, while the candidates halve; one needs no round."""
    num_rounds = max(0, num_candidates - 1).bit_length()
    # Every round costs about num_candidates times the first length.
    budget = STEP_SHARE * num_steps
    first = max(FEWEST_STEPS, int(budget / max(1, num_candidates * num_rounds)))
    return [first << place for place in range(num_rounds)]


def best_first(probes: Sequence[Probe]) -> list[Probe]:
    """Order probes of equal steps: those that keep the best fall by parameters, others by loss."""
    fall = max(probe.loss_before - probe.loss for probe in probes)
    keeps = [p for p in probes if p.loss_before - p.loss >= KEPT_FALL * fall and fall > 0]
    rest = [probe for probe in probes if probe not in keeps]
    return sorted(keeps, key=lambda p: (p.parameters, p.loss)) + sorted(
        rest, key=lambda p: (p.loss, p.parameters)
    )


def with_energy(recipe: Recipe, energy: float) -> Recipe:
    """The recipe with a threshold in place of auto."""
    rank = recipe.adapter.rank.model_copy(update={"energy": energy})
    adapter = recipe.adapter.model_copy(update={"rank": rank})
    return recipe.model_copy(update={"adapter": adapter})
