"""How others know a base model: its id on the hub, and the licence its card states."""

from __future__ import annotations

import re
from pathlib import Path

from kpsvd_tune.models.source import HUB_ID
from kpsvd_tune.report.card import Base
from kpsvd_tune.storage.json_files import parse_json

_LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]+)['\"]?\s*$", re.MULTILINE)
_MOST_BYTES = 1_000_000


def describe_base(path: str, folder: Path | None = None) -> Base:
    """Name a base model without a path of this machine.

    A hub id is what the user wrote, what a folder of the hub's cache is called, or what the model's
    config.json says it came from.

    Args:
        path: What the user wrote: a hub id, a folder, a GGUF file or ``package:NAME/FILE.gguf``.
        folder: Where its files lie; None where only the path is known.
    """
    if path.startswith("package:"):
        return Base(path, False)
    if path.endswith(".gguf"):
        return Base(Path(path).name, False)
    local = Path(path).expanduser()
    if folder is None and local.is_dir():
        folder = local
    licence = _licence(folder) if folder is not None else None
    if not local.exists() and HUB_ID.fullmatch(path):
        return Base(path, True, licence)
    known = _cached(local) or (_configured(folder) if folder is not None else None)
    if known is not None:
        return Base(known, True, licence)
    return Base(Path(path).name or local.resolve().name, False, licence)


def _cached(path: Path) -> str | None:
    """The id in models--OWNER--NAME, as the hub's cache names its folders."""
    for part in path.absolute().parts:
        name = part.removeprefix("models--").replace("--", "/")
        if part.startswith("models--") and HUB_ID.fullmatch(name):
            return name
    return None


def _configured(folder: Path) -> str | None:
    """The id that config.json remembers; what may as well be a folder here is none."""
    try:
        name = parse_json(_read(folder / "config.json")).get("_name_or_path")
    except ValueError:
        return None
    if not isinstance(name, str) or "/" not in name or not HUB_ID.fullmatch(name):
        return None
    return None if Path(name).exists() or (folder.parent / name).exists() else name


def _licence(folder: Path) -> str | None:
    """The licence in the first lines of the folder's README.md."""
    parts = _read(folder / "README.md").split("---\n", 2)
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else None


def _read(file: Path) -> str:
    """A small text file; empty where there is none."""
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
