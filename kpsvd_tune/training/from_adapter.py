"""`adapter.from`: training goes on from an adapter that was saved, with nothing decomposed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper

from kpsvd_tune.adapter import KpsvdConfig, KpsvdLayer
from kpsvd_tune.adapter.base import RECORD, record_base, weight_at_hand
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.adapter.targets import plain_name, untouched
from kpsvd_tune.context import Context, RunInput
from kpsvd_tune.decompose import layer_report
from kpsvd_tune.decompose.start import base_name, fetching, load_base
from kpsvd_tune.errors import AdapterError, RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.linalg import LayerPlan, rearrange
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.runs.adapter_folder import WEIGHTS, holds_adapter
from kpsvd_tune.runs.find import COMPARED, find, load_adapter
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.training.accelerator import shares_weights


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
    is_shared = shares_weights(context.accelerator, recipe.train)
    base = load_base(data.source, recipe, is_shared=is_shared, note=events.note)
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
    record_base(model, layers, "default", config, fetching(model))
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
    """What the adapter's layers are, in the form of the decomposition's report."""
    base = model.get_base_model()
    whole = {
        plain_name(name): sum(p.numel() for p in module.modules_to_save["default"].parameters())
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    fetch, plans = fetching(model), []
    for name, layer in kpsvd_layers(model):
        with weight_at_hand(layer, name, fetch):
            plans.append(_plan(name, layer))
    layers = tuple(map(layer_report, plans))
    config: Any = model.peft_config["default"]
    return RankReport(
        model=recipe.model.path,
        totals={
            "modules": len(layers),
            "trainable_parameters": sum(layer.parameters for layer in layers),
            "stored_parameters": sum(plan.stored(config.frozen_seed is not None) for plan in plans),
            "base_parameters": sum(
                parameter.numel()
                for name, parameter in base.named_parameters()
                if ".kpsvd_" not in name and ".modules_to_save." not in name
            ),
            "energy": math.fsum(layer.energy_window for layer in layers) / len(layers),
        },
        layers=layers,
        untouched=tuple(untouched(base, [layer.name for layer in layers], whole)),
        rule={"from": recipe.adapter.from_},
        form=plans[0].form,
        frozen_seed=config.frozen_seed,
        trained_whole=whole,
    )


def _plan(name: str, layer: KpsvdLayer) -> LayerPlan:
    """The layer as it was chosen; no term is known but those that are kept.

    A term's value is the norm of what its frozen factors hold of R(W), which of the weight's own
    terms is the singular value; factors of the form both have the norms sqrt(sigma_k).
    """
    form = layer.kpsvd_form["default"]
    weight = base_weight(layer).float()
    found = [factors.double().flatten(1) for factors in layer.frozen("default")]
    if form.name == "both":
        values = found[0].norm(dim=1) * found[1].norm(dim=1)
    else:
        held = rearrange(weight, form.shape).double()
        units = [each / each.norm(dim=1, keepdim=True) for each in found]
        if form.name == "left":
            values = (held @ units[0].T).norm(dim=0)
        elif form.name == "right":
            values = (units[0] @ held).norm(dim=1)
        else:
            values = ((units[0] @ held) * units[1]).sum(1).abs()
    return LayerPlan(
        name,
        form.shape,
        values=tuple(values.sort(descending=True).values.tolist()),
        squared_norm=float(weight.double().square().sum()),
        rank=form.rank,
        rank_energy=form.rank,
        rank_elbow=form.rank,
        bound_by="from",
        form=form.name,
    )
