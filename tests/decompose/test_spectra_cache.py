"""The cache gives back what was put in, or nothing: never a damaged or foreign entry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kpsvd_tune.decompose.cache import SpectraCache, default_cache_dir, entry_key
from kpsvd_tune.decompose.hashes import HashIndex, weight_hash
from kpsvd_tune.errors import ResourceError
from kpsvd_tune.linalg import KPSVD, KroneckerShape, kpsvd

SHAPE = KroneckerShape(4, 3, 2, 5)


@pytest.fixture
def terms() -> KPSVD:
    return kpsvd(torch.randn(8, 15), SHAPE, 6)


@pytest.fixture
def cache(tmp_path: Path) -> SpectraCache:
    return SpectraCache(tmp_path)


KEY = entry_key("weight", SHAPE, 5e-3, 0)


def test_an_entry_comes_back_bit_for_bit(cache: SpectraCache, terms: KPSVD) -> None:
    cache.write(KEY, terms, 0.1)
    read = SpectraCache(cache.folder).read(KEY, SHAPE, 6)
    assert read is not None
    found, seconds = read
    assert seconds == 0.1
    assert found.squared_norm == terms.squared_norm
    assert found.shape == SHAPE
    for name in ("values", "left", "right"):
        expected = getattr(terms, name)
        assert getattr(found, name).dtype == expected.dtype
        assert torch.equal(getattr(found, name), expected)


def test_a_smaller_window_is_a_prefix_and_a_larger_one_is_missing(
    cache: SpectraCache, terms: KPSVD
) -> None:
    cache.write(KEY, terms, 0.1)
    read = cache.read(KEY, SHAPE, 4)
    assert read is not None
    assert torch.equal(read[0].values, terms.values[:4])
    assert read[0].right.shape == (4, 2, 5)
    assert cache.read(KEY, SHAPE, 7) is None
    assert not cache.damaged


def test_all_terms_there_are_serve_for_any_window(cache: SpectraCache) -> None:
    terms = kpsvd(torch.randn(8, 15), SHAPE, 100)
    assert len(terms.values) == SHAPE.max_rank == 10
    cache.write(KEY, terms, 0.1)
    assert cache.read(KEY, SHAPE, 100) is not None


def test_a_bit_flipped_anywhere_is_noticed(cache: SpectraCache, terms: KPSVD) -> None:
    cache.write(KEY, terms, 0.1)
    (file,) = (cache.folder / "spectra").rglob("*.safetensors")
    whole = file.read_bytes()
    for position in [*range(0, len(whole), 37), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 4
        file.write_bytes(bytes(damaged))
        fresh = SpectraCache(cache.folder)
        assert fresh.read(KEY, SHAPE, 6) is None, position
        assert fresh.damaged == {KEY}
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert SpectraCache(cache.folder).read(KEY, SHAPE, 6) is None, length
    file.write_bytes(whole)
    assert cache.read(KEY, SHAPE, 6) is not None


def test_an_entry_under_another_key_is_not_taken(cache: SpectraCache, terms: KPSVD) -> None:
    cache.write(KEY, terms, 0.1)
    other = KEY[:2] + "0" * 62
    (file,) = (cache.folder / "spectra").rglob("*.safetensors")
    file.rename(file.with_name(f"{other}.safetensors"))
    assert cache.read(other, SHAPE, 6) is None


def test_the_key_holds_everything_the_numbers_depend_on() -> None:
    other_shape = KroneckerShape(8, 3, 1, 5)
    keys = {
        KEY,
        entry_key("another", SHAPE, 5e-3, 0),
        entry_key("weight", other_shape, 5e-3, 0),
        entry_key("weight", SHAPE, 4e-3, 0),
        entry_key("weight", SHAPE, 5e-3, 1),
    }
    assert len(keys) == 5


def test_what_a_killed_run_left_is_swept_up(cache: SpectraCache, terms: KPSVD) -> None:
    folder = cache.folder / "spectra" / KEY[:2]
    folder.mkdir(parents=True)
    (folder / f".{KEY}.safetensors.01234567.tmp").write_bytes(b"half an ent")
    cache.write(KEY, terms, 0.1)
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.safetensors"]


def test_a_lock_is_held_by_one_and_freed_by_death(cache: SpectraCache) -> None:
    script = (
        "import fcntl, os, sys, time\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    with cache.lock(KEY, wait=True):
        pass
    (file,) = (cache.folder / "locks").iterdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with cache.lock(KEY, wait=False) as held:
            assert not held
        other.kill()
        with cache.lock(KEY, wait=True) as held:
            assert held


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, terms: KPSVD) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = SpectraCache(tmp_path / "file")
    with pytest.raises(ResourceError, match="a file is in the way; .*XDG_CACHE_HOME"):
        cache.write(KEY, terms, 0.1)
    with (
        pytest.raises(ResourceError, match="a file is in the way; .*XDG_CACHE_HOME"),
        cache.lock(KEY, wait=True),
    ):
        pass


def test_a_full_disk_is_called_full(
    cache: SpectraCache, terms: KPSVD, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ResourceError, match="No space left on device; free some space, .*XDG_CACHE_HOME"
    ):
        cache.write(KEY, terms, 0.1)
    assert cache.read(KEY, SHAPE, 6) is None


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/kpsvd-tune")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "kpsvd-tune"


def test_hashes_tell_numbers_dtypes_sizes_and_transposes_apart() -> None:
    weight = torch.randn(4, 6)
    same = weight.clone()
    assert weight_hash(weight) == weight_hash(same)
    others = [
        weight + 1e-6,
        weight.to(torch.bfloat16),
        weight.reshape(6, 4),
        weight.T,
        weight.T.contiguous(),
        weight.double(),
    ]
    assert len({weight_hash(other) for other in [weight, *others]}) == 7


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(b"0123")
    os.utime(file, (1e9, 1e9))
    return file


def test_the_index_remembers_across_objects(tmp_path: Path, weights_file: Path) -> None:
    HashIndex(tmp_path / "index").put([weights_file], "a 0 4", "a" * 64)
    HashIndex(tmp_path / "index").put([weights_file], "b 4 8", "b" * 64)
    index = HashIndex(tmp_path / "index")
    assert index.get([weights_file], "a 0 4") == "a" * 64
    assert index.get([weights_file], "b 4 8") == "b" * 64
    assert index.get([weights_file], "c 0 4") is None


@pytest.mark.parametrize("change", ["size", "time", "inode", "content"])
def test_a_changed_file_is_not_trusted(tmp_path: Path, weights_file: Path, change: str) -> None:
    HashIndex(tmp_path / "index").put([weights_file], "a 0 4", "a" * 64)
    if change == "size":
        weights_file.write_bytes(b"01234")
        os.utime(weights_file, (1e9, 1e9))
    elif change == "content":
        time.sleep(0.05)  # further than the resolution of the time of change
        weights_file.write_bytes(b"4567")
        os.utime(weights_file, (1e9, 1e9))
    elif change == "time":
        os.utime(weights_file, (1e9, 1e9 + 1))
    else:
        (tmp_path / "copy").write_bytes(b"4567")
        os.utime(tmp_path / "copy", (1e9, 1e9))
        (tmp_path / "copy").replace(weights_file)
    assert HashIndex(tmp_path / "index").get([weights_file], "a 0 4") is None


def test_a_file_just_written_is_not_indexed(tmp_path: Path, weights_file: Path) -> None:
    os.utime(weights_file, (time.time(), time.time()))
    index = HashIndex(tmp_path / "index")
    index.put([weights_file], "a 0 4", "a" * 64)
    assert index.get([weights_file], "a 0 4") is None


def test_a_torn_line_of_the_index_spoils_no_other(tmp_path: Path, weights_file: Path) -> None:
    index = HashIndex(tmp_path / "index")
    index.put([weights_file], "a 0 4", "a" * 64)
    (place,) = (tmp_path / "index").iterdir()
    with place.open("a") as stream:
        stream.write('\n["b 4 8", "bb')
    index.put([weights_file], "c 8 9", "c" * 64)
    again = HashIndex(tmp_path / "index")
    assert again.get([weights_file], "a 0 4") == "a" * 64
    assert again.get([weights_file], "b 4 8") is None
    assert again.get([weights_file], "c 8 9") == "c" * 64


@pytest.mark.parametrize("line", ["5", "null", '["a 0 4"]', '{"a": 1}', '[["a"], 4]'])
def test_a_line_of_the_index_that_is_no_pair_is_passed_over(
    tmp_path: Path, weights_file: Path, line: str
) -> None:
    index = HashIndex(tmp_path / "index")
    index.put([weights_file], "a 0 4", "a" * 64)
    (place,) = (tmp_path / "index").iterdir()
    with place.open("a") as stream:
        stream.write("\n" + line)
    assert HashIndex(tmp_path / "index").get([weights_file], "a 0 4") == "a" * 64
