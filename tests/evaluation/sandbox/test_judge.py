"""The judge from outside: honest programs of every kind pass, no cheat does."""

from __future__ import annotations

import textwrap
import time

import pytest
from programs import BOMBS, CHEATS, CHEATS_OF_HELPERS, ESCAPES, HONEST, TESTS

from kpsvd_tune.evaluation.sandbox.capture import Limits
from kpsvd_tune.evaluation.sandbox.run import (
    Program,
    RunResult,
    Sandbox,
    run_program,
    sandbox_fault,
)

# Without bubblewrap the judge is a process of its own too, so most of this must hold all the same.
SANDBOX: Sandbox = "bwrap" if sandbox_fault() is None else "none"


def judge(source: str, *tests: str) -> RunResult:
    limits = Limits(cpu_seconds=2, wall_seconds=20)
    program = Program(textwrap.dedent(source), tuple(textwrap.dedent(test) for test in tests))
    return run_program(program, SANDBOX, limits)


def test_there_are_enough_cheats():
    assert len(CHEATS) >= 40
    assert judge("def f(x): return x + 1", *TESTS).passed


# Some cheats kill every process of the user, or empty each file below /tmp.
@pytest.mark.slow
@pytest.mark.skipif(SANDBOX == "none", reason="needs bubblewrap")
@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str):
    result = judge(CHEATS[name], *TESTS)
    assert not result.passed
    assert result.status in ("failed", "crashed", "timeout"), result


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS_OF_HELPERS)
def test_no_cheat_reaches_what_the_tests_compare_with(name: str):
    source, test = CHEATS_OF_HELPERS[name]
    assert not judge(source, test).passed


def test_cheats_fail_without_a_sandbox_too():
    for name in ("exec replaced", "tests cleared through gc", "equal to everything"):
        assert not run_program(Program(CHEATS[name], TESTS), "none").passed, name


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str):
    source, *tests = HONEST[name]
    result = judge(source, *tests)
    assert result.passed, result


@pytest.mark.parametrize("name", ["callback", "dataclass", "printed text", "generator"])
def test_honest_programs_pass_without_a_sandbox_too(name: str):
    source, *tests = HONEST[name]
    assert run_program(Program(source, tuple(tests)), "none").passed


def test_an_object_in_an_operator_with_a_plain_value_is_explained():
    result = judge("class V: pass", "assert V() < 3")
    assert result.status == "failed"
    assert "an object of the program met a plain value in an operator" in result.detail


def test_an_end_in_the_middle_of_the_tests_is_told():
    result = judge("import os\ndef f(x): os._exit(0)", "assert f(1) == 2")
    assert (result.status, result.detail) == ("crashed", "the program ended before its tests did")


def test_a_message_that_cannot_be_read_is_told():
    result = judge(CHEATS["rubbish"], *TESTS)
    assert result.status == "crashed"
    assert "a message that cannot be read" in result.detail


@pytest.mark.slow
@pytest.mark.skipif(SANDBOX == "none", reason="needs bubblewrap")
@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape_succeeds(name: str):
    result = judge(ESCAPES[name], "assert escaped()")
    assert not result.passed, result


@pytest.mark.slow
@pytest.mark.skipif(SANDBOX == "none", reason="needs bubblewrap")
@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_lasts(name: str):
    start = time.monotonic()
    assert not judge(BOMBS[name], "assert False").passed
    assert time.monotonic() - start < 30
