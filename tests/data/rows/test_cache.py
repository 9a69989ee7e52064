"""The cache of tokenised rows: found by content, safe for several runs, bounded."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.data.encode.encoder import Encoder, Mark, TokenizedRow
from kpsvd_tune.data.rows.cache import TokenCache, tokenizer_fingerprint
from kpsvd_tune.data.rows.store import FACTS, StoreWriter
from kpsvd_tune.errors import DataError, ResourceError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.storage.durable import write_folder

ROWS = [{"prompt": f"{n}+1?", "completion": str(n + 1)} for n in range(20)]
Read = Callable[..., PreparedData]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """Prepare twenty rows; keywords are keys of the dataset section."""
    path = write(tmp_path / "rows.jsonl", ROWS)

    def run(**keys: Any) -> PreparedData:
        return prepare(DatasetRecipe(path=str(path), **keys), tokenizer, seed=0)

    return run


def stores() -> list[Path]:
    return sorted(TokenCache().folder.glob(f"*/{FACTS}"))


def refuse_to_tokenise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Encoder, "encode_laid_out", refuse)


def test_a_second_run_tokenises_nothing_and_says_so(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read()
    assert first.cache_note == f"tokenised rows: {TokenCache().folder}"
    refuse_to_tokenise(monkeypatch)
    second = read()
    assert second.cache_note.endswith("found there; nothing was tokenised")
    assert list(second.train) == list(first.train)
    assert list(second.validation) == list(first.validation)
    assert (second.report, second.sha256) == (first.report, first.sha256)
    with pytest.raises(AssertionError, match="tokenised again"):
        read(max_length=100)


def test_split_weight_and_filters_need_no_tokenising(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(validation=0)
    refuse_to_tokenise(monkeypatch)
    assert len(read(validation=5).train) == 15
    assert len(read(validation=0, min_length=3).train) == 20
    assert len(stores()) == 1
    assert read(validation=0).report == first.report


def test_content_decides_and_not_the_place(
    read: Read, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = read(validation=0)
    moved = write(tmp_path / "moved.jsonl", ROWS)
    again = prepare(DatasetRecipe(path=str(moved), validation=0), tokenizer, seed=0)
    assert again.cache_note.endswith("nothing was tokenised")
    assert again.sha256 == first.sha256
    write(moved, [*ROWS[:-1], {**ROWS[-1], "completion": "?"}])
    changed = prepare(DatasetRecipe(path=str(moved), validation=0), tokenizer, seed=0)
    assert changed.sha256 != first.sha256
    assert len(stores()) == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"max_length": 100},
        {"template": "{prompt}={completion}"},
        {"template": "chat"},
        {"format": "prompt-completion"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
        {"split": "train[:5]"},
        {"learn": "last"},
    ],
)
def test_every_setting_that_changes_tokens_has_a_store_of_its_own(
    read: Read, keys: dict[str, Any]
) -> None:
    read()
    read(**keys)
    assert len(stores()) == 2


def test_tokenizers_are_told_apart_by_what_they_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == (
        tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    )
    assert tokenizer_fingerprint(copy.deepcopy(tokenizer)) == base
    others = [copy.deepcopy(tokenizer) for _ in range(3)]
    others[0].chat_template += " "
    others[1].add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    others[2].eos_token = "<pad>"
    assert len({base, *map(tokenizer_fingerprint, others)}) == 4


def test_a_damaged_store_is_made_again(read: Read) -> None:
    rows = list(read().train)
    (facts,) = stores()
    (facts.parent / "token_ids.npy").write_bytes(b"damaged")
    again = read()
    assert "found there" not in again.cache_note
    assert list(again.train) == rows


def test_a_damaged_report_is_made_again(read: Read) -> None:
    first = read()
    (note,) = (TokenCache().folder / "notes").glob("*.json")
    note.write_text(note.read_text().replace(first.sha256, "0" * 64))
    assert read().sha256 == first.sha256


def test_a_fault_leaves_no_store(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\noops\n')
    with pytest.raises(DataError, match="line 2"):
        prepare(DatasetRecipe(path=str(path), validation=0), tokenizer, seed=0)
    assert [each.name for each in TokenCache().folder.iterdir()] == ["locks"]


def make_store(cache: TokenCache, key: str) -> None:
    def make(writer: Any) -> dict[str, Any]:
        for number in range(1000):
            writer.add(TokenizedRow((), (), number, Mark.EMPTY))
        return {}

    cache.find_or_make(key, make)


@pytest.mark.slow
def test_stores_used_longest_ago_go_when_the_bound_is_passed(tmp_path: Path) -> None:
    # Made by a process that has ended: those of a running one stay.
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from data.rows.test_cache import TokenCache, make_store\n"
        "for key in 'abc': make_store(TokenCache(Path(sys.argv[2])), key)\n"
    )
    tests = Path(__file__).parents[2]
    warm.run([sys.executable, "-c", program, str(tests), str(tmp_path)], check=True)
    now = time.time()
    for age, key in enumerate("bac"):
        os.utime(tmp_path / key / FACTS, (now - age, now - age))
    size = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    TokenCache(tmp_path, max_bytes=2 * size).prune()
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{FACTS}")) == ["a", "b"]
    make_store(TokenCache(tmp_path), "d")
    TokenCache(tmp_path, max_bytes=0).prune()
    assert [path.parent.name for path in tmp_path.glob(f"*/{FACTS}")] == ["d"]


@pytest.mark.slow
def test_two_runs_make_one_store(tmp_path: Path) -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from kpsvd_tune.data.rows.cache import TokenCache\n"
        "def make(writer):\n"
        "    Path(sys.argv[2], 'made').open('a').write('x'); time.sleep(1); return {}\n"
        "print(TokenCache(Path(sys.argv[2], 'c')).find_or_make('k', make)[1])\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2]), str(tmp_path)]
    runs = [warm.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(run.communicate()[0].strip() for run in runs) == ["False", "True"]
    assert (tmp_path / "made").read_text() == "x"


def test_a_full_disk_names_the_folder_and_the_cure(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StoreWriter, "close", fail)
    with pytest.raises(
        ResourceError, match="tokens.*No space left on device; free some space, .*XDG_CACHE"
    ):
        read()
    assert stores() == []


def test_a_folder_that_cannot_be_written_is_named(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ResourceError, match="file is in the way.* another cache folder by XDG_CACHE"
    ):
        read()


def test_a_file_that_changes_while_it_is_read_leaves_no_store(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode_laid_out

    def meanwhile(*arguments: Any) -> Any:
        write(tmp_path / "rows.jsonl", [*ROWS, *ROWS])
        return encode(*arguments)

    monkeypatch.setattr(Encoder, "encode_laid_out", meanwhile)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; .* run again"):
        read()
    assert stores() == []


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_writes_is_not(
    read: Read,
) -> None:
    cache = TokenCache()
    left = cache.folder / ".aa.01234567.tmp"
    left.mkdir(parents=True)
    with write_folder(cache.folder / "bb") as written:
        read()
        assert list(cache.folder.glob(".*.tmp")) == [written]
