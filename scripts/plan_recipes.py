"""Plan every combination of shipped parts, and write recipes/combinations.json.

    python scripts/plan_recipes.py [--jobs 2]

Rests on the configurations in tests/fixtures/configurations; fetches nothing. Every row counts as
`dataset.max_length` tokens. A GPU is imagined where there is none. Combinations that do not fit
their machine are left out. What differs in nothing that memory depends on is planned once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kpsvd_tune.estimate import memory
from kpsvd_tune.estimate import plan as plans
from kpsvd_tune.estimate.time import Speed
from kpsvd_tune.events import Silence
from kpsvd_tune.hardware.bf16 import Bf16
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.recipe.files import shipped_parts
from kpsvd_tune.recipe.heads import COMBINATIONS, candidates, head_of
from kpsvd_tune.report.plan import Plan
from kpsvd_tune.training import precision

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = ROOT / "tests" / "fixtures" / "configurations"
LIBRARIES = (
    700_000_000  # bytes of a process with Python and the libraries, the same on all machines
)
SPARE = 1_000_000_000  # bytes of a device or machine that a run leaves to others
PLENTY = 10**15


@contextmanager
def imagined(model: str, device: str) -> Iterator[None]:
    """A device of that kind, and a model of which nothing but its configuration is here."""
    with tempfile.TemporaryDirectory() as folder:
        text = (CONFIGURATIONS / f"{model}.json").read_text(encoding="utf-8")
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        source = ModelSource(model, "hub", Path(folder), ())
        with (
            patch.object(plans, "find_configuration", lambda *_: source),
            patch.object(plans, "measure_speed", lambda *_: Speed(1e9, 1e9)),
            patch.object(plans, "decomposition_seconds", lambda *_: 0.0),
            patch.object(plans, "process_bytes", lambda: LIBRARIES),
            patch.object(memory, "process_bytes", lambda: LIBRARIES),
            patch.object(memory, "free_memory", lambda: PLENTY),
            patch.object(torch.cuda, "is_available", lambda: device == "cuda"),
            patch.object(torch.cuda, "mem_get_info", lambda: (PLENTY, PLENTY)),
        ):
            yield


def settled(name: str, recipe: Recipe) -> Recipe:
    """The recipe with what `auto` takes on the machine that its part is for."""
    device = machine_of(name)["Device"]
    speed = Bf16(device == "cuda", "imagined")
    with patch.object(precision, "bf16_speed", lambda _: speed):
        return precision.settle_precision(recipe, torch.device(device)).recipe


def machine_of(name: str) -> dict[str, str]:
    """What the machine's part says of itself."""
    return head_of(shipped_parts()[name.split("+")[2]])


def planned(name: str) -> Plan:
    """The plan of a combination, each row as long as may be."""
    model = name.split("+")[0].partition("/")[2]
    with imagined(model, machine_of(name)["Device"]):
        return plans.make_plan(settled(name, load_recipe(name)), Silence(), reads_rows=False)


def sizes_of(plan: Plan) -> dict[str, int]:
    """What is written down of a plan."""
    least, most = plan.adapter.trainable_parameters
    assert least == most, "the shipped parts give all layers one rank"
    peak = (plan.on_device or plan.host).peak_bytes
    return {"parameters": plan.base_parameters, "trained": most, "memory_bytes": peak}


def fits(name: str, sizes: dict[str, int]) -> bool:
    """Whether the machine has that memory."""
    return sizes["memory_bytes"] + SPARE <= 1e9 * int(machine_of(name)["Memory"].split()[0])


def key_of(name: str, recipe: Recipe) -> str:
    """A hash of what the sizes depend on; equal for combinations that take the same."""
    recipe = settled(name, recipe)
    assert recipe.dataset is not None
    train, model = recipe.train, recipe.model
    what = [
        model.path,
        model.dtype,
        model.attn_implementation,
        machine_of(name)["Device"],
        recipe.adapter.model_dump(mode="json"),
        [train.batch_size, train.gradient_accumulation > 1, train.precision, train.optimizer],
        [train.gradient_checkpointing, train.packing and train.batch_size > 1],
        recipe.dataset.max_length,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _sizes(name: str) -> tuple[str, dict[str, int]]:
    torch.set_num_threads(1)
    return name, sizes_of(planned(name))


def too_large(name: str, recipe: Recipe) -> bool:
    """Whether the weights alone leave no room, so that nothing has to be planned."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[settled(name, recipe).model.dtype]
    billions = json.loads((CONFIGURATIONS / "parameters.json").read_text(encoding="utf-8"))
    num = billions[name.split("+")[0].partition("/")[2]]
    return not fits(name, {"memory_bytes": width * num})


def main() -> None:
    """Plan them all and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    jobs = parser.parse_args().jobs
    recipes = {name: load_recipe(name) for name in candidates()}
    names = [name for name, recipe in recipes.items() if not too_large(name, recipe)]
    keys = {name: key_of(name, recipes[name]) for name in names}
    first: dict[str, str] = {}
    for name, key in keys.items():
        first.setdefault(key, name)
    found: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for number, (name, sizes) in enumerate(pool.map(_sizes, first.values()), 1):
            found[keys[name]] = sizes
            print(f"{number} of {len(first)}: {name} {sizes}", flush=True)
    content: dict[str, Any] = {
        name: {**found[key], "key": key} for name, key in keys.items() if fits(name, found[key])
    }
    write = partial(json.dumps, indent=1)
    (ROOT / "recipes" / COMBINATIONS).write_text(write(content) + "\n", encoding="utf-8")
    print(f"{len(content)} combinations of {len(names)} fit")


if __name__ == "__main__":
    main()
