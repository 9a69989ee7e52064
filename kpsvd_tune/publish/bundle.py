"""What is published of a folder: its files, checked to be whole and free of secrets.

JSON and YAML that our commands wrote name folders of this machine; they are published with the last
name of each alone. A model card is the user's to edit, so one that names a folder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from kpsvd_tune.errors import AdapterError, CheckpointError, InputError, some_of
from kpsvd_tune.models import describe_base
from kpsvd_tune.report.card import CARD, THIS_FOLDER, local_path, without_folders
from kpsvd_tune.runs.adapter_folder import CONFIG, WEIGHTS
from kpsvd_tune.runs.find import find
from kpsvd_tune.runs.ownership import is_run
from kpsvd_tune.storage.commit import MANIFEST, check_sealed, manifest
from kpsvd_tune.storage.hashes import file_hashes
from kpsvd_tune.storage.json_files import parse_json, read_bytes, read_json, to_json
from kpsvd_tune.storage.paths import Kind, expand, kind_of, named, siblings

Content = Literal["adapter", "merged", "lora", "gguf"]
WORDS: dict[Content, str] = {
    "adapter": "a KPSVD adapter",
    "merged": "a merged model",
    "lora": "an exported LoRA",
    "gguf": "a GGUF file",
}
# Where files of the run lie, apart from those that libraries read.
RUN_FILES = "training"
_REPORT = {
    "merged": "merge_report.json",
    "lora": "export_report.json",
    "gguf": "export_report.json",
}
# How to get what is not there.
_MAKING = {
    "adapter": "kpsvd-tune train RECIPE",
    "merged": "kpsvd-tune merge RUN --output merged",
    "lora": "kpsvd-tune export RUN --to lora --output lora",
    "gguf": "kpsvd-tune export RUN --to gguf --output gguf",
}
# Those in which our commands write where something lies.
_WITH_PATHS = (CONFIG, "config.json", *_REPORT.values())
_BASE_KEYS = ("base_model_name_or_path", "_name_or_path")
# What storage.durable calls a folder that a killed command left.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.removed-.+")
_TEXTS = (".json", ".jinja", ".md", ".txt", ".yaml", ".yml", ".py", ".csv", ".html")
# Tokens and keys by the forms that their makers gave them.
_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
    r"github_pat_\w{30,}|sk-[\w-]{30,}|AKIA[A-Z0-9]{16}|xox[abpr]-[\w-]{10,}|"
    r"wandb_v\d_\w{30,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass(frozen=True)
class Bundle:
    """What is published."""

    content: Content
    folder: Path  # that it is taken from
    # By its name in the repository the file, or what is published in its place.
    files: Mapping[str, Path | bytes]
    shortened: tuple[str, ...] = ()  # files of which paths were shortened
    left_out: tuple[str, ...] = ()  # files of the folder that are not published
    notes: tuple[str, ...] = field(default=())  # what passed, and the user may want to know

    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes, by name."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in self.files.items()
        }


def collect(source: str, place: str, expected: Content | None = None) -> Bundle:
    """Find what is to be published of a run or a folder, and check all of it.

    Args:
        source: What the user typed: a run, or a folder of one of the three kinds.
        place: What the code of the card loads in place of the folder, as Python writes it.
        expected: What it must be; None for any of them.

    Raises:
        InputError: Nothing of the kind lies there; it is not whole, or was changed; its card names
            a folder of this machine, or a file holds a token.
        AdapterError: The adapter is not as it was saved.
    """
    folder, content, run = _recognise(source)
    if expected not in (None, content):
        raise InputError(
            f"{source} is {WORDS[content]}; --{expected} expects {WORDS[expected]}: make it with "
            f"`{_MAKING[expected].replace('RUN', source)}`, and name that folder"
        )
    kept, left_out = _files(folder)
    _check_whole(folder, content, kept)
    files: dict[str, Path | bytes] = {name: folder / name for name in kept}
    if run is not None:
        files |= _of_run(run)
    published = {name: _published(name, file, place) for name, file in files.items()}
    changed = tuple(name for name in files if isinstance(published[name], bytes))
    if MANIFEST in kept and any(name in kept for name in changed):
        published[MANIFEST] = _resealed(folder, content, published)
    for name, file in published.items():
        _check_secrets(folder, name, file)
    notes = []
    if content in ("merged", "gguf"):
        notes += _check_hashes(folder, content)
    elif MANIFEST not in kept:
        notes.append(_UNSEALED)
    if not re.search(r"^license:", _text(published[CARD]), re.MULTILINE):
        notes.append(f"{CARD} states no licence: add a line such as `license: mit` to its head")
    shortened = tuple(name for name in changed if name != CARD)
    return Bundle(content, folder, published, shortened, tuple(left_out), tuple(notes))


_UNSEALED = f"there is no {MANIFEST}, so changes since it was saved cannot be noticed"


def find_token(text: str) -> str | None:
    """The beginning of a token or key in a text, enough to find it; None where there is none."""
    found = _SECRETS.search(text)
    return f"{found[0][:6]}..." if found else None


def without_secrets(text: str) -> str:
    """A text in which nothing looks like a token or key."""
    return _SECRETS.sub("<token>", text)


def _recognise(source: str) -> tuple[Path, Content, Path | None]:
    """The folder to publish, what it is, and the run that it is of, where it lies in one."""
    place = expand(source)
    if _LEFTOVER.fullmatch(place.resolve().name):
        raise InputError(
            f"{source} is what a killed command left of a folder, and is not whole; call that "
            "command again, which removes it"
        )
    kind = kind_of(place)
    if kind == "run":
        found = find(source)
        assert found.adapter is not None  # find refuses a run without one
        return found.adapter, "adapter", place
    if kind == "adapter":
        config = read_json(place / CONFIG, error=InputError)
        if config.get("peft_type") == "KPSVD":
            run = place.resolve().parent
            if place.resolve().name == "adapter" and is_run(run):
                find(str(run))  # compares it with what the run saved
                return place, "adapter", run
            find(source)
            return place, "adapter", None
        if (place / _REPORT["lora"]).is_file():
            return place, "lora", None
        raise InputError(
            f"{source} is an adapter of {str(config.get('peft_type'))[:40]} that `kpsvd-tune "
            "export` did not write; expected a run, a KPSVD adapter, a merged model or an exported "
            "LoRA. Others are sent by `hf upload`"
        )
    if kind == "merged":
        return place, "merged", None
    if kind is not None and (place / _REPORT["gguf"]).is_file():
        return place, "gguf", None
    raise InputError(f"{source} {_not_published(source, kind)}")


def _not_published(source: str, kind: Kind | None) -> str:
    wanted = "expected a finished run, an adapter, a merged model, or an exported LoRA or GGUF"
    if kind is None:
        return f"is not there; {wanted}{siblings(source)}"
    lacks = {
        "model": f"is a model without {_REPORT['merged']}, which `kpsvd-tune merge` writes; others "
        "are sent by `hf upload`",
        "recipe": "is a recipe; name the folder of its run, its output_dir",
    }
    return f"{lacks.get(kind, f'is {named(kind)}')}; {wanted}"


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a folder that are published, and what is left out of it."""
    kept, left_out = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InputError(
                f"{path} is a link, and only what lies in the folder itself is published; put the "
                "file in its place, or remove it"
            )
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            left_out.append(name)
        elif path.is_file():
            kept.append(name)
        elif not path.is_dir():
            raise InputError(f"{path} is {named('special')}, which cannot be published; remove it")
    return kept, left_out


def _check_whole(folder: Path, content: Content, names: list[str]) -> None:
    """Refuse a folder that lacks a file, or has another one than was written."""
    needed = [CARD]
    needed += {"merged": ["config.json"], "gguf": []}.get(content, [CONFIG, WEIGHTS])
    needed += [_REPORT[content]] if content in _REPORT else []
    if missing := [name for name in needed if name not in names]:
        raise InputError(
            f"{folder} lacks {some_of(missing)}: it is not a whole folder of {WORDS[content]}; "
            f"make it again with `{_MAKING[content]}`"
        )
    if content == "merged":
        _check_merged(folder, names)
        return
    if content == "gguf":
        _check_gguf(folder)
        return
    try:
        check_sealed(folder, content)
    except CheckpointError as error:
        raise AdapterError(
            f"{error}; put back the file as it was saved. If the change was meant, remove "
            f"{folder / MANIFEST}, by which it is noticed"
        ) from error


def _check_gguf(folder: Path) -> None:
    """Refuse an exported GGUF file that is not there, or of another size than was written."""
    report = read_json(folder / _REPORT["gguf"], error=InputError)
    name, expected = str(report.get("file")), report.get("num_bytes")
    found = (folder / name).stat().st_size if (folder / name).is_file() else None
    if found is None or found != expected:
        has = "is not there" if found is None else f"has {found:,} bytes"
        raise InputError(
            f"{folder / name} {has}, and {_REPORT['gguf']} tells of {expected} bytes; make it "
            f"again with `{_MAKING['gguf']}`"
        )


def _check_merged(folder: Path, names: list[str]) -> None:
    """Refuse a merged model whose proof failed, or whose weights are not all there."""
    from safetensors import SafetensorError, safe_open

    again = "merge again, into another folder"
    if read_json(folder / _REPORT["merged"], error=InputError).get("passed") is not True:
        raise InputError(
            f"{folder / _REPORT['merged']} says that the merge was not proved; it is not "
            f"published: {again}, perhaps with --dtype float32"
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    held: dict[str, str] = {}
    for name in shards:
        try:
            with safe_open(folder / name, "pt") as file:
                held |= dict.fromkeys(file.keys(), name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} is damaged: {error}; {again}") from error
    index = folder / "model.safetensors.index.json"
    expected = read_json(index, error=InputError).get("weight_map") if index.is_file() else held
    if not held or expected != held:
        lacking = sorted({*dict(expected or {}).values()} - {*shards}) or ["tensors"]
        raise InputError(f"{folder} lacks {some_of(lacking)} of the model's weights; {again}")


def _check_hashes(folder: Path, content: Content) -> list[str]:
    """Refuse weights that changed since they were written; a note where no hash tells that."""
    report = read_json(folder / _REPORT[content], error=InputError)
    known = report.get("weight_files")
    if content == "gguf":
        known = {str(report.get("file")): report["sha256"]} if report.get("sha256") else None
    if not known:
        return [
            f"{_REPORT[content]} is of an older version and holds no hashes, so changes of the "
            "weights since they were written cannot be noticed"
        ]
    if not isinstance(known, Mapping):
        raise InputError(f"{folder / _REPORT[content]} is damaged: weight_files is no table")
    found = {file.name for file in folder.glob("*.safetensors")} | set(known)
    now = file_hashes(folder / name for name in found if (folder / name).is_file())
    if changed := [name for name in sorted(found) if now.get(name) != known.get(name)]:
        raise InputError(
            f"{some_of([str(folder / name) for name in changed])} changed since "
            f"{_REPORT[content]} was written, so what it proves holds no longer; put back the file "
            f"as it was, or make it again with `{_MAKING[content]}`"
        )
    return []


def _of_run(run: Path) -> dict[str, Path | bytes]:
    """The recipe and the rank report of a run, apart from the adapter's own files."""
    files = {"recipe.yaml": run / "recipe.yaml", "rank_report.json": run / "init/rank_report.json"}
    return {f"{RUN_FILES}/{name}": file for name, file in files.items() if file.is_file()}


def _published(name: str, file: Path | bytes, place: str) -> Path | bytes:
    """A file, or what is published in its place."""
    assert isinstance(file, Path)
    if name == CARD:
        text = read_bytes(file).decode("utf-8", errors="surrogateescape")
        _check_card(file, text)
        # In code alone; commands take a folder.
        return text.replace(f'"{THIS_FOLDER}"', place).encode(errors="surrogateescape")
    if name.startswith(f"{RUN_FILES}/") and file.suffix == ".yaml":
        recipe = yaml.safe_load(read_bytes(file))
        text = yaml.safe_dump(_shortened(recipe), sort_keys=False, allow_unicode=True)
        return text.encode()
    if name in _WITH_PATHS or name.startswith(f"{RUN_FILES}/"):
        content = parse_json(read_bytes(file))
        shorter = _shortened(content)
        return to_json(shorter) if shorter != content else file
    return file


def _check_card(file: Path, text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if found := local_path(line):
            raise InputError(
                f"{file}:{number} names {found}, a place on this machine, which others need not "
                "know; edit that line"
            )


def _shortened(value: Any, key: str = "") -> Any:
    """A value of JSON or YAML without folders of this machine."""
    if isinstance(value, dict):
        return {name: _shortened(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each, key) for each in value]
    if not isinstance(value, str):
        return value
    if key in _BASE_KEYS:
        return describe_base(value).name if value else value
    if re.fullmatch(r"(?:~\w*|\.{1,2})?/[^\n]*", value):
        return Path(value).name or value
    # Sentences of reports; templates of prompts hold slashes of their own.
    return without_folders(value) if key in ("warnings", "notes", "message") else value


def _resealed(folder: Path, content: Content, published: Mapping[str, Path | bytes]) -> bytes:
    """The manifest of an adapter or LoRA whose files are published in other words."""
    sealed = json.loads(read_bytes(folder / MANIFEST))["files"]
    contents = {}
    for name in sealed:
        file = published[name]
        contents[name] = file if isinstance(file, bytes) else read_bytes(file)
    return manifest(content, contents)


def _check_secrets(folder: Path, name: str, file: Path | bytes) -> None:
    if Path(name).suffix.lower() in _TEXTS and (found := find_token(_text(file))):
        raise InputError(
            f"{name} of {folder} holds what looks like a token or key ({found}); remove it, and "
            "make it void where it was issued"
        )


def _text(file: Path | bytes) -> str:
    raw = file if isinstance(file, bytes) else read_bytes(file)
    return raw.decode("utf-8", errors="replace")
