"""Reads a run's folder back, for showing it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError


def read_run(run: Path) -> dict[str, Any]:
    """Return the rank report and the results of a run, each None where it does not exist yet.

    Raises:
        InputError: The folder is not a run, or a file in it is not JSON.
    """
    files = {"ranks": run / "init" / "rank_report.json", "results": run / "results.json"}
    if not any(path.is_file() for path in files.values()):
        raise InputError(
            f"{run} holds neither init/rank_report.json nor results.json: expected the output_dir "
            "of a recipe after `kpsvd-tune init-only` or `kpsvd-tune train`"
        )
    return {name: _read(path) for name, path in files.items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): was it edited or cut?") from error
