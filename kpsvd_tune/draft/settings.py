"""Choose the settings of a first recipe: by the rows, the model, this machine and the budget."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.data.rows.preflight import model_limits
from kpsvd_tune.draft.budget import Budget
from kpsvd_tune.draft.rows import LookedAt
from kpsvd_tune.errors import AdapterError, InputError
from kpsvd_tune.estimate import make_plan
from kpsvd_tune.evaluation.room import room
from kpsvd_tune.events import Events, Silence
from kpsvd_tune.hardware.bf16 import without_bf16
from kpsvd_tune.hardware.devices import hardware_name, own_device
from kpsvd_tune.models import find_configuration, load_skeleton, load_tokenizer
from kpsvd_tune.recipe import LOSS_TASKS, DatasetRecipe, Recipe
from kpsvd_tune.report.plan import Plan
from kpsvd_tune.training.stages import read_rows
from kpsvd_tune.units import counted, duration

DEFAULT_PARAMETERS = 600_000
# Rows a step, passes: more rows make steadier steps, and need fewer passes.
_SIZES = ((1_000, 8, 3), (20_000, 16, 2), (None, 32, 1))
# A length of rows for the first look; longer ones count as this long.
_LONGEST = 8_192
_MULTIPLE = 64
# Questions that are answered before and after training; on a CPU an answer takes seconds.
_QUESTIONS = {"cpu": 50, "mps": 50, "cuda": 200}
_TOGETHER = 16
_MOST_NEW_TOKENS = 1_024
# Changes to make a plan fit; one makes it fit, and the free memory may have moved meanwhile.
_TRIES = 3


@dataclass(frozen=True)
class BaseModel:
    """A base model without its weights."""

    path: str  # as it was typed
    skeleton: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wanted:
    """What the user said."""

    held_out: str  # file that the held-out rows will be in
    model: BaseModel
    rows: LookedAt
    task: str | None
    budget: Budget
    price: float | None  # of an hour of this machine
    output_dir: str


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows."""

    longest: int
    most: int  # 99 % have at most so many
    answer: int  # of the longest answer, its end token among them


@dataclass(frozen=True)
class Draft:
    """The values of a recipe, and what they rest on."""

    content: dict[str, Any]  # as the recipe has it
    plan: Plan
    lengths: Lengths
    device: str  # in words
    limit: str | None = None  # how the budget bounds the run, where it does


def look_at_model(path: str) -> BaseModel:
    """Find a base model by its configuration and tokenizer alone.

    Raises:
        ModelError: It cannot be found or read.
        AdapterError: It has no layers to adapt.
    """
    source = find_configuration(path)
    skeleton = load_skeleton(source)
    target_names(skeleton, "all-linear", None, [])
    return BaseModel(path, skeleton, load_tokenizer(source))


def draft(wanted: Wanted, events: Events) -> Draft:
    """Choose every value, and change what does not fit this machine until it does.

    Raises:
        InputError: The budget is too small for a single step, or its money has no price.
        ModelError, DataError, AdapterError: As `plan` refuses them.
    """
    time_limit = wanted.budget.time_limit(wanted.price)
    with tempfile.TemporaryDirectory(prefix="kpsvd-tune-") as folder:
        # The plan reads the rows as the run will, and nothing is written beside the recipe yet.
        held_out = Path(folder) / Path(wanted.held_out).name
        held_out.write_bytes(as_lines(wanted.rows.held_out))
        events.stage(f"tokenising {wanted.rows.path} with the tokenizer of {wanted.model.path}")
        content = _content(wanted)
        content["dataset"]["validation"] = str(held_out)
        lengths = _set_lengths(content, wanted)
        events.stage("planning: what fits this machine, and how long it takes")
        plan = _fit(content)
        limit = None
        if time_limit is not None:
            plan, limit = _shorten(content, plan, time_limit)
    content["dataset"]["validation"] = wanted.held_out
    return Draft(content, plan, lengths, _device()[1], limit)


def as_lines(rows: tuple[Mapping[str, Any], ...]) -> bytes:
    """Rows as a file of JSON lines."""
    lines = [json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows]
    return "".join(lines).encode("utf-8", "backslashreplace")


def _content(wanted: Wanted) -> dict[str, Any]:
    rows, budget = wanted.rows, wanted.budget
    num_train = rows.num_rows - len(rows.held_out)
    size, epochs = next((s, e) for most, s, e in _SIZES if most is None or num_train < most)
    precision, dtype = _precision()
    dataset: dict[str, Any] = {"path": rows.path, "max_length": _LONGEST}
    if rows.columns:
        dataset["columns"] = dict(rows.columns)
    if rows.form.is_chat or (rows.form.is_pair and wanted.model.tokenizer.chat_template):
        dataset["template"] = "chat"
    elif rows.form.is_pair:
        dataset["template"] = DatasetRecipe.model_fields["template"].default
    rank = {"method": "energy+elbow", "energy": 0.5, "min": 1, "max": 16}
    content: dict[str, Any] = {
        "model": {"path": wanted.model.path, "dtype": dtype},
        "dataset": dataset,
        "adapter": {
            "target_modules": "all-linear",
            "rank": {**rank, "budget": _short(budget.parameters or DEFAULT_PARAMETERS)},
        },
        "train": {
            "epochs": epochs,
            "batch_size": size,
            "gradient_accumulation": 1,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.05,
            "precision": precision,
            "gradient_checkpointing": False,
            **_intervals(num_train * epochs // size),
        },
    }
    if wanted.price is not None:
        content["compare"] = {"price_per_hour": wanted.price, "currency": budget.currency}
    content["output_dir"] = wanted.output_dir
    return content


def _intervals(num_steps: int) -> dict[str, int]:
    """Validations and checkpoints: about five of each in a run."""
    return dict.fromkeys(("eval_every", "save_every"), max(1, -(-num_steps // 5)))


def _short(parameters: int) -> int | str:
    """The number as people write it in a recipe: 0.6M, 300k."""
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if 10 * parameters >= unit and parameters % (unit // 100) == 0:
            return f"{parameters / unit:g}{letter}"
    return parameters


def _set_lengths(content: dict[str, Any], wanted: Wanted) -> Lengths:
    """Tokenise the rows, and set what depends on their lengths."""
    dataset = content["dataset"]
    skeleton, tokenizer = wanted.model.skeleton, wanted.model.tokenizer
    positions = model_limits(skeleton).positions
    dataset["max_length"] = min(_LONGEST, positions or _LONGEST)
    recipe = Recipe.model_validate(content)
    assert recipe.dataset is not None
    found = read_rows(recipe, recipe.dataset, tokenizer, skeleton, Silence())
    tokens = np.concatenate([found.train.lengths, found.validation.lengths])
    learnt = np.concatenate([found.train.num_supervised, found.validation.num_supervised])
    most = int(np.quantile(tokens, 0.99, method="higher"))
    lengths = Lengths(int(tokens.max()), most, int(learnt.max()))
    # A few very long rows would cost every step the memory of a batch of them.
    is_even = lengths.longest <= 2 * most
    wished = lengths.longest if is_even else most
    rounded = -(-wished // _MULTIPLE) * _MULTIPLE
    dataset["max_length"] = min(rounded, dataset["max_length"])
    if not is_even:
        dataset["too_long"] = "drop"
    if wanted.task is not None:
        scored = _evaluation(wanted, wanted.task, lengths, dataset["max_length"])
        content["evaluation"] = [scored]
        content["output_dir"] = content.pop("output_dir")  # the last one
    return lengths


def _evaluation(wanted: Wanted, task: str, lengths: Lengths, max_length: int) -> dict[str, Any]:
    found: dict[str, Any] = {"task": task, "path": wanted.held_out, "before": True}
    if task in LOSS_TASKS:
        return {**found, "window": max_length}
    if task == "label" and len(wanted.rows.labels) > 1:
        found["labels"] = list(wanted.rows.labels)
    return {
        **found,
        "limit": _QUESTIONS[_device()[0]],
        "max_new_tokens": min(room(lengths.answer), _MOST_NEW_TOKENS),
        "batch_size": _TOGETHER,
    }


def _fit(content: dict[str, Any]) -> Plan:
    """The plan of the recipe, which is changed where it does not fit."""
    try:
        plan = _plan(content)
    except AdapterError:
        # The budget may not hold a term of every layer; 0 leaves some of them alone.
        if content["adapter"]["rank"]["min"] == 0:
            raise
        content["adapter"]["rank"]["min"] = 0
        plan = _plan(content)
    for _ in range(_TRIES):
        if plan.fits is not False or not plan.cure_keys:
            break
        for change in plan.cure_keys:
            key, _, value = change.partition("=")
            section, _, name = key.partition(".")
            words = {"true": True, "false": False}
            content[section][name] = words.get(value, int(value) if value.isdecimal() else value)
        plan = _plan(content)
    return plan


def _plan(content: dict[str, Any]) -> Plan:
    # The evaluation reads a file that is not there yet, and takes no part in the plan's figures.
    recipe = Recipe.model_validate({k: v for k, v in content.items() if k != "evaluation"})
    return make_plan(recipe, Silence())


def _shorten(content: dict[str, Any], plan: Plan, limit: float) -> tuple[Plan, str]:
    """Fewer steps, where the slow end of the plan's range is beyond the limit."""
    time, steps = plan.time, plan.data.steps or 1
    slowest = (time.training_seconds or (0.0, 0.0))[1]
    left = limit - time.decomposition_seconds
    if slowest <= left:
        return plan, f"within {duration(limit)} by the slow end of the plan, without the scoring"
    wanted = int(steps * left / slowest)
    if wanted < 1:
        each = duration(slowest / steps)
        raise InputError(
            f"budget: {duration(limit)} is too little here: the decomposition takes about "
            f"{duration(time.decomposition_seconds)} and a step up to {each}; give more, or take "
            "a smaller base model"
        )
    train = content["train"]
    del train["epochs"]
    content["train"] = {"max_steps": wanted, **train, **_intervals(wanted)}
    shorter = _plan(content)
    # By the speed that chose the steps: another probe finds another one.
    least, most = (each * wanted / steps for each in time.training_seconds or (0.0, 0.0))
    shorter = replace(shorter, time=replace(shorter.time, training_seconds=(least, most)))
    return (
        shorter,
        f"of {counted(steps, 'step')} {wanted} are within {duration(limit)}, without the scoring",
    )


def _device() -> tuple[str, str]:
    """The kind of device that trains here, and what it is in words."""
    device = own_device()
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return "cpu", f"a CPU with {counted(threads, 'thread')}"
    return device.type, f"a GPU, {hardware_name(device)}"


def _precision() -> tuple[str, str]:
    """`train.precision` and `model.dtype`: left to the machine that trains.

    But on a CUDA device without units for bfloat16, which multiplies float16 fast instead; that is
    never chosen by itself, for it needs a loss scaler.
    """
    device = own_device()
    is_old = device.type == "cuda" and without_bf16(device) is not None
    return ("fp16", "float16") if is_old else ("auto", "auto")
