"""The configuration and tokenizer of a GGUF file are read from it once, and kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kpsvd_tune.errors import ModelError
from kpsvd_tune.models import load_skeleton, load_tokenizer, resolve_model
from kpsvd_tune.models.loading import same_tokenizer
from kpsvd_tune.storage.paths import cache_folder

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path, words: tuple[str, ...] = ("on", "to")) -> Path:
    """A GGUF file of a Llama of one layer with a vocabulary, and without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    letters = sorted({letter for word in words for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *letters, *words]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{word[0]} {word[1]}" for word in words])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the gguf package may not be asked."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(gguf, "GGUFReader", refuse)


def test_a_second_command_does_not_read_the_vocabulary_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf")))
    first = load_skeleton(source).config, load_tokenizer(source)
    no_reading(monkeypatch)
    config, tokenizer = load_skeleton(source).config, load_tokenizer(source)
    assert config.to_dict() == first[0].to_dict()
    assert config.hidden_size == 16
    assert same_tokenizer(tokenizer, first[1])
    assert tokenizer.chat_template == first[1].chat_template == "{{ messages[0].content }}"
    assert tokenizer.name_or_path == config.name_or_path == str(tmp_path)


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    assert "to" in load_tokenizer(resolve_model(str(file))).get_vocab()
    file.unlink()
    write_gguf(file, ("on", "si"))
    vocabulary = load_tokenizer(resolve_model(str(file))).get_vocab()
    assert "si" in vocabulary
    assert "to" not in vocabulary


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_what_is_damaged_in_the_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf")))
    expected = load_tokenizer(source)
    (kept,) = (cache_folder() / "gguf").glob("*-tokenizer/tokenizer.json")
    whole = kept.read_bytes()
    if harm == "cut":
        kept.write_bytes(whole[: len(whole) // 2])
    else:
        kept.unlink()
    assert same_tokenizer(load_tokenizer(source), expected)
    assert kept.read_bytes() == whole
    no_reading(monkeypatch)
    assert same_tokenizer(load_tokenizer(source), expected)


def test_without_a_cache_folder_the_file_is_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf")))
    assert load_skeleton(source).config.hidden_size == 16
    assert "to" in load_tokenizer(source).get_vocab()
    no_reading(monkeypatch)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(source)


def test_what_does_not_survive_saving_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpsvd_tune.models.gguf_head._is_same_tokenizer", lambda *_: False)
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf")))
    assert "to" in load_tokenizer(source).get_vocab()
    assert not list((cache_folder() / "gguf").glob("*-tokenizer"))


def test_a_full_disk_keeps_nothing_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    source = resolve_model(str(write_gguf(tmp_path / "tiny.gguf")))
    assert load_skeleton(source).config.hidden_size == 16
    assert "to" in load_tokenizer(source).get_vocab()
    assert not (cache_folder() / "gguf").exists()
