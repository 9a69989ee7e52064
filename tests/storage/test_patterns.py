"""Patterns that would be matched for hours end within the limit."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from kpsvd_tune.linalg import RankRule
from kpsvd_tune.storage import patterns
from kpsvd_tune.storage.patterns import SlowPatternError, check_patterns, time_limit

SLOW = r"(a+)+b"
NAME = "a" * 60


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)


def test_a_pattern_that_backtracks_is_ended_and_named() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^target_modules takes more than 0\.2 s to match"):
        check_patterns({"target_modules": SLOW}, [NAME])
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_rank_override_that_backtracks_is_refused() -> None:
    with pytest.raises(ValueError, match="rank override .* takes more than 0.2 s to match"):
        RankRule(overrides={SLOW: 4}).for_layers([NAME])


def test_what_matches_at_once_passes_and_other_values_are_no_patterns() -> None:
    check_patterns({"a": r".*\.q_proj", "b": ["(", "names"], "c": None}, [NAME])


def test_what_cannot_be_compiled_is_named() -> None:
    with pytest.raises(ValueError, match="exclude_modules is not a regular expression: "):
        check_patterns({"exclude_modules": "("}, [NAME])


def test_an_alarm_of_the_caller_is_put_back() -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with time_limit("x"):
            pass
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_another_thread_is_not_bounded_and_works() -> None:
    found: list[object] = []

    def match() -> None:
        with time_limit("x"):
            found.append(1)

    thread = threading.Thread(target=match)
    thread.start()
    thread.join()
    assert found == [1]
    assert issubclass(SlowPatternError, ValueError)
