"""One training run of a comparison: any method, the same loop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.decompose import decompose
from kpsvd_tune.decompose.start import adapt
from kpsvd_tune.errors import CheckpointError, NonFiniteError
from kpsvd_tune.evaluation.loss import text_loss
from kpsvd_tune.events import Silence
from kpsvd_tune.hardware.devices import decomposing_device
from kpsvd_tune.models import ModelSource, load_tokenizer
from kpsvd_tune.processes import device, gpu_identity, reset_peak_memory
from kpsvd_tune.recipe import DatasetRecipe, Recipe, recipe_to_yaml
from kpsvd_tune.report.comparison import TrialRow
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.results import StepMetrics, TrainResult
from kpsvd_tune.runs.directory import RunDirectory, RunRecord
from kpsvd_tune.runs.identity import changes
from kpsvd_tune.runs.record import RunEvents
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.json_files import as_read_back, parse_json, read_bytes, read_json
from kpsvd_tune.training import Training, make_accelerator
from kpsvd_tune.training.batches import make_micro_batch
from kpsvd_tune.training.loss import SummedTokenLoss, validation_loss
from kpsvd_tune.usage import Usage

# Tokens of a window of the forgetting text: short, for the runs of a comparison are.
WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Material:
    """What every trial of a comparison shares."""

    source: ModelSource
    train: Sequence[TokenizedRow]
    validation: Sequence[TokenizedRow]  # held-out rows, which choices are made by
    test: Sequence[TokenizedRow]  # rows that no choice looks at; may be empty
    forgetting: Path | None  # a text of another kind; None: not measured
    pad_token_id: int  # fills short rows
    dataset: DatasetRecipe  # with the template that the rows turned out to take
    chat_template: str | None = None  # of the tokenizer, as the rows were written


def measure_base(material: Material, recipe: Recipe, base: KeptBase) -> dict[str, float | None]:
    """Losses of the base model: validation_loss, test_loss and forgetting_loss."""
    losses = _Losses(base.fresh(), material, recipe, make_accelerator(recipe.train))
    return {"validation_loss": losses.of(material.validation)} | losses.others()


def run_trial(
    setup: Setup,
    material: Material,
    base: KeptBase,
    report: Callable[[StepMetrics, int], None],
    *,
    jobs: int = 1,
) -> TrialRow:
    """Train one method once and measure it; ``report`` gets each step's metrics and the step count.

    ``jobs`` trials run on this machine at a time. The energy of what several of them share is not
    told, because each would count the others' too.

    What ran in this process before changes nothing: the row is bit for bit that of a trial in a
    process of its own, times and memory aside. SIGINT and SIGTERM raise StoppedBySignal once the
    state is saved; the trial later goes on from its checkpoint. Its folder keeps the metrics, what
    looked wrong (events.jsonl) and the adapter.
    """
    recipe = setup.recipe
    accelerator = make_accelerator(recipe.train)
    owns_gpu = jobs <= torch.cuda.device_count()
    gpus = gpu_identity(accelerator.device) if owns_gpu else []
    usage = Usage(gpus, has_host=jobs == 1)
    run = RunDirectory(setup.folder)
    with run.lock():
        known = known_identity(run, setup.identity)
        begun = run.begin(
            recipe_to_yaml(recipe),
            known or setup.identity,
            {"trial": setup.trial.folder_name},
            resume="auto" if known else "never",
        )
        if begun.is_finished:
            # It ended, and whoever started it was gone before the row could be written down.
            return TrialRow.from_dict(read_json(run.results_file))
        reset_peak_memory(accelerator.device)
        model, rank, init_seconds = adapted(setup, material, base.fresh())
        # What looks wrong is kept in the trial's folder, and told with its row.
        events = RunEvents(Silence(), run, is_main=True)
        events.begin(begun.changed)
        training = Training(
            model,
            material.train,
            material.validation,
            recipe.train,
            accelerator,
            run,
            pad_token_id=material.pad_token_id,
            checkpoint=begun.checkpoint,
            rate_factors=_rate_factors(model, setup),
            # All but PiSSA, which rounds what it takes out of the weights, begin as the base.
            loss_before=None if setup.method.kind == "pissa" else setup.base["validation_loss"],
            tell=events.tell,
        )
        failed = None
        try:
            for metrics in training.steps():
                report(metrics, training.num_steps)
        except NonFiniteError as error:
            failed = str(error)
        others: dict[str, float | None] = {"test_loss": None, "forgetting_loss": None}
        if failed is None:
            others = _Losses(model, material, recipe, accelerator).others()
            with explained(f"write {run.adapter}"):
                model.save_pretrained(str(run.adapter), save_embedding_layers=False)
        stored = _stored(model, setup.method.kind)
        row = _row(setup, run, training.result(), others, rank, stored, init_seconds, failed)
        before = training.seconds_before
        row = replace(
            row,
            device_seconds=usage.seconds() + before,
            energy_joules=None if before else usage.joules(),
            warnings=_warnings(run),
        )
        run.finish(row.to_dict())
    return row


def _row(
    setup: Setup,
    run: RunDirectory,
    outcome: TrainResult,
    others: Mapping[str, float | None],
    rank: str,
    stored_parameters: int,
    init_seconds: float,
    failed: str | None,
) -> TrialRow:
    lines = _read_metrics(run.metrics_file)
    curve = [(0, outcome.validation_loss_before)]
    curve += [(line["step"], line.get("validation_loss")) for line in lines]
    before, after = setup.base["forgetting_loss"], others["forgetting_loss"]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]
    return TrialRow(
        method=setup.trial.method,
        budget=setup.trial.budget,
        learning_rate=setup.trial.learning_rate,
        seed=setup.trial.seed,
        rank=rank,
        trainable_parameters=outcome.trainable_parameters,
        stored_parameters=stored_parameters,
        validation_loss=None if failed else outcome.adapter_validation_loss,
        validation_losses=tuple((step, loss) for step, loss in curve if loss is not None),
        test_loss=others["test_loss"],
        forgetting=None if after is None or before is None else after - before,
        # A step that was skipped has none, and what a loss scaler overflows has no norm.
        losses=tuple(round(line["loss"], 5) for line in lines if line["loss"] is not None),
        grad_norms=tuple(
            round(line["grad_norm"], 5) for line in lines if line["grad_norm"] is not None
        ),
        seconds_per_step=statistics.median(seconds or [0.0]),
        init_seconds=init_seconds,
        wall_seconds=outcome.wall_seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        failed=failed,
    )


def _warnings(run: RunDirectory) -> dict[str, str]:
    """The first text of each code that the trial told, in any of its sessions."""
    found: dict[str, str] = {}
    for event in read_events(run.path):
        if event.kind in ("warning", "fallback"):
            found.setdefault(event.code, event.text)
    return found


def known_identity(run: RunDirectory, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The identity of a trial as its folder has it; None where the folder holds another trial.

    The recipe may have got or lost keys since an earlier version began the trial: what they did
    then is what their defaults do, so the trial goes on under the identity that it began with.
    """
    if not run.run_file.exists():
        return identity
    held, now = read_json(run.run_file, RunRecord).get("identity"), as_read_back(dict(identity))
    if not held or not held.get("shared"):
        return None
    is_same = all(held.get(key) == now[key] for key in ("method", "schedule"))
    # Each as a part of a recipe, whose keys have defaults.
    adapters = [{"recipe": {"adapter": each.get("adapter") or {}}} for each in (held, now)]
    if is_same and not changes(held["shared"], now["shared"]) and not changes(*adapters):
        return held
    return None


def adapted(setup: Setup, material: Material, base: Any) -> tuple[PeftModel, str, float]:
    """The model with its adapter, its rank as text, and the seconds the adapter's start took."""
    recipe, source = setup.recipe, material.source
    # Last, so that nothing that came before has drawn from it.
    torch.manual_seed(recipe.train.seed)
    if setup.baseline is not None:
        began = time.monotonic()
        baseline: Any = get_peft_model(base, setup.baseline.config)
        for name, parameter in baseline.named_parameters():
            if any(part in name for part in setup.baseline.frozen):
                parameter.requires_grad_(False)
        rank = setup.baseline.size.rank
        return baseline, "–" if rank is None else str(rank), time.monotonic() - began
    began = time.monotonic()
    decomposition = decompose(
        source,
        recipe.adapter,
        start_seed=recipe.train.seed,
        device=str(decomposing_device(device())),
    )
    took = time.monotonic() - began
    model = adapt(recipe, source, decomposition, None, base)
    ranks = [layer.rank for layer in decomposition.report.layers]
    low, high = min(ranks), max(ranks)
    # What the cache spared is counted all the same.
    seconds = sum(layer.seconds for layer in decomposition.report.layers)
    return model, str(low) if low == high else f"{low}-{high}", max(seconds, took)


def _rate_factors(model: PeftModel, setup: Setup) -> dict[str, float]:
    if setup.baseline is None:
        return rate_factors(model, is_relative=setup.recipe.adapter.rate == "relative")
    return {
        name: factor
        for name, parameter in model.named_parameters()
        for part, factor in setup.baseline.rate_ratios.items()
        if parameter.requires_grad and part in name
    }


def _stored(model: PeftModel, kind: str) -> int:
    saved: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    # What the base is known by is stored beside them as whole numbers, and is no parameter.
    count = sum(tensor.numel() for tensor in saved.values() if tensor.is_floating_point())
    # For the unmodified base PiSSA has to store where it started too.
    return 2 * count if kind == "pissa" else count


@dataclass(frozen=True)
class _Losses:
    """Measures a model, with or without an adapter."""

    model: Any
    material: Material
    recipe: Recipe
    accelerator: Accelerator

    def of(self, rows: Sequence[TokenizedRow]) -> float | None:
        """The loss on rows; None without any."""
        if not rows:
            return None
        with self.accelerator.autocast():
            return validation_loss(
                SummedTokenLoss(self.model),
                rows,
                self.recipe.train.batch_size,
                self.accelerator,
                lambda part: make_micro_batch(part, self.material.pad_token_id),
            )

    def others(self) -> dict[str, float | None]:
        """test_loss and forgetting_loss; None where not measured or not finite."""
        test, forgetting = self.of(self.material.test), None
        if self.material.forgetting is not None:
            was_training = self.model.training
            self.model.eval()
            tokenizer = load_tokenizer(self.material.source)
            is_mixed = self.recipe.train.precision != "no"
            with self.accelerator.autocast() if is_mixed else nullcontext():
                found = text_loss(
                    self.model, tokenizer, self.material.forgetting, window=WINDOW_TOKENS
                )
            self.model.train(was_training)
            forgetting = found.value
        losses = {"test_loss": test, "forgetting_loss": forgetting}
        return {k: v if v is not None and math.isfinite(v) else None for k, v in losses.items()}


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return [parse_json(line) for line in read_bytes(file).splitlines()]
    except ValueError as error:
        raise CheckpointError(
            f"{file}: a line {error}; remove the folder {file.parent}, and its trial is run again"
        ) from error
