"""The error tree: exit codes, parents, and survival of a trip between processes."""

from __future__ import annotations

import pickle
import signal

import pytest

from kpsvd_tune import errors

EXIT_CODES = {
    "KpsvdTuneError": 1,
    "InputError": 2,
    "RecipeError": 2,
    "DataError": 2,
    "ModelError": 2,
    "AdapterError": 2,
    "RunError": 1,
    "CheckpointError": 1,
    "FolderInUseError": 1,
    "MergeError": 1,
    "ExportError": 1,
    "HubError": 1,
    "ResourceError": 1,
    "NonFiniteError": 3,
    "WorseThanBaseError": 4,
}


def test_the_table_above_is_the_whole_tree():
    found = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, errors.KpsvdTuneError)
    }
    assert found == {*EXIT_CODES, "StoppedBySignal"}


@pytest.mark.parametrize(("name", "exit_code"), EXIT_CODES.items())
def test_each_error_has_its_exit_code_and_keeps_its_message(name: str, exit_code: int):
    error = getattr(errors, name)("got 1, expected 2")
    assert isinstance(error, errors.KpsvdTuneError)
    assert error.exit_code == exit_code
    assert str(error) == "got 1, expected 2"


@pytest.mark.parametrize("name", ["RecipeError", "DataError", "ModelError", "AdapterError"])
def test_what_the_user_gave_is_an_input_error(name: str):
    assert issubclass(getattr(errors, name), errors.InputError)


@pytest.mark.parametrize("name", ["CheckpointError", "MergeError", "ExportError", "ResourceError"])
def test_what_failed_while_running_is_a_run_error(name: str):
    assert issubclass(getattr(errors, name), errors.RunError)


def test_the_tree_in_the_docstring_names_every_error():
    names = [*EXIT_CODES, "StoppedBySignal", "UNSAVED_EXIT_CODE"]
    assert all(name in (errors.__doc__ or "") for name in names)


@pytest.mark.parametrize(
    ("signum", "exit_code", "name"),
    [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM"), (99, 227, "signal 99")],
)
def test_a_signal_gives_the_exit_code_that_shells_use(signum: int, exit_code: int, name: str):
    error = errors.StoppedBySignal(signum)
    assert error.exit_code == exit_code
    assert str(error) == f"stopped by {name}; what was done is saved"


def test_a_stopped_run_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.StoppedBySignal(signal.SIGTERM)))
    assert (error.signum, error.exit_code) == (15, 143)


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("loar", "; did you mean lora?"),
        ("LORA", "; did you mean lora?"),
        ("pisa", "; did you mean PiSSA?"),
        ("adapter", ""),
    ],
)
def test_the_nearest_name_is_suggested_whatever_its_case(word: str, advice: str):
    assert errors.did_you_mean(word, ["lora", "PiSSA", "lokr"]) == advice


def test_how_near_a_name_must_be_can_be_said():
    assert errors.closest("test", ["train", "text"]) == "text"
    assert errors.closest("test", ["train", "text"], 0.8) is None
