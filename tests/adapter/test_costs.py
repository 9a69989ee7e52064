"""The constants of the cost model: by device and dtype, kept by a run, measured by a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from shipped_scripts import script

from kpsvd_tune.adapter import costs
from kpsvd_tune.adapter.costs import Costs, costs_of, from_record, table_of, to_record, use_costs
from kpsvd_tune.adapter.forms import Both
from kpsvd_tune.commands import main as cli
from kpsvd_tune.linalg import KroneckerShape
from kpsvd_tune.training import stages

BALANCED = KroneckerShape(64, 64, 64, 64)


@pytest.fixture(autouse=True)
def common() -> Iterator[None]:
    yield
    use_costs(None)


def planted(**values: float) -> Costs:
    return Costs(**{**to_record({("a", "b"): costs.CPU_FLOAT32})["a b"], **values})


def test_a_gpu_never_uses_the_constants_of_a_cpu() -> None:
    own = costs_of("cpu", torch.float32)
    for kind in ("cuda", "mps", "meta"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert costs_of(kind, dtype).call > 100 * own.call
    assert costs_of("cpu", torch.bfloat16) != own
    assert costs_of("cpu", torch.float64) == own


def test_constants_change_the_choice() -> None:
    dear, cheap = planted(build_per_entry=1e6), planted(build_per_entry=0.0)
    ways = [Both(BALANCED, 4).plan(1024, costs=each).update.__name__ for each in (dear, cheap)]
    assert ways[0] != "Dense"
    assert ways[1] == "Dense"


def test_hardware_has_its_own_and_a_run_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = planted(call=3.0)
    entry = {"hardware": "X", "kind": "cuda", "dtype": "float32", "costs": vars(own)}
    monkeypatch.setattr(costs, "_shipped", lambda shipped=costs._shipped: [entry, *shipped()])
    assert table_of("X")["cuda", "float32"] == own
    assert table_of("Y") == table_of() != table_of("X")
    kept = from_record(json.loads(json.dumps(to_record(table_of("X")))))
    assert kept == table_of("X")
    use_costs(kept)
    assert costs_of("cuda", torch.float32) == own
    use_costs(None)
    assert costs_of("cuda", torch.float32) != own


def test_a_cpu_with_a_unit_for_bfloat16_has_the_constants_of_that_unit() -> None:
    without = table_of(cpu_unit="")
    with_unit = table_of(cpu_unit="avx512_bf16")
    assert without["cpu", "bfloat16"] != with_unit["cpu", "bfloat16"]
    assert without["cpu", "float32"] == with_unit["cpu", "float32"]
    assert table_of(cpu_unit="a unit of the future") == without
    # The same shipped entries whatever this machine has.
    assert table_of("some CPU", "avx512_bf16") == with_unit


def test_the_name_of_the_hardware_goes_before_that_of_the_unit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = planted(call=3.0)
    entry = {"hardware": "X", "kind": "cpu", "dtype": "bfloat16", "costs": vars(own)}
    monkeypatch.setattr(costs, "_shipped", lambda shipped=costs._shipped: [entry, *shipped()])
    assert table_of("X", "avx512_bf16")["cpu", "bfloat16"] == own


@pytest.mark.slow
def test_a_run_goes_on_with_the_constants_it_began_with(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    use = costs.use_costs

    def watch(table: costs.Table | None) -> None:
        if table is not None:
            seen.append(table["cpu", "float32"].call)
        use(table)

    monkeypatch.setattr(stages, "use_costs", watch)
    entry = {"hardware": "", "kind": "cpu", "dtype": "float32", "costs": vars(planted(call=5.0))}
    shipped = costs._shipped
    monkeypatch.setattr(costs, "_shipped", lambda: [*shipped(), entry])
    recipe = str(
        write_recipe(
            train={"max_steps": 2, "save_every": 1, "eval_every": 0},
            adapter={"rank": {"method": "fixed", "max": 1, "window": 2}},
        )
    )
    assert cli.run(["train", recipe]) == 0
    monkeypatch.setattr(costs, "_shipped", shipped)
    more = ["train.max_steps=3", "--allow-change", "train.max_steps"]
    assert cli.run(["train", recipe, *more]) == 0
    assert seen == [5.0, 5.0]
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["costs"]["constants"]["cpu float32"]["call"] == 5.0
    assert costs_of("cpu", torch.float32).call != 5.0, "the process is left as it was"


@pytest.mark.slow
def test_the_script_measures_this_machine(tmp_path: Path) -> None:
    measure = script("measure_costs")
    entry = measure.measure(torch.device("cpu"), torch.float32, size=128, seconds=0.01)
    found = Costs(**entry["costs"])
    assert all(value >= 0 for value in vars(found).values())
    assert found.batched_slowness >= 1.0
    file = tmp_path / "costs.json"
    file.write_text("[]", encoding="utf-8")
    for _ in range(2):
        measure.add(file, entry)
    assert json.loads(file.read_text(encoding="utf-8")) == [entry]
