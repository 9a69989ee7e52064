"""What a disk refuses, in whatever words a library has for it: path, reason and cure."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import DataError, ResourceError
from kpsvd_tune.storage import disk


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some"),
        (Exception("No space left on device (os error 28)"), "No space left on device; free some"),
        (OSError(errno.EROFS, "Read-only file system"), "choose an --output that can be written"),
        (PermissionError(errno.EACCES, "Permission denied"), "choose an --output that this user"),
        (OSError(errno.EEXIST, "File exists"), "remove it, or choose another --output"),
        (OSError("odd"), "odd; try again, or choose an --output on another disk"),
    ],
    ids=str,
)
def test_every_word_for_it_is_understood(error: Exception, message: str) -> None:
    with pytest.raises(ResourceError) as told, disk.explained("write out", "an --output"):
        raise error
    assert str(told.value).startswith("could not write out: ")
    assert message in str(told.value)


@pytest.mark.parametrize("error", [ValueError("other"), DataError("ours (os error 28)")], ids=str)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)[:4]), disk.explained("write out"):
        raise error


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(adapter={"rank": {"window": 8, "max": 4}}, train={"max_steps": 2})


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*args: Any, **options: Any) -> None:
    # As the tokenizers library says it: neither an OSError nor one of a type of its own.
    raise Exception("No space left on device (os error 28)")


TOKENIZER = "transformers.PreTrainedTokenizerFast.save_pretrained"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "place", "action", "attempt"),
    [
        (["train", "RECIPE"], TOKENIZER, full_in_rust, "write RUN/adapter"),
        (["init-only", "RECIPE"], "kpsvd_tune.report.rank_page.write_rank_report", full,
         "write RUN/init"),
        (["merge", "RUN", "-o", "MERGED"], TOKENIZER, full_in_rust, "write MERGED"),
        (["merge", "RUN", "-o", "MERGED"], "kpsvd_tune.storage.durable.NewFile.copy_from", full,
         "write MERGED"),
        (["eval", "RUN", "--task", "gsm8k", "--path", "ROWS", "--limit", "1",
          "--max-new-tokens", "2"],
         "kpsvd_tune.evaluation.evaluate._open_folder", full, "write into RUN/evaluation/gsm8k"),
    ],
    ids=["train", "init-only", "merge-tokenizer", "merge-model", "eval"],
)  # fmt: skip
def test_a_full_disk_is_called_one_by_every_command(
    words: list[str],
    place: str,
    action: Any,
    attempt: str,
    recipe: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"RECIPE": recipe, "ROWS": rows_file}
    names |= {"RUN": tmp_path / "run", "MERGED": tmp_path / "merged"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
        attempt = attempt.replace(name, str(path))
    if words[0] in ("merge", "eval"):
        assert cli.run(["train", str(recipe)]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(place, action)
        assert cli.run(words) == 1
    err = capsys.readouterr().err
    assert f"error: could not {attempt}: No space left on device; free some space, or " in err
    assert "bug" not in err
    assert "Traceback" not in err
    # Nothing half-written is in the way of a second try.
    assert cli.run(words) == 0


def test_what_no_stage_put_into_words_has_file_and_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/some/file")

    monkeypatch.setattr("kpsvd_tune.commands.report.read_run_files", fail)
    assert cli.run(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "error: Read-only file system (/some/file); the file system is read-only; choose a place "
        "that can be written\n"
    )


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_told_of_before_the_scoring(
    recipe: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, output = tmp_path / "run", tmp_path / "scores"
    assert cli.run(["train", str(recipe)]) == 0
    capsys.readouterr()
    temporary, opened = "kpsvd_tune.storage.paths.tempfile.TemporaryFile", Path.open
    import tempfile

    original = tempfile.TemporaryFile

    def only_outside(*args: Any, dir: Path, **options: Any) -> Any:
        if Path(dir) == run:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(*args, dir=dir, **options)

    def open_outside(self: Path, *args: Any, **options: Any) -> Any:
        if self == run / ".lock":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, *args, **options)

    monkeypatch.setattr(temporary, only_outside)
    monkeypatch.setattr(Path, "open", open_outside)
    words = ["eval", str(run), "--task", "gsm8k", "--path", str(rows_file), "--limit", "1"]
    assert cli.run([*words, "--max-new-tokens", "2", "--output", str(output)]) == 0
    err = capsys.readouterr().err
    early = err.index("the scores will not be added to the run: ")
    assert early < err.index("scoring gsm8k")
    assert (output / "results.json").exists()
    # Without another place there is nowhere to write, which is known before any work.
    assert cli.run([*words, "--max-new-tokens", "2"]) == 2
    assert "cannot be written: Read-only file system" in capsys.readouterr().err
