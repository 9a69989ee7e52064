"""What the ways to compute cost beside a large product, by kind of device, dtype and hardware.

The unit is a multiply-add of a large product on the same device in the same dtype. costs.json holds
the constants; scripts/measure_costs.py measures them on a machine and adds them. A kind of device
never uses those of another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch

from kpsvd_tune.hardware.bf16 import CPU_UNIT


@dataclass(frozen=True)
class Costs:
    """The constants of :mod:`kpsvd_tune.adapter.ways`."""

    # Building W + Delta moves two matrices of W's size and multiplies with a small inner size.
    build_per_entry: float
    build_per_term: float
    # Reading and writing an activation once, per entry: what keeps narrow products slow.
    pass_per_entry: float
    # Products batched over tokens, in the output and in the gradients, are too small for speed.
    batched_slowness: float
    chunked_slowness: float
    # The gradients' batched products have p columns: the slower, the fewer they are.
    narrow: float
    # The weight gradient is made at full speed; rearranging and contracting it is not.
    rearrange_per_entry: float
    # A call of a small product, whatever its size.
    call: float


Table = dict[tuple[str, str], Costs]  # by kind of device and name of the dtype


def _shipped() -> list[dict[str, Any]]:
    file = resources.files("kpsvd_tune.adapter") / "costs.json"
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def table_of(hardware: str = "", cpu_unit: str = CPU_UNIT) -> Table:
    """The constants for a piece of hardware, by its name; the common ones where it has none.

    Between the two stand those of CPUs with a unit for bfloat16, by the name of its flag: the
    unit decides far more than the maker.
    """
    found: Table = {}
    shipped = _shipped()
    for name in dict.fromkeys(("", cpu_unit, hardware)):
        for entry in shipped:
            if entry["hardware"] == name:
                found[entry["kind"], entry["dtype"]] = Costs(**entry["costs"])
    return found


_common = table_of()
CPU_FLOAT32 = _common["cpu", "float32"]
_active: Table = dict(_common)


def use_costs(table: Table | None) -> None:
    """Choose ways by these constants from now on in this process; None: by the common ones."""
    _active.clear()
    _active.update(_common if table is None else {**_common, **table})


def costs_of(device_kind: str, dtype: torch.dtype) -> Costs:
    """The constants of a kind of device and the dtype that updates are computed in."""
    kind = "cpu" if device_kind == "cpu" else "cuda"
    bits = torch.finfo(dtype).bits
    name = "float32" if bits >= 32 else "bfloat16"
    return _active[kind, name]


def to_record(table: Table) -> dict[str, dict[str, float]]:
    """A table as JSON values."""
    return {f"{kind} {dtype}": asdict(costs) for (kind, dtype), costs in table.items()}


def from_record(record: Mapping[str, Mapping[str, float]]) -> Table:
    """Undo :func:`to_record`."""
    found: Table = {}
    for name, costs in record.items():
        kind, _, dtype = name.partition(" ")
        found[kind, dtype] = Costs(**costs)
    return found
