"""What a command would do and take, before it does: the result of `--dry-run`, and its lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.text import Text

from kpsvd_tune.report.layout import output, print_line, print_pairs
from kpsvd_tune.report.plan import MemoryPlan, memory_lines, span
from kpsvd_tune.report.results import Result
from kpsvd_tune.units import duration, size


@dataclass(frozen=True)
class DiskPlan(Result):
    """What is written."""

    place: str  # the folder
    needed_bytes: tuple[int, int]  # least and most
    free_bytes: int | None  # None where not known

    @property
    def fits(self) -> bool | None:
        """Whether there is room for the most of it; None where nobody knows."""
        return None if self.free_bytes is None else self.needed_bytes[1] <= self.free_bytes


@dataclass(frozen=True)
class WorkPlan(Result):
    """What one command would do and take."""

    command: str
    steps: tuple[tuple[str, str], ...]  # what would be done: name and value in words
    seconds: tuple[float, float] | None  # least and most; None where it is not estimated
    host: MemoryPlan
    on_device: MemoryPlan | None  # of each device; None on a CPU
    disk: DiskPlan
    basis: tuple[str, ...]  # what the figures rest on

    @property
    def fits(self) -> bool | None:
        """Whether memory and disk have room; None where nobody knows."""
        known = [each.fits for each in (self.host, self.on_device, self.disk) if each is not None]
        return False if False in known else None if None in known else True

    def to_dict(self) -> dict[str, Any]:
        """Give the content of `--json`."""
        return super().to_dict() | {"fits": self.fits}


def show_work(plan: WorkPlan) -> None:
    """The plan as lines on the standard output."""
    out = output()
    print_pairs(plan.steps)
    for place, memory in (("memory", plan.host), ("device memory", plan.on_device)):
        if memory is not None:
            print_pairs(memory_lines(place, memory))
    disk = plan.disk
    free = "not known" if disk.free_bytes is None else size(disk.free_bytes)
    print_pairs([(f"disk: {disk.place}", f"{span(disk.needed_bytes, size)}; free {free}")])
    if plan.seconds is not None:
        print_pairs([("time", span(plan.seconds, duration))])
    for line in plan.basis:
        print_line(out, Text(line, style="dim"))
    lacking = [
        name
        for name, each in (("memory", plan.host), ("device", plan.on_device), ("disk", plan.disk))
        if each is not None and each.fits is False
    ]
    if lacking:
        print_line(out, Text(f"it does NOT fit: too little {' and '.join(lacking)}", "bold red"))
    elif plan.fits:
        print_line(out, Text("it fits by what is free now; nothing was done", "bold green"))
    else:
        print_line(out, Text("whether it fits is not known here; nothing was done", "yellow"))
