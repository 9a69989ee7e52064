"""`adapter.from`: training goes on from an adapter that was saved, with nothing decomposed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import PeftModel

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.base import RECORD, record_base
from kpsvd_tune.adapter.layer import KpsvdLayer
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.adapter.targets import untouched
from kpsvd_tune.context import Context, RunInput
from kpsvd_tune.decompose import layer_report
from kpsvd_tune.decompose.start import base_name
from kpsvd_tune.errors import AdapterError, RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.models import load_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.runs.adapter_folder import WEIGHTS, holds_adapter
from kpsvd_tune.runs.find import COMPARED, find, load_adapter
from kpsvd_tune.storage.disk import explained


def find_adapter(recipe: Recipe) -> Path | None:
    """The adapter folder that `adapter.from` names; None where it names none."""
    path = recipe.adapter.from_
    if path is None:
        return None
    output = Path(recipe.output_dir).resolve()
    if Path(path).resolve() in (output, output / "adapter"):
        raise RecipeError(
            f"adapter.from: {path} is what this run itself would write; choose another output_dir"
        )
    folder = find(path).adapter
    if folder is None or not holds_adapter(folder):
        raise RecipeError(
            f"adapter.from: {path} holds no adapter; expected a finished run, or a folder with "
            f"adapter_config.json and {WEIGHTS}"
        )
    return folder


def load_adapted(context: Context, data: RunInput, folder: Path) -> tuple[PeftModel, str | None]:
    """Load the base model with a saved adapter on it, ready to be trained on.

    Factors, offsets, ranks and shapes are the adapter's, dropout and path are the recipe's. The
    result is as of :func:`kpsvd_tune.runs.find.load_adapter`; AdapterError if of another base.
    """
    recipe, events, base_files = context.recipe, context.events, data.base_files
    base = load_model(data.source, recipe.model.dtype, recipe.model.attn_implementation)
    config: KpsvdConfig = KpsvdConfig.from_pretrained(str(folder))
    if not config.layers:
        raise AdapterError(f"adapter.from: {folder} says nothing about its layers")
    config.dropout, config.path = recipe.adapter.dropout, recipe.adapter.path
    config.inference_mode = False
    model, other = load_adapter(
        base, folder, context.options.allow_other_base, config=config, is_trainable=True
    )
    if other is not None:
        events.note(f"training {other}")
    elif config.base_files is not None and config.base_files != base_files:
        events.note(f"the base model's files differ from those of the adapter; {COMPARED}")
    # What is recorded of the base is now that of this base, in this dtype.
    layers = dict(kpsvd_layers(model))
    for name, layer in layers.items():
        if "default" not in layer.kpsvd_base:
            layer.kpsvd_base["default"] = torch.zeros(RECORD, dtype=torch.int32)
        if other is not None and config.layers is not None:
            config.layers[name]["fingerprint"] = None
    record_base(model, layers, "default", config)
    config.base_files = dict(base_files)
    config.base_model_name_or_path = base_name(recipe.model.path)
    return model, other


def write_ranks(model: PeftModel, recipe: Recipe, folder: Path, events: Events) -> RankReport:
    """Write and show the adapter's layers as the rank report of the run."""
    report = report_ranks(model, recipe)
    with explained(f"write {folder}"):
        missing_page = write_rank_report(report, folder)
    if missing_page is not None:
        events.note(missing_page)
    events.ranks(report)
    return report


@torch.no_grad()
def report_ranks(model: PeftModel, recipe: Recipe) -> RankReport:
    """What the adapter's layers are, in the form of the decomposition's report.

    The k-th factors have the norms sqrt(sigma_k), which gives the singular values without an SVD.
    """
    base = model.get_base_model()
    layers = tuple(layer_report(_plan(name, layer)) for name, layer in kpsvd_layers(model))
    return RankReport(
        model=recipe.model.path,
        totals={
            "modules": len(layers),
            "trainable_parameters": sum(layer.parameters for layer in layers),
            "base_parameters": sum(
                parameter.numel()
                for name, parameter in base.named_parameters()
                if ".kpsvd_" not in name and ".modules_to_save." not in name
            ),
            "energy": math.fsum(layer.energy_window for layer in layers) / len(layers),
        },
        layers=layers,
        untouched=tuple(untouched(base, [layer.name for layer in layers])),
        rule={"from": recipe.adapter.from_},
    )


def _plan(name: str, layer: KpsvdLayer) -> LayerPlan:
    """The layer as it was chosen; no term is known but those that are kept."""
    factors = layer.kpsvd_left0["default"], layer.kpsvd_right0["default"]
    left, right = (torch.linalg.vector_norm(each.double(), dim=(1, 2)) for each in factors)
    values = tuple((left * right).tolist())
    rank = len(values)
    return LayerPlan(
        name,
        layer.kpsvd_form["default"].shape,
        values=values,
        squared_norm=float(base_weight(layer).double().square().sum()),
        rank=rank,
        rank_energy=rank,
        rank_elbow=rank,
        bound_by="from",
    )
