"""The store of tokenised rows: what goes in comes out, in any process, and damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpsvd_tune.data import IGNORED, StoredRows, TokenizedRow, collate, pack
from kpsvd_tune.data.encode.encoder import Mark
from kpsvd_tune.data.rows.store import FACTS, StoreWriter, TokenStore, rows_sha256
from kpsvd_tune.errors import DataError

ROWS = [
    TokenizedRow((5, 6, 7), (IGNORED, 6, 7), 1),
    TokenizedRow((), (), 101, Mark.EMPTY),
    TokenizedRow((70_000, 8), (IGNORED, IGNORED), 4),
    TokenizedRow((1, 2, 3, 4), (IGNORED, IGNORED, 3, 4), 9),
]


def make(folder: Path, rows: list[TokenizedRow]) -> TokenStore:
    folder.mkdir(parents=True)
    writer = StoreWriter(folder)
    for row in rows:
        writer.add(row)
    writer.close({"a": "fact"})
    return TokenStore(folder)


def everything(store: TokenStore) -> StoredRows:
    return StoredRows([store], np.flatnonzero(store.marks == 0))


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    store = make(tmp_path / "s", ROWS)
    rows = everything(store)
    assert list(rows) == [ROWS[0], *ROWS[2:]]
    assert rows[-1] == ROWS[-1]
    assert list(rows[1:]) == [ROWS[2], ROWS[3]]
    assert rows.lengths.tolist() == [3, 2, 4]
    assert rows.num_supervised.tolist() == [2, 0, 2]
    assert rows.max_token_id == 70_000
    assert store.marks.tolist() == [0, Mark.EMPTY, 0, 0]
    assert store.numbers.tolist() == [1, 101, 4, 9]
    assert store.facts == {"a": "fact"}
    with pytest.raises(IndexError):
        rows[3]


def test_several_stores_are_one_sequence_in_any_order(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", ROWS), make(tmp_path / "b", ROWS[::-1])
    rows = StoredRows([first, second], np.array([4, 0, 0, 7]))
    assert list(rows) == [ROWS[3], ROWS[0], ROWS[0], ROWS[0]]
    assert rows.lengths.tolist() == [4, 3, 3, 3]


def test_a_pickle_names_the_files_and_holds_no_tokens(tmp_path: Path) -> None:
    row = TokenizedRow(tuple(range(5000)), (IGNORED, *range(1, 5000)), 1)
    rows = everything(make(tmp_path / "s", [row]))
    content = pickle.dumps(rows)
    assert len(content) < 1000
    assert list(pickle.loads(content)) == [row]


def test_a_row_is_a_slice_of_the_mapped_file_and_a_batch_is_a_copy(tmp_path: Path) -> None:
    ids = list(range(1, 40_000))
    store = make(tmp_path / "s", [TokenizedRow(ids, [IGNORED, *ids[1:]], 1), ROWS[0]])
    assert isinstance(store.token_ids, np.memmap)
    rows = everything(store)
    assert np.shares_memory(rows[0].input_ids, store.token_ids)
    assert not rows[0].input_ids.flags.writeable
    for batch in (collate(rows, pad_token_id=0), pack(rows)):
        batch["input_ids"] += 1
        assert batch["input_ids"][0, :3].tolist() == [2, 3, 4]
    assert rows[0].input_ids[:3].tolist() == [1, 2, 3]
    assert rows[1] == ROWS[0]
    assert rows[1] != ROWS[3]
    assert repr(rows[1]).startswith("TokenizedRow([5, 6, 7], [-100, 6, 7], 1, ")


def test_a_store_that_another_machine_does_not_see_says_so(tmp_path: Path) -> None:
    content = pickle.dumps(everything(make(tmp_path / "s", ROWS)))
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="are gone .* XDG_CACHE_HOME at one that all machines"):
        pickle.loads(content)


def test_a_store_without_any_token(tmp_path: Path) -> None:
    store = make(tmp_path / "s", [ROWS[1], ROWS[1]])
    assert TokenStore.verified(tmp_path / "s") is not None
    assert (len(store), store.max_token_id, store.token_ids.tolist()) == (2, -1, [])


@pytest.mark.parametrize("name", ["token_ids", "is_learnt", "ends", "numbers", "marks"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s", ROWS)
    assert TokenStore.verified(tmp_path / "s") is not None
    file = tmp_path / "s" / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert TokenStore.verified(tmp_path / "s") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": "x"}', None])
def test_facts_that_are_not_ours_are_noticed(tmp_path: Path, text: str | None) -> None:
    make(tmp_path / "s", ROWS)
    file = tmp_path / "s" / FACTS
    if text is None:
        content = json.loads(file.read_text())
        text = json.dumps({**content, "facts": {"a": "lie"}})
    file.write_text(text)
    assert TokenStore.verified(tmp_path / "s") is None


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=5),
        max_size=6,
    )
)
def test_the_hash_is_that_of_ids_and_labels_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[int, bool]]]
) -> None:
    made = [
        TokenizedRow(
            tuple(token for token, _ in row),
            tuple(token if learnt else IGNORED for token, learnt in row),
            1,
        )
        for row in rows
    ]
    stored = everything(make(tmp_path_factory.mktemp("h") / "s", made))
    # As it was before rows lay on disk: resumes compare it.
    digest = hashlib.sha256(len(made).to_bytes(8, "little"))
    for row in made:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(array("q", [*row.input_ids, *row.labels]).tobytes())
    assert rows_sha256(stored) == digest.hexdigest()


def test_many_rows_pass_through_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpsvd_tune.data.rows.store._BLOCK", 7)
    rows = [TokenizedRow((n, n + 1), (IGNORED, n + 1), n) for n in range(50)]
    assert list(everything(make(tmp_path / "s", rows))) == rows


def test_a_shortened_file_is_an_error_and_not_an_empty_store(tmp_path: Path) -> None:
    store = make(tmp_path / "s", ROWS)
    for content in (store.folder / "marks.npy").read_bytes()[:-1], b"":
        (store.folder / "marks.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"marks\.npy cannot be read"):
            len(TokenStore(store.folder))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    writer._files["marks"].close()
    writer._files["marks"] = Path("/dev/full").open("w+b")  # noqa: SIM115  # abandon() closes it
    writer.add(ROWS[1])
    with pytest.raises(OSError, match="No space left") as raised:
        writer.close({})
    assert raised.value.errno == errno.ENOSPC
    writer.abandon()
