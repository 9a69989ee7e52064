"""The cache of tokenised rows: stores by the hash of what they were made from, shared by runs."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.rows.store import FACTS, StoreWriter, TokenStore, json_sha256, store_files
from kpsvd_tune.errors import ResourceError
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import make_folder, remove_leftovers, replace_file, write_folder
from kpsvd_tune.storage.json_files import parse_json, read_bytes
from kpsvd_tune.storage.locks import hold, is_shared, share
from kpsvd_tune.storage.paths import CACHE_PLACE, cache_folder

# Part of every key: raise it whenever the same rows would give other tokens, another store, or
# other notes of the preflight, which is kept beside them.
FORMAT_VERSION = 10
# Above this the least recently used stores are removed, but those of running commands.
MAX_BYTES = 32 * 2**30
_OPEN_FILES = 65_536


class TokenCache:
    """Stores of tokenised rows, by default under ``$XDG_CACHE_HOME/kpsvd-tune/tokens``.

    A store gets its name when it is whole, so a killed run leaves none half-written; a lock keeps
    two runs from making the same one. Above `max_bytes` the least recently used are removed.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder or cache_folder() / "tokens"
        self._max_bytes = max_bytes
        # Looking at all stores takes time, so it is not done after every small one.
        self._made_bytes = max_bytes
        _allow_many_files()

    def find_or_make(
        self, key: str, make: Callable[[StoreWriter], dict[str, Any]]
    ) -> tuple[TokenStore, bool]:
        """Open the store of a key, or have `make` add its rows; and whether it was there before.

        `make` returns the facts to keep; what it raises is passed on, and no store is left.
        """
        folder = self.folder / key
        place = f"use the cache of tokenised rows {self.folder}"
        with explained(place, CACHE_PLACE), self._lock(key):
            if (found := TokenStore.verified(folder)) is not None:
                _hold(found)
                return found, True
            with write_folder(folder, replace=True) as aside:
                writer = StoreWriter(aside)
                try:
                    writer.close(make(writer))
                except BaseException:
                    writer.abandon()
                    raise
            store = TokenStore(folder)
            _hold(store)
        self._made_bytes += sum(map(_size, store_files(folder)))
        if self._made_bytes > self._max_bytes // 100:
            self._made_bytes = 0
            self.prune()
        return store, False

    def read_note(self, key: str) -> Any:
        """The JSON value noted under a key; None where it is absent or damaged."""
        try:
            content = parse_json(read_bytes(self.folder / "notes" / f"{key}.json"))
            return content["value"] if content["sha256"] == json_sha256(content["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_note(self, key: str, value: Any) -> None:
        """Note a JSON value; a note only saves time, so a folder that takes none is no error."""
        file = self.folder / "notes" / f"{key}.json"
        with suppress(ResourceError):
            make_folder(file.parent)
            text = json.dumps({"value": value, "sha256": json_sha256(value)})
            replace_file(file, text.encode())

    def prune(self) -> None:
        """Remove the least recently used stores, until the rest is no larger than the bound."""
        remove_leftovers(self.folder)
        stores = sorted(self.folder.glob(f"*/{FACTS}"), key=_last_use, reverse=True)
        total = 0
        for facts in stores:
            total += sum(map(_size, store_files(facts.parent)))
            if total > self._max_bytes and not is_shared(facts):
                shutil.rmtree(facts.parent, ignore_errors=True)
        notes = sorted((self.folder / "notes").glob("*.json"), key=_last_use, reverse=True)
        for note in notes[1000:]:
            note.unlink(missing_ok=True)

    def _lock(self, key: str) -> AbstractContextManager[bool | None]:
        locks = self.folder / "locks"
        make_folder(locks)
        # Renames keep stores whole where there are no locks.
        return hold(locks / f"{key[:2]}.lock", wait=True)


def _allow_many_files() -> None:
    """Raise this process's limit of open files: every source keeps up to eight open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def store_key(*parts: Any) -> str:
    """Name a store by everything its tokens depend on: JSON values, in order."""
    libraries = [tokenizers.__version__, transformers.__version__]
    return json_sha256([FORMAT_VERSION, libraries, *parts])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does: vocabulary, rules, special tokens, chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        # The place of the files changes nothing about what the tokenizer does.
        if name not in ("name_or_path", "vocab_file", "tokenizer_file", "cache_dir")
        and not name.startswith("_")
    }
    added = sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items())
    parts = [type(tokenizer).__name__, rules, special, added, tokenizer.chat_template]
    text = json.dumps([*parts, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _hold(store: TokenStore) -> None:
    """Mark a store as used now, and keep it from being pruned while this process lives."""
    facts = store.folder / FACTS
    os.utime(facts)
    share(facts)


def _last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
