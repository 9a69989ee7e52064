"""A trial whose folder another process still holds waits for it, and for nothing else."""

from __future__ import annotations

import pytest

from kpsvd_tune.comparison import workers
from kpsvd_tune.errors import CheckpointError, FolderInUseError


def test_a_trial_waits_while_its_folder_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | str] = [FolderInUseError("held"), FolderInUseError("held"), "row"]
    waits: list[float] = []

    def run() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("time.sleep", waits.append)
    assert workers._patiently(run) == "row"
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("error", "seconds"),
    # By the kind of the error and not by its words.
    [(CheckpointError("x is in use by another run"), 60.0), (FolderInUseError("held"), -1.0)],
)
def test_another_error_or_a_long_wait_ends_the_trial(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seconds: float
) -> None:
    def run() -> None:
        raise error

    monkeypatch.setattr(workers, "_LOCK_SECONDS", seconds)
    with pytest.raises(type(error), match=str(error)):
        workers._patiently(run)
