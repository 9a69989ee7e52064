"""A folder that is whole or not there: written aside, sealed by a manifest of hashes, renamed.

Files and manifest go into a hidden folder beside it, which is synced and then renamed. Only a
caller that sees `commit` return may delete an older folder. The manifest carries its own hash and
must be spelled exactly as we spell it, so one flipped byte anywhere, the manifest included, is
noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.json_files import check_types, parse_json, read_bytes, to_json

MANIFEST = "manifest.json"
_FORMAT = 1


class _Entry(TypedDict):
    bytes: int
    sha256: str


def commit(folder: Path, files: Iterable[tuple[str, bytes]], run: str | None = None) -> None:
    """Write pairs of file name and content as the folder `folder`, atomically.

    They are taken one at a time, so that a generator keeps only one content in memory. `run` is
    what :func:`run_of` gives back.

    Raises:
        CheckpointError: `folder` exists.
        ResourceError: The disk refused; nothing stands under `folder`'s name.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; it was not written again")
    listed: dict[str, _Entry] = {}
    with durable.write_folder(folder) as aside:
        for name, data in files:
            durable.write_file(aside / name, data)
            listed[name] = _entry(data)
        durable.write_file(aside / MANIFEST, _manifest(folder.name, listed, run))


def read_committed(folder: Path) -> dict[str, bytes]:
    """The content of each committed file but the manifest, by name, checked against that.

    CheckpointError: a file is missing, cut short or changed; the message names it.
    """
    files = _read_manifest(folder, folder.name)["files"]
    return {name: _read_listed(folder / name, entry) for name, entry in files.items()}


def run_of(folder: Path) -> str | None:
    """What the run that committed a folder is known by; None where it was not said.

    CheckpointError: the manifest is missing or damaged.
    """
    run: str | None = _read_manifest(folder, folder.name).get("run")
    return run


def manifest(kind: str, files: Mapping[str, bytes]) -> bytes:
    """The content of a manifest that seals files of a folder which may be renamed and copied.

    `kind` is what the folder is, which :func:`check_sealed` must be told.
    """
    return _manifest(kind, {name: _entry(data) for name, data in files.items()})


def seal(folder: Path, kind: str, *, but: str) -> None:
    """Write the manifest of all that a folder of :func:`durable.write_folder` holds by now.

    The file `but` is left out, for a user may edit it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    contents.pop(but, None)
    durable.write_file(folder / MANIFEST, manifest(kind, contents))


def check_sealed(folder: Path, kind: str) -> None:
    """Compare a folder's files with its seal; folders of older versions and of others have none.

    CheckpointError: a file is missing, cut short or changed; the message names it.
    """
    if (folder / MANIFEST).exists():
        for name, entry in _read_manifest(folder, kind)["files"].items():
            _read_listed(folder / name, entry)


def _entry(data: bytes) -> _Entry:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(name: str, files: dict[str, _Entry], run: str | None = None) -> bytes:
    content: dict[str, Any] = {"format": _FORMAT, "name": name, "files": files}
    if run is not None:
        content["run"] = run
    seal = hashlib.sha256(to_json(content)).hexdigest()
    return to_json({**content, "sha256": seal})


def _read_manifest(folder: Path, expected: str) -> dict[str, Any]:
    path = folder / MANIFEST
    raw = _read(path, ": the folder was never completed")
    try:
        content: dict[str, Any] = parse_json(raw)
        version, name = content["format"], content["name"]
        files = check_types(content["files"], dict[str, _Entry])
        run = check_types(content.get("run"), str | None)
        is_whole = raw == _manifest(name, files, run)
    except (ValueError, KeyError):
        is_whole, version = False, None
    if isinstance(version, int) and version > _FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version reads {_FORMAT}: update kpsvd-tune"
        )
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: its own hash does not fit its content")
    # The manifest holds the folder's name, so that a renamed step is not taken for another.
    if name != expected:
        raise CheckpointError(f"{path} is of {name}; expected {expected}")
    return content


def _read_listed(path: Path, entry: _Entry) -> bytes:
    data = _read(path)
    if len(data) != entry["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {len(data):,} bytes; expected {entry['bytes']:,}"
        )
    if _entry(data) != entry:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
    return data


def _read(path: Path, if_missing: str = "") -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing{if_missing}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
