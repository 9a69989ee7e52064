"""Which files of a folder or a pattern are read: by extension and by split."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kpsvd_tune.data.read.files import SUFFIXES, kind_of, suffix_of
from kpsvd_tune.errors import DataError, some_of
from kpsvd_tune.storage.paths import exists, expand

# Files that tools write beside the rows.
_METADATA = {
    *("config.json", "croissant.json", "dataset_dict.json", "dataset_info.json", "info.json"),
    *("dataset_infos.json", "meta.json", "metadata.json", "package.json", "state.json"),
}
# The words that the datasets library reads as splits, and a few more that people write.
_SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training", "trainset"),
        "validation": ("validation", "valid", "val", "dev", "valset", "devset", "holdout"),
        "test": ("test", "testing", "testset", "eval", "evaluation", "evalset"),
    }.items()
    for word in words
}
# As sets on the hub name the parts of any split: NAME-00000-of-00002.parquet.
_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-\d{5}(-.*)?")
_LISTED = 5
_CARD_KEYS = {"config_name", "data_files", "data_dir", "default", "description", "features"}
# Where held-out rows are looked for in a source with splits.
HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Listing:
    """The files of a folder, or those that a pattern matches."""

    label: str  # the folder or pattern, as messages name it
    root: Path  # folder that names are shown relative to
    files: tuple[Path, ...]  # data files of one kind, in the order of their names
    others: tuple[str, ...]  # names of what is left out, whatever the split
    is_pattern: bool = False  # whether the files were picked by a pattern
    # Files by split where a dataset card gives them; None: their names tell.
    given: Mapping[str, Sequence[Path]] | None = None

    @property
    def splits(self) -> dict[str, list[Path]]:
        """Files by the split that their names tell; those that tell none under the empty name."""
        if self.given is not None:
            return {split: list(files) for split, files in self.given.items()}
        found: dict[str, list[Path]] = {}
        for file in self.files:
            found.setdefault(self._split_of(file), []).append(file)
        return found

    def choose(self, name: str, *, is_held_out: bool = False) -> tuple[list[Path], str]:
        """The files of a split, and a sentence on what is read and what is left out.

        Files that tell no split are `train`, unless others say that they are. Held-out rows come
        from the files that say validation, or else test.
        """
        splits = self.splits
        wanted = name if name in splits else _SPLITS.get(name.lower(), name)
        if is_held_out:
            wanted = next((each for each in HELD_OUT if each in splits), wanted)
        unnamed = splits.pop("", [])
        if unnamed and "train" not in splits:
            splits["train"], unnamed = unnamed, []
        if self.is_pattern and len(splits) == 1 and wanted not in splits:
            wanted = next(iter(splits))  # picked by name already
        if wanted not in splits:
            there = "; ".join(f"{key} ({self._names(files)})" for key, files in splits.items())
            raise DataError(
                f"dataset.split is {name!r} and {self.label} has no files of that split; it has "
                f"{there}: set dataset.split to one of these, or dataset.path to the file meant"
            )
        left = [
            f"{self._names(files)} (split {key})" for key, files in splits.items() if key != wanted
        ]
        if unnamed:
            left.append(f"{self._names(unnamed)} (named after no split)")
        if self.others:
            left.append(f"{some_of(self.others, _LISTED)} (no rows)")
        note = f"{self.label}: read as {wanted}: {self._names(splits[wanted])}"
        return splits[wanted], note + (f"; left out: {', '.join(left)}" if left else "")

    def _names(self, files: Sequence[Path]) -> str:
        return some_of([os.path.relpath(file, self.root) for file in files], _LISTED)

    def _split_of(self, file: Path) -> str:
        *folders, name = Path(os.path.relpath(file, self.root)).parts
        stem = name.removesuffix(suffix_of(file))
        by_name, by_folder = _words(stem), {s for part in folders for s in _words(part)}
        if not by_name and (shard := _SHARD.fullmatch(stem)):
            by_name = {shard["name"]}
        found = by_name or by_folder
        if len(found) > 1 or (by_name and by_folder and by_name != by_folder):
            splits = " and ".join(sorted(by_name | by_folder))
            raise DataError(
                f"{self.label}: the name of {os.path.relpath(file, self.root)} tells the splits "
                f"{splits}; expected one of them: rename it, or set dataset.path to the files meant"
            )
        return next(iter(found), "")


def list_folder(folder: Path) -> Listing:
    """The data files of a folder and of those in it."""
    files: list[Path] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder):
        hidden = [name for name in folders if name.startswith((".", "__"))]
        others += [os.path.relpath(Path(place, name), folder) + "/" for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            file = Path(place, name)
            if _is_data(file):
                files.append(file)
            else:
                others.append(os.path.relpath(file, folder))
    if not files:
        raise DataError(
            f"{folder}: the folder holds no file of rows (it has "
            f"{some_of(others, _LISTED) or 'nothing'}); expected {', '.join(SUFFIXES)}, also "
            "compressed as .gz or .zst"
        )
    return _of_one_kind(Listing(str(folder), folder, tuple(sorted(files)), tuple(others)))


def list_card(folder: Path, names: Sequence[str | None]) -> list[Listing] | None:
    """The files of each configuration that a dataset card (README.md) gives, as those on the hub.

    The name None stands for the default configuration. Gives None where the card names none.
    """
    cards = _configurations(folder)
    return [_of_card(folder, cards, name) for name in names] if cards else None


def _configurations(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
        content = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    found = content.get("configs") if isinstance(content, dict) else None
    return [each for each in found or () if isinstance(each, dict)]


def _of_card(folder: Path, cards: Sequence[Mapping[str, Any]], name: str | None) -> Listing:
    by_name = {str(card.get("config_name", "default")): card for card in cards}
    known = ", ".join(by_name)
    if name is None:
        defaults = [key for key, card in by_name.items() if card.get("default")]
        likely = [*defaults, *({"default"} & set(by_name)), *(by_name if len(by_name) == 1 else ())]
        if not likely:
            raise DataError(
                f"{folder}: its README.md has the configurations {known}; expected dataset.name to "
                "be one of these"
            )
        name = likely[0]
    if name not in by_name:
        raise DataError(
            f"dataset.name is {name!r} and the README.md of {folder} has the configurations "
            f"{known}; expected one of these"
        )
    card = by_name[name]
    label = f"{folder} ({name})"
    if unknown := sorted(set(card) - _CARD_KEYS):
        raise DataError(
            f"{label}: its README.md sets {', '.join(map(str, unknown))}, which changes how the "
            "files are read and is not known here; expected plain files: set dataset.path to them"
        )
    root = folder / str(card.get("data_dir", ""))
    if "data_files" not in card:
        return list_folder(root)
    given = {
        split: [file for pattern in patterns for file in list_pattern(str(root / pattern)).files]
        for split, patterns in _card_files(label, card["data_files"]).items()
    }
    files = tuple(file for each in given.values() for file in each)
    return _of_one_kind(Listing(label, folder, files, (), given=given))


def _card_files(label: str, value: Any) -> dict[str, list[str]]:
    """Patterns by split, from any of the forms in which a card writes them."""
    entries = value if isinstance(value, list) else [value]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(path, str) and "://" not in path for path in paths):
            raise DataError(
                f"{label}: data_files in its README.md has {entry!r}; expected names or patterns "
                "of files in this folder"
            )
        found.setdefault(split, []).extend(paths)
    return found


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern of file names (`data/*.jsonl`) rather than the name of a file."""
    return glob.has_magic(path) and not exists(path)


def list_pattern(pattern: str) -> Listing:
    """The files that a pattern matches; `**` reaches into all folders below."""
    found = sorted(Path(name) for name in glob.glob(str(expand(pattern)), recursive=True))
    names = [file for file in found if file.is_file()]
    files = [file for file in names if _is_data(file)]
    root = Path(os.path.commonpath([file.parent for file in names])) if names else Path()
    others = [os.path.relpath(file, root) for file in names if file not in set(files)]
    if not files:
        raise DataError(
            f"{pattern}: no file of rows matches this pattern (looked from {Path.cwd()}; it "
            f"matches {some_of(others, _LISTED) or 'nothing'}); expected {', '.join(SUFFIXES)}, "
            "also compressed as .gz or .zst"
        )
    return _of_one_kind(Listing(pattern, root, tuple(files), tuple(others), is_pattern=True))


def _of_one_kind(listing: Listing) -> Listing:
    kinds: dict[str, Path] = {}
    for file in listing.files:
        kinds.setdefault(kind_of(file), file)
    if len(kinds) > 1:
        names = " and ".join(os.path.relpath(file, listing.root) for file in kinds.values())
        raise DataError(
            f"{listing.label}: holds files of several kinds ({names}), and which of them are rows "
            f"to learn is unclear; expected one kind: set dataset.path to the files meant, such as "
            f"{Path(listing.label) / ('*' + next(iter(kinds)))}, or to a list of them"
            if not listing.is_pattern
            else f"{listing.label}: matches files of several kinds ({names}); expected one kind: "
            f"end the pattern with it, such as *{next(iter(kinds))}, or list the files"
        )
    return listing


def _is_data(file: Path) -> bool:
    is_hidden = file.name.startswith((".", "__"))
    return kind_of(file) in SUFFIXES and not is_hidden and file.name.lower() not in _METADATA


def _words(text: str) -> set[str]:
    words = re.split(r"[-._\s\d]+", text.lower())
    return {_SPLITS[word] for word in words if word in _SPLITS}
