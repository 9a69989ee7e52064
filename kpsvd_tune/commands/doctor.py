"""The command `doctor`: whether this machine has what kpsvd-tune needs, and what to do."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from kpsvd_tune import __version__
from kpsvd_tune.commands.options import Debug, Json, Offline, emit, prepare_libraries
from kpsvd_tune.report.doctor import Check, Diagnosis, show_check


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave the self-test out.")] = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: packages, devices, disk, memory, hub, sandbox, and a self-test."""
    from kpsvd_tune.commands.main import run
    from kpsvd_tune.doctor import selftest
    from kpsvd_tune.doctor.checks import all_checks, anonymous, checked

    found: list[Check] = []

    def note(check: Check) -> None:
        found.append(check)
        if not as_json:
            show_check(check)

    checks = all_checks()
    # Python and packages first: with others the libraries may not even be importable.
    for _ in range(2):
        note(next(checks))
    with contextlib.suppress(ImportError):
        prepare_libraries(offline, debug)
    for check in checks:
        note(check)

    def self_test() -> Check:
        return selftest.self_test(run)

    if not quick:
        note(anonymous(checked(self_test)))
    diagnosis = Diagnosis(__version__, tuple(found))
    if as_json:
        emit(diagnosis, True, lambda _: None)
    if not diagnosis.can_work:
        raise typer.Exit(1)
