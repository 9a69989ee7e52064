"""What `doctor` found out about a machine, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from kpsvd_tune.report.layout import output, print_line
from kpsvd_tune.report.results import Result

Status = Literal["ok", "warning", "fault"]
_STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class Check(Result):
    """One thing that was looked at."""

    name: str
    status: Status  # a fault makes work impossible, a warning some of it
    found: str
    cure: str = ""  # what to do; empty where nothing need be done


@dataclass(frozen=True)
class Diagnosis(Result):
    """All that was looked at."""

    version: str  # of kpsvd-tune
    checks: Sequence[Check]

    @property
    def can_work(self) -> bool:
        """Whether nothing makes work impossible."""
        return all(check.status != "fault" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Give the content of `--json`."""
        return super().to_dict() | {"can_work": self.can_work}


def show_check(check: Check) -> None:
    """One line, and a second one with what to do."""
    line = Text(f"{check.status:<8}", style=_STYLES[check.status])
    print_line(output(), line + Text(f" {check.name}: {check.found}", style=""), 9)
    if check.cure:
        print_line(output(), Text(f"{'':<8} -> {check.cure}"), 12)
